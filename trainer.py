"""Train a classifier with the normalization and the batch size of your choice.

    python trainer.py --dataset CIFAR10 --norm_type group --batch_size 2
    python trainer.py --dataset MNIST --norm_type batch --model convnet --max_training_step 500
    python trainer.py --resume train_dir/RUN                    # continue a run that was stopped
    tensorboard --logdir train_dir

A step has max_batch_size images, so that curves of different batch sizes share an axis. The weights are updated after
each batch (batch_size images on each replica), or with --accumulate once per step. Batch norm sees batch_size images.
"""

import contextlib
import dataclasses
import math
import os
import shlex
import signal
import sys

from command import DISK_FULL, ExternalError, Interruption, Stopped, UserError, run, set_threads, start
from config import parse_training

FLAGS = start(__name__, parse_training)  # flags first: TensorFlow takes seconds to import

import keras
import tensorflow as tf

import checkpoints
import download
import evaler
import replicas
import runs
from config import CLIP_NORM, derive, evaluation_batch, number_of_replicas, workers
from input_ops import create_input_ops
from model import create_model
from summaries import Log, print_plan


def learning_rate_at(step, config):
    """The learning rate of step number `step`, counted from 0."""
    peak, steps, warmup = config.peak_learning_rate, config.max_training_step, config.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    if config.lr_schedule == "step":
        return peak * 0.1 ** sum(step >= share * steps for share in (0.3, 0.6, 0.9))
    if config.lr_schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
    return peak


