"""The output of a run: rows of metrics.jsonl, TensorBoard summaries, console lines, a progress bar, and pictures.

log = summaries.Log(run_dir, config, train, test, first_step=0)
log.stepped(step)
if log.due(step): log.write({"step": step, ...}, images)
"""

import contextlib
import datetime
import json
import os
import threading
import time
import warnings

import numpy as np
import tensorflow as tf
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tensorboard.plugins.hparams import api as hparams
from tqdm import tqdm

import runs
from command import save_figure
from input_ops import create_input_ops

FIRST_TAGS = {"accuracy/test": "test_loss/accuracy", "accuracy/training": "loss/accuracy"}  # TensorBoard's first cards
SHOWN_IMAGES = 64  # in a picture
MAX_SILENCE = 60  # without a progress bar, print a row if the last line is older than this many seconds

warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # of class names


class Log:
    """Writes the row and the scalars of each step that is due, prints a line at each test, and moves the progress bar.

    images_per_second counts only the time of training: not the time inside `with log.paused()`, and not the first step,
    which traces the graph.

    Args:
        run_dir: the run folder, or None in a worker that does not write.
        config, train, test: of the run.
        first_step: the number of steps done before.
        writes: whether this process writes and prints; with several workers, only the chief does.
        batches_done: a function that returns the number of finished batches in the current step.
    """

    def __init__(self, run_dir, config, train, test, first_step, writes=True, batches_done=lambda: 0):
        self.config, self.first_step, self.steps = config, first_step, config.max_training_step
        self.num_test_images, self.shown = len(test), test.subset(np.arange(min(SHOWN_IMAGES, len(test))))
        self.epoch = -(-len(train) // config.max_batch_size)  # in steps
        self.in_epochs = self.steps % self.epoch == 0 and config.test_sample_step % self.epoch == 0
        self.writes, self.path = writes, run_dir and run_dir / "metrics.jsonl"
        self.file = open(self.path if writes else os.devnull, "a")
        self.writer = tf.summary.create_file_writer(str(run_dir)) if writes else tf.summary.create_noop_writer()
        if writes:
            mark_start(self.writer, first_step)
        if writes and first_step == 0:
            with self.writer.as_default(step=0):
                write_hparams(config, run_dir.name)
        self.batches, self.batches_done = config.batches_per_step, batches_done
        total, done = self.steps * self.batches, first_step * self.batches
        self.bar = tqdm(total=total, initial=done, unit="batch", disable=None if writes else True)
        self.closed = threading.Event()
        if not self.bar.disable:
            threading.Thread(target=self.move_bar, daemon=True).start()
        self.clock, self.timed_steps, self.seconds_per_step = time.perf_counter(), 0, None
        self.seconds_per_test, self.printed_at, self.done = None, time.monotonic(), first_step

    def test_due(self, step):
        return step % self.config.test_sample_step == 0 or step == self.steps

    def log_step_due(self, step):
        return step % self.config.log_step == 0 or self.test_due(step)

    def scalars_due(self, step):
        return step % self.config.write_summary_step == 0 or self.test_due(step)

    def due(self, step):
        return self.log_step_due(step) or self.scalars_due(step)

    def needs_row(self, step):
        """Whether the row of `step` is due but missing, because its test was interrupted."""
        return step > 0 and self.due(step) and all(row["step"] != step for row in runs.read_rows(self.path))

    @contextlib.contextmanager
    def paused(self):
        """Exclude the time of the block from the training time; TensorBoard's events are flushed first."""
        start = time.perf_counter()
        self.writer.flush()
        yield
        self.clock += time.perf_counter() - start

    @contextlib.contextmanager
    def testing(self):
        start = time.perf_counter()
        with self.paused():
            yield
        self.seconds_per_test = time.perf_counter() - start

    def move_bar(self):
        """Move the bar every second in a thread of its own, because a step may take a minute."""
        while not self.closed.wait(1):
            self.bar.n = self.done * self.batches + self.batches_done() % self.batches
            self.bar.refresh()

    def stepped(self, step):
        """Count a step; after the second one print the expected time of an epoch, and the time left."""
        self.done = step
        self.bar.update(step * self.batches - self.bar.n)
        self.timed_steps += 1
        if step == self.first_step + 1:
            self.clock, self.timed_steps = time.perf_counter(), 0
        if step == self.first_step + 2:
            self.seconds_per_step = time.perf_counter() - self.clock
            epoch = as_time(self.epoch * self.seconds_per_step)
            self.print(f"an epoch takes about {epoch}; {as_time(self.seconds_left(step))} left, tests included")

    def seconds_left(self, step):
        tests = self.steps // self.config.test_sample_step - step // self.config.test_sample_step
        if self.steps % self.config.test_sample_step and step < self.steps:
            tests += 1  # after the last step
        guess = self.seconds_per_step * self.num_test_images / self.config.max_batch_size / 3  # forward pass only
        return (self.steps - step) * self.seconds_per_step + tests * (self.seconds_per_test or guess)

    def print(self, line):
        self.printed_at = time.monotonic()
        if self.writes:
            self.bar.write(line) if not self.bar.disable else print(line)

    def write(self, row, images):
        """Write the row of a step, and after a test also pictures of the step's images [B, h, w, c]."""
        step, seconds = row["step"], time.perf_counter() - self.clock
        if self.timed_steps:
            self.seconds_per_step = seconds / self.timed_steps
            row["images_per_second"] = self.timed_steps * self.config.max_batch_size / seconds
        self.clock, self.timed_steps = time.perf_counter(), 0
        with self.paused():
            self.add(row)
            if self.scalars_due(step):
                self.write_summaries(row, images)
            if self.test_due(step) or (self.bar.disable and time.monotonic() - self.printed_at > MAX_SILENCE):
                self.print(self.line(row))
            elif self.log_step_due(step):
                self.bar.set_postfix_str(f"loss {row['loss/loss']:.3f}, accuracy {100 * row['loss/accuracy']:.1f} %")

    def add(self, row):
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def write_summaries(self, row, images):
        with self.writer.as_default(step=row["step"]):
            for tag, value in row.items():
                if tag != "step":
                    tf.summary.scalar(tag, value)
            for tag, name in FIRST_TAGS.items():
                if name in row:
                    tf.summary.scalar(tag, row[name])
            if self.test_due(row["step"]) and images is not None:
                tf.summary.image("img/image", image_grid(images.numpy()))
                tests, _ = next(iter(create_input_ops(self.shown, SHOWN_IMAGES, is_training=False)))
                tf.summary.image("test_img/image", image_grid(tests.numpy()))

    def line(self, row):
        """The console line of a row, at most 100 columns wide."""
        step, total, unit = row["step"], self.steps, "step"
        if self.in_epochs and step % self.epoch == 0:
            step, total, unit = step // self.epoch, total // self.epoch, "epoch"
        line = f"{unit} {step:>{len(str(total))}}/{total}"
        line += f"  loss {row['loss/loss']:.4f}  accuracy {100 * row['loss/accuracy']:5.2f} %"
        if "test_loss/accuracy" in row:
            line += f"  test {100 * row['test_loss/accuracy']:5.2f} %"
        if "test_loss/top5_accuracy" in row:
            line += f"  top-5 {100 * row['test_loss/top5_accuracy']:5.2f} %"
        if "images_per_second" in row:
            line += f"  {row['images_per_second']:.4g} images/s  {as_time(self.seconds_left(row['step']))} left"
        return line

    def close(self):
        self.closed.set()
        self.bar.close()
        self.writer.close()
        self.file.close()


def mark_start(writer, first_step):
    """Mark a new start after `first_step`, so that TensorBoard ignores older events of later steps."""
    start = tf.compat.v1.SessionLog(status=tf.compat.v1.SessionLog.START)
    event = tf.compat.v1.Event(step=first_step + 1 if first_step else 0, wall_time=time.time(), session_log=start)
    tf.raw_ops.ImportEvent(writer=writer._resource, event=event.SerializeToString())


def print_plan(config, train, test):
    """Print the data, the network and the length of a run."""
    tests = -(-config.max_training_step // config.test_sample_step)
    updates = f"{config.updates_per_step} updates each" if config.updates_per_step > 1 else "one update each"
    if config.accumulate:
        updates = f"one update each, of {config.batches_per_step} batches"
    size, norm = "x".join(map(str, train.network_shape)), config.norm.removesuffix("+acc")
    shown = {
        "flip+crop": "flipped and cropped at random (--augment crop: only cropped; --no_augment: unchanged)",
        "crop": "cropped at random, not flipped",
        None: "unchanged (--augment crop: cropped at random; --augment: flipped, too)",
    }
    print(
        f"{config.dataset}: {len(train)} train, {len(test)} test images of {size} in {train.num_classes} classes\n"
        f"training images: {shown[config.augment]}\n"
        f"{config.model}, {norm} norm: {config.max_training_step} steps of {config.max_batch_size} images, "
        f"{updates}; {tests} test{'s' * (tests > 1)}"
    )


def as_time(seconds: float) -> str:
    """The seconds as h:mm:ss."""
    return str(datetime.timedelta(seconds=int(seconds)))


def write_hparams(config, trial):
    """Write the row `trial` of TensorBoard's HParams table: the settings of a run and its accuracies.

    TensorBoard takes the columns from one run, so that every run must declare the same ones. It shows the first five in
    alphabetical order, hence the numbers.
    """
    settings = {
        "1 norm": config.norm,
        "2 batch size": config.batch_size,
        "3 model": config.model,
        "4 rate": config.base_learning_rate,
        "5 seed": config.seed,
        "dataset": config.dataset,
        "steps": config.max_training_step,
        "groups": config.groups if config.norm_type == "group" and config.group_size is None else 0,
        "group_size": config.group_size or 0,
        "max_batch_size": config.max_batch_size,
        "optimizer": config.optimizer,
        "lr_schedule": config.lr_schedule,
        "weight_decay": config.weight_decay,
        "augment": config.augment or "none",
        "dtype": config.dtype,
    }
    metrics = {
        "test_loss/accuracy": "test accuracy",
        "test_loss/loss": "test loss",
        "loss/accuracy": "training accuracy",
        "evaluation_test/accuracy": "accuracy by evaler.py",
    }
    columns = [hparams.Metric(tag, display_name=name) for tag, name in metrics.items()]
    hparams.hparams_config(hparams=[hparams.HParam(name) for name in settings], metrics=columns)
    hparams.hparams(settings, trial_id=trial)


def to_uint8(images):
    """Convert images of uint8, or of floats in any range, to uint8 for display."""
    images = np.asarray(images)
    if images.dtype == np.uint8:
        return images
    low, high = min(0.0, float(images.min())), max(1.0, float(images.max()))
    return np.round((images - low) / (high - low) * 255).astype(np.uint8)


def image_grid(images):
    """Arrange the first SHOWN_IMAGES of [N, h, w, c] in one picture [1, H, W, 1 or 3] for TensorBoard."""
    images = to_uint8(images[:SHOWN_IMAGES])
    images = images if images.shape[-1] in (1, 3) else images[..., :1]
    count, height, width, channels = images.shape
    columns = int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    grid = np.zeros((rows * columns, height, width, channels), np.uint8)
    grid[:count] = images
    grid = grid.reshape(rows, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
    return grid.reshape(1, rows * height, columns * width, channels)


def draw_confusion(confusion, class_names):
    """Draw the confusion matrix [K, K] (label, prediction); colours are shares of a label's images."""
    figure = Figure(figsize=(4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    figure.colorbar(axes.imshow(shares, cmap="Blues", vmin=0, vmax=1))
    axes.set(xlabel="prediction", ylabel="label")
    axes.set_title(f"{confusion.sum()} images; colour: share of the label's images", fontsize=8)
    if len(class_names) <= 20:
        ticks, names = range(len(class_names)), [f"{name:.16}" for name in class_names]
        axes.set_xticks(ticks, names, rotation=45, ha="right", fontsize=7, parse_math=False)  # a name may have a $
        axes.set_yticks(ticks, names, fontsize=7, parse_math=False)
    for label, prediction in np.argwhere(confusion) if len(class_names) <= 10 else ():
        colour = "white" if shares[label, prediction] > 0.5 else "black"
        count = confusion[label, prediction]
        axes.text(prediction, label, count, ha="center", va="center", fontsize=7, color=colour)
    return figure


def as_pixels(figure):
    """Render a figure as a picture [1, H, W, 3] uint8 for TensorBoard, which shows it about 350 pixels wide."""
    figure.set_dpi(100)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[None, ..., :3]


def draw_mistakes(path, split, result, most=25):
    """Save the mistakes with the largest loss as a PNG, each with its id, label, prediction and probability."""
    wrong = np.flatnonzero(result["predictions"] != split.labels)
    worst = wrong[np.argsort(-result["losses"][wrong], kind="stable")][:most]
    figure = Figure(figsize=(11, 12))
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=0.93, hspace=0.3)
    figure.suptitle(f"{split.name}: the {len(worst)} worst of {len(wrong)} mistakes in {len(split)} images", y=0.995)
    images = split.read(worst)
    if split.encoded:
        images = [tf.io.decode_jpeg(jpeg, channels=3).numpy() for jpeg in images]
    for number, (position, image) in enumerate(zip(worst, images), 1):
        axes = figure.add_subplot(5, 5, number, xticks=[], yticks=[])
        shown = to_uint8(image)
        axes.imshow(shown if shown.shape[-1] == 3 else shown[..., 0], cmap="gray")
        label = split.class_names[split.labels[position]]
        prediction = split.class_names[result["predictions"][position]]
        probability = f"{100 * result['probabilities'][position]:.0f} %"
        name = split.ids[position].rpartition("/")[2]
        title = f"{name[-28:]}\ntrue {label:.20}\npredicted {prediction:.14} {probability}"
        axes.set_title(title, fontsize=8, parse_math=False)
        axes.axis("off")
    save_figure(figure, path)
