"""Checkpoints: the state of training that they hold, and starting a network from the weights of another run."""

import dataclasses
import itertools
import os
import time

import tensorflow as tf

import runs
from command import UserError, reading
from convert import match_moments
from input_ops import create_input_ops
from model import create_model

CONVERSION_IMAGES = 256  # training images for converting the norms of --checkpoint
REMEDY = "restore its files, give an older checkpoint with --checkpoint, or train a new run"
CHECKPOINT_SECONDS = 600  # save after a step if the last checkpoint is older than this


def weights_of(model) -> dict:
    """The variables of a model as saved in a checkpoint, by name: weights, moving statistics and states of dropout.

    Keras numbers the states of dropout across all models of a process; here each model counts from 0.
    """
    numbers, found = itertools.count(), {}
    for variable in model.variables:
        name = variable.path
        if name.endswith("/seed_generator_state"):
            number = next(numbers)
            name = f"seed_generator{f'_{number}' if number else ''}/seed_generator_state"
        found[name] = variable.value
    return found


class State:
    """The state of training, as saved in a checkpoint: weights, optimizer, number of steps done, and recent metrics.

    `totals` [3] holds the sums of losses, correct predictions and images over the current step, in training mode.
    `window` [log_step, 3] holds the totals of the last log_step steps, and `recent` is its copy for the checkpoint.
    `sums` accumulates the mean loss and gradients of a step for --accumulate.
    """

    def __init__(self, model, optimizer, config, strategy):
        self.model, self.optimizer, self.weights = model, optimizer, optimizer.variables
        self.config, self.strategy = config, strategy
        with strategy.scope():  # only the variables that replicas use: each one made here costs a collective
            self.totals = tf.Variable(tf.zeros([3], tf.float64), trainable=False)
            summed = [0.0, *self.weights] if config.accumulate else []
            self.sums = [tf.Variable(tf.zeros_like(v), trainable=False) for v in summed]
        self.step = tf.Variable(0, dtype=tf.int64, trainable=False)
        self.recent = tf.Variable(tf.zeros([config.log_step, 3], tf.float64), trainable=False)
        self.window = self.recent.numpy()

    def open(self, run_dir, writes):
        """Restore the newest checkpoint of a run folder, if any. `writes`: whether this process saves checkpoints."""
        optimizer = {name: getattr(self.optimizer, name) for name in ("learning_rate", "slots", "beta_powers")}
        model = weights_of(self.model)
        checkpoint = tf.train.Checkpoint(model=model, optimizer=optimizer, recent=self.recent, step=self.step)
        with reading(f"{run_dir}/checkpoint", REMEDY):
            manager = tf.train.CheckpointManager(checkpoint, str(run_dir), max_to_keep=3, checkpoint_name="model")
        self.manager, newest = manager, manager.latest_checkpoint
        if run_dir and newest is None and runs.has_checkpoint(run_dir):
            raise UserError(f"{run_dir}/checkpoint is damaged: {REMEDY}")
        if newest:
            with reading(newest, REMEDY):
                checkpoint.restore(newest).assert_consumed()
            self.window = self.recent.numpy()
        self.writes, self.saved_step, self.saved_at = writes, int(self.step), time.monotonic()

    def batches_done(self):
        """The number of finished batches in the current step. Another thread may call this while the step runs."""
        return int(self.totals.numpy()[2]) // self.config.batch_size

    def finish_step(self):
        self.step.assign_add(1)
        self.window[int(self.step) % len(self.window)] = self.totals.numpy()

    def save_due(self):
        return int(self.step) % self.config.ckpt_save_step == 0 or time.monotonic() - self.saved_at > CHECKPOINT_SECONDS

    def save(self):
        self.recent.assign(self.window)
        if self.writes:
            self.manager.save(checkpoint_number=self.step)
        self.saved_step, self.saved_at = int(self.step), time.monotonic()

    def row(self):
        """The log row of this step: means over the window, and the learning rate that the optimizer used."""
        loss, correct, images = self.window.sum(axis=0)
        return {
            "step": int(self.step),
            "loss/accuracy": correct / images,
            "loss/loss": loss / images,
            "learning_rate": float(self.optimizer.learning_rate.numpy()),
        }


