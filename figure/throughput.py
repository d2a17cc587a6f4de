"""Measure images per second of trainer.py as users run it, its start, and the input pipeline alone.

    python figure/throughput.py                                 # CIFAR-10, convnet: about 25 minutes
    python figure/throughput.py --quick                         # two batch sizes, one round: two minutes
    python figure/throughput.py --model resnet20 --optimizer momentum

Each run is `python trainer.py` with its default input, augmentation, summaries and log; images per second are those
that it writes into metrics.jsonl, without the first step, which traces the graph. They alternate, norm by norm, in
rounds over all batch sizes: what is printed is the median over the rounds, with the least and the most in brackets.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import datasets
from command import ArgumentParser, UserError, WorldError, run
from input_ops import create_input_ops

BATCH_SIZES = (1, 2, 8, 32, 64)
QUICK_BATCH_SIZES = (2,)
NORMS = ("batch", "group")
STEPS = 31  # logged every 10
IMPORT = "import trainer; trainer.tf.constant(0); trainer.keras.Model; print('imported')"
# Images per second of the 2018 repo's own trainer and network on CIFAR-10, with TensorFlow 1.15.5, medians of two runs
# on the machine of the README's table (AMD EPYC, 2 cores, AVX2): elsewhere the ratio says little.
ORIGINAL = {
    "batch": dict(zip(BATCH_SIZES, (40, 51, 71, 81, 88))),
    "group": dict(zip(BATCH_SIZES, (33, 49, 70, 82, 90))),
}


def time_until(line_start, command):
    """Run a command; returns the seconds until it printed a line that starts so."""
    start, seconds = time.perf_counter(), None
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith(line_start):
            seconds = time.perf_counter() - start
    if process.wait():
        raise WorldError(f"{' '.join(command)} failed with exit code {process.returncode}")
    return seconds


def train(flags, norm_type, batch_size):
    """Run trainer.py; returns its images per second, and the seconds until it has a run folder."""
    with tempfile.TemporaryDirectory() as train_dir:
        seconds = time_until(
            "run folder",
            [
                sys.executable,
                "trainer.py",
                "--dataset",
                flags.dataset,
                "--data_dir",
                str(Path(flags.data_dir).resolve()),
                "--model",
                flags.model,
                "--optimizer",
                flags.optimizer,
                "--norm_type",
                norm_type,
                "--batch_size",
                str(batch_size),
                "--max_training_step",
                str(STEPS),
                "--train_dir",
                train_dir,
            ],
        )
        (metrics,) = Path(train_dir).glob("*/metrics.jsonl")
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    return statistics.median(row["images_per_second"] for row in rows if "images_per_second" in row), seconds


def measure_pipeline(flags):
    """Images per second of the input alone, with augmentation, 64 at a time."""
    train_split, _ = datasets.create_default_splits(flags.dataset, flags.data_dir)
    batches = iter(create_input_ops(train_split, 64, is_training=True, augment="flip+crop"))
    for _ in range(20):
        next(batches)
    start, count = time.perf_counter(), 400
    for _ in range(count):
        next(batches)
    return 64 * count / (time.perf_counter() - start)


def show(values):
    return f"{statistics.median(values):.1f} [{min(values):.1f} {max(values):.1f}]"


def print_table(flags, speeds, batch_sizes):
    compare = (flags.dataset, flags.model, flags.optimizer) == ("CIFAR10", "convnet", "adam")
    print(f"{flags.dataset}, {flags.model}, {flags.optimizer}: images per second")
    print(
        f"{'batch size':>10}  "
        + "".join(f"{norm_type + ' norm':<30}" for norm_type in NORMS)
        + "group / batch"
        + ("   times the original's: batch, group" if compare else "")
    )
    for batch_size in batch_sizes:
        batch, group = (speeds[norm_type, batch_size] for norm_type in NORMS)
        line = f"{batch_size:>10}  {show(batch):<30}{show(group):<30}"
        line += f"{statistics.median(g / b for g, b in zip(group, batch)):13.2f}"
        if compare:
            line += "   " + ", ".join(
                f"{statistics.median(speeds[n, batch_size]) / ORIGINAL[n][batch_size]:.1f}" for n in NORMS
            )
        print(line)


def main():
    parser = ArgumentParser(description="Measure images per second of trainer.py as users run it.")
    parser.add_argument("--dataset", default="CIFAR10", help="a dataset that download.py packed")
    parser.add_argument("--model", default="convnet", help="the network")
    parser.add_argument("--optimizer", default="adam", choices=("adam", "momentum"), help="the optimizer")
    parser.add_argument("--data_dir", default=datasets.DATA_DIR, help="where the datasets are")
    parser.add_argument("--quick", action="store_true", help="batch size 2 alone, one round")
    flags = parser.parse_args()
    if not datasets.is_prepared(flags.dataset, flags.data_dir):
        raise UserError(f"{flags.dataset} is not in {flags.data_dir}: run python download.py --dataset {flags.dataset}")
    batch_sizes, rounds = (QUICK_BATCH_SIZES, 1) if flags.quick else (BATCH_SIZES, 3)
    speeds = {(norm_type, batch_size): [] for norm_type in NORMS for batch_size in batch_sizes}
    imports, starts = [], []
    for batch_size in batch_sizes * rounds:
        imports.append(time_until("imported", [sys.executable, "-c", IMPORT]))
        for norm_type in NORMS:
            speed, seconds = train(flags, norm_type, batch_size)
            speeds[norm_type, batch_size].append(speed)
            starts.append(seconds - imports[-1])
    print_table(flags, speeds, batch_sizes)
    pipeline, fastest = measure_pipeline(flags), max(statistics.median(rounds) for rounds in speeds.values())
    print(f"the input alone: {pipeline:.0f} images per second, {pipeline / fastest:.1f} times the fastest step")
    print(
        f"start: {statistics.median(imports):.1f} s to import TensorFlow and all else, "
        f"{statistics.median(starts):.1f} s more to open the data, build the network and make the run folder"
    )


if __name__ == "__main__":
    run(main)
