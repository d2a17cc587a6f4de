"""Train every norm at every batch size, and compare the accuracies.

    python figure/compare.py --dataset CIFAR10 --model resnet8 --norm_type batch group group+ws \\
        --batch_size 1 2 4 8 16 32 --seeds 3 --epochs 8 --train_dir studies/cifar10
    python figure/compare.py --dataset MY_DATA --batch_size 2 16
    python figure/compare.py --from_logs figure/studies/cifar10         # table and pictures from logs, no training
    python figure/compare.py --challenge figure/studies/digits          # does your machine reproduce these numbers?

Each run has a run folder of trainer.py, and is evaluated by evaler.py at its last step. Finished runs are kept,
interrupted runs are resumed, and the others are trained, --jobs of them at the same time. Other flags are passed to
trainer.py (default here: --epochs 8). Writes table.md, results.csv, batch_size.png and curves.png to --train_dir.
"""

import contextlib
import ctypes
import dataclasses
import os
import queue
import signal
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
from tqdm import tqdm

import challenge
import datasets
import download
import pictures
import results
from command import ArgumentParser, UserError, ExternalError, one_line, run, within, write_atomically
from config import NORM_NAMES, derive, parse_training, training_parser
from runs import MEASURES, describe_data, hash_of, read_runs, run_dir_of, settings_of

FIRST_BATCH_SIZES = (2, 32)  # trained first, because they show most of the result
SMALL = 2  # up to this batch size, batch norm is also evaluated with statistics re-estimated at that batch size
EPOCHS = 8
LOG_STEP = 50
PROCESS_BYTES = 1.2e9  # of TensorFlow, the network and its batches, without the dataset
PRCTL, PR_SET_PDEATHSIG = getattr(ctypes.CDLL(None), "prctl", None), 1


def parse_flags(argv=None):
    """Return (flags, the other flags, which are for trainer.py)."""
    trainer = training_parser()
    parser = ArgumentParser(passes_to=trainer, description=__doc__)
    parser.add_argument("--dataset", help="as in trainer.py")
    norms = {"choices": NORM_NAMES, "default": ["batch", "group", "group+ws"]}
    named = "norms to compare, as in trainer.py: +ws is weight standardization, and +acc one update per step"
    parser.add_argument("--norm_type", nargs="+", metavar="NORM", help=named, **norms)
    sizes = [1, 2, 4, 8, 16, 32]
    parser.add_argument("--batch_size", nargs="+", type=int, default=sizes, help="batch sizes to compare")
    parser.add_argument("--groups", type=int, help="number of groups of group norm")
    parser.add_argument("--group_size", type=int, help="channels per group of group norm")
    parser.add_argument("--seeds", type=within(int, low=1), default=3, help="runs per cell, with the seeds 0, 1, ...")
    parser.add_argument("--train_dir", help="folder of the run folders, by default studies/DATASET")
    parser.add_argument("--data_dir", default=datasets.DATA_DIR, help="folder of the datasets")
    jobs = "processes to run at the same time, each on its own cores"
    parser.add_argument("--jobs", type=within(int, low=1), default=len(available_cores()), help=jobs)
    parser.add_argument("--dry_run", action="store_true", help="print the runs to train and the time they take")
    logs = "make table and pictures of the runs in these folders, and write them to the first; train nothing"
    parser.add_argument("--from_logs", nargs="+", metavar="DIR", help=logs)
    called = "name of the dataset in table and pictures, if its own name is not accurate"
    parser.add_argument("--called", metavar="NAME", help=called)
    again = "train the first steps of runs in DIR again, and compare their logs"
    parser.add_argument("--challenge", metavar="DIR", help=again)
    parser.add_argument("--runs", type=within(int, low=1), default=3, help="of --challenge: number of random runs")
    parser.add_argument("--steps", type=within(int, low=1), default=100, help="of --challenge: steps of each run")
    flags, rest = parser.parse_known_args(argv)
    unknown = trainer.parse_known_args(rest)[1]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    given, passed = parser.names_given(argv), trainer.names_given(rest)
    if flags.challenge or flags.from_logs:
        mode, known = ("challenge", ("runs", "steps", "data_dir")) if flags.challenge else ("from_logs", ("called",))
        useless = [f"--{name}" for name in given if name not in (mode, *known)] + rest
        if useless:
            raise UserError(f"--{mode} trains no grid, so {useless[0]} has no effect: omit it")
        return flags, rest
    for name in {"runs", "steps"} & set(given):
        raise UserError(f"--{name} has no effect without --challenge: omit it, or give --epochs or --max_training_step")
    for name, remedy in (
        ("seed", "--seeds N trains with the seeds 0 to N - 1"),
        ("resume", "the same command resumes interrupted runs"),
    ):
        if name in passed:
            raise UserError(f"--{name} has no effect here: {remedy}")
    for name in {"groups", "group_size"} & set(given):
        if not any(norm.startswith("group") for norm in flags.norm_type):
            raise UserError(f"--{name} has no effect on {', '.join(flags.norm_type)}: omit it, or add group norm")
    for name, suffix in (("weight_standardization", "+ws"), ("accumulate", "+acc")):
        if name in passed:
            rest.remove(f"--{name}")
            flags.norm_type = [norm if suffix in norm else with_suffix(norm, suffix) for norm in flags.norm_type]
    flags.train_dir = flags.train_dir or f"studies/{flags.dataset}"
    if not {"epochs", "max_training_step"} & set(passed):
        rest += ["--epochs", str(EPOCHS)]
    for name in ("log_step", "write_summary_step"):
        rest += [] if name in passed else [f"--{name}", str(LOG_STEP)]
    return flags, rest


