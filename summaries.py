"""What a run writes and prints: rows of metrics.jsonl, TensorBoard, lines and a bar on the console, pictures.

log = summaries.Log(run_dir, config, test, first_step=0)
log.stepped(step)
if log.due(step): log.write({"step": step, ...}, images)
"""

import contextlib
import json
import os
import time

import numpy as np
import tensorflow as tf
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tensorboard.plugins.hparams import api as hparams
from tqdm import tqdm

import runs
from config import flags_given
from input_ops import create_input_ops


class Log:
    """The row, the scalars, the line and the bar of each step that asks for them.

    images_per_second counts the seconds of training alone, without those spent in `with log.paused()` and without the
    first step, which traces the graph. Of several workers one writes.
    """

    def __init__(self, run_dir, config, test, first_step, writes=True):
        self.config, self.test, self.first_step, self.steps = config, test, first_step, config.max_training_step
        self.writes, self.path = writes, run_dir and run_dir / "metrics.jsonl"
        self.file = open(self.path if writes else os.devnull, "a")
        self.writer = tf.summary.create_file_writer(str(run_dir)) if writes else tf.summary.create_noop_writer()
        if writes:
            mark_start(self.writer, first_step)
        if writes and first_step == 0:
            with self.writer.as_default(step=0):
                write_hparams(config, flags_given(run_dir))
        self.bar = tqdm(total=self.steps, initial=first_step, unit="step", disable=None if writes else True)
        self.clock, self.timed_steps, self.seconds_per_step = time.perf_counter(), 0, None
        self.seconds_per_test = None

    def test_due(self, step):
        return step % self.config.test_sample_step == 0 or step == self.steps

    def line_due(self, step):
        return step % self.config.log_step == 0 or self.test_due(step)

    def scalars_due(self, step):
        return step % self.config.write_summary_step == 0 or self.test_due(step)

    def due(self, step):
        return self.line_due(step) or self.scalars_due(step)

    def needs_row(self, step):
        """Whether the row of `step` is due and not written: its test was interrupted."""
        return step > 0 and self.due(step) and all(row["step"] != step for row in runs.read_rows(self.path))

    @contextlib.contextmanager
    def paused(self):
        """Seconds that are no training; what TensorBoard has to show is written first."""
        began = time.perf_counter()
        self.writer.flush()
        yield
        self.clock += time.perf_counter() - began

    @contextlib.contextmanager
    def testing(self):
        began = time.perf_counter()
        with self.paused():
            yield
        self.seconds_per_test = time.perf_counter() - began

    def stepped(self, step):
        """Count a step; say after the second one how long all will take."""
        self.bar.update()
        self.timed_steps += 1
        if step == self.first_step + 1:
            self.clock, self.timed_steps = time.perf_counter(), 0
        if step == self.first_step + 2:
            self.seconds_per_step = time.perf_counter() - self.clock
            self.say(f"about {duration(self.seconds_left(step))} to go, tests included")

    def seconds_left(self, step):
        tests = self.steps // self.config.test_sample_step - step // self.config.test_sample_step
        tests += self.steps % self.config.test_sample_step > 0 and step < self.steps
        guess = self.seconds_per_step * len(self.test) / self.config.max_batch_size / 3  # forward alone
        return (self.steps - step) * self.seconds_per_step + tests * (self.seconds_per_test or guess)

    def say(self, line):
        if self.writes:
            self.bar.write(line) if not self.bar.disable else print(line, flush=True)

    def write(self, row, images):
        """Write the row of a step, with pictures of its images [B, h, w, c] where it was tested."""
        step, seconds = row["step"], time.perf_counter() - self.clock
        if self.timed_steps:
            self.seconds_per_step = seconds / self.timed_steps
            row["images_per_second"] = self.timed_steps * self.config.max_batch_size / seconds
        self.clock, self.timed_steps = time.perf_counter(), 0
        with self.paused():
            self.add(row)
            if self.scalars_due(step):
                self.write_summaries(row, images)
            if self.line_due(step):
                self.say(self.line(row))

    def add(self, row):
        """Append a row to metrics.jsonl."""
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def write_summaries(self, row, images):
        with self.writer.as_default(step=row["step"]):
            for tag, value in row.items():
                if tag != "step":
                    tf.summary.scalar(tag, value)
            if self.test_due(row["step"]) and images is not None:
                tf.summary.image("img/image", image_grid(images.numpy()))
                tests, _ = next(iter(create_input_ops(self.test, min(64, len(self.test)), is_training=False)))
                tf.summary.image("test_img/image", image_grid(tests.numpy()))

    def line(self, row):
        line = (
            f"step {row['step']:>{len(str(self.steps))}}/{self.steps}  loss {row['loss/loss']:.4f}  "
            f"accuracy {100 * row['loss/accuracy']:6.2f} %  rate {row['learning_rate']:.2e}"
        )
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


