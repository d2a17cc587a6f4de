"""What does a norm do for me at the batch size I can afford? Trains every norm at every batch size, and compares.

    python figure/compare.py --dataset CIFAR10 --model resnet8 --norm_type batch group group+ws \
        --batch_size 1 2 4 8 16 32 --seeds 3 --epochs 8 --train_dir studies/cifar10
    python figure/compare.py --dataset MY_DATA --batch_size 2 16
    python figure/compare.py --from_logs figure/studies/cifar10         # table and pictures from logs alone
    python figure/compare.py --challenge figure/studies/digits          # are these numbers what your machine gives?

Every cell of the grid is a run folder of trainer.py, evaluated by evaler.py at its last step. What is finished is kept,
what was interrupted goes on, the rest is trained, --jobs processes side by side. Flags of trainer.py that are not
listed here pass through. Leaves table.md, results.csv, batch_size.png and curves.png in --train_dir.
"""

import ctypes
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tqdm import tqdm

import challenge
import datasets
import results
import trainer
from command import ArgumentParser, Terminated, UserError, WorldError, one_line, run, within
from runs import MEASURES, comparable, describe_data, read_runs
from summaries import duration

PLAIN_NORMS = ("batch", "group", "layer", "instance", "none")
NORMS = (*PLAIN_NORMS, *(f"{norm}+ws" for norm in PLAIN_NORMS), "batch+renorm")
ARMS = (*NORMS, *(f"{norm}+acc" for norm in NORMS))
SMALL = 2  # batch sizes up to this are evaluated with statistics re-estimated in batches of their own size, too
FIRST_BATCH_SIZES = (2, 32)  # these two tell the story
LOG_STEP = 50
EPOCHS = 8
PROCESS_BYTES = 1.2e9  # TensorFlow, the network and its batches, without the images
POLL_SECONDS = 1.0
PRCTL, PR_SET_PDEATHSIG = getattr(ctypes.CDLL(None), "prctl", None), 1


# ------------------------------------------------------------------------------------------------------ the grid


def parse_flags(argv=None):
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", help="as in trainer.py")
    parser.add_argument(
        "--norm_type",
        nargs="+",
        choices=ARMS,
        metavar="NORM",
        default=["batch", "group", "group+ws"],
        help=f"norms to compare, of {', '.join(NORMS)} (ws: weight standardization), each also with +acc at its end "
        "(accumulate: one update per step)",
    )
    parser.add_argument(
        "--batch_size", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32], help="batch sizes to compare"
    )
    parser.add_argument("--groups", type=int, help="of group norm")
    parser.add_argument("--group_size", type=int, help="of group norm, channels per group")
    parser.add_argument("--seeds", type=within(int, low=1), default=3, help="runs per cell, with the seeds 0, 1, ...")
    parser.add_argument("--train_dir", default="studies/comparison", help="where the run folders are")
    parser.add_argument("--data_dir", default=datasets.DATA_DIR, help="where the datasets are")
    parser.add_argument(
        "--jobs",
        type=within(int, low=1),
        default=len(available_cores()),
        help="processes side by side, each on cores of its own",
    )
    parser.add_argument("--dry_run", action="store_true", help="print what would be trained, and how long it takes")
    parser.add_argument(
        "--from_logs", nargs="+", metavar="DIR", help="make table and pictures of these run folders; train nothing"
    )
    parser.add_argument(
        "--called",
        metavar="NAME",
        help="what table and pictures call the dataset, where the data are not quite what its name says",
    )
    parser.add_argument(
        "--challenge", metavar="DIR", help="train the first steps of runs in DIR again, and compare what they logged"
    )
    parser.add_argument("--runs", type=within(int, low=1), default=3, help="of --challenge: how many, chosen at random")
    parser.add_argument("--steps", type=within(int, low=1), default=100, help="of --challenge: how many of each run")
    flags, rest = parser.parse_known_args(argv)
    names, allowed = parser.names_given(argv), ("challenge", "runs", "steps", "data_dir")
    for name in names:
        if flags.challenge and name not in allowed or not flags.challenge and name in ("runs", "steps"):
            raise UserError(
                f"--{name} has no effect {'with' if flags.challenge else 'without'} --challenge: leave it out"
            )
    if flags.challenge:
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        return flags, rest
    if flags.from_logs:
        given = [name for name in parser.names_given(argv) if name not in ("from_logs", "called")]
        given += rest
        if given:
            raise UserError(f"--from_logs trains nothing, so {given[0]} has no effect: leave it out")
        return flags, rest
    given = trainer.make_parser().names_given(rest)
    for name, remedy in (
        ("seed", "--seeds N trains with the seeds 0 to N - 1"),
        ("resume", "the same command goes on with what it has begun"),
        ("weight_standardization", "put +ws at the end of a --norm_type"),
        ("accumulate", "put +acc at the end of a --norm_type"),
    ):
        if name in given:
            raise UserError(f"--{name} has no effect here: {remedy}")
    if not {"epochs", "max_training_step"} & set(given):
        rest += ["--epochs", str(EPOCHS)]
    for name in ("log_step", "write_summary_step"):
        rest += [] if name in given else [f"--{name}", str(LOG_STEP)]
    return flags, rest


