"""Train a classifier with the normalization and the batch size of your choice.

    python trainer.py --dataset CIFAR10 --norm_type group --batch_size 2
    python trainer.py --dataset MNIST --norm_type batch --model convnet --max_training_step 500
    python trainer.py --resume train_dir/RUN                    # go on where a run stopped
    tensorboard --logdir train_dir

A step is max_batch_size images, in max_batch_size / batch_size updates, so that the curves of different batch sizes
share an axis. batch_size is the number of images that batch norm sees.
"""
import contextlib
import functools
import importlib.metadata
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from tqdm import tqdm

import datasets
import download
import evaler
import model as models
from datasets.errors import ArgumentParser, Later, UserError, WorldError, run
from input_ops import AUGMENTATIONS, create_input_ops, network_image_shape

tf, keras, hparams = Later("tensorflow"), Later("keras"), Later("tensorboard.plugins.hparams.api")

CLIP_NORM = 20.0        # gradients are clipped to this global norm, as in the ancestor
LEARNING_RATES = {"adam": 1e-3, "momentum": 0.2}        # at max_batch_size images an update: figure/studies/recipe
SCALING = {"adam": "square root", "momentum": "linear"}     # with the batch size: arXiv 2205.10287 and 1706.02677
FETCHED_ON_FIRST_USE = ("MNIST", "Fashion", "SVHN", "CIFAR10", "Digits")
EPOCHS = {"MNIST": 5, "Fashion": 10, "SVHN": 10, "CIFAR10": 30, "TinyImageNet": 30, "ImageNet": 90, "Digits": 20}
OWN_EPOCHS = 30
PLACES = ("data_dir", "train_dir", "prefix", "resume", "log_step", "write_summary_step")    # no matter to the result
FLIPPED = ("CIFAR10", "Fashion", "TinyImageNet", "ImageNet")        # a mirrored digit is another sign
CHECKPOINTS_KEPT = 3
CHECKPOINT_SECONDS = 600        # a checkpoint at least so often, however long a step takes
ONE_THREAD_PIXELS = 2 ** 14     # 16 images of 32 by 32: up to there one thread an operation was measured to be faster


# ---------------------------------------------------------------------------------------------------- settings