def mark_start(writer, first_step):
    """Tell TensorBoard that a session starts here: it drops what an earlier one wrote of the steps that follow."""
    start = tf.compat.v1.SessionLog(status=tf.compat.v1.SessionLog.START)
    event = tf.compat.v1.Event(step=first_step + 1 if first_step else 0, wall_time=time.time(), session_log=start)
    tf.raw_ops.ImportEvent(writer=writer._resource, event=event.SerializeToString())


def duration(seconds: float) -> str:
    """'h:mm:ss'."""
    seconds = int(seconds)
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def write_hparams(config, given):
    """TensorBoard's HParams table: the main settings, and each other flag that was given, against test accuracy."""
    settings = {
        "dataset": config.dataset,
        "norm_type": config.norm_type,
        "batch_size": config.batch_size,
        "learning_rate": config.base_learning_rate,
        "model": config.model,
        "seed": config.seed,
        "optimizer": config.optimizer,
        "weight_standardization": config.weight_standardization,
    }
    settings |= {name: value for name, value in given.items() if name not in settings}
    hparams.hparams_config(
        hparams=[hparams.HParam(name) for name in settings],
        metrics=[
            hparams.Metric("test_loss/accuracy", display_name="test accuracy"),
            hparams.Metric("test_loss/loss", display_name="test loss"),
        ],
    )
    hparams.hparams(settings)


# Pictures.


def to_uint8(images):
    """Images of uint8, or of floats of any range, as uint8 for showing."""
    images = np.asarray(images)
    if images.dtype == np.uint8:
        return images
    low, high = min(0.0, float(images.min())), max(1.0, float(images.max()))
    return np.round((images - low) / (high - low) * 255).astype(np.uint8)


def image_grid(images, most=64):
    """The first images of [N, h, w, c] side by side in one picture [1, H, W, 1 or 3], for TensorBoard."""
    images = to_uint8(images[:most])
    images = images if images.shape[-1] in (1, 3) else images[..., :1]
    count, height, width, channels = images.shape
    columns = int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    grid = np.zeros((rows * columns, height, width, channels), np.uint8)
    grid[:count] = images
    grid = grid.reshape(rows, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
    return grid.reshape(1, rows * height, columns * width, channels)


def confusion_image(confusion, class_names):
    """The confusion matrix, each row as shares of its label, as a picture [1, H, W, 3] uint8."""
    figure = Figure(figsize=(7, 6.5), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    figure.colorbar(axes.imshow(shares, cmap="Blues", vmin=0, vmax=1), label="share of the label's images")
    axes.set(xlabel="prediction", ylabel="label", title=f"{confusion.sum()} images")
    if len(class_names) <= 20:
        ticks = range(len(class_names))
        axes.set_xticks(ticks, class_names, rotation=45, ha="right")
        axes.set_yticks(ticks, class_names)
        for label, prediction in np.ndindex(*confusion.shape):
            if confusion[label, prediction]:
                axes.text(
                    prediction,
                    label,
                    confusion[label, prediction],
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if shares[label, prediction] > 0.5 else "black",
                )
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[None, ..., :3]


def draw_mistakes(path, split, result, most=25):
    """Save the images that were most wrong as a PNG, each with its label, prediction and loss."""
    wrong = np.flatnonzero(result["predictions"] != split.labels)
    worst = wrong[np.argsort(-result["losses"][wrong], kind="stable")][:most]
    figure = Figure(figsize=(10, 11), layout="constrained")
    figure.suptitle(f"{split.name}: the {len(worst)} worst of {len(wrong)} mistakes in {len(split)} images")
    images = split.read(worst) if len(worst) else []
    if split.encoded:
        images = [tf.io.decode_jpeg(jpeg, channels=3).numpy() for jpeg in images]
    for place, (position, image) in enumerate(zip(worst, images), 1):
        axes = figure.add_subplot(5, 5, place)
        shown = to_uint8(image)
        axes.imshow(shown if shown.shape[-1] == 3 else shown[..., 0], cmap="gray")
        label = split.class_names[split.labels[position]]
        prediction = split.class_names[result["predictions"][position]]
        axes.set_title(f"{label:.24}, not\n{prediction:.24} ({result['losses'][position]:.1f})", fontsize=8)
        axes.axis("off")
    figure.savefig(path, dpi=100)