def with_suffix(norm, suffix):
    """Append a suffix before '+acc': 'group+acc' and '+ws' make 'group+ws+acc'."""
    plain, acc, _ = norm.partition("+acc")
    return plain + suffix + acc


def available_cores():
    """Return the numbers of the cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count()))


class Cell:
    """One run of the grid, with its flags, and the settings that identify its folder, derived before any training."""

    def __init__(self, flags, rest, norm, batch_size, seed, splits):
        self.norm, self.batch_size, self.seed = norm, batch_size, seed
        self.name = f"{norm}, batch size {batch_size}, seed {seed}"
        self.flags = ["--dataset", flags.dataset, "--norm_type", norm, "--batch_size", str(batch_size)]
        self.flags += ["--seed", str(seed), "--train_dir", flags.train_dir, "--data_dir", flags.data_dir, *rest]
        for name in ("groups", "group_size") if norm.startswith("group") else ():
            value = getattr(flags, name)
            self.flags += [f"--{name}", str(value)] if value is not None else []
        self.config = derive(parse_training(self.flags)[0], splits[0])
        if self.config.checkpoint:
            run_dir_of(self.config.checkpoint)
        self.settings = settings_of(self.config, describe_data(*splits))
        self.images = self.config.max_training_step * self.config.max_batch_size

    def find(self, runs):
        """Return the Run of this cell in `runs`, or None."""
        found = [run for run in runs if run.config.seed == self.seed and run.settings == self.settings]
        return min(found, key=results.preference, default=None)


def make_grid(flags, rest):
    """Return the cells in the order of training, by seed with batch sizes 2 and 32 first, and both splits."""
    if flags.dataset is None:
        raise UserError(f"--dataset is missing: give one of {', '.join(datasets.NAMES)} or your own")
    config, _ = parse_training(["--dataset", flags.dataset, "--data_dir", flags.data_dir, *rest])
    splits = download.load_splits(config.dataset, config.data_dir, config.validation)
    first = [size for size in FIRST_BATCH_SIZES if size in flags.batch_size]
    sizes = first + [size for size in dict.fromkeys(flags.batch_size) if size not in first]
    cells = [
        Cell(flags, rest, norm, size, seed, splits)
        for seed in range(flags.seeds)
        for size in sizes
        for norm in dict.fromkeys(flags.norm_type)
    ]
    return cells, *splits


def check_train_dir(train_dir, cells, runs, split):
    """Raise UserError if the folder has runs with other settings, such as another dataset or length, or other images.

    Norms that are not in this grid may have another rate and other groups, so that each can have its best rate.
    """
    for found in runs:
        alike = next((cell.settings for cell in cells if cell.norm == found.norm), None)
        settings, free = (alike, set()) if alike else (cells[0].settings, results.OF_NORM)
        for name in sorted((settings.keys() | found.settings.keys()) - results.DERIVED - free - {"batch_size"}):
            here, other = settings.get(name), found.settings.get(name)
            if here != other:
                raise UserError(
                    f"{train_dir} has a run with {name} {other}, where this grid has {here} ({found.path.name}): "
                    f"give another --train_dir"
                )
        if found.stored["data"].get("split", split) != split:
            raise UserError(f"{train_dir} has a run on different images ({found.path.name}): give another --train_dir")


def check_memory(jobs, train, test):
    """Raise UserError if the free memory is too small for `jobs` processes."""
    loaded = sum(split.nbytes for split in (train, test) if split.in_memory or isinstance(split.image, np.ndarray))
    needed = jobs * (PROCESS_BYTES + 1.5 * loaded)
    try:
        lines = dict(line.split(":") for line in open("/proc/meminfo"))
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # not Linux
        return
    if needed > free:
        raise UserError(
            f"training {jobs} at a time needs about {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free: "
            + (f"give --jobs {int(jobs * free / needed)}" if needed < jobs * free else "free some memory")
        )


def needs_evaluation(found):
    """Return whether a finished run lacks an accuracy that evaler.py can measure. Without a checkpoint it cannot."""
    needed = {"accuracy"}
    if found.config.norm_type == "batch":
        needed |= {"reestimated", "by_batch"} | ({"reestimated_small"} if found.config.batch_size <= SMALL else set())
    has_all = needed <= found.evaluation.keys()
    return found.state == "finished" and not has_all and any(found.path.glob("model-*.index"))


def to_do(cells, runs):
    """Return the cells that `runs` lack: those to train, resume or evaluate."""
    pairs = [(cell, cell.find(runs)) for cell in cells]
    return [cell for cell, run in pairs if run is None or run.state == "unfinished" or needs_evaluation(run)]


class Processes:
    """Runs scripts, each on its own cores; stop() sends SIGTERM to all, upon which they save and end."""

    def __init__(self, jobs):
        cores = available_cores()
        self.running, self.stopped, self.cores = set(), False, queue.SimpleQueue()
        for i in range(jobs):
            self.cores.put(set(cores[i::jobs]) or set(cores))

    def run(self, command, log):
        """Run a script to its end. If it fails, raise ExternalError with the last lines of its log."""
        cores = self.cores.get()

        def prepare():  # in the new process
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
            if PRCTL:  # on Linux, get SIGHUP when compare.py ends, even by SIGKILL
                PRCTL(PR_SET_PDEATHSIG, signal.SIGHUP)
            if hasattr(os, "sched_setaffinity"):
                os.sched_setaffinity(0, cores)

        try:
            with open(log, "a") as file:
                process = subprocess.Popen(  # in its own session, so that Ctrl-C only reaches it through stop()
                    [sys.executable, str(ROOT / command[0]), *command[1:]],
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    start_new_session=True,
                    preexec_fn=prepare,
                )
            self.running.add(process)
            if self.stopped:
                process.terminate()
            code = process.wait()
            self.running.discard(process)
        finally:
            self.cores.put(cores)
        if code:
            last = " ".join(Path(log).read_text(errors="replace").splitlines()[-3:])
            raise ExternalError(f"{command[0]} ended with code {code}: {one_line(last, 400)}")

    def stop(self):
        self.stopped = True
        for process in list(self.running):
            process.terminate()


def run_cell(cell, flags, processes):
    """Train or resume a cell, evaluate it, and return its Run."""
    log = Path(flags.train_dir) / "logs" / f"{cell.name.replace(', ', '_').replace(' ', '_')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("")
    data = ["--data_dir", flags.data_dir]
    found = cell.find(read_runs([flags.train_dir]))
    if found is None or found.state == "unfinished":
        given = ["--resume", str(found.path), *data] if found else cell.flags
        try:
            processes.run(["trainer.py", *given], log)
        except ExternalError:
            found = cell.find(read_runs([flags.train_dir]))
            if found is None or found.state != "diverged":
                raise
        found = cell.find(read_runs([flags.train_dir]))
    if needs_evaluation(found):
        last = found.path / f"model-{found.config.max_training_step}"
        command = ["evaler.py", "--dataset", found.config.dataset, "--checkpoint", str(last), *data]
        if found.config.norm_type == "batch":
            small = ["reestimate_small"] * (found.config.batch_size <= SMALL)
            command += ["--batch_statistics", "moving", "reestimate", *small, "batch"]
        if found.config.validation:
            command += ["--validation", str(found.config.validation)]
        processes.run(command, log)
        found = cell.find(read_runs([flags.train_dir]))
    return found


def train_all(waiting, number, flags):
    """Train and evaluate the waiting cells of `number`, --jobs at a time. If interrupted, let them save and end.

    Raises ExternalError at the end if some failed.
    """
    bar = tqdm(total=sum(cell.images for cell in waiting), unit="img", unit_scale=True, disable=None)
    write = print if bar.disable else bar.write
    processes, failures = Processes(flags.jobs), []
    with ThreadPoolExecutor(flags.jobs) as pool, contextlib.closing(bar):
        futures = {pool.submit(run_cell, cell, flags, processes): cell for cell in waiting}
        try:
            for future in as_completed(futures):
                cell = futures[future]
                bar.update(cell.images)
                try:
                    write(f"{cell.name}: {outcome(future.result())}")
                except ExternalError as error:
                    failures.append(f"{cell.name}: {error}")
                    write(failures[-1])
        except BaseException:
            write("stopping: the runs save a checkpoint; run the same command to resume them")
            pool.shutdown(wait=False, cancel_futures=True)
            processes.stop()
            raise
    if failures:
        raise ExternalError(f"{len(failures)} of {number} runs failed; the first: {failures[0]}")


def outcome(found):
    """Return the accuracies of a run, or its state if it has none, as text."""
    if found.state != "finished":
        return found.state
    return "; ".join(f"{100 * value:.2f} %{MEASURES[name]}" for name, value in found.accuracies.items())


def print_grid(cells, flags):
    """Print the runs to train, and the hours they take, estimated from existing runs or two short runs."""
    runs = read_runs([flags.train_dir])
    waiting = to_do(cells, runs)
    for cell in cells:
        print(f"{'to do  ' if cell in waiting else 'done   '}{cell.name}: {cell.images:,} images")
    speeds, source = images_per_second(runs), "images per second of existing runs"
    if not speeds:
        source = "two trial runs of 12 steps"
        with tempfile.TemporaryDirectory() as folder:
            for cell in {min(cells, key=lambda c: c.batch_size), max(cells, key=lambda c: c.batch_size)}:
                short = {"max_training_step": 12, "warmup_steps": 0, "log_step": 4, "test_sample_step": 1_000_000}
                trial = challenge.flags_of(dataclasses.replace(cell.config, **short))
                trial += ["--train_dir", folder, "--data_dir", flags.data_dir]
                Processes(flags.jobs).run(["trainer.py", *trial], os.path.join(folder, "log"))
            speeds = images_per_second(read_runs([folder]))
    seconds = 0
    for cell in waiting:
        nearest, found = min(speeds, key=lambda size: abs(size - cell.batch_size)), cell.find(runs)
        done = found.rows[-1]["step"] / cell.config.max_training_step if found and found.rows else 0
        seconds += (1 - done) * cell.images / speeds[nearest]
    jobs = max(1, min(flags.jobs, len(waiting)))
    hours = f"{seconds / min(jobs, len(available_cores())) / 3600:.1f} hours with {jobs} processes, without tests"
    print(f"{len(cells)} runs, {len(waiting)} to do; about {hours} (estimated from {source})")


def images_per_second(runs):
    """Return {batch size: median of the images per second that runs logged}."""
    found = {}
    for one in runs:
        speeds = [row["images_per_second"] for row in one.rows if "images_per_second" in row]
        found.setdefault(one.config.batch_size, []).extend(speeds)
    return {size: statistics.median(speeds) for size, speeds in found.items() if speeds}


def report(runs, folder, called=None):
    """Print the tables and sentences of `runs`, and write table.md, results.csv and two pictures to `folder`."""
    found, folder, parts = results.tables(runs, called), Path(folder), []
    for table in found:
        parts += [results.markdown(table), "\n".join(results.sentences(table))]
    text = "\n\n".join(filter(None, parts)) + "\n"
    print(text)
    write_atomically(folder / "table.md", text)
    results.write_results(runs, folder / "results.csv")
    of_norms = [table for table in found if not any(settings for (_, settings), _ in table.rows)]  # not of settings
    drawn = ""
    if of_norms and any(run.state == "finished" for run in runs):
        pictures.draw_batch_sizes(of_norms, folder / "batch_size.png")
        pictures.draw_curves(of_norms, folder / "curves.png")
        drawn = " and pictures"
    print(f"wrote table.md, results.csv{drawn} to {folder}")


def main():
    flags, rest = parse_flags()
    if flags.from_logs:
        for folder in flags.from_logs:
            if not read_runs([folder]):
                raise UserError(f"no run folder in {folder}: give the --train_dir of trainer.py or compare.py")
        report(read_runs(flags.from_logs), flags.from_logs[0], flags.called)
        return
    if flags.challenge:
        challenge.challenge(flags.challenge, flags.runs, flags.steps, flags.data_dir)
        return
    cells, train, test = make_grid(flags, rest)
    runs = read_runs([flags.train_dir])
    check_train_dir(flags.train_dir, cells, runs, hash_of(train, test))
    if flags.dry_run:
        print_grid(cells, flags)
        return
    waiting = to_do(cells, runs)
    check_memory(min(flags.jobs, len(waiting)), train, test)
    try:
        train_all(waiting, len(cells), flags)
    finally:
        runs = read_runs([flags.train_dir])
        if runs:
            report(runs, flags.train_dir, flags.called)


if __name__ == "__main__":
    run(main)