def parse_flags(argv=None):
    parser = ArgumentParser(description="Train a classifier with the normalization and batch size of your choice.")
    parser.add_argument("--dataset", help="MNIST, Fashion, SVHN, CIFAR10, TinyImageNet, ImageNet, Digits or your own")
    parser.add_argument("--prefix", default="default", help="first part of the run folder's name")
    models.add_model_flags(parser)
    parser.add_argument("--batch_size", type=int, help="images an update, all of which batch norm sees together; "
                                                       "by default --max_batch_size")
    parser.add_argument("--max_batch_size", type=int, default=64, help="images a step, a multiple of --batch_size")
    parser.add_argument("--max_training_step", type=int, help="steps to train; by default a number of epochs that "
                                                              "suits the dataset")
    parser.add_argument("--optimizer", choices=("adam", "momentum"),
                        help=f"by default momentum (0.9), for convnet adam; gradients are clipped to the global norm "
                             f"{CLIP_NORM:g}")
    parser.add_argument("--learning_rate", type=float,
                        help="rate at max_batch_size images an update; by default " + " and ".join(
                            f"{rate:g} for {name}" for name, rate in LEARNING_RATES.items()))
    parser.add_argument("--no_adjust_learning_rate", action="store_true",
                        help="do not scale the rate with the batch size: by batch_size / max_batch_size for momentum "
                             "(arXiv 1706.02677), by its square root for adam (arXiv 2205.10287)")
    parser.add_argument("--lr_schedule", choices=("constant", "step", "cosine"), default="cosine",
                        help="constant; step: a tenth after 30, 60 and 90 %% of the steps; cosine: to 0 at the end")
    parser.add_argument("--warmup_steps", type=int, default=0, help="steps of linear increase of the rate at the start")
    parser.add_argument("--weight_decay", type=float, help="L2 penalty on all weights, gamma and beta included; "
                                                           "by default 1e-4 with momentum, 0 with adam")
    parser.add_argument("--augment", choices=AUGMENTATIONS, nargs="?", const="flip+crop",
                        help="cut images at random (for digits and signs), or mirror them too, which --augment alone "
                             "means and is the default for photographs")
    parser.add_argument("--no_augment", action="store_true", help="show the images as they are")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                        help="bfloat16: Keras' mixed precision; statistics, gamma, beta and logits stay float32")
    parser.add_argument("--jit_compile", action="store_true", help="compile the training step with XLA")
    parser.add_argument("--seed", type=int, default=0, help="of initialisation, order, augmentation and dropout")
    parser.add_argument("--validation", type=int, metavar="N",
                        help="hold out N training images, of each class its share and always the same ones, and test "
                             "on them instead of the test split: for choosing settings")
    parser.add_argument("--checkpoint", help="start from the weights of this checkpoint or run folder")
    parser.add_argument("--resume", metavar="RUN_DIR", help="go on with this run, with the flags that it was given")
    parser.add_argument("--log_step", type=int, default=10, help="steps between lines of log and of metrics.jsonl")
    parser.add_argument("--write_summary_step", type=int, default=10, help="steps between TensorBoard scalars")
    parser.add_argument("--test_sample_step", type=int, help="steps between tests on the whole test split; by default "
                                                             "an epoch")
    parser.add_argument("--ckpt_save_step", type=int, default=1000, help="steps between checkpoints")
    parser.add_argument("--data_dir", default=datasets.DATA_DIR, help="where the datasets are")
    parser.add_argument("--train_dir", default="train_dir", help="where to make the run folder")
    flags = parser.parse_args(argv)
    if flags.resume is not None:
        given = [name for name in parser.names_given(argv) if name not in ("resume", "data_dir")]
        if given:
            raise UserError(f"--resume goes on with the flags of the run, so --{given[0]} {getattr(flags, given[0])} "
                            f"has no effect: leave it out, or start a new run")
    else:
        check_flags(flags)
    return flags