def available_cores():
    """The numbers of the cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count()))


class Cell:
    """One run of the grid: what it is, the flags that make it, and the settings by which its folder is known."""

    def __init__(self, flags, rest, arm, batch_size, seed):
        plain = arm.removesuffix("+acc")
        norm = plain.removesuffix("+ws")
        self.arm, self.batch_size, self.seed = arm, batch_size, seed
        self.name = f"{arm}, batch size {batch_size}, seed {seed}"
        self.flags = [
            "--dataset",
            flags.dataset,
            "--norm_type",
            norm,
            "--batch_size",
            str(batch_size),
            "--seed",
            str(seed),
            "--train_dir",
            flags.train_dir,
            "--data_dir",
            flags.data_dir,
            *rest,
        ]
        self.flags += ["--weight_standardization"] * (plain != norm) + ["--accumulate"] * (arm != plain)
        if norm == "group":
            for name in ("groups", "group_size"):
                value = getattr(flags, name)
                self.flags += [f"--{name}", str(value)] if value is not None else []

    def derive(self, train, test):
        """Fill in the settings, with trainer.py's own functions: its errors come before anything is trained."""
        flags, _ = trainer.parse_flags(self.flags)
        self.config = trainer.derive(flags, train)
        self.settings = comparable(self.config, describe_data(train, test))
        self.images = self.config.max_training_step * self.config.max_batch_size

    def find(self, runs):
        """The Run of this cell among `runs`, or None."""
        return next((run for run in runs if run.config.seed == self.seed and run.settings == self.settings), None)


def make_grid(flags, rest):
    """The cells in the order of training: seeds outermost, batch sizes 2 and 32 first; and (train, test)."""
    if flags.dataset is None:
        raise UserError(f"--dataset is missing: give one of {', '.join(datasets.NAMES)} or your own")
    probe, _ = trainer.parse_flags(["--dataset", flags.dataset, "--data_dir", flags.data_dir, *rest])
    train, test = trainer.load_data(probe)
    first = [size for size in FIRST_BATCH_SIZES if size in flags.batch_size]
    sizes = first + [size for size in dict.fromkeys(flags.batch_size) if size not in first]
    cells = [
        Cell(flags, rest, arm, size, seed)
        for seed in range(flags.seeds)
        for size in sizes
        for arm in dict.fromkeys(flags.norm_type)
    ]
    for cell in cells:
        cell.derive(train, test)
    return cells, train, test


def check_train_dir(train_dir, cells, runs):
    """Raise UserError if the folder holds runs that do not belong beside this grid: of another dataset, length, ...
    Norms that this grid has not may have another rate and other groups: each norm can be trained at its own best."""
    free = results.FOLLOWING | {"norm_type", "weight_standardization", "accumulate", "batch_size"}
    for found in runs:
        alike = next((cell.settings for cell in cells if cell.arm == found.arm), None)
        settings = alike or cells[0].settings
        of_norm = {"groups", "group_size", "base_learning_rate"} if alike is None else set()
        for name in sorted((settings.keys() | found.settings.keys()) - free - of_norm):
            here, there = settings.get(name), found.settings.get(name)
            if here != there:
                raise UserError(
                    f"{train_dir} holds a run with {name} {there}, where this grid has {here} "
                    f"({found.path.name}): name another --train_dir"
                )


