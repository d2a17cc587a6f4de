"""Run folders: names, locks, metrics.jsonl, evaluation.json, and reading them. Imports no TensorFlow.

for run in runs.read_runs(["train_dir"]): print(run.config.norm_type, run.accuracies)
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import datasets
from command import UserError, reading, write_atomically
from config import FIELDS, Config, check_path

MEASURES = {
    "accuracy": "",
    "last_epochs": ", median of the last epochs",
    "reestimated": ", statistics re-estimated",
    "reestimated_small": ", statistics re-estimated in training-size batches",
    "by_batch": ", statistics of the test batch",
}


def make_run_dir(config: Config) -> Path:
    """Create train_dir/<prefix>-<dataset>_<norm>_bs_<batch size>_<model>_s<seed>-<time>, and return its path."""
    now = time.strftime("%Y%m%d-%H%M%S")
    name = f"{config.prefix}-{config.dataset}_{config.norm}_bs_{config.batch_size}_{config.model}_s{config.seed}-{now}"
    Path(config.train_dir).mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        path = Path(config.train_dir) / (name if number == 1 else f"{name}-{number}")
        with contextlib.suppress(FileExistsError):  # another run started in the same second
            path.mkdir()
            return path


def write_config(run_dir: Path, flags: Config, config: Config, data: dict) -> None:
    """Write config.json: flags, derived settings, data, versions, machine and commit."""
    given = {field.name: getattr(flags, field.name) for field in FIELDS if "help" in field.metadata}
    given["data_dir"] = None if flags.data_dir == datasets.DATA_DIR else str(Path(flags.data_dir).resolve())
    derived = [field.name for field in FIELDS if "help" not in field.metadata or field.metadata.get("derived")]
    stored = {
        "flags": given,
        "derived": {name: getattr(config, name) for name in derived},
        "data": data,
        "versions": versions(),
        # '0': without oneDNN's convolutions, which round differently
        "machine": machine() | {"onednn": os.environ.get("TF_ENABLE_ONEDNN_OPTS")},
        "source": source(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    write_atomically(run_dir / "config.json", json.dumps(stored, indent=1) + "\n")


def read_config(run_dir) -> tuple[Config, dict]:
    """(configuration, all of config.json as write_config wrote it); UserError if it is missing or damaged."""
    path = Path(run_dir) / "config.json"
    check_path(run_dir)
    if not path.exists():
        raise UserError(f"{run_dir} is not a run folder: it has no config.json, which trainer.py writes")
    with reading(path, "restore this JSON file"):
        stored = json.loads(path.read_text())
        settings = {**stored["flags"], **stored["derived"]}
        for name in ("dataset", "norm_type", "model", "groups", "batch_size", "batch_norm_momentum", "seed"):
            settings[name]  # raises KeyError if it is missing
        stored["data"]["train"], stored["data"]["test"]
    return Config(**{field.name: settings[field.name] for field in FIELDS if field.name in settings}), stored


def describe_data(train, test) -> dict:
    """The description of the data in config.json."""
    return {
        "train": len(train),
        "test": len(test),
        "image_shape": list(train.network_shape),
        "num_classes": train.num_classes,
        "class_names": list(train.class_names),
        "made_from": train.made_from,
        "split": hash_of(train, test),
    }


def hash_of(train, test) -> str:
    """A hash of the ids, labels and images of both splits."""
    found = hashlib.sha256("\n".join([*train.ids, "", *test.ids, train.digest]).encode())
    for split in (train, test):
        found.update(split.labels.tobytes())
    return found.hexdigest()[:16]


def check_data(run_dir, data: dict, train, test, counts: bool = True) -> None:
    """Raise UserError unless the splits match `data`, the description of a run's data in config.json.

    counts: whether to compare the sizes and the hash of the splits, which differ if other images are held out now.
    """
    here = describe_data(train, test)
    free = () if counts else ("train", "test", "split")
    for name in [name for name in here if name in data and name not in free]:
        there, now = data[name], here[name]
        if there == now:
            continue
        if name == "class_names" and len(there) == len(now):
            number = next(i for i, pair in enumerate(zip(there, now)) if pair[0] != pair[1])
            name, there, now = f"class {number}", there[number], now[number]
        change = f"its {name} is {there!r}, but that of {train.name} is now {now!r}"
        if name == "split":
            change = f"images or labels of {train.name}, or which of them are tested, have changed"
        raise UserError(
            f"{run_dir} was trained on other data: {change}; give the old data with --data_dir, or train a new run"
        )


def open_data(run_dir: Path, config: Config, data: dict, data_dir: str, validation: int | None) -> tuple:
    """(train, test) of a stored run, with `validation` images held out; UserError if they differ from `data`.

    data_dir: the folder of the datasets; if it is the default, the run's own folder is used if that exists.
    """
    stored = config.data_dir
    if data_dir == datasets.DATA_DIR and stored and os.path.isdir(stored):
        data_dir = stored
    train, test = datasets.create_default_splits(config.dataset, data_dir, validation=validation)
    check_data(run_dir, data, train, test, counts=validation == config.validation)
    return train, test


def changed_flags(stored: dict) -> dict:
    """The flags in config.json that differ from their defaults, without local ones such as paths."""
    given = stored["flags"]
    return {
        field.name: given[field.name]
        for field in FIELDS
        if field.name in given and given[field.name] not in (field.default, None) and not field.metadata.get("local")
    }


def settings_of(config: Config, data: dict) -> dict:
    """The settings that are equal in runs that differ only in their seed: without local and ignored ones."""
    names = [field.name for field in FIELDS if not {"local", "ignored"} & field.metadata.keys()]
    settings = {name: getattr(config, name) for name in names}
    if config.norm_type != "group":
        settings |= {"groups": None, "group_size": None}
    elif config.group_size is not None:
        settings["groups"] = None
    if data.get("made_from"):  # without the hash of an archive, which depends on how and when it was compressed
        data = data | {"made_from": re.sub(r" sha256 \w+", "", data["made_from"])}
    return settings | {name: value for name, value in data.items() if name not in ("class_names", "split")}


def versions() -> dict:
    """The versions of Python and of the packages that affect results."""
    packages = ("tensorflow", "keras", "numpy")
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in packages}


def machine() -> dict:
    """The processor: its name, its number of cores, and whether it has AVX-512, which changes how sums are rounded."""
    path = Path("/proc/cpuinfo")
    info = path.read_text() if path.exists() else ""  # only Linux has it
    name = re.search(r"model name\s*: (.*)", info)
    return {
        "architecture": platform.machine(),
        "processor": name.group(1) if name else platform.processor(),
        "avx512": "avx512f" in info,
        "processors": os.cpu_count(),
    }


def source() -> dict | None:
    """The git commit of this code, and whether tracked files differ from it; None without git."""

    def git(*words):
        command = ["git", "-C", str(Path(__file__).resolve().parent), *words]
        return subprocess.run(command, text=True, check=True, capture_output=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.CalledProcessError):
        return None


@contextlib.contextmanager
def lock(run_dir: Path):
    """Lock a run folder for this process; UserError if another process trains in it."""
    with open(run_dir / "config.json", "r+") as file:  # for writing: without that, NFS refuses the lock
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{run_dir} is being trained by another process: wait for it, or stop it first") from None
        yield


def has_checkpoint(run_dir: Path) -> bool:
    return (run_dir / "checkpoint").exists()


def find_run(train_dir, dataset: str | None = None) -> Path:
    """The run folder in train_dir with the newest checkpoint, of `dataset` if given. train_dir may be a run folder."""
    train_dir = Path(train_dir)
    if (train_dir / "config.json").exists():
        candidates = [train_dir]
    else:
        candidates = [path.parent for path in train_dir.glob("*/config.json")]
    of_dataset = {path: read_config(path)[0].dataset for path in candidates}
    found = [path for path, name in of_dataset.items() if dataset in (None, name) and has_checkpoint(path)]
    if not found:
        wanted = f"run of {dataset}" if dataset else "run"
        there = f", which has runs of {', '.join(sorted(set(of_dataset.values())))}" if candidates else ""
        raise UserError(
            f"no {wanted} with a checkpoint in {train_dir}{there}: wait for one, train one with 'python trainer.py "
            f"--dataset {dataset or 'NAME'}', or give another --train_dir"
        )
    return max(found, key=lambda path: (path / "checkpoint").stat().st_mtime_ns)


def run_dir_of(checkpoint) -> Path:
    """The run folder of `checkpoint`, which is a checkpoint or the run folder itself; UserError if it has none."""
    path = Path(checkpoint)
    run_dir = path if path.is_dir() else path.parent
    if not (run_dir / "config.json").exists():
        raise UserError(f"--checkpoint {checkpoint} is not in a run folder: give RUN_FOLDER or RUN_FOLDER/model-1000")
    return run_dir


def drop_after(run_dir: Path, step: int) -> None:
    """Remove the log rows after `step`, which are computed again, and unfinished checkpoints.

    TensorBoard's events stay: summaries.Log marks a new start, and TensorBoard ignores older events of later steps.
    """
    for leftover in run_dir.glob("model-*temp*"):  # a checkpoint whose writing was killed
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    path = run_dir / "metrics.jsonl"
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in read_rows(path) if row["step"] <= step))


class Run(NamedTuple):
    """The contents of a run folder, for tables and figures."""

    path: Path
    config: Config
    stored: dict  # config.json, as write_config wrote it
    settings: dict  # equal in runs that differ only in their seed
    rows: list  # of metrics.jsonl
    accuracies: dict  # by the names in MEASURES
    evaluation: dict  # the accuracies that evaler.py measured
    state: str  # finished, diverged or unfinished

    @property
    def norm(self) -> str:
        return self.config.norm

    @property
    def training_accuracy(self) -> float | None:
        """The mean training accuracy of the last epoch, from the rows at multiples of log_step; None if unfinished."""
        epoch = math.ceil(self.settings["train"] / self.config.max_batch_size)
        rows = [row for row in self.rows if row["step"] % self.config.log_step == 0 and "loss/accuracy" in row]
        last = [row["loss/accuracy"] for row in rows if row["step"] > self.config.max_training_step - epoch]
        return statistics.mean(last) if last and self.state == "finished" else None


def read_run(path: Path) -> Run:
    """Read a run folder; UserError if one of its files is damaged."""
    config, stored = read_config(path)
    data, rows = stored["data"], read_rows(path / "metrics.jsonl")
    state = "unfinished"
    if rows and rows[-1]["step"] >= config.max_training_step:
        state = "finished"
    if rows and rows[-1].get("diverged"):
        state = "diverged"
    trained, evaluation = {}, measured_accuracies(path / "evaluation.json", config)
    if state == "finished" and "test_loss/accuracy" in rows[-1]:  # trainer.py's last test; evaler.py repeats it
        trained = {"accuracy": rows[-1]["test_loss/accuracy"]} | last_epochs(config, data, rows)
    accuracies = trained | evaluation if state == "finished" else {}
    return Run(path, config, stored, settings_of(config, data), rows, accuracies, evaluation, state)


def last_epochs(config: Config, data: dict, rows: list) -> dict:
    """{"last_epochs": median test accuracy of the last epochs}; {} if the dataset has no reported_epochs."""
    epochs = datasets.defaults_of(config.dataset).get("reported_epochs")
    if epochs is None:
        return {}
    start = config.max_training_step - epochs * math.ceil(data["train"] / config.max_batch_size)
    tests = [row["test_loss/accuracy"] for row in rows if row["step"] > start and "test_loss/accuracy" in row]
    return {"last_epochs": statistics.median(tests)}


def read_rows(path: Path) -> list:
    """The rows of metrics.jsonl, without an incomplete last line, as a kill may leave."""
    if not path.exists():
        return []
    with reading(path, "each line must be a JSON object with a step"):
        rows = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        [row["step"] for row in rows]
    return rows


def write_evaluation(run_dir: Path, split: str, step: int, checkpoint: str, class_names: list, results: dict) -> None:
    """Write the results {measure: dict} of an evaluation to evaluation.json, in place of older ones.

    evaluation.json holds one result per split and measure, as {"class_names": [...], "splits": {split: {measure:
    {"step", "checkpoint", "accuracy", "loss", ...}}}}.
    """
    path = run_dir / "evaluation.json"
    splits = read_evaluations(path)
    new = {measure: {"step": step, "checkpoint": checkpoint} | result for measure, result in results.items()}
    splits[split] = splits.get(split, {}) | new
    write_atomically(path, json.dumps({"class_names": class_names, "splits": splits}, indent=1) + "\n")


def read_evaluations(path: Path) -> dict:
    """{split: {measure: result}} from evaluation.json, empty if it does not exist; UserError if it is damaged."""
    if not path.exists():
        return {}
    with reading(path, "delete it and run evaler.py again"):
        stored = json.loads(path.read_text())
        if "splits" in stored:
            return stored["splits"]
        # An older file, with one split and its measures.
        results = {name: stored[name] for name in MEASURES if isinstance(stored.get(name), dict)}
        results["accuracy"] = {name: value for name, value in stored.items() if name not in (*results, "split")}
        return {stored["split"]: {name: {"step": stored["step"]} | result for name, result in results.items()}}


def measured_accuracies(path: Path, config: Config) -> dict:
    """{measure: accuracy} from evaluation.json, at the last step, on the split that trainer.py tested on."""
    with reading(path, "delete it and run evaler.py again"):
        results = read_evaluations(path).get("validation" if config.validation else "test", {})
        return {
            name: results[name]["accuracy"]
            for name in MEASURES
            if name in results
            and results[name]["step"] == config.max_training_step
            # Older versions re-estimated statistics without the augmentation of the run.
            and (name != "reestimated" or results[name].get("augment") == config.augment)
        }


def read_runs(folders) -> list[Run]:
    """The runs in `folders` and their subfolders, sorted by path."""
    paths = {Path(path) for folder in folders for path, _, files in os.walk(folder) if "config.json" in files}
    return [read_run(path) for path in sorted(paths)]
