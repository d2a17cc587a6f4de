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
import replicas
import runs
from command import ArgumentParser, Later, UserError, WorldError, run, set_threads
from input_ops import create_input_ops, network_image_shape
from summaries import Log

tf, keras, ops = Later("tensorflow"), Later("keras"), Later("ops")

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # the last: its terminal was closed
CONVERSION_IMAGES = 256  # training images over which the norms of --checkpoint are converted


# ------------------------------------------------------------------------------------------------- configuration


def make_parser():
    parser = ArgumentParser(description="Train a classifier with the normalization and batch size of your choice.")
    parser.add_flags(runs.Config)
    parser.add_argument("--resume", metavar="RUN_DIR", help="go on with this run, with the flags that it was given")
    return parser


def parse_flags(argv=None):
    """(runs.Config of the flags alone, run folder to resume or None)."""
    parser = make_parser()
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
    check_replicas(flags)
    if flags.freeze_batch_norm and (flags.norm_type != "batch" or not flags.checkpoint):
        raise UserError("--freeze_batch_norm is for --norm_type batch and weights of --checkpoint: leave it out")
    if flags.augment and flags.no_augment:
        raise UserError("--augment and --no_augment contradict each other: give one of them")
    if flags.epochs and flags.max_training_step:
        raise UserError(
            f"--epochs {flags.epochs} and --max_training_step {flags.max_training_step} both say how long to train: "
            f"give one of them"
        )
    if flags.max_training_step is not None and flags.warmup_steps > flags.max_training_step:
        raise UserError(
            f"--warmup_steps {flags.warmup_steps} is more than --max_training_step {flags.max_training_step}"
        )


