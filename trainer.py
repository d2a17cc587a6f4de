"""Train a classifier with the normalization and the batch size of your choice.

    python trainer.py --dataset CIFAR10 --norm_type group --batch_size 2
    python trainer.py --dataset MNIST --norm_type batch --model convnet --max_training_step 500
    python trainer.py --resume train_dir/RUN                    # go on where a run stopped
    tensorboard --logdir train_dir

A step is max_batch_size images, in max_batch_size / batch_size updates, so that the curves of different batch sizes
share an axis. batch_size is the number of images that batch norm sees.
"""

import contextlib
import dataclasses
import math
import os
import signal
import sys
import threading
from pathlib import Path

import datasets
import download
import evaler
import model as models
import runs
from command import ArgumentParser, Later, UserError, WorldError, run, set_threads
from input_ops import create_input_ops, network_image_shape
from summaries import Log

tf, keras, ops = Later("tensorflow"), Later("keras"), Later("ops")


# ------------------------------------------------------------------------------------------------- configuration


def parse_flags(argv=None):
    """(runs.Config of the flags alone, run folder to resume or None)."""
    parser = ArgumentParser(description="Train a classifier with the normalization and batch size of your choice.")
    parser.add_flags(runs.Config)
    parser.add_argument("--resume", metavar="RUN_DIR", help="go on with this run, with the flags that it was given")
    parsed = vars(parser.parse_args(argv))
    resume = parsed.pop("resume")
    flags = runs.Config(**parsed)
    if resume is None:
        check_flags(flags)
        return flags, None
    given = parser.names_given(argv)
    for field in dataclasses.fields(runs.Config):
        if field.name in given and not field.metadata.get("on_resume"):
            raise UserError(
                f"--resume goes on with the flags of the run, so --{field.name} "
                f"{getattr(flags, field.name)} has no effect: leave it out, or start a new run"
            )
    return flags, Path(resume)


