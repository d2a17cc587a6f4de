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

import contextlib
import ctypes
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

from tqdm import tqdm

import challenge
import datasets
import download
import pictures
import results
from command import ArgumentParser, UserError, ExternalError, one_line, run, within
from config import ARMS, NORMS, derive, describe_data, parse_training, settings_of, training_parser
from runs import MEASURES, read_runs

FIRST_BATCH_SIZES = (2, 32)  # these two tell the story
SMALL = 2  # batch sizes up to this are evaluated with statistics re-estimated in batches of their own size, too
EPOCHS = 8
LOG_STEP = 50
PROCESS_BYTES = 1.2e9  # TensorFlow, the network and its batches, without the images
PRCTL, PR_SET_PDEATHSIG = getattr(ctypes.CDLL(None), "prctl", None), 1


# The grid.


def parse_flags(argv=None):
    """(flags, those of trainer.py that pass through)."""
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
    sizes = [1, 2, 4, 8, 16, 32]
    parser.add_argument("--batch_size", nargs="+", type=int, default=sizes, help="batch sizes to compare")
    parser.add_argument("--groups", type=int, help="of group norm")
    parser.add_argument("--group_size", type=int, help="of group norm, channels per group")
    parser.add_argument("--seeds", type=within(int, low=1), default=3, help="runs per cell, with the seeds 0, 1, ...")
    parser.add_argument("--train_dir", default="studies/comparison", help="where the run folders are")
    parser.add_argument("--data_dir", default=datasets.DATA_DIR, help="where the datasets are")
    jobs = "processes side by side, each on cores of its own"
    parser.add_argument("--jobs", type=within(int, low=1), default=len(available_cores()), help=jobs)
    parser.add_argument("--dry_run", action="store_true", help="print what would be trained, and how long it takes")
    parser.add_argument(
        "--from_logs", nargs="+", metavar="DIR", help="make table and pictures of these run folders; train nothing"
    )
    parser.add_argument(
        "--called", metavar="NAME", help="what table and pictures call the dataset, where its name is not quite true"
    )
    again = "train the first steps of runs in DIR again, and compare what they logged"
    parser.add_argument("--challenge", metavar="DIR", help=again)
    parser.add_argument("--runs", type=within(int, low=1), default=3, help="of --challenge: how many, chosen at random")
    parser.add_argument("--steps", type=within(int, low=1), default=100, help="of --challenge: how many of each run")
    flags, rest = parser.parse_known_args(argv)
    given, passed = parser.names_given(argv), training_parser().names_given(rest)
    if flags.challenge or flags.from_logs:
        what, known = ("challenge", ("runs", "steps", "data_dir")) if flags.challenge else ("from_logs", ("called",))
        strange = [name for name in given if name not in (what, *known)] + rest
        if strange:
            raise UserError(f"--{what} trains no grid, so {strange[0]} has no effect: leave it out")
        return flags, rest
    for name, remedy in (
        ("seed", "--seeds N trains with the seeds 0 to N - 1"),
        ("resume", "the same command goes on with what it has begun"),
    ):
        if name in passed:
            raise UserError(f"--{name} has no effect here: {remedy}")
    for name, suffix in (("weight_standardization", "+ws"), ("accumulate", "+acc")):
        if name in passed:  # as trainer.py spells it
            rest.remove(f"--{name}")
            flags.norm_type = [arm if suffix in arm else with_suffix(arm, suffix) for arm in flags.norm_type]
    if not {"epochs", "max_training_step"} & set(passed):
        rest += ["--epochs", str(EPOCHS)]
    for name in ("log_step", "write_summary_step"):
        rest += [] if name in passed else [f"--{name}", str(LOG_STEP)]
    return flags, rest


def with_suffix(arm, suffix):
    """group and +ws: group+ws; group+acc and +ws: group+ws+acc."""
    plain, acc, _ = arm.partition("+acc")
    return plain + suffix + acc


