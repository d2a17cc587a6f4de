"""Measure how training scales from one worker to two on one machine, each pinned to a core.

    python figure/scaling.py                # about an hour, with nothing else running
    python figure/scaling.py --quick        # resnet8 at one batch size, one round: a minute

Runs `python trainer.py` with group norm on random images in three ways that alternate: one worker alone; two
independent runs, one per core; and two workers that average gradients (TF_CONFIG). Images per second are read from
metrics.jsonl, while all processes train. Two workers are compared with two independent runs, because cores share memory
and clock. A ratio is the median of the ratios within a round. Linux only. Prints a table.
"""

import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from compare import PR_SET_PDEATHSIG, PRCTL, ROOT, available_cores  # first: it finds the modules of the repo
import datasets
import runs
from command import ArgumentParser, UserError, ExternalError, run

WAYS = {"1 worker": 1, "2 independent": 2, "2 workers": 2}  # name: number of processes
NEVER = "1000000"  # steps


class Network(NamedTuple):
    """A network, the number of random images, the images per step, the steps per row of the log, and batch sizes."""

    model: str
    pixels: int
    classes: int
    images: int
    step: int
    log_step: int
    batch_sizes: tuple  # per replica


NETWORKS = [Network("resnet20", 32, 10, 320, 64, 2, (1, 2, 8, 32)), Network("resnet50", 224, 1000, 40, 16, 1, (2, 8))]
QUICK_NETWORKS = [Network("resnet8", 32, 10, 80, 16, 1, (2,))]


def pack(network, data_dir):
    """Pack random images into data_dir/<model>, 10 of them to test."""
    rng, size = np.random.default_rng(0), (network.pixels, network.pixels, 3)
    parts = (
        (split, rng.integers(256, size=(count, *size), dtype=np.uint8), rng.integers(network.classes, size=count), None)
        for split, count in enumerate((network.images - 10, 10))
    )
    names = [str(i) for i in range(network.classes)]
    folder = Path(data_dir) / network.model
    folder.mkdir()
    datasets.hdf5.write(folder, datasets.hdf5.Source(names, size, network.images, parts))


@contextlib.contextmanager
def started(commands, cores, folder, together):
    """Start commands, one per core, as workers of one run if `together`; kill them at the end of the block.

    Yields the processes. Process i writes to folder/i.log, and ends if this process ends.
    """
    with contextlib.ExitStack() as stack:  # finds free ports
        servers = [stack.enter_context(socket.create_server(("localhost", 0))) for _ in commands]
        cluster = {"worker": [f"localhost:{server.getsockname()[1]}" for server in servers]}
    processes = []

    def prepare(core):
        os.sched_setaffinity(0, {core})
        PRCTL(PR_SET_PDEATHSIG, signal.SIGKILL)

    try:
        for i, (command, core) in enumerate(zip(commands, cores)):
            config = json.dumps({"cluster": cluster, "task": {"type": "worker", "index": i}}) if together else ""
            with open(Path(folder) / f"{i}.log", "w") as log:
                process = subprocess.Popen(  # in its own session, so that Ctrl-C does not reach it
                    [sys.executable, *map(str, command)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env={**os.environ, "TF_CONFIG": config, "CUDA_VISIBLE_DEVICES": "-1"},
                    start_new_session=True,
                    preexec_fn=lambda core=core: prepare(core),
                )
            processes.append(process)
        yield processes
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def train(network, batch_size, way, quick, cores, data_dir):
    """Train in one of the WAYS, and return the images per second of all processes together."""
    given = {
        "dataset": network.model,
        "model": network.model,
        "norm_type": "group",
        "batch_size": batch_size,
        "max_batch_size": network.step,
        "learning_rate": 1e-4,  # small, so that training on random labels does not diverge
        "log_step": network.log_step,
        "data_dir": data_dir,
    }
    given |= dict.fromkeys(["write_summary_step", "test_sample_step", "ckpt_save_step", "max_training_step"], NEVER)
    command = [ROOT / "trainer.py", *(word for name in given for word in (f"--{name}", given[name]))]
    with tempfile.TemporaryDirectory() as folder:
        train_dirs = [Path(folder) / str(i) for i in range(WAYS[way])]
        commands = [[*command, "--train_dir", train_dir] for train_dir in train_dirs]
        with started(commands, cores, folder, way == "2 workers") as processes:
            written = train_dirs[:1] if way == "2 workers" else train_dirs  # worker 0 writes for both
            return sum(speeds(processes, folder, written, 2 if quick else 6))


def speeds(processes, folder, train_dirs, wanted):
    """Return the median images per second of each run, over at least `wanted` rows written while all runs train."""
    first = None
    while True:
        for i, process in enumerate(processes):
            if process.poll():
                log = (Path(folder) / f"{i}.log").read_text(errors="replace")
                raise ExternalError(f"{process.args[1]} ended with code {process.returncode}: {log[-400:]}")
        rows = [
            [row for path in train_dir.glob("*/metrics.jsonl") for row in runs.read_rows(path)]
            for train_dir in train_dirs
        ]
        if first is None and all(rows):
            first = [len(of_run) + 1 for of_run in rows]  # the next row began before all runs trained
        counted = [of_run[begin:] for of_run, begin in zip(rows, first or [])]
        if counted and min(map(len, counted)) >= wanted:
            return [statistics.median(row["images_per_second"] for row in of_run) for of_run in counted]
        time.sleep(0.2)


def main():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="resnet8 at one batch size, one round")
    flags = parser.parse_args()
    cores = available_cores()[:2]
    if len(cores) < 2 or not PRCTL:
        raise UserError(f"scaling.py needs Linux and two cores: this is {sys.platform} with {len(cores)}")
    networks, rounds = (QUICK_NETWORKS, 1) if flags.quick else (NETWORKS, 2)
    columns = ["network", "pixels", "batch size per replica", *WAYS, "workers / independent"]
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    with tempfile.TemporaryDirectory() as data_dir:
        for network in networks:
            pack(network, data_dir)
            for batch_size in network.batch_sizes:
                found = {way: [] for way in WAYS}
                for _ in range(rounds):
                    for way, of_rounds in found.items():
                        of_rounds.append(train(network, batch_size, way, flags.quick, cores, data_dir))
                medians = " | ".join(f"{statistics.median(of_rounds):.1f}" for of_rounds in found.values())
                ratio = statistics.median(a / b for a, b in zip(found["2 workers"], found["2 independent"]))
                print(f"| {network.model} | {network.pixels} | {batch_size} | {medians} | {ratio:.2f} |")


if __name__ == "__main__":
    run(main)