def check_replicas(flags):
    """Raise UserError unless a step is whole updates of all replicas, and for what several replicas cannot do."""
    number = replicas.number(flags.replicas)
    batch_size, max_batch_size = batch_sizes(flags)
    images = batch_size * number
    if max_batch_size % images:
        fitting = -(-max_batch_size // images) * images
        each = f"--batch_size {batch_size}" if number == 1 else f"{number} replicas of {batch_size} images"
        raise UserError(
            f"{each} does not divide --max_batch_size {max_batch_size}: a "
            f"step is max_batch_size images in whole updates; --max_batch_size {fitting} would do"
        )
    if flags.accumulate and max_batch_size == images:
        raise UserError(
            f"--accumulate has no effect with one batch per step ({images} images): leave it out, or give a smaller "
            f"--batch_size"
        )
    if flags.sync_batch_norm and (flags.norm_type != "batch" or number == 1):
        what = f"--norm_type {flags.norm_type}" if flags.norm_type != "batch" else "one replica"
        raise UserError(f"--sync_batch_norm has no effect with {what}: leave it out")
    if flags.jit_compile and number > 1:
        raise UserError(f"--jit_compile does not go with {number} replicas: leave it out")


def batch_sizes(flags):
    """(images per update and replica, images per step): the flags, else the dataset's recipe where it fits them."""
    recipe = datasets.recipe_of(flags.dataset)
    most = flags.max_batch_size or recipe.get("max_batch_size", runs.MAX_BATCH_SIZE)
    number = replicas.number(flags.replicas)
    usual = recipe.get("batch_size", most)
    return flags.batch_size or (max(1, most // number) if most % (usual * number) else usual), most


def derive(flags, train):
    """The configuration: the flags, and what follows from them and the training images. Nothing changes it later."""
    facts, recipe = datasets.module_of(flags.dataset), datasets.recipe_of(flags.dataset)
    model = flags.model or models.default_model(network_image_shape(train))
    models.check_network(flags, model)
    optimizer = flags.optimizer or ("adam" if model == "convnet" else "momentum")
    number = replicas.number(flags.replicas)
    batch_size, max_batch_size = batch_sizes(flags)
    batch_share = number * batch_size / max_batch_size
    update_share = 1.0 if flags.accumulate else batch_share
    learning_rate = flags.learning_rate or runs.LEARNING_RATES[optimizer]
    if "momentum_rate" in recipe and optimizer == "momentum" and flags.learning_rate is None:
        learning_rate = recipe["momentum_rate"] * max_batch_size / recipe["max_batch_size"]  # arXiv 1706.02677
    scaling = "none" if flags.no_adjust_learning_rate else runs.SCALING[optimizer]
    scale = {"none": 1.0, "linear": update_share, "square root": math.sqrt(update_share)}[scaling]
    epoch = math.ceil(len(train) / max_batch_size)
    steps = flags.max_training_step or (flags.epochs or facts.EPOCHS) * epoch
    if flags.warmup_steps > steps:
        raise UserError(f"--warmup_steps {flags.warmup_steps} is more than the {steps} steps of this run")
    return dataclasses.replace(
        flags,
        model=model,
        groups=flags.groups or models.default_groups(model),
        batch_size=batch_size,
        max_batch_size=max_batch_size,
        updates_per_step=1 if flags.accumulate else max_batch_size // (number * batch_size),
        num_replicas=number,
        optimizer=optimizer,
        lr_schedule=flags.lr_schedule or recipe.get("lr_schedule", "cosine"),
        base_learning_rate=learning_rate,
        learning_rate_scaling=scaling,
        peak_learning_rate=learning_rate * scale,
        weight_decay={"adam": 0.0, "momentum": 1e-4}[optimizer] if flags.weight_decay is None else flags.weight_decay,
        # A step forgets a tenth of the statistics, in however many batches: every batch size averages over the same
        # number of images.
        batch_norm_momentum=0.9**batch_share,
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
    alone = len(replicas.workers().addresses) == 1  # two workers must not both fetch it
    if alone and datasets.module_of(name).FETCHED_ON_FIRST_USE and not datasets.is_prepared(name, config.data_dir):
        print(f"{name} is not in {config.data_dir} yet: preparing it first", flush=True)
        download.prepare(name, config.data_dir)
    return datasets.create_default_splits(name, config.data_dir, validation=config.validation)


def reopen(run_dir, flags):
    """(configuration, train, test) of a run that goes on; UserError if its data changed, or its number of replicas."""
    config, data = runs.read_config(run_dir)
    here = flags.replicas or config.replicas
    if replicas.number(here) != config.num_replicas:
        raise UserError(
            f"{run_dir} was trained by {config.num_replicas} replicas, but there are {replicas.number(here)} now: "
            f"start as many, by --replicas or TF_CONFIG"
        )
    data_dir = flags.data_dir
    if data_dir == datasets.DATA_DIR:  # None: the run's data were in the default place, too
        data_dir = config.data_dir or data_dir
    config = dataclasses.replace(config, data_dir=data_dir, replicas=here, worker_timeout=flags.worker_timeout)
    config = longer(config, run_dir, flags.max_training_step)
    splits = datasets.create_default_splits(config.dataset, data_dir, validation=config.validation)
    runs.check_data(run_dir, data, *splits)
    return config, *splits


def longer(config, run_dir, steps):
    """The configuration with so many steps, or as it is for None; UserError if the steps that are done would have had
    another rate: what is trained longer is what would have been trained had it been so long from the start."""
    if steps in (None, config.max_training_step):
        return config
    if steps < config.max_training_step:
        raise UserError(f"--max_training_step {steps}: {run_dir} has {config.max_training_step} already; give more")
    extended = dataclasses.replace(config, max_training_step=steps)
    rows = runs.read_rows(run_dir / "metrics.jsonl")
    done = rows[-1]["step"] if rows else 0
    for step in range(done):
        if learning_rate_at(step, config) != learning_rate_at(step, extended):
            raise UserError(
                f"--max_training_step {steps}: {run_dir} cannot go on: with so many steps its {config.lr_schedule} "
                f"schedule would have had another rate from step {step} on; start a new run from its weights: "
                f"python trainer.py --dataset {config.dataset} --checkpoint {run_dir} and its other flags"
            )
    return extended


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
    """What training changes and a checkpoint holds: the model, the optimizer, the number of steps done, and the sums of
    losses, correct predictions and images, in training mode, of each of the last log_step steps.

    `totals` has these sums of the present step, `window` [log_step, 3] those of the last ones, `recent` the same for
    the checkpoint.
    """

    def __init__(self, strategy, model, config, run_dir, writes=True):
        self.strategy, self.model = strategy, model
        with strategy.scope():  # what replicas use, and nothing else: to make a variable here is a collective
            self.optimizer = Optimizer(config.optimizer, [variable.value for variable in model.trainable_variables])
            self.totals = tf.Variable(tf.zeros([3], tf.float64), trainable=False)
        self.step = tf.Variable(0, dtype=tf.int64, trainable=False)
        self.recent = tf.Variable(tf.zeros([config.log_step, 3], tf.float64), trainable=False)
        self.checkpoints = runs.Checkpoints(
            run_dir,
            config,
            writes,
            model=runs.weights_of(model),
            recent=self.recent,
            optimizer=self.optimizer.tracked(),
            step=self.step,
        )
        self.window = self.recent.numpy()

    def finish_step(self, step):
        self.step.assign(step)
        self.window[step % len(self.window)] = self.totals.numpy()

    def save(self, step):
        self.recent.assign(self.window)
        self.checkpoints.save(step)

    def row(self):
        """The row of the log of this step: means over the window, and the rate that the optimizer used."""
        loss, correct, images = self.window.sum(axis=0)
        return {
            "step": int(self.step),
            "loss/accuracy": correct / images,
            "loss/loss": loss / images,
            "learning_rate": float(self.optimizer.learning_rate.numpy()),
        }


def make_train_step(model, optimizer, totals, config, strategy=None):
    """The graph of a step, from (images [batches * replicas here * batch_size, h, w, c], labels, whether to stop) to
    whether all was finite, the loss of the last update, and whether any worker asked to stop. totals: as in State.

    Losses and gradients are means over all replicas, so that all agree on norm, clipping and finiteness. An update is
    made of each batch, or with --accumulate of the mean of all gradients of the step.
    """
    strategy = strategy or tf.distribute.get_strategy()
    batches = config.batches_per_step
    weights = [variable.value for variable in model.trainable_variables]
    moving = [v.value for v in model.non_trainable_variables if v.dtype == "float32"]  # statistics of batch norm
    with strategy.scope():  # for --accumulate: the mean loss and gradients of the batches so far
        sums = [tf.Variable(tf.zeros_like(v), trainable=False) for v in [0.0, *weights]] if config.accumulate else []

    def start_step():
        totals.assign(tf.zeros_like(totals))
        for variable in sums:
            variable.assign(tf.zeros_like(variable))

    def loss_and_gradients(images, labels):
        images, labels = (replicas.part(values, values.shape[0] // config.batch_size) for values in (images, labels))
        with tf.GradientTape() as tape:
            logits = model(images, training=True)
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
            objective = loss = tf.reduce_mean(losses)
            if config.weight_decay:
                objective += config.weight_decay * tf.add_n([tf.nn.l2_loss(weight) for weight in weights])
        gradients = tape.gradient(objective, weights)
        correct = tf.equal(tf.argmax(logits, axis=1, output_type=labels.dtype), labels)
        sum_of_losses, hits = (tf.reduce_sum(tf.cast(values, tf.float64)) for values in (losses, correct))
        totals.assign_add(tf.stack([sum_of_losses, hits, config.batch_size]))
        return [loss, *gradients]

    def apply(loss_and_gradients):
        loss, *gradients = replicas.mean(loss_and_gradients)
        norm = tf.linalg.global_norm(gradients)
        optimizer.apply(
            tf.cond(norm > runs.CLIP_NORM, lambda: [g * (runs.CLIP_NORM / norm) for g in gradients], lambda: gradients)
        )
        return tf.math.is_finite(loss) & tf.math.is_finite(norm), loss

    def update(images, labels):
        return apply(loss_and_gradients(images, labels))

    def accumulate(images, labels):
        for variable, value in zip(sums, loss_and_gradients(images, labels)):
            variable.assign_add(value / batches)

    def update_by_sums():
        return apply([variable.read_value() for variable in sums])

    def end_step(stop):
        """Average what the replicas have apart: so it is the same in all of them between two steps."""
        if strategy.num_replicas_in_sync == 1:
            return stop
        stop, *means = replicas.mean([tf.cast(stop, tf.float64), totals.read_value()])
        means += replicas.mean([variable.read_value() for variable in moving]) if moving else []
        for variable, value in zip([totals, *moving], means):
            variable.assign(value)
        return stop > 0

    def in_replicas(function, *arguments):
        results = strategy.run(function, arguments)
        return tf.nest.map_structure(lambda value: strategy.experimental_local_results(value)[0], results)

    @tf.function(jit_compile=config.jit_compile or None)
    def train_step(images, labels, stop=False):
        in_replicas(start_step)
        if batches == 1:
            finite, loss = in_replicas(update, images, labels)
            return finite, loss, in_replicas(end_step, stop)
        images = tf.reshape(images, [batches, images.shape[0] // batches, *images.shape[1:]])
        labels = tf.reshape(labels, [batches, labels.shape[0] // batches])
        if config.accumulate:
            for i in tf.range(batches):
                in_replicas(accumulate, images[i], labels[i])
            finite, loss = in_replicas(update_by_sums)
        else:
            finite, loss = True, 0.0
            for i in tf.range(batches):
                if finite:  # nothing is learned after the update that failed
                    finite, loss = in_replicas(update, images[i], labels[i])
        return finite, loss, in_replicas(end_step, stop)

    return train_step


# ----------------------------------------------------------------------------------------------------- the loop


class Stopped(Exception):
    """A signal came in the middle of a test."""


class Interruption:
    """A signal to stop is remembered, so that the run can save; a second one, or one before there is anything to save,
    ends the process at once.

    Python runs its handlers between two calls of TensorFlow, which may take minutes: a thread reads the signals'
    numbers from a pipe, where they arrive at once.
    """

    def __init__(self, alone):
        self.signal, self.worth_saving, self.alone = None, False, alone
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing)
        threading.Thread(target=self.watch, args=(reading,), daemon=True).start()
        for number in STOPPING:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup does with SIGHUP
                signal.signal(number, lambda *_: None)

    def watch(self, pipe):
        while True:
            number = os.read(pipe, 1)[0]
            if number not in STOPPING:
                continue
            if not self.worth_saving or (self.signal and number != signal.SIGHUP):  # which may come twice
                print(f"stopped by {signal.Signals(number).name}", file=sys.stderr, flush=True)
                os._exit(128 + number)
            self.signal = number
            print(
                f"{signal.Signals(number).name}: stopping as soon as this step is saved; once more stops at once",
                flush=True,
            )

    def check(self, batches):
        """The batches, unless a signal comes between two of them: Stopped. Several workers test to the end."""
        for batch in batches:
            if self.signal and self.alone:
                raise Stopped
            yield batch

    def stops(self, agreed):
        """Whether this step is the last: a signal came, or, with several workers, all agreed in it that one did."""
        return agreed or (self.alone and self.signal)


def train_run(run_dir, config, splits, state, interruption):
    """The training loop, from the step of `state` to the last one, or to the one in which a signal comes."""
    train, test = splits
    who, step = replicas.workers(), int(state.step)
    train_step = make_train_step(state.model, state.optimizer, state.totals, config, state.strategy)
    batches = create_input_ops(
        train,
        config.max_batch_size,
        True,
        config.augment,
        config.seed,
        first_step=step,
        last_step=config.max_training_step,
        rows=replicas.rows_of(who, config.max_batch_size, config.batches_per_step),
    )
    test_here = test.subset(replicas.test_share(who, len(test)), is_train=False)
    test_batches = create_input_ops(test_here, evaler.EVALUATION_BATCH, is_training=False)
    predict = evaler.make_predictor(state.model, state.strategy)
    join = replicas.make_join(state.strategy, who, len(test))
    log = Log(run_dir, config, test, step, who.is_chief)

    def test_and_log(images=None):
        row = state.row()
        if log.test_due(step):
            with log.testing():
                outputs = join(evaler.predict_all(predict, interruption.check(test_batches)))
                result = evaler.summarize(*outputs, test.labels, test.num_classes)
            row |= {f"test_loss/{name}": result[name] for name in evaler.SCALARS if name in result}
        log.write(row, images)

    done = False
    with contextlib.suppress(Stopped):  # by a signal in a test: its row is written when the run goes on
        if log.owes(step):
            test_and_log()
        for images, labels in batches:
            state.optimizer.learning_rate.assign(learning_rate_at(step, config))
            finite, loss, stop = train_step(images, labels, tf.constant(interruption.signal is not None))
            if not finite:
                stop_at_nan(log, run_dir, step + 1, float(loss), state)
            step += 1
            state.finish_step(step)
            log.stepped(step)
            interruption.worth_saving = True
            if log.due(step):
                test_and_log(images)
            if state.checkpoints.due(step):
                with log.paused():
                    state.save(step)
            if interruption.stops(stop):
                break
        done = step == config.max_training_step
    if state.checkpoints.saved != step:
        state.save(step)
    log.close()
    return done


def stop_at_nan(log, run_dir, step, loss, state):
    """End a run that diverged: its log says so, and its last checkpoint stays."""
    log.add({"step": step, "diverged": True})
    log.close()
    last = f"the last good checkpoint is {state.checkpoints.newest()}"
    if not state.checkpoints.newest():
        last = f"{run_dir} has no checkpoint yet"
    raise WorldError(
        f"training diverged at step {step}: loss {loss}, or its gradient, is not finite at the learning "
        f"rate {float(state.optimizer.learning_rate.numpy()):g}; {last}; start anew with a smaller "
        f"--learning_rate"
    )


# --------------------------------------------------------------------------------------------------- the script


def build_model(config, train):
    """The network of a run, with the weights that --checkpoint names; UserError where it cannot be trained so."""
    model = evaler.build_model(config, network_image_shape(train), train.num_classes)
    for layer in model.layers:
        if isinstance(layer, (ops.BatchNorm, keras.layers.BatchNormalization)):
            positions = layer.input.shape[1:-1]
            together = config.batch_size * (config.num_replicas if config.sync_batch_norm else 1)
            if None not in positions and together * math.prod(positions) < 2:
                raise UserError(
                    f"--batch_size {config.batch_size} is too small for batch norm in {model.name}: "
                    f"{layer.name} sees 1 position of each image, a single value per channel; use a larger "
                    f"batch, larger images or another --norm_type"
                )
            layer.freeze_statistics = config.freeze_batch_norm
    return model


def start_from_weights(model, config, splits):
    """Give the network the weights of --checkpoint, and say what was not taken.

    Norms of another kind are converted (ops.match_moments over CONVERSION_IMAGES training images), and the accuracy
    that this leaves is said.
    """
    train, test = splits
    other, data = runs.read_config(runs.run_dir_of(config.checkpoint))
    converted = runs.check_convertible(config, other, config.checkpoint)
    source = evaler.build_model(other, network_image_shape(train), data["num_classes"])
    path, _ = runs.load_weights(source, config.checkpoint)
    fresh = runs.take_weights(model, source, data.get("class_names", train.class_names) == train.class_names)
    print(f"starting from the weights of {path}" + (f"; new: {', '.join(fresh)}" if fresh else ""), flush=True)
    if converted:
        batches = create_input_ops(train, min(len(train), CONVERSION_IMAGES), True, seed=config.seed, last_step=1)
        ops.match_moments(model, source, next(iter(batches))[0])
        tested = create_input_ops(test, evaler.EVALUATION_BATCH, is_training=False)
        result = evaler.evaluate(evaler.make_predictor(model), tested, test.labels, test.num_classes)
        print(
            f"{other.norm_type} norm became {config.norm_type} norm: accuracy {100 * result['accuracy']:.2f} % before "
            f"training",
            flush=True,
        )


def identity(config, train, test, run_dir):
    """What all workers of a run must have in common."""
    settings = dataclasses.asdict(config) | runs.describe_data(train, test) | {"source": runs.source()}
    settings |= {"--resume": run_dir and run_dir.resolve().name, "TF_CONFIG": replicas.workers().addresses}
    return {name: value for name, value in settings.items() if name not in ("data_dir", "train_dir", "worker_timeout")}


def introduce(config, train, test):
    """Say what will be done, before TensorFlow takes seconds to start."""
    tests = -(-config.max_training_step // config.test_sample_step)
    updates = f"{config.updates_per_step} updates each"
    if config.accumulate:
        updates = f"one update each, of {config.batches_per_step} batches"
    print(
        f"{config.dataset}: {len(train)} train, {len(test)} test images of "
        f"{'x'.join(map(str, network_image_shape(train)))} in {train.num_classes} classes\n"
        f"{config.model}, {config.norm_type} norm: {config.max_training_step} steps of {config.max_batch_size} "
        f"images, in {updates}; {tests} tests. Starting TensorFlow; how long it will "
        f"take is said after two steps",
        flush=True,
    )


def main():
    flags, run_dir = parse_flags()
    if run_dir is None:
        train, test = load_data(flags)
        config = derive(flags, train)
    else:
        config, train, test = reopen(run_dir, flags)
    introduce(config, train, test)
    going_on, who = run_dir is not None, replicas.workers()
    with replicas.met(who, identity(config, train, test, run_dir), config.worker_timeout):
        set_threads(config.batch_size, network_image_shape(train))
        strategy = replicas.start(config.replicas or 1, who)
    interruption = Interruption(alone=len(who.addresses) == 1)
    keras.utils.set_random_seed(config.seed)
    with strategy.scope():
        model = build_model(config, train)
    if config.checkpoint and not going_on:
        start_from_weights(model, config, (train, test))
    if not going_on and who.is_chief:
        run_dir = runs.make_run_dir(config)
        runs.write_config(run_dir, flags, config, runs.describe_data(train, test))
    with runs.lock(run_dir) if who.is_chief else contextlib.nullcontext():
        state = State(strategy, model, config, run_dir, who.is_chief)
        if going_on:
            if who.is_chief:
                runs.drop_after(run_dir, int(state.step))
                runs.extend(run_dir, config)
            print(f"going on at step {int(state.step)} of {config.max_training_step}")
        finish(run_dir, config, (train, test), state, interruption)


def finish(run_dir, config, splits, state, interruption):
    """Train to the last step, and print how it ended; exit code 128 + the signal's number if one came."""
    who = replicas.workers()
    place = run_dir or "RUN_FOLDER_OF_WORKER_0"
    together = f" in each of {config.num_replicas} replicas" if config.num_replicas > 1 else ""
    print(
        f"{state.model.count_params():,} parameters; {config.optimizer}, rate {config.peak_learning_rate:g} at "
        f"batch size {config.batch_size}{together}\nrun folder: {place}",
        flush=True,
    )
    try:
        done = train_run(run_dir, config, splits, state, interruption)
    except (tf.errors.ResourceExhaustedError, tf.errors.OutOfRangeError) as error:
        # TensorFlow's words for a full memory, a full disk, and a file beyond the limit on sizes
        raise WorldError(f"{run_dir}: {error.message}; free some and go on with --resume {run_dir}") from error
    except tf.errors.OpError as error:
        if len(who.addresses) == 1:
            raise
        raise WorldError(
            f"another worker was lost ({type(error).__name__}); start all again with --resume {place}"
        ) from error
    if not done:
        number = interruption.signal or signal.SIGTERM
        print(
            f"stopped by {signal.Signals(number).name} after step {int(state.step)}, which is saved; go "
            f"on with\n  python trainer.py --resume {place}",
            flush=True,
        )
        sys.exit(128 + number)
    print(f"done: {config.max_training_step} steps, run folder {place}")


if __name__ == "__main__":
    run(main)