def check_flags(flags):
    """Raise UserError for values out of range and flags that contradict each other."""
    if flags.dataset is None:
        raise UserError(f"--dataset is missing: give one of {', '.join(datasets.NAMES)} or your own")
    if not flags.prefix or any(c in flags.prefix for c in "/\\\0") or flags.prefix in (".", ".."):
        raise UserError(f"--prefix {flags.prefix!r} must be a plain name, for it begins the name of a folder")
    models.check_model_flags(flags)
    for name in ("batch_size", "max_batch_size", "max_training_step", "log_step", "write_summary_step",
                 "test_sample_step", "ckpt_save_step", "validation"):
        at_least(flags, name, 1)
    at_least(flags, "warmup_steps", 0)
    at_least(flags, "seed", 0)
    for name in ("learning_rate", "weight_decay"):
        value = getattr(flags, name)
        if value is not None and not (math.isfinite(value) and value >= 0 and (value > 0 or name == "weight_decay")):
            raise UserError(f"--{name} must be a positive number{' or 0' * (name == 'weight_decay')}, not {value}")
    if flags.seed >= 2 ** 31:
        raise UserError(f"--seed must be below 2147483648, not {flags.seed}")
    if flags.batch_size is not None and flags.max_batch_size % flags.batch_size:
        fitting = -(-flags.max_batch_size // flags.batch_size) * flags.batch_size
        raise UserError(f"--batch_size {flags.batch_size} does not divide --max_batch_size {flags.max_batch_size}: a "
                        f"step is max_batch_size images in whole updates; --max_batch_size {fitting} would do")
    evaler.check_path(Path(flags.train_dir) / flags.prefix)
    if flags.augment and flags.no_augment:
        raise UserError("--augment and --no_augment contradict each other: give one of them")
    if flags.max_training_step is not None and flags.warmup_steps > flags.max_training_step:
        raise UserError(f"--warmup_steps {flags.warmup_steps} is more than --max_training_step "
                        f"{flags.max_training_step}")


def at_least(flags, name, low):
    value = getattr(flags, name)
    if value is not None and value < low:
        raise UserError(f"--{name} must be at least {low}, not {value}")


def derive(flags, train):
    """What follows from the flags and the data; after this nothing of the configuration changes."""
    name = flags.model or models.default_model(network_image_shape(train))
    models.check_groups(name, flags)
    optimizer = flags.optimizer or ("adam" if name == "convnet" else "momentum")
    batch_size = flags.batch_size or flags.max_batch_size
    learning_rate = flags.learning_rate or LEARNING_RATES[optimizer]
    if flags.dataset == "ImageNet" and optimizer == "momentum" and flags.learning_rate is None:
        learning_rate = 0.1 * flags.max_batch_size / 256        # arXiv 1706.02677, as arXiv 1803.08494
    scaling = "none" if flags.no_adjust_learning_rate else SCALING[optimizer]
    share = batch_size / flags.max_batch_size
    scale = {"none": 1.0, "linear": share, "square root": math.sqrt(share)}[scaling]
    weight_decay = flags.weight_decay if flags.weight_decay is not None else {"adam": 0.0, "momentum": 1e-4}[optimizer]
    epoch = math.ceil(len(train) / flags.max_batch_size)
    steps = flags.max_training_step or EPOCHS.get(flags.dataset, OWN_EPOCHS) * epoch
    if flags.warmup_steps > steps:
        raise UserError(f"--warmup_steps {flags.warmup_steps} is more than the {steps} steps of this run")
    return {
        "model": name, "groups": flags.groups or models.default_groups(name), "batch_size": batch_size,
        "updates_per_step": flags.max_batch_size // batch_size, "optimizer": optimizer,
        "base_learning_rate": learning_rate, "learning_rate_scaling": scaling,
        "peak_learning_rate": learning_rate * scale, "weight_decay": weight_decay,
        # A step forgets a tenth of the statistics, in however many updates: every batch size averages over the same
        # number of images.
        "batch_norm_momentum": 0.9 ** share,
        "augment": flags.augment or ("flip+crop" if flags.dataset in FLIPPED and not flags.no_augment else None),
        "max_training_step": steps, "test_sample_step": flags.test_sample_step or epoch,
    }


def learning_rate_at(step, config):
    """The rate of step number `step`, counted from 0."""
    flags, derived = config["flags"], config["derived"]
    peak, steps, warmup = derived["peak_learning_rate"], derived["max_training_step"], flags["warmup_steps"]
    if step < warmup:
        return peak * (step + 1) / warmup
    if flags["lr_schedule"] == "step":
        return peak * 0.1 ** sum(step >= share * steps for share in (0.3, 0.6, 0.9))
    if flags["lr_schedule"] == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
    return peak


# ---------------------------------------------------------------------------------------------------- the step


def set_threads(images, image_shape):
    """One thread an operation where an update holds few pixels, before TensorFlow starts.

    Waking a second thread takes longer than half of a small operation, and the two cores find more work in
    operations that do not depend on each other: the gradients of weights and of inputs, the updates of weights.
    """
    height, width, _ = image_shape
    if height and images * height * width <= ONE_THREAD_PIXELS:
        tf.config.threading.set_intra_op_parallelism_threads(1)


class Optimizer:
    """Adam (arXiv 1412.6980) or SGD with momentum 0.9, by TensorFlow's fused kernels: one operation a variable.

    At small batches the update is a large part of a step, and Keras' optimizers spend a dozen operations a variable.
    """

    def __init__(self, kind, variables):
        self.kind, self.variables_updated = kind, list(variables)
        self.learning_rate = tf.Variable(0.0, trainable=False)
        slots = {"adam": 2, "momentum": 1}[kind]
        self.slots = [[tf.Variable(tf.zeros_like(v), trainable=False) for v in variables] for _ in range(slots)]
        self.beta_powers = [tf.Variable(beta, trainable=False) for beta in (0.9, 0.999)] if kind == "adam" else []

    def state(self):
        """What a checkpoint holds of it."""
        return {"learning_rate": self.learning_rate, "slots": self.slots, "beta_powers": self.beta_powers}

    def apply(self, gradients):
        if self.kind == "momentum":
            for variable, accumulator, gradient in zip(self.variables_updated, *self.slots, gradients):
                tf.raw_ops.ResourceApplyMomentum(var=variable.handle, accum=accumulator.handle, lr=self.learning_rate,
                                                 grad=gradient, momentum=0.9)
            return
        power1, power2 = self.beta_powers
        for variable, m, v, gradient in zip(self.variables_updated, *self.slots, gradients):
            tf.raw_ops.ResourceApplyAdam(
                var=variable.handle, m=m.handle, v=v.handle, beta1_power=power1, beta2_power=power2,
                lr=self.learning_rate, beta1=0.9, beta2=0.999, epsilon=1e-8, grad=gradient)
        power1.assign(power1 * 0.9)
        power2.assign(power2 * 0.999)


def make_train_step(model, optimizer, totals, config):
    """The graph of a step, from (images [max_batch_size, h, w, c], labels) to whether all was finite, and the loss.

    totals [3] float64 sums the losses, the correct predictions and the images, in training mode, until it is read.
    """
    derived = config["derived"]
    updates, batch_size, weight_decay = derived["updates_per_step"], derived["batch_size"], derived["weight_decay"]
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
        optimizer.apply(tf.cond(norm > CLIP_NORM, lambda: [g * (CLIP_NORM / norm) for g in gradients],
                                lambda: gradients))
        correct = tf.equal(tf.argmax(logits, axis=1, output_type=labels.dtype), labels)
        totals.assign_add(tf.stack([tf.reduce_sum(tf.cast(losses, tf.float64)),
                                    tf.reduce_sum(tf.cast(correct, tf.float64)), batch_size]))
        return tf.math.is_finite(loss) & tf.math.is_finite(norm), loss

    @tf.function(jit_compile=config["flags"]["jit_compile"] or None)
    def train_step(images, labels):
        if updates == 1:
            return update(images, labels)
        images = tf.reshape(images, [updates, batch_size, *images.shape[1:]])
        labels = tf.reshape(labels, [updates, batch_size])
        finite, loss = True, 0.0
        for i in tf.range(updates):
            if finite:                          # nothing is learned after the update that failed
                finite, loss = update(images[i], labels[i])
        return finite, loss

    return train_step


# ------------------------------------------------------------------------------------------------- run folders


def make_run_dir(flags, derived):
    """A new folder train_dir/<prefix>-<dataset>_lr_..._bs_..._norm_type_...-<time>, this run's alone."""
    name = (f"{flags.prefix}-{flags.dataset}_lr_{derived['base_learning_rate']:g}_bs_{derived['batch_size']}"
            f"_norm_type_{flags.norm_type}-{time.strftime('%Y%m%d-%H%M%S')}")
    for suffix in [""] + [f"-{i}" for i in range(2, 1000)]:
        path = Path(flags.train_dir) / (name + suffix)
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:         # started in the same second
            if not path.is_dir():
                raise
    raise UserError(f"{flags.train_dir} has 999 run folders called {name}: name another --train_dir")


def describe(flags, derived, train, test):
    """config.json: all that it takes to evaluate or to continue a run."""
    return {
        "flags": {name: value for name, value in vars(flags).items() if name != "resume"} | {
            "data_dir": None if flags.data_dir == datasets.DATA_DIR else str(Path(flags.data_dir).resolve())},
        "derived": derived,
        "data": {"train": len(train), "test": len(test), "image_shape": list(network_image_shape(train)),
                 "num_classes": train.num_classes, "class_names": list(train.class_names),
                 "made_from": train.made_from},
        "versions": {"python": platform.python_version()} | {
            name: importlib.metadata.version(name) for name in ("tensorflow", "keras", "numpy")},
        "machine": {"architecture": platform.machine(), "processor": processor(), "processors": os.cpu_count()},
        "source": source(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def processor():
    """The CPU's name."""
    try:
        names = [line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
        return names[0]
    except (OSError, IndexError):       # not Linux
        return platform.processor()


@functools.cache
def source():
    """The git commit of this code, and whether the tree differs from it; None where there is no git."""
    def git(*words):
        return subprocess.run(["git", "-C", str(Path(__file__).resolve().parent), *words], text=True, check=True,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout.strip()
    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def trim_metrics(path, step):
    """Drop the rows after `step` from metrics.jsonl: the steps that a continued run does again."""
    rows = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept = [row for row in rows if row.endswith("\n") and json.loads(row)["step"] <= step]
    evaler.write_whole(path, "".join(kept))


def trim_events(run_dir, step):
    """Drop the TensorBoard events after `step`, and what a kill left half-written, from a run folder's event files."""
    files = sorted(path for path in run_dir.glob("events.out.tfevents.*") if not path.name.endswith(".evaluation"))
    kept = {}                           # a record that an interrupted trim left in two files counts once
    for path in files:
        try:
            for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
                event = tf.compat.v1.Event.FromString(record)
                if event.step <= step and not event.file_version:
                    kept[record] = None
        except tf.errors.DataLossError:
            pass                        # the end of the file was never written
    if files:
        part = run_dir / "events.part"
        with tf.io.TFRecordWriter(str(part)) as writer:
            writer.write(tf.compat.v1.Event(file_version="brain.Event:2").SerializeToString())
            for record in kept:
                writer.write(record)
        part.replace(files[0])
        for path in files[1:]:
            path.unlink()


def write_hparams(config):
    """TensorBoard's HParams table: the main settings, and each other that is not its default, against test accuracy."""
    flags, derived = config["flags"], config["derived"]
    defaults = vars(parse_flags(["--dataset", flags["dataset"]]))
    settings = {"dataset": flags["dataset"], "norm_type": flags["norm_type"], "batch_size": derived["batch_size"],
                "learning_rate": derived["base_learning_rate"], "model": derived["model"], "seed": flags["seed"],
                "optimizer": derived["optimizer"], "weight_standardization": flags["weight_standardization"]}
    settings |= {name: value for name, value in flags.items()
                 if name not in settings and name in defaults and value != defaults[name] and name not in PLACES}
    hparams.hparams_config(hparams=[hparams.HParam(name) for name in settings],
                           metrics=[hparams.Metric("test_loss/accuracy", display_name="test accuracy"),
                                    hparams.Metric("test_loss/loss", display_name="test loss")])
    hparams.hparams(settings)


class Log:
    """What a run shows: rows of metrics.jsonl, TensorBoard, lines and a bar; and the clock behind them.

    images_per_second counts the seconds of training alone, without those spent in `with log.untimed()`.
    """

    def __init__(self, run_dir, config, step, test):
        settings, derived = config["flags"], config["derived"]
        self.steps, self.step_images, self.test = derived["max_training_step"], settings["max_batch_size"], test
        self.log_step, self.write_step = settings["log_step"], settings["write_summary_step"]
        self.test_step = derived["test_sample_step"]
        self.path = run_dir / "metrics.jsonl"
        self.file = open(self.path, "a")
        self.writer = tf.summary.create_file_writer(str(run_dir))
        if step == 0:
            with self.writer.as_default(step=0):
                write_hparams(config)
        self.bar = tqdm(total=self.steps, initial=step, unit="step", disable=None)
        self.first_step, self.clock, self.timed_images, self.seconds_per_step = step, time.perf_counter(), 0, None
        self.seconds_per_test = None

    def say(self, line):
        self.bar.write(line) if not self.bar.disable else print(line, flush=True)

    @contextlib.contextmanager
    def untimed(self):
        began = time.perf_counter()
        yield
        self.clock += time.perf_counter() - began

    def test_due(self, step):
        return step % self.test_step == 0 or step == self.steps

    def due(self, step):
        return step % self.log_step == 0 or step % self.write_step == 0 or self.test_due(step)

    def owes(self, step):
        """Whether the row of `step` is due and not written: its test was interrupted."""
        rows = self.path.read_text().splitlines()
        return step > 0 and self.due(step) and not (rows and json.loads(rows[-1])["step"] == step)

    def stepped(self, step):
        self.bar.update()
        if step == self.first_step + 1:         # it traced the graph: it is not timed
            self.clock, self.timed_images = time.perf_counter(), 0
            return
        self.timed_images += self.step_images
        if step == self.first_step + 2:
            self.seconds_per_step = time.perf_counter() - self.clock
            self.say(f"about {duration(self.seconds_left(step))} to go, tests included")

    def seconds_left(self, step):
        tests = sum(self.test_due(s) for s in range(step + 1, self.steps + 1))
        guess = self.seconds_per_step * len(self.test) / self.step_images / 3         # forward alone
        return (self.steps - step) * self.seconds_per_step + tests * (self.seconds_per_test or guess)

    def write(self, row, images):
        """Write the row of a step, with pictures of its images [B, h, w, c] where it was tested."""
        step, seconds = row["step"], time.perf_counter() - self.clock
        if self.timed_images:
            row["images_per_second"] = self.timed_images / seconds
            self.seconds_per_step = seconds / self.timed_images * self.step_images
        self.clock, self.timed_images = time.perf_counter(), 0
        with self.untimed():
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
            if step % self.write_step == 0 or self.test_due(step):
                self.write_summaries(row, images)
            if step % self.log_step == 0 or self.test_due(step):
                self.say(self.line(row))

    def write_summaries(self, row, images):
        with self.writer.as_default(step=row["step"]):
            for tag, value in row.items():
                if tag != "step":
                    tf.summary.scalar(tag, value)
            if self.test_due(row["step"]) and images is not None:
                tf.summary.image("img/image", evaler.image_grid(images.numpy()))
                tests, _ = next(iter(create_input_ops(self.test, min(64, len(self.test)), is_training=False)))
                tf.summary.image("test_img/image", evaler.image_grid(tests.numpy()))

    def line(self, row):
        line = (f"step {row['step']:>{len(str(self.steps))}}/{self.steps}  loss {row['loss/loss']:.4f}  "
                f"accuracy {100 * row['loss/accuracy']:6.2f} %  rate {row['learning_rate']:.2e}")
        if "images_per_second" in row:
            line += f"  {row['images_per_second']:7.1f} images/s  {duration(self.seconds_left(row['step']))} left"
        if "test_loss/accuracy" in row:
            line += f"  TEST accuracy {100 * row['test_loss/accuracy']:.2f} %"
            if "test_loss/top5_accuracy" in row:
                line += f"  top-5 {100 * row['test_loss/top5_accuracy']:.2f} %"
            line += f"  loss {row['test_loss/loss']:.4f}"
        return line

    def close(self):
        self.bar.close()
        self.writer.close()
        self.file.close()


def duration(seconds):
    seconds = int(seconds)
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


# -------------------------------------------------------------------------------------------------- the script


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
            print(f"{signal.Signals(number).name}: stopping as soon as this step is saved; once more stops at once",
                  flush=True)

    def check(self, batches):
        """The batches, unless a signal comes between two of them: Stopped."""
        for batch in batches:
            if self.signal:
                raise Stopped
            yield batch


def load_data(flags):
    name = flags.dataset
    if name in FETCHED_ON_FIRST_USE and not datasets.is_prepared(name, flags.data_dir):
        print(f"{name} is not in {flags.data_dir} yet: preparing it first", flush=True)
        download.prepare(name, flags.data_dir)
    return datasets.create_default_splits(name, flags.data_dir, validation=flags.validation)


def open_run(flags):
    """Make a new run folder, or open the one to resume; returns (run_dir, config, train, test)."""
    if flags.resume is None:
        train, test = load_data(flags)
        derived = derive(flags, train)
        config = describe(flags, derived, train, test)
        return None, config, train, test
    run_dir = Path(flags.resume)
    config = evaler.read_config(run_dir)
    data_dir = flags.data_dir
    if data_dir == datasets.DATA_DIR:                   # None: the run's data were in the default place, too
        data_dir = config["flags"]["data_dir"] or data_dir
    train, test = datasets.create_default_splits(config["flags"]["dataset"], data_dir,
                                                 validation=config["flags"].get("validation"))
    for split, data in (("train", train), ("test", test)):
        if len(data) != config["data"][split]:
            raise UserError(f"{run_dir} was trained with {config['data'][split]} {split} images, but "
                            f"{data_dir} has {len(data)} now: the data changed")
    return run_dir, config, train, test


def train_run(run_dir, config, train, test, model, optimizer, totals, done, manager, interruption):
    """The training loop: from the step that `done` holds to the last."""
    settings, derived = config["flags"], config["derived"]
    step, steps = int(done), derived["max_training_step"]
    train_step = make_train_step(model, optimizer, totals, config)
    predict = evaler.make_predictor(model)
    tests = create_input_ops(test, evaler.EVALUATION_BATCH, is_training=False)
    batches = create_input_ops(train, settings["max_batch_size"], True, derived["augment"], settings["seed"],
                               first_step=step, last_step=steps)
    log = Log(run_dir, config, step, test)
    saved = time.monotonic()

    def write_row(images):
        row = {"step": step, **training_row(totals, optimizer)}
        if log.test_due(step):
            with log.untimed():
                began = time.perf_counter()
                result = evaler.evaluate(predict, interruption.check(tests), test.labels, test.num_classes)
                log.seconds_per_test = time.perf_counter() - began
            row |= {f"test_loss/{name}": result[name] for name in ("accuracy", "top5_accuracy", "loss")
                    if name in result}
        log.write(row, images)
        totals.assign(tf.zeros_like(totals))

    if log.owes(step):
        write_row(None)
    for images, labels in batches:
        optimizer.learning_rate.assign(learning_rate_at(step, config))
        finite, loss = train_step(images, labels)
        if not finite:
            log.file.write(json.dumps({"step": step + 1, "diverged": True}) + "\n")
            log.close()
            stop_at_nan(run_dir, step + 1, float(loss), float(optimizer.learning_rate), manager)
        step += 1
        done.assign(step)
        log.stepped(step)
        interruption.worth_saving = True
        try:
            if log.due(step):
                write_row(images)
        except Stopped:
            pass                                # the row is written when the run goes on
        if (step % settings["ckpt_save_step"] == 0 or step == steps or interruption.signal
                or time.monotonic() - saved > CHECKPOINT_SECONDS):
            with log.untimed():
                log.writer.flush()
                manager.save(checkpoint_number=step)
            saved = time.monotonic()
        if interruption.signal and (step < steps or log.owes(step)):
            log.close()
            print(f"stopped by {signal.Signals(interruption.signal).name} after step {step}, which is saved; "
                  f"go on with\n  python trainer.py --resume {run_dir}", flush=True)
            sys.exit(128 + interruption.signal)
    log.close()
    print(f"done: {steps} steps, run folder {run_dir}")


def training_row(totals, optimizer):
    """The means over the steps since the last row, in training mode, and the rate that the optimizer used."""
    loss, correct, images = totals.numpy()
    return {"loss/accuracy": correct / images, "loss/loss": loss / images,
            "learning_rate": float(optimizer.learning_rate)}


def stop_at_nan(run_dir, step, loss, rate, manager):
    last = f"the last good checkpoint is {manager.latest_checkpoint}"
    if not manager.latest_checkpoint:
        last = f"{run_dir} has no checkpoint yet"
    raise WorldError(f"training diverged at step {step}: loss {loss}, or its gradient, is not finite at the learning "
                     f"rate {rate:g}; {last}; start anew with a smaller --learning_rate")


def check_batch_norm(model, batch_size):
    """Raise UserError if a batch norm would see one value a channel, which it turns into 0."""
    for layer in model.layers:
        if isinstance(layer, (evaler.ops.BatchNorm, keras.layers.BatchNormalization)):
            positions = layer.input.shape[1:-1]
            if None not in positions and batch_size * math.prod(positions) < 2:
                raise UserError(f"--batch_size {batch_size} is too small for batch norm in {model.name}: {layer.name} "
                                f"sees 1 position of each image, a single value per channel; use a larger batch, "
                                f"larger images or another --norm_type")


def main():
    flags = parse_flags()
    run_dir, config, train, test = open_run(flags)
    settings, derived = config["flags"], config["derived"]
    steps = derived["max_training_step"]
    print(f"{settings['dataset']}: {len(train)} train, {len(test)} test images of "
          f"{'x'.join(map(str, network_image_shape(train)))} in {train.num_classes} classes\n"
          f"{derived['model']}, {settings['norm_type']} norm: {steps} steps of {settings['max_batch_size']} images, in "
          f"{derived['updates_per_step']} updates each; {-(-steps // derived['test_sample_step'])} tests. Starting "
          f"TensorFlow; how long it will take is said after two steps", flush=True)
    set_threads(derived["batch_size"], network_image_shape(train))
    keras.utils.set_random_seed(settings["seed"])
    model = evaler.build_model(config, network_image_shape(train), train.num_classes)
    check_batch_norm(model, derived["batch_size"])
    if settings["checkpoint"]:
        evaler.check_same_network(config, settings["checkpoint"])
        path, _ = evaler.load_weights(model, settings["checkpoint"])
        print(f"starting from the weights of {path}")
    optimizer = Optimizer(derived["optimizer"], [variable.value for variable in model.trainable_variables])
    totals = tf.Variable(tf.zeros([3], tf.float64), trainable=False)
    done = tf.Variable(0, dtype=tf.int64, trainable=False)
    if run_dir is None:
        run_dir = make_run_dir(flags, derived)
        evaler.write_whole(run_dir / "config.json", json.dumps(config, indent=1) + "\n")
    checkpoint = tf.train.Checkpoint(model=evaler.weights_of(model), optimizer=optimizer.state(), totals=totals,
                                     step=done)
    manager = tf.train.CheckpointManager(checkpoint, str(run_dir), CHECKPOINTS_KEPT, checkpoint_name="model")
    if manager.latest_checkpoint:
        checkpoint.restore(manager.latest_checkpoint).assert_consumed()
    if flags.resume:
        for leftover in run_dir.glob("model-*temp*"):       # of a checkpoint whose writing was killed
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        trim_metrics(run_dir / "metrics.jsonl", int(done))
        trim_events(run_dir, int(done) or -1)
        print(f"going on at step {int(done)} of {steps}")
    print(f"{model.count_params():,} parameters; {derived['optimizer']}, rate {derived['peak_learning_rate']:g} at "
          f"batch size {derived['batch_size']}\nrun folder: {run_dir}", flush=True)
    try:
        train_run(run_dir, config, train, test, model, optimizer, totals, done, manager, Interruption())
    except (tf.errors.ResourceExhaustedError, tf.errors.OutOfRangeError) as error:
        # TensorFlow's words for a full memory, a full disk, and a file beyond the limit on sizes
        raise WorldError(f"{run_dir}: {error.message}; free some and go on with --resume {run_dir}") from error


if __name__ == "__main__":
    run(main)