def load_weights(model, checkpoint) -> tuple[str, int]:
    """Load a model's variables from a checkpoint, or from the newest in a run folder; returns its path and step.

    Raises UserError if the checkpoint cannot be read, or its variables do not match the model's.
    """
    path = str(checkpoint).removesuffix(".index")  # which the completion of a shell may add
    try:
        if os.path.isdir(path):
            path = tf.train.latest_checkpoint(path) or path
        reader = tf.train.load_checkpoint(path)
        shapes = reader.get_variable_to_shape_map()
    except (ValueError, tf.errors.OpError):
        remedy = "give a run folder with files model-*.index, or RUN_FOLDER/model-1000"
        raise UserError(f"no checkpoint can be read from {checkpoint}: {remedy}") from None
    stored = {name: tuple(shape) for name, shape in shapes.items() if name.startswith("model/")}
    variables = {
        f"model/{name.replace('/', '.S')}/.ATTRIBUTES/VARIABLE_VALUE": variable
        for name, variable in weights_of(model).items()
    }
    wanted = {name: tuple(variable.shape) for name, variable in variables.items()}
    for name in sorted(wanted.keys() | stored.keys()):
        if wanted.get(name) != stored.get(name):
            raise UserError(
                f"checkpoint {path} is of another model, norm, kind of images or number of classes: its "
                f"{name.split('/')[1].replace('.S', '/')} is {stored.get(name, 'missing')}, but the network's is "
                f"{wanted.get(name, 'missing')}"
            )
    with reading(path, REMEDY):
        for name, variable in variables.items():
            variable.assign(reader.get_tensor(name))
        return path, int(reader.get_tensor("step/.ATTRIBUTES/VARIABLE_VALUE"))


def warn_of_split(checkpoint, data, train, test):
    """Print a warning if a checkpoint was trained on another split of the same dataset, described by `data`."""
    now = runs.hash_of(train, test)
    if data.get("split", now) != now:
        print(
            f"warning: {train.name} has changed since {checkpoint} was trained: images that it was trained on may be "
            "test images now, which makes the test accuracy too high"
        )


def copy_weights(checkpoint, model, config, train, test) -> str | None:
    """Load the weights of --checkpoint, print the names of the new ones, and return the norm_type that was converted.

    Norms of another type are converted by match_moments over CONVERSION_IMAGES training images. Other classes get a new
    last layer. Returns None if no norm was converted.
    """
    other, stored = runs.read_config(runs.run_dir_of(checkpoint))
    data = stored["data"]
    converted = check_convertible(config, other, checkpoint)
    if (config.dataset, config.validation) == (other.dataset, other.validation):
        warn_of_split(checkpoint, data, train, test)
    other = dataclasses.replace(other, batch_size=None)  # it is not trained further
    source = create_model(other, train.network_shape, data["num_classes"])
    path, _ = load_weights(source, checkpoint)
    same_classes = data.get("class_names", train.class_names) == train.class_names
    taken = {name: v for name, v in weights_of(source).items() if same_classes or not name.startswith("logits/")}
    new = []
    for name, variable in weights_of(model).items():
        if name.endswith("/seed_generator_state"):  # of dropout: --seed has set it
            continue
        if name in taken and taken[name].shape == variable.shape:
            variable.assign(taken[name])
        else:
            new.append(name)
    print(f"starting from the weights of {path}" + (f"; new: {', '.join(new)}" if new else ""))
    if converted:
        batches = create_input_ops(train, min(len(train), CONVERSION_IMAGES), True, seed=config.seed, last_step=1)
        match_moments(model, source, next(iter(batches))[0])
    return other.norm_type if converted else None


def check_convertible(config, other, checkpoint) -> bool:
    """Whether the norms of the run `other` must be converted; UserError if its weights do not fit `config`."""
    for name in ("model", "weight_standardization"):
        here, there = getattr(config, name), getattr(other, name)
        if here != there:
            raise UserError(f"checkpoint {checkpoint} is of a run with --{name} {there}, not {here}: use the same")
    if config.validation and config.dataset == other.dataset and config.validation != other.validation:
        raise UserError(f"checkpoint {checkpoint} saw images that --validation {config.validation} holds out: omit it")
    same = config.norm_type == other.norm_type
    if config.norm_type == "group":
        same = same and (config.groups, config.group_size) == (other.groups, other.group_size)
    if not same and (config.norm_type not in ("group", "layer", "instance") or other.norm_type == "none"):
        raise UserError(
            f"checkpoint {checkpoint} is of a run with --norm_type {other.norm_type}, which cannot become "
            f"{config.norm_type}: use the same, or convert a norm to group, layer or instance"
        )
    return not same