def available_cores():
    """The numbers of the cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count()))


class Cell:
    """One run of the grid: what it is, the flags that make it, and the settings by which its folder is known."""

    def __init__(self, flags, rest, arm, batch_size, seed):
        norm = arm.removesuffix("+acc").removesuffix("+ws")
        self.arm, self.batch_size, self.seed = arm, batch_size, seed
        self.name = f"{arm}, batch size {batch_size}, seed {seed}"
        self.flags = ["--dataset", flags.dataset, "--norm_type", arm, "--batch_size", str(batch_size)]
        self.flags += ["--seed", str(seed), "--train_dir", flags.train_dir, "--data_dir", flags.data_dir, *rest]
        for name in ("groups", "group_size") if norm == "group" else ():
            value = getattr(flags, name)
            self.flags += [f"--{name}", str(value)] if value is not None else []

    def derive(self, train, test):
        """Fill in the settings, with trainer.py's own functions: its errors come before anything is trained."""
        self.config = derive(parse_training(self.flags)[0], train)
        self.settings = settings_of(self.config, describe_data(train, test))
        self.images = self.config.max_training_step * self.config.max_batch_size

    def find(self, runs):
        """The Run of this cell among `runs`, or None."""
        return next((run for run in runs if run.config.seed == self.seed and run.settings == self.settings), None)


def make_grid(flags, rest):
    """The cells in the order of training: seeds outermost, batch sizes 2 and 32 first; and (train, test)."""
    if flags.dataset is None:
        raise UserError(f"--dataset is missing: give one of {', '.join(datasets.NAMES)} or your own")
    config, _ = parse_training(["--dataset", flags.dataset, "--data_dir", flags.data_dir, *rest])
    train, test = download.load_splits(config.dataset, config.data_dir, config.validation)
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
                    f"{train_dir} holds a run with {name} {there}, where this grid has {here} ({found.path.name}): "
                    f"name another --train_dir"
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
            f"--jobs {jobs} needs about {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free: give --jobs "
            f"{max(1, int(jobs * free / needed))}"
        )


# The running of it.


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