def check_memory(jobs, train, test):
    needed = jobs * (PROCESS_BYTES + 1.5 * (train.nbytes + test.nbytes))
    try:
        lines = dict(line.split(":") for line in open("/proc/meminfo"))
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # not Linux
        return
    if needed > free:
        raise UserError(
            f"--jobs {jobs} needs about {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free: "
            f"give --jobs {max(1, int(jobs * free / needed))}"
        )


# ------------------------------------------------------------------------------------------------ the running of it


class Job:
    """The processes of one cell, one after the other: trainer.py, then evaler.py, on cores of their own."""

    def __init__(self, cell, flags, cores):
        self.cell, self.cores, self.train_dir, self.data_dir = cell, cores, flags.train_dir, flags.data_dir
        self.log = Path(flags.train_dir) / "logs" / f"{cell.name.replace(', ', '_').replace(' ', '_')}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.write_text("")
        self.process = self.failure = None
        self.advance()

    def found(self):
        return self.cell.find(read_runs([self.train_dir]))

    def advance(self):
        """Start what comes next; False if nothing does."""
        found = self.found()
        if found is None:
            command = ["trainer.py", *self.cell.flags]
        elif found.state == "unfinished" or (needs_evaluation(found) and not has_checkpoint(found)):
            command = ["trainer.py", "--resume", str(found.path), "--data_dir", self.data_dir]
        elif needs_evaluation(found):
            command = [
                "evaler.py",
                "--dataset",
                found.config.dataset,
                "--train_dir",
                str(found.path),
                "--data_dir",
                self.data_dir,
            ]
            if found.config.norm_type == "batch":
                small = ["reestimate_small"] * (found.config.batch_size <= SMALL)
                command += ["--batch_statistics", "moving", "reestimate", *small, "batch"]
            if found.config.validation:
                command += ["--validation", str(found.config.validation)]
        else:
            return False
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(  # in a session of its own: Ctrl-C reaches it through us, once
                [sys.executable, str(ROOT / command[0]), *command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=self.pin,
            )
        return True

    def pin(self):
        """Take the cores of this job; on Linux, save and stop by SIGHUP when compare.py ends, however that ends."""
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
        if PRCTL:
            PRCTL(PR_SET_PDEATHSIG, signal.SIGHUP)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, self.cores)

    def running(self):
        """Whether there is still something to wait for; when a process ended well, the next one is started."""
        code = self.process.poll()
        if code is None:
            return True
        if code == 0:
            return self.advance()
        found = self.found()
        if found is None or found.state != "diverged":
            self.failure = f"{self.cell.name} ended with code {code}: {one_line(' '.join(tail(self.log)), 400)}"
        return False


def tail(path, lines=3):
    return path.read_text(errors="replace").splitlines()[-lines:]


def has_checkpoint(found):
    return any(found.path.glob("model-*.index"))


def needs_evaluation(found):
    """Whether a finished run lacks what evaler.py measures; logs without a checkpoint are kept as they are."""
    needed = {"accuracy"}
    if found.config.norm_type == "batch":
        needed |= {"reestimated", "by_batch"} | ({"reestimated_small"} if found.config.batch_size <= SMALL else set())
    if found.state != "finished" or needed <= found.evaluation.keys():
        return False
    return not found.evaluation or has_checkpoint(found)


def is_done(cell, runs):
    found = cell.find(runs)
    return found is not None and found.state != "unfinished" and not needs_evaluation(found)


def images_done(cell, runs):
    found = cell.find(runs)
    if found is None or not found.rows:
        return 0
    return cell.images if found.state != "unfinished" else found.rows[-1]["step"] * cell.config.max_batch_size


def seconds_per_image(runs):
    """A function from a batch size to the measured seconds per image: a + b / batch_size where it was not measured."""
    by_size = {}
    for found in runs:
        speeds = [row["images_per_second"] for row in found.rows if "images_per_second" in row]
        if speeds:
            by_size.setdefault(found.config.batch_size, []).append(1 / statistics.median(speeds))
    measured = {size: statistics.median(seconds) for size, seconds in by_size.items()}
    if len(measured) < 2:
        constant = next(iter(measured.values()), None)
        return lambda size: constant
    (x1, y1), (x2, y2) = ((1 / size, measured[size]) for size in (min(measured), max(measured)))
    return lambda size: measured.get(size, max(y2 + (y1 - y2) * (1 / size - x2) / (x1 - x2), y2 / 10))


def time_left(cells, runs, jobs):
    seconds = seconds_per_image(runs)
    if seconds(1) is None:
        return None
    return sum((cell.images - images_done(cell, runs)) * seconds(cell.batch_size) for cell in cells) / jobs