class Optimizer:
    """Adam (arXiv 1412.6980) or SGD with momentum 0.9, with TensorFlow's fused kernels: one operation per variable.

    At small batches the update is a large part of a step, and Keras' optimizers use a dozen operations per variable.
    """

    def __init__(self, kind, variables):
        self.kind, self.variables = kind, list(variables)
        self.learning_rate = tf.Variable(0.0, trainable=False)
        slots = {"adam": 2, "momentum": 1}[kind]
        self.slots = [[tf.Variable(tf.zeros_like(v), trainable=False) for v in variables] for _ in range(slots)]
        self.beta_powers = [tf.Variable(beta, trainable=False) for beta in (0.9, 0.999)] if kind == "adam" else []

    def apply(self, gradients):
        if self.kind == "momentum":
            for variable, accumulator, gradient in zip(self.variables, *self.slots, gradients):
                tf.raw_ops.ResourceApplyMomentum(
                    var=variable.handle, accum=accumulator.handle, lr=self.learning_rate, grad=gradient, momentum=0.9
                )
            return
        power1, power2 = self.beta_powers
        for variable, mean, square, gradient in zip(self.variables, *self.slots, gradients):
            tf.raw_ops.ResourceApplyAdam(
                var=variable.handle,
                m=mean.handle,
                v=square.handle,
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


def make_state(model, config, strategy=None):
    """The state of training before its first step, with the variables that each replica of `strategy` needs."""
    strategy = strategy or tf.distribute.get_strategy()
    with strategy.scope():
        optimizer = Optimizer(config.optimizer, [variable.value for variable in model.trainable_variables])
    return checkpoints.State(model, optimizer, config, strategy)


def loss_and_gradients(state, images, labels):
    """Return [loss, *gradients] of a batch, and add its losses, correct predictions and images to the totals."""
    config = state.config
    images, labels = (replicas.part(values, values.shape[0] // config.batch_size) for values in (images, labels))
    with tf.GradientTape() as tape:
        logits = state.model(images, training=True)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
        objective = loss = tf.reduce_mean(losses)
        if config.weight_decay:
            objective += config.weight_decay * tf.add_n([tf.nn.l2_loss(weight) for weight in state.weights])
    gradients = tape.gradient(objective, state.weights)
    correct = tf.equal(tf.argmax(logits, axis=1, output_type=labels.dtype), labels)
    sum_of_losses, hits = (tf.reduce_sum(tf.cast(values, tf.float64)) for values in (losses, correct))
    state.totals.assign_add(tf.stack([sum_of_losses, hits, config.batch_size]))
    return [loss, *gradients]


def update(state, loss, *gradients):
    """Update the weights by the clipped gradients; returns whether loss and gradients were finite, and the loss.

    Loss and gradients are first averaged over all replicas, so that replicas agree on clipping and finiteness.
    """
    loss, *gradients = replicas.mean([loss, *gradients])
    norm = tf.linalg.global_norm(gradients)
    state.optimizer.apply(
        tf.cond(norm > CLIP_NORM, lambda: [g * (CLIP_NORM / norm) for g in gradients], lambda: gradients)
    )
    return tf.math.is_finite(loss) & tf.math.is_finite(norm), loss


def accumulate(state, images, labels):
    """Add a batch's share of the step's mean loss and gradients to the sums."""
    for variable, value in zip(state.sums, loss_and_gradients(state, images, labels)):
        variable.assign_add(value / state.config.batches_per_step)


def start_step(state):
    for variable in [state.totals, *state.sums]:
        variable.assign(tf.zeros_like(variable))


def end_step(state, stop):
    """Average totals and moving statistics over the replicas, so that all replicas are equal between steps.

    Returns whether any worker asked to stop.
    """
    if state.strategy.num_replicas_in_sync == 1:
        return stop
    moving = [v.value for v in state.model.non_trainable_variables if v.dtype == "float32"]  # batch norm's statistics
    stop, *means = replicas.mean([tf.cast(stop, tf.float64), state.totals.read_value()])
    means += replicas.mean([variable.read_value() for variable in moving]) if moving else []
    for variable, value in zip([state.totals, *moving], means):
        variable.assign(value)
    return stop > 0


def make_train_step(state):
    """Build the graph of a step: train_step(images, labels, stop) -> (finite, loss, stop).

    It makes one update per batch, or with --accumulate one update by the mean of all gradients of the step.

    Args of train_step:
        images: [batches_per_step * replicas of this process * batch_size, h, w, c].
        labels: [the same number], int.
        stop: whether this worker asks to stop.

    Returns of train_step:
        whether all losses and gradients were finite, the loss of the last update, whether any worker asked to stop.
    """
    config, batches = state.config, state.config.batches_per_step

    def in_replicas(function, *arguments):
        results = state.strategy.run(function, (state, *arguments))
        return tf.nest.map_structure(lambda value: state.strategy.experimental_local_results(value)[0], results)

    def update_by_batch(state, images, labels):
        return update(state, *loss_and_gradients(state, images, labels))

    def update_by_sums(state):
        return update(state, *(variable.read_value() for variable in state.sums))

    @tf.function(autograph=False, jit_compile=config.jit_compile or None)  # autograph takes seconds
    def train_step(images, labels, stop=False):
        in_replicas(start_step)
        if batches == 1:
            finite, loss = in_replicas(update_by_batch, images, labels)
            return finite, loss, in_replicas(end_step, stop)
        images = tf.reshape(images, [batches, images.shape[0] // batches, *images.shape[1:]])
        labels = tf.reshape(labels, [batches, labels.shape[0] // batches])

        def accumulate_batch(i):
            in_replicas(accumulate, images[i], labels[i])
            return [i + 1]

        def update_batch(i, finite, loss):
            return i + 1, *in_replicas(update_by_batch, images[i], labels[i])

        if config.accumulate:
            tf.while_loop(lambda i: i < batches, accumulate_batch, [0])
            finite, loss = in_replicas(update_by_sums)
        else:  # the loop ends after an update that failed
            _, finite, loss = tf.while_loop(
                lambda i, finite, loss: finite & (i < batches), update_batch, [0, True, 0.0]
            )
        return finite, loss, in_replicas(end_step, stop)

    return train_step


def make_test(state, test, interruption):
    """Make a function that tests on the complete test split, shared by all workers: {"test_loss/accuracy": ...}."""
    who = workers()
    test_here = test if len(who.addresses) == 1 else test.subset(replicas.test_share(who, len(test)))
    batches = create_input_ops(test_here, evaluation_batch(test.network_shape), is_training=False)
    predict = evaler.make_predictor(state.model, state.strategy)
    join = replicas.make_join(state.strategy, who, len(test))

    def test_now():
        outputs = join(evaler.predict_all(predict, interruption.until_stopped(batches)))
        result = evaler.summarize(*outputs, test.labels, test.num_classes)
        return {f"test_loss/{name}": result[name] for name in evaler.SCALARS if name in result}

    return test_now


def train_run(state, train, test, log, interruption):
    """Train from the step of `state` until the last step or a signal; returns whether the last step was reached."""
    config, who = state.config, workers()
    train_step, test_now = make_train_step(state), make_test(state, test, interruption)
    steps = {"first_step": int(state.step), "last_step": config.max_training_step}
    rows = replicas.rows_of(who, config.max_batch_size, config.batches_per_step)
    batches = create_input_ops(train, config.max_batch_size, True, config.augment, config.seed, rows=rows, **steps)

    def write_row(images=None):
        row = state.row()
        if log.test_due(row["step"]):
            with log.testing():
                row |= test_now()
        log.write(row, images)

    done = False
    with contextlib.suppress(Stopped):  # the row of an interrupted test is written when the run is resumed
        if log.needs_row(int(state.step)):
            write_row()
        for images, labels in batches:
            state.optimizer.learning_rate.assign(learning_rate_at(int(state.step), config))
            finite, loss, stop = train_step(images, labels, tf.constant(interruption.signal is not None))
            if not finite:
                end_diverged(state, log, float(loss))
            state.finish_step()
            step = int(state.step)
            log.stepped(step)
            interruption.worth_saving = True
            if step == config.max_training_step:  # before its row, so that a finished run has a checkpoint
                with log.paused():
                    state.save()
            if log.due(step):
                write_row(images)
            if state.save_due() and state.saved_step != step:
                with log.paused():
                    state.save()
            if interruption.should_stop(stop):
                break
        done = int(state.step) == config.max_training_step
    if state.saved_step != int(state.step):
        state.save()
    log.close()
    return done


def end_diverged(state, log, loss):
    """End a run whose training diverged: mark it in the log, keep the last checkpoint, raise ExternalError."""
    step, newest = int(state.step) + 1, state.manager.latest_checkpoint if state.writes else "that of worker 0"
    log.add({"step": step, "diverged": True})
    log.close()
    raise ExternalError(
        f"training diverged at step {step}: the loss {loss} or its gradient is not finite with --learning_rate "
        f"{state.config.base_learning_rate:g}; "
        + (f"the last good checkpoint is {newest}" if newest else "there is no checkpoint yet")
        + "; start a new run with a smaller --learning_rate"
    )


def reopen(run_dir, flags):
    """(configuration, train, test) of a run to resume; UserError if its data, replicas or convolutions changed."""
    found = runs.read_run(run_dir)
    onednn, now = found.stored.get("machine", {}).get("onednn"), os.environ.get("TF_ENABLE_ONEDNN_OPTS")
    if onednn and now and onednn != now:
        raise UserError(f"{run_dir} needs TF_ENABLE_ONEDNN_OPTS={onednn}, but it is {now}: set it to {onednn}")
    config, here = found.config, flags.replicas or found.config.replicas
    there, number = config.num_replicas, number_of_replicas(here)
    if number != there:
        raise UserError(f"{run_dir} was trained with {there} replicas, not {number}: change --replicas or TF_CONFIG")
    if found.state == "finished" and not runs.has_checkpoint(run_dir):
        raise UserError(f"{run_dir} is finished and has no checkpoint to continue: train a new run")
    splits = runs.open_data(run_dir, config, found.stored["data"], flags.data_dir, config.validation)
    return dataclasses.replace(config, replicas=here, worker_timeout=flags.worker_timeout), *splits


def shared_settings(config, train, test, run_dir):
    """The settings that all workers of a run must share."""
    settings = dataclasses.asdict(config) | runs.describe_data(train, test) | {"source": runs.source()}
    path = run_dir and run_dir / "checkpoint"
    settings |= {"--resume": run_dir and run_dir.resolve().name, "TF_CONFIG": workers().addresses}
    settings |= {"newest checkpoint": path.read_text(errors="replace") if path and path.exists() else None}
    return {name: value for name, value in settings.items() if name not in ("data_dir", "train_dir", "worker_timeout")}


def main(flags, run_dir):
    resuming, who = run_dir is not None, workers()
    if resuming:
        config, train, test = reopen(run_dir, flags)
    else:
        if flags.checkpoint:
            runs.run_dir_of(flags.checkpoint)  # raises UserError, before a download
        alone = len(who.addresses) == 1  # several workers must not download the same dataset
        train, test = download.load_splits(flags.dataset, flags.data_dir, flags.validation, may_fetch=alone)
        config = derive(flags, train)
    print_plan(config, train, test)
    if len(test) < len(who.addresses):
        raise UserError(f"{len(test)} test images are too few for {len(who.addresses)} workers: use fewer workers")
    with replicas.all_workers(who, shared_settings(config, train, test, run_dir), config.worker_timeout):
        set_threads(config.batch_size, train.network_shape)
        strategy = replicas.start(config.replicas or 1, who)
    interruption = Interruption(alone=len(who.addresses) == 1)
    keras.utils.set_random_seed(config.seed)
    with strategy.scope():
        model = create_model(config, train.network_shape, train.num_classes)
    if config.checkpoint and not (resuming and runs.has_checkpoint(run_dir)):
        start_from_checkpoint(model, config, train, test)
    if not resuming and who.is_chief:
        run_dir = runs.make_run_dir(config)
        runs.write_config(run_dir, flags, config, runs.describe_data(train, test))
    with runs.lock(run_dir) if who.is_chief else contextlib.nullcontext():
        state = make_state(model, config, strategy)
        state.open(run_dir, who.is_chief)
        if resuming and who.is_chief:
            runs.drop_after(run_dir, int(state.step))
        train_and_report(run_dir, state, train, test, interruption)


def start_from_checkpoint(model, config, train, test):
    """Load the weights of --checkpoint; if this converts the norms, print the accuracy after the conversion."""
    before = checkpoints.copy_weights(config.checkpoint, model, config, train, test)
    if before:
        accuracy = 100 * evaler.evaluate(model, test)["accuracy"]
        print(f"{before} norm became {config.norm_type} norm: accuracy {accuracy:.2f} % before training")


def train_and_report(run_dir, state, train, test, interruption):
    """Train to the last step, and print the result; exit code 128 + number of the signal if one arrived."""
    config, who = state.config, workers()
    shown_dir = shlex.quote(str(run_dir)) if run_dir else "RUN_FOLDER_OF_WORKER_0"
    together = f" in each of {config.num_replicas} replicas" if config.num_replicas > 1 else ""
    print(
        f"{state.model.count_params():,} parameters; {config.optimizer}, rate {config.peak_learning_rate:g} at "
        f"batch size {config.batch_size}{together}\nrun folder: {shown_dir}"
        + (f"\nresuming at step {int(state.step)} of {config.max_training_step}" if int(state.step) else "")
    )
    try:
        log = Log(run_dir, config, train, test, int(state.step), who.is_chief, state.batches_done)
        done = train_run(state, train, test, log, interruption)
    except (tf.errors.ResourceExhaustedError, tf.errors.OutOfRangeError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in DISK_FULL:
            raise
        # Memory or disk is full, or a file exceeds the size limit.
        raise ExternalError(
            f"{shown_dir}: {getattr(error, 'message', error)}; free memory or disk space, then --resume {shown_dir}"
        ) from error
    except tf.errors.OpError as error:
        if len(who.addresses) == 1:
            raise
        raise ExternalError(
            f"another worker was lost ({type(error).__name__}); start all workers again with --resume {shown_dir}"
        ) from error
    if not done:
        number = interruption.signal or signal.SIGTERM
        print(
            f"stopped by {signal.Signals(number).name} after step {int(state.step)}, which is saved; continue with\n"
            f"  python trainer.py --resume {shown_dir}"
        )
        sys.exit(128 + number)
    if not who.is_chief:
        print(f"done: {config.max_training_step} steps")
    else:
        accuracy = runs.read_run(run_dir).accuracies["accuracy"]
        kind, flag = ("validation", f" --validation {config.validation}") if config.validation else ("test", "")
        print(
            f"done: {config.max_training_step} steps, {kind} accuracy {100 * accuracy:.2f} %; for the accuracy by "
            f"class, the mistakes and the curves, run\n  python evaler.py {shown_dir}{flag}\n"
            f"  tensorboard --logdir {shlex.quote(str(run_dir.parent))}"
        )


if __name__ == "__main__":
    run(lambda: main(*FLAGS))