def check_flags(flags):
    """Raise UserError for flags that contradict each other."""
    if flags.dataset is None:
        raise UserError(f"--dataset is missing: give one of {', '.join(datasets.NAMES)} or your own")
    if not flags.prefix or any(c in flags.prefix for c in "/\\\0") or flags.prefix in (".", ".."):
        raise UserError(f"--prefix {flags.prefix!r} must be a plain name, for it begins the name of a folder")
    runs.check_path(Path(flags.train_dir) / flags.prefix)
    models.check_network(flags)
    if flags.seed >= 2**31:
        raise UserError(f"--seed must be below 2147483648, not {flags.seed}")
    batch_size, max_batch_size = batch_sizes(flags)
    if max_batch_size % batch_size:
        fitting = -(-max_batch_size // batch_size) * batch_size
        raise UserError(
            f"--batch_size {batch_size} does not divide --max_batch_size {max_batch_size}: a "
            f"step is max_batch_size images in whole updates; --max_batch_size {fitting} would do"
        )
    if flags.augment and flags.no_augment:
        raise UserError("--augment and --no_augment contradict each other: give one of them")
    if flags.max_training_step is not None and flags.warmup_steps > flags.max_training_step:
        raise UserError(
            f"--warmup_steps {flags.warmup_steps} is more than --max_training_step {flags.max_training_step}"
        )


def batch_sizes(flags):
    """(images per update, images per step): the flags, else what the dataset's recipe says where it fits them."""
    recipe = datasets.recipe_of(flags.dataset)
    most = flags.max_batch_size or recipe.get("max_batch_size", runs.MAX_BATCH_SIZE)
    usual = recipe.get("batch_size", most)
    return flags.batch_size or (most if most % usual else usual), most


def derive(flags, train):
    """The configuration: the flags, and what follows from them and the training images. Nothing changes it later."""
    facts, recipe = datasets.module_of(flags.dataset), datasets.recipe_of(flags.dataset)
    model = flags.model or models.default_model(network_image_shape(train))
    models.check_network(flags, model)
    optimizer = flags.optimizer or ("adam" if model == "convnet" else "momentum")
    batch_size, max_batch_size = batch_sizes(flags)
    share = batch_size / max_batch_size
    learning_rate = flags.learning_rate or runs.LEARNING_RATES[optimizer]
    if "momentum_rate" in recipe and optimizer == "momentum" and flags.learning_rate is None:
        learning_rate = recipe["momentum_rate"] * max_batch_size / recipe["max_batch_size"]  # arXiv 1706.02677
    scaling = "none" if flags.no_adjust_learning_rate else runs.SCALING[optimizer]
    scale = {"none": 1.0, "linear": share, "square root": math.sqrt(share)}[scaling]
    epoch = math.ceil(len(train) / max_batch_size)
    steps = flags.max_training_step or facts.EPOCHS * epoch
    if flags.warmup_steps > steps:
        raise UserError(f"--warmup_steps {flags.warmup_steps} is more than the {steps} steps of this run")
    return dataclasses.replace(
        flags,
        model=model,
        groups=flags.groups or models.default_groups(model),
        batch_size=batch_size,
        max_batch_size=max_batch_size,
        updates_per_step=max_batch_size // batch_size,
        optimizer=optimizer,
        lr_schedule=flags.lr_schedule or recipe.get("lr_schedule", "cosine"),
        base_learning_rate=learning_rate,
        learning_rate_scaling=scaling,
        peak_learning_rate=learning_rate * scale,
        weight_decay={"adam": 0.0, "momentum": 1e-4}[optimizer] if flags.weight_decay is None else flags.weight_decay,
        # A step forgets a tenth of the statistics, in however many updates: every batch size averages over the same
        # number of images.
        batch_norm_momentum=0.9**share,
        augment=flags.augment or ("flip+crop" if facts.MIRRORED and not flags.no_augment else None),
        max_training_step=steps,
        test_sample_step=flags.test_sample_step or epoch,
    )


def learning_rate_at(step, config):
    """The rate of step number `step`, counted from 0."""
    peak, steps, warmup = config.peak_learning_rate, config.max_training_step, config.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    if config.lr_schedule == "step":
        return peak * 0.1 ** sum(step >= share * steps for share in (0.3, 0.6, 0.9))
    if config.lr_schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
    return peak


def load_data(config):
    """(train, test): the splits of a configuration, fetched first where that may be."""
    name = config.dataset
    if datasets.module_of(name).FETCHED_ON_FIRST_USE and not datasets.is_prepared(name, config.data_dir):
        print(f"{name} is not in {config.data_dir} yet: preparing it first", flush=True)
        download.prepare(name, config.data_dir)
    return datasets.create_default_splits(name, config.data_dir, validation=config.validation)


def reopen(run_dir, data_dir):
    """(configuration, train, test) of a run that goes on; UserError if its data changed."""
    config, data = runs.read_config(run_dir)
    if data_dir == datasets.DATA_DIR:  # None: the run's data were in the default place, too
        data_dir = config.data_dir or data_dir
    config = dataclasses.replace(config, data_dir=data_dir)
    splits = datasets.create_default_splits(config.dataset, data_dir, validation=config.validation)
    for name, split in zip(("train", "test"), splits):
        if len(split) != data[name]:
            raise UserError(
                f"{run_dir} was trained with {data[name]} {name} images, but {data_dir} has {len(split)} "
                f"now: the data changed"
            )
    return config, *splits


# ----------------------------------------------------------------------------------------------------- the step


class Optimizer:
    """Adam (arXiv 1412.6980) or SGD with momentum 0.9, by TensorFlow's fused kernels: one operation per variable.

    At small batches the update is a large part of a step, and Keras' optimizers spend a dozen operations per variable.
    """

    def __init__(self, kind, variables):
        self.kind, self.variables_updated = kind, list(variables)
        self.learning_rate = tf.Variable(0.0, trainable=False)
        slots = {"adam": 2, "momentum": 1}[kind]
        self.slots = [[tf.Variable(tf.zeros_like(v), trainable=False) for v in variables] for _ in range(slots)]
        self.beta_powers = [tf.Variable(beta, trainable=False) for beta in (0.9, 0.999)] if kind == "adam" else []

    def tracked(self):
        """What a checkpoint holds of it."""
        return {"learning_rate": self.learning_rate, "slots": self.slots, "beta_powers": self.beta_powers}

    def apply(self, gradients):
        if self.kind == "momentum":
            for variable, accumulator, gradient in zip(self.variables_updated, *self.slots, gradients):
                tf.raw_ops.ResourceApplyMomentum(
                    var=variable.handle, accum=accumulator.handle, lr=self.learning_rate, grad=gradient, momentum=0.9
                )
            return
        power1, power2 = self.beta_powers
        for variable, m, v, gradient in zip(self.variables_updated, *self.slots, gradients):
            tf.raw_ops.ResourceApplyAdam(
                var=variable.handle,
                m=m.handle,
                v=v.handle,
                beta1_power=power1,
                beta2_power=power2,
                lr=self.learning_rate,
                beta1=0.9,
                beta2=0.999,
                epsilon=1e-8,
                grad=gradient,
            )
        power1.assign(power1 * 0.9)
        power2.assign(power2 * 0.999)


class State:
    """What training changes and a checkpoint holds: the model, the optimizer, the number of steps done, and `totals`:
    the sums of losses, correct predictions and images, in training mode, since the last row of the log."""

    def __init__(self, model, config, run_dir):
        self.model = model
        self.optimizer = Optimizer(config.optimizer, [variable.value for variable in model.trainable_variables])
        self.totals = tf.Variable(tf.zeros([3], tf.float64), trainable=False)
        self.step = tf.Variable(0, dtype=tf.int64, trainable=False)
        self.checkpoints = runs.Checkpoints(
            run_dir,
            config,
            model=runs.weights_of(model),
            totals=self.totals,
            optimizer=self.optimizer.tracked(),
            step=self.step,
        )

    def row(self):
        """The row of the log of this step: means since the last row, and the rate that the optimizer used."""
        loss, correct, images = self.totals.numpy()
        return {
            "step": int(self.step),
            "loss/accuracy": correct / images,
            "loss/loss": loss / images,
            "learning_rate": float(self.optimizer.learning_rate),
        }


def make_train_step(model, optimizer, totals, batch_size, updates=1, weight_decay=0.0, jit_compile=False):
    """The graph of a step, from (images [updates * batch_size, h, w, c], labels) to whether all was finite, and the
    loss of the last update. totals: as in State."""
    weights = [variable.value for variable in model.trainable_variables]

    def update(images, labels):
        with tf.GradientTape() as tape:
            logits = model(images, training=True)
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
            objective = loss = tf.reduce_mean(losses)
            if weight_decay:
                objective += weight_decay * tf.add_n([tf.nn.l2_loss(weight) for weight in weights])
        gradients = tape.gradient(objective, weights)
        norm = tf.linalg.global_norm(gradients)
        optimizer.apply(
            tf.cond(norm > runs.CLIP_NORM, lambda: [g * (runs.CLIP_NORM / norm) for g in gradients], lambda: gradients)
        )
        correct = tf.equal(tf.argmax(logits, axis=1, output_type=labels.dtype), labels)
        totals.assign_add(
            tf.stack(
                [tf.reduce_sum(tf.cast(losses, tf.float64)), tf.reduce_sum(tf.cast(correct, tf.float64)), batch_size]
            )
        )
        return tf.math.is_finite(loss) & tf.math.is_finite(norm), loss

    @tf.function(jit_compile=jit_compile or None)
    def train_step(images, labels):
        if updates == 1:
            return update(images, labels)
        images = tf.reshape(images, [updates, batch_size, *images.shape[1:]])
        labels = tf.reshape(labels, [updates, batch_size])
        finite, loss = True, 0.0
        for i in tf.range(updates):
            if finite:  # nothing is learned after the update that failed
                finite, loss = update(images[i], labels[i])
        return finite, loss

    return train_step


# ----------------------------------------------------------------------------------------------------- the loop


class Stopped(Exception):
    """A signal came in the middle of a test."""


class Interruption:
    """SIGTERM or Ctrl-C is remembered, so that the run can save; a second one, or one before there is anything to save,
    ends the process at once.

    Python runs its handlers between two calls of TensorFlow, which may take minutes: a thread reads the signals'
    numbers from a pipe, where they arrive at once.
    """

    def __init__(self):
        self.signal, self.worth_saving = None, False
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing)
        threading.Thread(target=self.watch, args=(reading,), daemon=True).start()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)

    def watch(self, pipe):
        while True:
            number = os.read(pipe, 1)[0]
            if number not in (signal.SIGTERM, signal.SIGINT):
                continue
            if self.signal or not self.worth_saving:
                print(f"stopped by {signal.Signals(number).name}", file=sys.stderr, flush=True)
                os._exit(128 + number)
            self.signal = number
            print(
                f"{signal.Signals(number).name}: stopping as soon as this step is saved; once more stops at once",
                flush=True,
            )

    def check(self, batches):
        """The batches, unless a signal comes between two of them: Stopped."""
        for batch in batches:
            if self.signal:
                raise Stopped
            yield batch