def train_all(cells, flags):
    """Run all cells that are not done, --jobs at a time. Interrupted, stops them after saving.

    Raises WorldError at the end, if some failed.
    """
    cores = available_cores()
    free = [set(cores[i :: flags.jobs]) or set(cores) for i in range(flags.jobs)]
    runs = read_runs([flags.train_dir])
    waiting, jobs, failures = [cell for cell in cells if not is_done(cell, runs)], [], []
    bar = tqdm(total=sum(cell.images for cell in cells), unit="img", unit_scale=True, disable=None)
    say = bar.write if not bar.disable else lambda line: print(line, flush=True)
    try:
        while waiting or jobs:
            while waiting and free:
                jobs.append(Job(waiting.pop(0), flags, free.pop()))
            time.sleep(POLL_SECONDS)
            for job in [job for job in jobs if not job.running()]:
                jobs.remove(job)
                free.append(job.cores)
                runs = read_runs([flags.train_dir])
                left = time_left(cells, runs, flags.jobs)
                say(job.failure or f"{job.cell.name}: {outcome(job.cell.find(runs))}; {duration(left or 0)} left")
                failures += [job.failure] if job.failure else []
            if not bar.disable:
                runs = read_runs([flags.train_dir])
                left = time_left(cells, runs, flags.jobs)
                bar.n = sum(images_done(cell, runs) for cell in cells)
                bar.set_postfix_str("time left " + (duration(left) if left is not None else "not known yet"))
    except (KeyboardInterrupt, Terminated):
        for job in jobs:
            job.process.terminate()
        say("stopping: the runs save what they have; the same command goes on with them")
        for job in jobs:
            job.process.wait()
        raise
    finally:
        bar.close()
    if failures:
        raise WorldError(f"{len(failures)} of {len(cells)} runs failed; the first: {failures[0]}")


def outcome(found):
    if found.state != "finished":
        return found.state
    return "; ".join(f"{100 * value:.2f} %{MEASURES[name]}" for name, value in found.accuracies.items())


def print_plan(cells, flags):
    """What would be trained, and the hours, from runs that are there or from two short ones."""
    runs = read_runs([flags.train_dir])
    for cell in cells:
        print(f"{'done   ' if is_done(cell, runs) else 'to do  '}{cell.name}: {cell.images:,} images")
    source = "images per second of the runs that are there"
    if seconds_per_image(runs)(1) is None:
        source = "two trial runs of 12 steps"
        with tempfile.TemporaryDirectory() as folder:
            for cell in {min(cells, key=lambda c: c.batch_size), max(cells, key=lambda c: c.batch_size)}:
                trial = [
                    *cell.flags,
                    "--train_dir",
                    folder,
                    "--max_training_step",
                    "12",
                    "--log_step",
                    "4",
                    "--test_sample_step",
                    "1000000",
                ]
                subprocess.run(
                    [sys.executable, str(ROOT / "trainer.py"), *trial], check=True, stdout=subprocess.DEVNULL
                )
            left = time_left(cells, runs + read_runs([folder]), flags.jobs)
    else:
        left = time_left(cells, runs, flags.jobs)
    print(
        f"{len(cells)} runs, {sum(not is_done(cell, runs) for cell in cells)} to do; about {left / 3600:.1f} hours "
        f"with {flags.jobs} processes, tests not counted (from {source})"
    )


def main():
    flags, rest = parse_flags()
    if flags.from_logs:
        runs = read_runs(flags.from_logs)
        if not runs:
            raise UserError(f"no run folder in {', '.join(flags.from_logs)}: name a folder that trainer.py wrote into")
        results.report(runs, flags.from_logs[0], flags.called)
        return
    if flags.challenge:
        challenge.challenge(flags.challenge, flags.runs, flags.steps, flags.data_dir)
        return
    cells, train, test = make_grid(flags, rest)
    check_train_dir(flags.train_dir, cells, read_runs([flags.train_dir]))
    check_memory(flags.jobs, train, test)
    if flags.dry_run:
        print_plan(cells, flags)
        return
    try:
        train_all(cells, flags)
    finally:
        runs = read_runs([flags.train_dir])
        if runs:
            results.report(runs, flags.train_dir, flags.called)


if __name__ == "__main__":
    run(main)
