"""Train the first steps of stored runs again, and compare the rows of metrics.jsonl.

python figure/compare.py --challenge figure/studies/digits --runs 3 --steps 100
"""

import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import datasets
import download
import runs
from command import UserError, ExternalError, one_line
from config import FIELDS

TRAINER = Path(__file__).resolve().parent.parent / "trainer.py"
TOLERANCE = 0.05  # of a loss or an accuracy: another processor rounds differently, and training amplifies that
COMPARED = ("loss/loss", "loss/accuracy", "test_loss/loss", "test_loss/accuracy")
SET_ELSEWHERE = {"prefix", "data_dir", "train_dir", "epochs", "learning_rate", "groups"}


def challenge(folder, number, steps, data_dir):
    """Repeat `steps` steps of `number` random runs of `folder`. Raises ExternalError beyond TOLERANCE."""
    found = runs.read_runs([folder])
    if not found:
        raise UserError(f"no run folder in {folder}: give a study, such as figure/studies/digits")
    problems = {run.path: find_problem(run, data_dir) for run in found}
    for problem, count in Counter(filter(None, problems.values())).items():
        print(f"skipped {count} of {len(found)} runs: {problem}")
    possible = [run for run in found if not problems[run.path]]
    if not possible:
        raise UserError(f"none of the {len(found)} runs of {folder} can be trained here: see the reasons above")
    chosen = random.sample(possible, min(number, len(possible)))
    print(f"{len(chosen)} of {len(possible)} runs, {steps} steps each")
    results = [compare(run, repeat(run, steps, data_dir), data_dir) for run in chosen]
    print(f"{sum(difference == 0 for difference in results)} of {len(results)} are bitwise equal")
    if max(results) > TOLERANCE:
        raise ExternalError(f"a row differs by {max(results):.3g}: rounding should change less than {TOLERANCE}")


def find_problem(run, data_dir):
    """Return why a run cannot be trained here (no rows, several hosts, other data, no checkpoint), '' if it can."""
    if not run.rows:
        return "no logged rows"
    if run.config.num_replicas != (run.config.replicas or 1):
        return "trained by several workers"
    try:
        name, held_out = run.config.dataset, run.config.validation
        splits = download.load_splits(name, data_dir, held_out, may_fetch=name == "Digits")  # needs no download
        runs.check_data("the run", run.stored["data"] | {"made_from": splits[0].made_from}, *splits)
        if run.config.checkpoint:
            runs.run_dir_of(run.config.checkpoint)
    except UserError as error:
        return one_line(error, 300)
    return ""


def flags_of(config):
    """Return the flags of trainer.py for a run of a configuration, derived values included."""
    names = [field.name for field in FIELDS if "help" in field.metadata and field.name not in SET_ELSEWHERE]
    values = {name: getattr(config, name) for name in names} | {"learning_rate": config.base_learning_rate}
    if config.norm_type == "group" and config.group_size is None:
        values["groups"] = config.groups
    words = []
    for name, value in values.items():
        if value is not None and value is not False:  # 0.0 == False
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def repeat(run, steps, data_dir):
    """Train a run again on one core until it has logged `steps` steps; return its rows as {step: row}."""
    onednn = run.stored.get("machine", {}).get("onednn")  # which convolutions it used; older runs have the default
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "log", "w+") as log:
        folders = ["--train_dir", str(Path(folder) / "runs"), "--data_dir", data_dir]
        process = subprocess.Popen(
            [sys.executable, str(TRAINER), *flags_of(run.config), *folders],
            stdout=log,
            stderr=log,
            env=os.environ | ({"TF_ENABLE_ONEDNN_OPTS": onednn} if onednn else {}),
            preexec_fn=use_one_core,
        )

        def rows_so_far():
            return {row["step"]: row for made in runs.read_runs([folder]) for row in made.rows}

        try:
            while process.poll() is None and max(rows_so_far(), default=0) < steps:
                time.sleep(0.2)
            failed = process.poll() and run.state != "diverged"
        finally:
            process.terminate()
            process.wait()
        rows = rows_so_far()
        if failed or not rows:
            log.seek(0)
            raise ExternalError(f"{run.path.name} failed: {one_line(log.read()[-400:])}")
    return {step: row for step, row in rows.items() if step <= steps}


def use_one_core():
    """Use one core, as the runs of studies do: sums depend on the number of threads."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def difference(old, new, name):
    """Return the difference of a value in two rows; infinite if only one row has it as a number."""
    before, after = old.get(name, math.nan), new.get(name, math.nan)
    if before == after or (math.isnan(before) and math.isnan(after)):
        return 0.0
    return math.inf if math.isnan(before - after) else abs(before - after)


def compare(run, repeated, data_dir):
    """Print and return the largest difference between the rows of a run and of its repetition."""
    pairs = [(row, repeated[row["step"]]) for row in run.rows if row["step"] in repeated]
    if not pairs:
        raise UserError(f"{run.path.name} logs every {run.config.log_step} steps: give --steps {run.config.log_step}")
    differences = [max(difference(old, new, name) for old, new in pairs) for name in COMPARED]
    verdict = "not equal"
    if max(differences) <= TOLERANCE:
        verdict = "bitwise equal" if max(differences) == 0 else "equal except for rounding"
    print(
        f"{run.path.name}: {len(pairs)} rows to step {pairs[-1][0]['step']}, largest difference of a loss "
        f"{max(differences[::2]):.2g}, of an accuracy {max(differences[1::2]):.2g}: {verdict}"
        + "".join(f"; {change}" for change in list_changes(run, data_dir))
    )
    return max(differences)


def list_changes(run, data_dir):
    """List differences that may explain other bits: versions, the processor, the archives of the data."""
    stored, train = run.stored, datasets.create_default_splits(run.config.dataset, data_dir)[0]
    now = runs.versions() | runs.machine() | {"made_from": train.made_from}
    then = stored["versions"] | stored.get("machine", {}) | stored["data"]
    return [f"{name} was {then[name]}, is {now[name]}" for name in now if name in then and then[name] != now[name]]