def train_run(run_dir, config, splits, state, interruption):
    """The training loop, from the step of `state` to the last one, or to the one in which a signal comes."""
    train, test = splits
    step = int(state.step)
    train_step = make_train_step(
        state.model,
        state.optimizer,
        state.totals,
        config.batch_size,
        config.updates_per_step,
        config.weight_decay,
        config.jit_compile,
    )
    test_batches = create_input_ops(test, evaler.EVALUATION_BATCH, is_training=False)
    batches = create_input_ops(
        train,
        config.max_batch_size,
        True,
        config.augment,
        config.seed,
        first_step=step,
        last_step=config.max_training_step,
    )
    predict = evaler.make_predictor(state.model)
    log = Log(run_dir, config, test, step)

    def test_and_log(images=None):
        row = state.row()
        if log.test_due(step):
            with log.testing():
                result = evaler.evaluate(predict, interruption.check(test_batches), test.labels, test.num_classes)
            row |= {f"test_loss/{name}": result[name] for name in evaler.SCALARS if name in result}
        log.write(row, images)
        state.totals.assign(tf.zeros_like(state.totals))

    with contextlib.suppress(Stopped):  # by a signal in a test: its row is written when the run goes on
        if log.owes(step):
            test_and_log()
        for images, labels in batches:
            state.optimizer.learning_rate.assign(learning_rate_at(step, config))
            finite, loss = train_step(images, labels)
            if not finite:
                stop_at_nan(log, run_dir, step + 1, float(loss), state)
            step += 1
            state.step.assign(step)
            log.stepped(step)
            interruption.worth_saving = True
            if log.due(step):
                test_and_log(images)
            if state.checkpoints.due(step):
                with log.paused():
                    state.checkpoints.save(step)
            if interruption.signal:
                break
    if state.checkpoints.saved != step:
        state.checkpoints.save(step)
    log.close()
    return step == config.max_training_step and not log.owes(step)