class Processes:
    """Runs scripts, each on cores of its own; stop() ends all of them by SIGTERM, after which they save."""

    def __init__(self, jobs):
        cores = available_cores()
        self.running, self.stopped, self.cores = set(), False, queue.SimpleQueue()
        for i in range(jobs):
            self.cores.put(set(cores[i::jobs]) or set(cores))

    def run(self, command, log):
        """Run a script to its end; ExternalError, with the last lines of its log, if it fails."""
        cores = self.cores.get()

        def prepare():  # in the new process
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
            if PRCTL:  # on Linux, SIGHUP when compare.py ends, however that ends
                PRCTL(PR_SET_PDEATHSIG, signal.SIGHUP)
            if hasattr(os, "sched_setaffinity"):
                os.sched_setaffinity(0, cores)

        try:
            with open(log, "a") as file:
                process = subprocess.Popen(  # in a session of its own: Ctrl-C reaches it through us, once
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
    """Train a cell, or go on with it, and evaluate it; returns its Run."""
    log = Path(flags.train_dir) / "logs" / f"{cell.name.replace(', ', '_').replace(' ', '_')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("")
    data = ["--data_dir", flags.data_dir]
    found = cell.find(read_runs([flags.train_dir]))
    command = None
    if found is None:
        command = ["trainer.py", *cell.flags]
    elif found.state == "unfinished" or (needs_evaluation(found) and not has_checkpoint(found)):
        command = ["trainer.py", "--resume", str(found.path), *data]
    if command:
        try:
            processes.run(command, log)
        except ExternalError:
            found = cell.find(read_runs([flags.train_dir]))
            if found is None or found.state != "diverged":
                raise
            return found
        found = cell.find(read_runs([flags.train_dir]))
    if needs_evaluation(found):
        command = ["evaler.py", "--dataset", found.config.dataset, "--train_dir", str(found.path), *data]
        if found.config.norm_type == "batch":
            small = ["reestimate_small"] * (found.config.batch_size <= SMALL)
            command += ["--batch_statistics", "moving", "reestimate", *small, "batch"]
        if found.config.validation:
            command += ["--validation", str(found.config.validation)]
        processes.run(command, log)
        found = cell.find(read_runs([flags.train_dir]))
    return found


def train_all(cells, flags):
    """Run all cells that are not done, --jobs at a time. Interrupted, stops them after saving.

    Raises ExternalError at the end, if some failed.
    """
    runs = read_runs([flags.train_dir])
    waiting = [cell for cell in cells if not is_done(cell, runs)]
    bar = tqdm(total=sum(cell.images for cell in waiting), unit="img", unit_scale=True, disable=None)
    say = bar.write if not bar.disable else lambda line: print(line, flush=True)
    processes, failures = Processes(flags.jobs), []
    with ThreadPoolExecutor(flags.jobs) as pool, contextlib.closing(bar):
        futures = {pool.submit(run_cell, cell, flags, processes): cell for cell in waiting}
        try:
            for future in as_completed(futures):
                cell = futures[future]
                bar.update(cell.images)
                try:
                    say(f"{cell.name}: {outcome(future.result())}")
                except ExternalError as error:
                    failures.append(f"{cell.name}: {error}")
                    say(failures[-1])
        except BaseException:
            say("stopping: the runs save what they have; the same command goes on with them")
            pool.shutdown(wait=False, cancel_futures=True)
            processes.stop()
            raise
    if failures:
        raise ExternalError(f"{len(failures)} of {len(cells)} runs failed; the first: {failures[0]}")


def outcome(found):
    if found.state != "finished":
        return found.state
    return "; ".join(f"{100 * value:.2f} %{MEASURES[name]}" for name, value in found.accuracies.items())


def print_plan(cells, flags):
    """What would be trained, and the hours, from runs that are there or from two short ones."""
    runs = read_runs([flags.train_dir])
    for cell in cells:
        print(f"{'done   ' if is_done(cell, runs) else 'to do  '}{cell.name}: {cell.images:,} images")
    speeds, source = images_per_second(runs), "images per second of the runs that are there"
    if not speeds:
        source = "two trial runs of 12 steps"
        with tempfile.TemporaryDirectory() as folder:
            for cell in {min(cells, key=lambda c: c.batch_size), max(cells, key=lambda c: c.batch_size)}:
                changed = cell.flags
                for name in ("--epochs", "--max_training_step"):  # and their values
                    place = changed.index(name) if name in changed else len(changed)
                    changed = changed[:place] + changed[place + 2 :]
                trial = "--max_training_step 12 --log_step 4 --test_sample_step 1000000 --train_dir".split()
                command = [sys.executable, str(ROOT / "trainer.py"), *changed, *trial, folder]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            speeds = images_per_second(read_runs([folder]))
    to_do = [cell for cell in cells if not is_done(cell, runs)]
    seconds = sum(cell.images / speeds[min(speeds, key=lambda size: abs(size - cell.batch_size))] for cell in to_do)
    print(
        f"{len(cells)} runs, {len(to_do)} to do; about {seconds / flags.jobs / 3600:.1f} hours with {flags.jobs} "
        f"processes, tests not counted (from {source})"
    )


def images_per_second(runs):
    """{batch size: median of the images per second that runs logged}."""
    found = {}
    for one in runs:
        speeds = [row["images_per_second"] for row in one.rows if "images_per_second" in row]
        found.setdefault(one.config.batch_size, []).extend(speeds)
    return {size: statistics.median(speeds) for size, speeds in found.items() if speeds}


def report(runs, folder, called=None):
    """Print the tables and sentences of `runs`; leave them in folder/table.md, results.csv and two pictures."""
    found, folder = results.tables(runs, called), Path(folder)
    parts = [part for table in found for part in (results.markdown(table), "\n".join(results.sentences(table))) if part]
    text = "\n\n".join(parts) + "\n"
    print(text)
    (folder / "table.md").write_text(text)
    results.write_csv(runs, folder / "results.csv")
    if any(run.state == "finished" for run in runs):
        pictures.draw_batch_sizes(found, folder / "batch_size.png")
        pictures.draw_curves(found, folder / "curves.png")
    print(f"wrote table.md, results.csv and pictures to {folder}")


def main():
    flags, rest = parse_flags()
    if flags.from_logs:
        runs = read_runs(flags.from_logs)
        if not runs:
            raise UserError(f"no run folder in {', '.join(flags.from_logs)}: name a folder that trainer.py wrote into")
        report(runs, flags.from_logs[0], flags.called)
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
            report(runs, flags.train_dir, flags.called)


if __name__ == "__main__":
    run(main)