def stop_at_nan(log, run_dir, step, loss, state):
    """End a run that diverged: its log says so, and its last checkpoint stays."""
    log.add({"step": step, "diverged": True})
    log.close()
    last = f"the last good checkpoint is {state.checkpoints.newest()}"
    if not state.checkpoints.newest():
        last = f"{run_dir} has no checkpoint yet"
    raise WorldError(
        f"training diverged at step {step}: loss {loss}, or its gradient, is not finite at the learning "
        f"rate {float(state.optimizer.learning_rate):g}; {last}; start anew with a smaller "
        f"--learning_rate"
    )


# --------------------------------------------------------------------------------------------------- the script


def build_model(config, train):
    """The network of a run, with the weights that --checkpoint names; UserError where it cannot be trained so."""
    model = evaler.build_model(config, network_image_shape(train), train.num_classes)
    for layer in model.layers:
        if isinstance(layer, (ops.BatchNorm, keras.layers.BatchNormalization)):
            positions = layer.input.shape[1:-1]
            if None not in positions and config.batch_size * math.prod(positions) < 2:
                raise UserError(
                    f"--batch_size {config.batch_size} is too small for batch norm in {model.name}: "
                    f"{layer.name} sees 1 position of each image, a single value per channel; use a larger "
                    f"batch, larger images or another --norm_type"
                )
    if config.checkpoint:
        runs.check_same_network(config, config.checkpoint)
        path, _ = runs.load_weights(model, config.checkpoint)
        print(f"starting from the weights of {path}")
    return model


def main():
    flags, run_dir = parse_flags()
    if run_dir is None:
        train, test = load_data(flags)
        config = derive(flags, train)
    else:
        config, train, test = reopen(run_dir, flags.data_dir)
    tests = -(-config.max_training_step // config.test_sample_step)
    print(
        f"{config.dataset}: {len(train)} train, {len(test)} test images of "
        f"{'x'.join(map(str, network_image_shape(train)))} in {train.num_classes} classes\n"
        f"{config.model}, {config.norm_type} norm: {config.max_training_step} steps of {config.max_batch_size} "
        f"images, in {config.updates_per_step} updates each; {tests} tests. Starting TensorFlow; how long it will "
        f"take is said after two steps",
        flush=True,
    )

    set_threads(config.batch_size, network_image_shape(train))
    keras.utils.set_random_seed(config.seed)
    model = build_model(config, train)
    going_on = run_dir is not None
    if not going_on:
        run_dir = runs.make_run_dir(config)
        runs.write_config(run_dir, flags, config, runs.describe_data(train, test))
    state = State(model, config, run_dir)
    if going_on:
        runs.drop_after(run_dir, int(state.step))
        print(f"going on at step {int(state.step)} of {config.max_training_step}")
    print(
        f"{model.count_params():,} parameters; {config.optimizer}, rate {config.peak_learning_rate:g} at "
        f"batch size {config.batch_size}\nrun folder: {run_dir}",
        flush=True,
    )

    interruption = Interruption()
    try:
        done = train_run(run_dir, config, (train, test), state, interruption)
    except (tf.errors.ResourceExhaustedError, tf.errors.OutOfRangeError) as error:
        # TensorFlow's words for a full memory, a full disk, and a file beyond the limit on sizes
        raise WorldError(f"{run_dir}: {error.message}; free some and go on with --resume {run_dir}") from error
    if not done:
        print(
            f"stopped by {signal.Signals(interruption.signal).name} after step {int(state.step)}, which is saved; go "
            f"on with\n  python trainer.py --resume {run_dir}",
            flush=True,
        )
        sys.exit(128 + interruption.signal)
    print(f"done: {config.max_training_step} steps, run folder {run_dir}")


if __name__ == "__main__":
    run(main)
