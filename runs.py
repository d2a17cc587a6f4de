"""A run: its configuration, and its folder with config.json, metrics.jsonl, evaluation.json and checkpoints.

config, data = runs.read_config("train_dir/RUN")
for run in runs.read_runs(["train_dir"]): print(run.config.norm_type, run.accuracies)
"""

import contextlib
import dataclasses
import fcntl
import functools
import importlib.metadata
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import datasets
import model as models
from command import Later, UserError, flag, write_whole
from input_ops import AUGMENTATIONS, network_image_shape

tf = Later("tensorflow")

LEARNING_RATES = {"adam": 1e-3, "momentum": 0.2}  # at max_batch_size images per update: figure/studies/recipe
SCALING = {"adam": "square root", "momentum": "linear"}  # with the batch size: arXiv 2205.10287 and 1706.02677
MAX_BATCH_SIZE = 64  # images per step, where the dataset has no recipe of its own
CHECKPOINTS_KEPT = 3
CHECKPOINT_SECONDS = 600  # a checkpoint at least so often, however long a step takes
CLIP_NORM = 20.0  # gradients are clipped to this global norm, as in the original repo


@dataclasses.dataclass(frozen=True)
class Config(models.Network):
    """What a run is: the flags of trainer.py, and below what follows from them and the data (trainer.derive)."""

    dataset: str | None = flag(None, "MNIST, Fashion, SVHN, CIFAR10, TinyImageNet, ImageNet, Digits or your own")
    prefix: str = flag("default", "first part of the run folder's name")
    batch_size: int | None = flag(
        None,
        "images per update and replica, all of which batch norm sees together; by default a whole step in one update, "
        "for ImageNet 32",
        low=1,
    )
    max_batch_size: int | None = flag(
        None,
        f"images per step, over all replicas, a multiple of what an update has; by default {MAX_BATCH_SIZE}, for "
        "ImageNet 256",
        low=1,
    )
    replicas: int | None = flag(
        None,
        "devices of this host to train on, by default 1, each with --batch_size images per update; hosts by TF_CONFIG",
        low=1,
        on_resume=True,
    )
    sync_batch_norm: bool = flag(False, "batch norm takes its statistics over the images of all replicas")
    worker_timeout: float = flag(300.0, "seconds to wait for the other hosts of TF_CONFIG", above=0, on_resume=True)
    accumulate: bool = flag(
        False,
        "average the gradients of all batches of a step and update the weights once: the memory of batch_size images, "
        "updates of max_batch_size; batch norm still sees batch_size",
    )
    max_training_step: int | None = flag(
        None,
        "steps to train; by default a number of epochs that suits the dataset; with --resume, to train longer",
        low=1,
        on_resume=True,
    )
    epochs: int | None = flag(None, "passes over the training images, instead of --max_training_step", low=1)
    optimizer: str | None = flag(
        None,
        f"by default momentum (0.9), for convnet adam; gradients are clipped to the global norm {CLIP_NORM:g}",
        choices=tuple(LEARNING_RATES),
    )
    learning_rate: float | None = flag(
        None,
        "rate at max_batch_size images per update; by default "
        + " and ".join(f"{rate:g} for {name}" for name, rate in LEARNING_RATES.items())
        + ", for ImageNet with momentum 0.1 at 256 images",
        above=0,
    )
    no_adjust_learning_rate: bool = flag(
        False,
        "do not scale the rate with the images per update: by their share in max_batch_size for momentum (arXiv "
        "1706.02677), by its square root for adam (arXiv 2205.10287)",
    )
    lr_schedule: str | None = flag(
        None,
        "constant; step: a tenth after 30, 60 and 90 %% of the steps; cosine: to 0 at the end; by default cosine, "
        "for ImageNet step",
        choices=("constant", "step", "cosine"),
    )
    warmup_steps: int = flag(0, "steps of linear increase of the rate at the start", low=0)
    weight_decay: float | None = flag(
        None, "L2 penalty on all weights, gamma and beta included; by default 1e-4 with momentum, 0 with adam", low=0
    )
    augment: str | None = flag(
        None,
        "cut images at random (for digits and signs), or mirror them too, which --augment "
        "alone means and is the default for photographs",
        choices=AUGMENTATIONS,
        nargs="?",
        const="flip+crop",
    )
    no_augment: bool = flag(False, "show the images as they are")
    dtype: str = flag(
        "float32",
        "bfloat16: Keras' mixed precision; statistics, gamma, beta and logits stay float32",
        choices=("float32", "bfloat16"),
    )
    jit_compile: bool = flag(False, "compile the training step with XLA")
    seed: int = flag(0, "of initialisation, order, augmentation and dropout", low=0)
    validation: int | None = flag(
        None,
        "hold out N training images, of each class its share and always the same ones, "
        "and test on them instead of the test split: for choosing settings",
        low=1,
        metavar="N",
    )
    checkpoint: str | None = flag(
        None,
        "start from the weights of this checkpoint or run folder: with other classes the last layer is new, and batch "
        "norm can become group, layer or instance norm",
    )
    freeze_batch_norm: bool = flag(False, "with --checkpoint: batch norm keeps the moving statistics that it came with")
    log_step: int = flag(
        10,
        "steps between lines of log; each is a row of metrics.jsonl too, and every row has the mean training loss and "
        "accuracy of the last log_step steps",
        low=1,
    )
    write_summary_step: int = flag(10, "steps between TensorBoard scalars; each is a row of metrics.jsonl too", low=1)
    test_sample_step: int | None = flag(None, "steps between tests on the whole test split; by default an epoch", low=1)
    ckpt_save_step: int = flag(1000, "steps between checkpoints; there is one every 10 minutes at least", low=1)
    data_dir: str | None = flag(datasets.DATA_DIR, "where the datasets are", on_resume=True)
    train_dir: str = flag("train_dir", "where to make the run folder")

    base_learning_rate: float | None = None  # --learning_rate, or the optimizer's default
    learning_rate_scaling: str | None = None  # none, linear or square root
    peak_learning_rate: float | None = None  # of the schedule: scaled with the batch size
    batch_norm_momentum: float | None = None  # of the moving statistics, per update
    updates_per_step: int | None = None
    num_replicas: int = 1  # on all hosts

    @property
    def batches_per_step(self) -> int:
        """How many batches each replica goes through in a step: an update for each, or one update with --accumulate."""
        return self.max_batch_size // (self.num_replicas * self.batch_size)


FLAGS = [field.name for field in dataclasses.fields(Config) if field.metadata]
DERIVED = [
    "model",
    "groups",
    "batch_size",
    "max_batch_size",
    "updates_per_step",
    "num_replicas",
    "optimizer",
    "lr_schedule",
    "base_learning_rate",
    "learning_rate_scaling",
    "peak_learning_rate",
    "weight_decay",
    "batch_norm_momentum",
    "augment",
    "max_training_step",
    "test_sample_step",
]
PLACES = {"prefix", "data_dir", "train_dir", "log_step", "write_summary_step", "worker_timeout"}
# What does not change what is learned, or follows from what does.
IGNORED = PLACES | {
    "seed",
    "test_sample_step",
    "ckpt_save_step",
    "class_names",
    "learning_rate",
    "no_adjust_learning_rate",
    "no_augment",
    "replicas",
    "epochs",
}
MEASURES = {
    "accuracy": "",
    "last_epochs": ", median of the last epochs",
    "reestimated": ", statistics re-estimated",
    "reestimated_small": ", statistics re-estimated in training-size batches",
    "by_batch": ", statistics of the test batch",
}


# ------------------------------------------------------------------------------------------------- the configuration


def describe_data(train, test) -> dict:
    """What config.json says of the data."""
    return {
        "train": len(train),
        "test": len(test),
        "image_shape": list(network_image_shape(train)),
        "num_classes": train.num_classes,
        "class_names": list(train.class_names),
        "made_from": train.made_from,
    }


def check_data(run_dir, data: dict, train, test, counts: bool = True) -> None:
    """Raise UserError unless the splits are the data that a run was trained on, as config.json describes them.

    counts: False where the run held out images that are not held out now, so that the numbers of images differ.
    """
    here = json.loads(json.dumps(describe_data(train, test)))
    for name in here.keys() & data.keys() - (set() if counts else {"train", "test"}):
        there, now = data[name], here[name]
        if there == now:
            continue
        if name == "class_names" and len(there) == len(now):
            number = next(i for i, pair in enumerate(zip(there, now)) if pair[0] != pair[1])
            name, there, now = f"class {number}", there[number], now[number]
        raise UserError(
            f"{run_dir} was trained on other data: its {name} is {there!r}, that of {train.name} is now {now!r}; bring "
            f"the old data back (--data_dir), or train anew"
        )


def write_config(run_dir: Path, flags: Config, config: Config, data: dict) -> None:
    """Write config.json: the flags as given, what follows from them, the data, the versions, machine and commit."""
    given = {name: getattr(flags, name) for name in FLAGS}
    given["data_dir"] = None if flags.data_dir == datasets.DATA_DIR else str(Path(flags.data_dir).resolve())
    write_whole(
        run_dir / "config.json",
        json.dumps(
            {
                "flags": given,
                "derived": {name: getattr(config, name) for name in DERIVED},
                "data": data,
                "versions": versions(),
                "machine": {"architecture": platform.machine(), "processor": processor(), "processors": os.cpu_count()},
                "source": source(),
                "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            },
            indent=1,
        )
        + "\n",
    )


def extend(run_dir: Path, config: Config) -> None:
    """Write into config.json that the run is as long as `config` says, if it is longer than before; all else stays."""
    path = run_dir / "config.json"
    stored = json.loads(path.read_text())
    if stored["derived"]["max_training_step"] != config.max_training_step:
        stored["flags"]["max_training_step"] = stored["derived"]["max_training_step"] = config.max_training_step
        write_whole(path, json.dumps(stored, indent=1) + "\n")


def read_config(run_dir) -> tuple[Config, dict]:
    """(configuration, data) of config.json; UserError if it is not there or not one of trainer.py's."""
    path = Path(run_dir) / "config.json"
    check_path(run_dir)
    try:
        stored = json.loads(path.read_text())
        settings, data = {**stored["flags"], **stored["derived"]}, stored["data"]
        for name in ("dataset", "norm_type", "model", "groups", "batch_size", "batch_norm_momentum", "seed"):
            settings[name]
        data["train"], data["test"]
    except FileNotFoundError:
        raise UserError(f"{run_dir} is no run folder: it has no config.json, which trainer.py writes") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {error}): it should be the JSON object that trainer.py wrote"
        ) from None
    if isinstance(settings["augment"], bool):  # of a run before --augment had choices
        settings["augment"] = "flip+crop" if settings["augment"] else None
    known = {field.name for field in dataclasses.fields(Config)}
    return Config(**{name: value for name, value in settings.items() if name in known}), data


def flags_given(run_dir) -> dict:
    """The flags of a run that are not their defaults, without those that name places."""
    given = json.loads((Path(run_dir) / "config.json").read_text())["flags"]
    return {
        field.name: given[field.name]
        for field in dataclasses.fields(Config)
        if field.name in given and given[field.name] not in (field.default, None) and field.name not in PLACES
    }


def versions() -> dict:
    """The versions of Python and of what computes."""
    packages = ("tensorflow", "keras", "numpy")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


def processor() -> str:
    """The CPU's name."""
    try:
        names = [line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
        return names[0]
    except (OSError, IndexError):  # not Linux
        return platform.processor()


@functools.cache
def source() -> dict | None:
    """The git commit of this code, and whether the tree differs from it; None where there is no git."""

    def git(*words):
        return subprocess.run(
            ["git", "-C", str(Path(__file__).resolve().parent), *words],
            text=True,
            check=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.CalledProcessError):
        return None


# -------------------------------------------------------------------------------------------------------- the folder


def check_path(path) -> None:
    """Raise UserError for a run folder whose checkpoints TensorFlow could not find: it takes paths for patterns, in
    UTF-8."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"{os.fsencode(path)!r} is not UTF-8: choose a name of letters and digits") from None
    found = sorted(set("*?[]\\") & set(str(path)))
    if found:
        raise UserError(
            f"{path} has {' '.join(found)} in it: TensorFlow reads the path of a checkpoint as a pattern, "
            f"and would not find it again; choose a name without * ? [ ] and \\"
        )


def make_run_dir(config: Config) -> Path:
    """A new folder train_dir/<prefix>-<dataset>_lr_..._bs_..._norm_type_...-<time>, this run's alone."""
    name = (
        f"{config.prefix}-{config.dataset}_lr_{config.base_learning_rate:g}_bs_{config.batch_size}"
        f"_norm_type_{config.norm_type}-{time.strftime('%Y%m%d-%H%M%S')}"
    )
    for suffix in [""] + [f"-{i}" for i in range(2, 1000)]:
        path = Path(config.train_dir) / (name + suffix)
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:  # started in the same second
            if not path.is_dir():
                raise
    raise UserError(f"{config.train_dir} has 999 run folders called {name}: name another --train_dir")


@contextlib.contextmanager
def lock(run_dir: Path):
    """Keep a run folder for this process; UserError if another process trains in it."""
    handle = os.open(run_dir, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"{run_dir} is being trained by another process: wait for it, or stop it first") from None
    finally:
        os.close(handle)  # which ends the lock, as the end of the process does


def find_run(train_dir, dataset: str) -> Path:
    """The run folder of this dataset whose checkpoint is the newest; train_dir may itself be one run folder."""
    train_dir = Path(train_dir)
    if (train_dir / "config.json").exists():
        candidates = [train_dir]
    else:
        candidates = [path.parent for path in train_dir.glob("*/config.json")]
    of_dataset = {path: read_config(path)[0].dataset for path in candidates}
    runs = [path for path in candidates if of_dataset[path] == dataset]
    if not runs:
        names = sorted(set(of_dataset.values()))
        raise UserError(
            f"no run of {dataset} in {train_dir}"
            + (f", only of {', '.join(names)}" if names else "")
            + f": train one with 'python trainer.py --dataset {dataset}', or name another --train_dir"
        )
    finished = [path for path in runs if tf.train.latest_checkpoint(path)]
    if not finished:
        raise UserError(f"the runs of {dataset} in {train_dir} have no checkpoint yet")
    return max(finished, key=lambda path: (path / "checkpoint").stat().st_mtime_ns)


def run_dir_of(checkpoint) -> Path:
    """The run folder that a checkpoint lies in; a folder stands for its newest checkpoint. UserError if it is none."""
    path = Path(checkpoint)
    check_path(path)
    run_dir = path if path.is_dir() else path.parent
    if not (run_dir / "config.json").exists():
        raise UserError(
            f"--checkpoint {checkpoint} lies in no run folder: name one as trainer.py writes them, such as "
            f"RUN_FOLDER/model-1000, or the run folder"
        )
    return run_dir


def weights_of(model) -> dict:
    """The variables that a checkpoint holds of a model, by name: weights, moving statistics, state of dropout."""
    return {variable.path: variable.value for variable in model.variables}


class Checkpoints:
    """The checkpoints of a run folder: restores the newest as it is made, says when one is due, and writes it."""

    def __init__(self, run_dir, config, writes, **tracked):
        checkpoint = tf.train.Checkpoint(**tracked)
        self.manager = tf.train.CheckpointManager(checkpoint, str(run_dir), CHECKPOINTS_KEPT, checkpoint_name="model")
        if self.newest():
            restored = checkpoint.restore(self.newest())
            stored = {name.split("/")[0] for name, _ in tf.train.list_variables(self.newest())}
            if "recent" in stored:  # else it was written before rows covered a fixed window
                restored.assert_consumed()
        self.every, self.writes = config.ckpt_save_step, writes
        self.saved, self.clock = int(tracked["step"]), time.monotonic()

    def newest(self):
        return self.manager.latest_checkpoint

    def due(self, step):
        return step % self.every == 0 or time.monotonic() - self.clock > CHECKPOINT_SECONDS

    def save(self, step):
        if self.writes:
            self.manager.save(checkpoint_number=step)
        self.saved, self.clock = step, time.monotonic()


def load_weights(model, checkpoint) -> tuple[str, int]:
    """Read a model's variables from a checkpoint (a path, or a run folder: its newest); returns the path and step."""
    path = str(checkpoint)
    if os.path.isdir(path):
        path = tf.train.latest_checkpoint(path) or path
    try:
        reader = tf.train.load_checkpoint(path)
        shapes = reader.get_variable_to_shape_map()
    except (ValueError, tf.errors.OpError):
        raise UserError(
            f"{checkpoint} is no readable checkpoint: name one as trainer.py writes them, "
            f"such as RUN_FOLDER/model-1000, or the run folder"
        ) from None
    stored = {name: shape for name, shape in shapes.items() if name.startswith("model/")}
    variables = weights_of(model)
    key = "model/{}/.ATTRIBUTES/VARIABLE_VALUE".format
    names = {key(name.replace("/", ".S")): name for name in variables}
    for name in sorted(names.keys() ^ stored.keys()):
        side = "the checkpoint lacks" if name in names else "the model lacks"
        raise UserError(f"checkpoint {path} is of another model or norm: {side} {names.get(name, name)}")
    for name, shape in stored.items():
        wanted = variables[names[name]].shape
        if list(wanted) != list(shape):
            raise UserError(
                f"checkpoint {path} is of another model or number of classes: {names[name]} has the shape "
                f"{tuple(shape)} there and {tuple(wanted)} here"
            )
    for name, variable in names.items():
        variables[variable].assign(reader.get_tensor(name))
    return path, int(reader.get_tensor("step/.ATTRIBUTES/VARIABLE_VALUE"))


def take_weights(model, source, same_classes: bool) -> list[str]:
    """Give a model the variables of another that have the same name and shape, those of the last layer only where the
    classes are the same; returns the names that nothing was taken for."""
    there = {name: v for name, v in weights_of(source).items() if same_classes or not name.startswith("logits/")}
    left = []
    for name, variable in weights_of(model).items():
        if name in there and there[name].shape == variable.shape:
            variable.assign(there[name])
        else:
            left.append(name)
    return left


def check_convertible(config: Config, other: Config, checkpoint) -> bool:
    """Whether the norms of a run with `other` have to be converted; UserError if its weights do not fit, or cannot."""
    for name in ("model", "weight_standardization"):
        if getattr(config, name) != getattr(other, name):
            raise UserError(
                f"checkpoint {checkpoint} is of a run with --{name} {getattr(other, name)}, not "
                f"{getattr(config, name)}: give the same"
            )
    same = config.norm_type == other.norm_type
    if config.norm_type == "group":
        same = same and (config.groups, config.group_size) == (other.groups, other.group_size)
    if not same and (config.norm_type not in ("group", "layer", "instance") or other.norm_type == "none"):
        raise UserError(
            f"checkpoint {checkpoint} is of a run with --norm_type {other.norm_type}, which cannot become "
            f"{config.norm_type}: give the same, or group, layer or instance to convert a norm"
        )
    return not same


def drop_after(run_dir: Path, step: int) -> None:
    """Make a folder what it was when `step` was saved: the steps after it are done again.

    TensorBoard's events stay: summaries.Log marks where it goes on, and TensorBoard drops what was written after that.
    """
    for leftover in run_dir.glob("model-*temp*"):  # of a checkpoint whose writing was killed
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    path = run_dir / "metrics.jsonl"
    write_whole(path, "".join(json.dumps(row) + "\n" for row in read_rows(path) if row["step"] <= step))


# ------------------------------------------------------------------------------------------------ reading it again


class Run(NamedTuple):
    """A run folder as figures read it."""

    path: Path
    config: Config
    settings: dict  # all that makes runs alike, but for the seed
    rows: list  # of metrics.jsonl
    accuracies: dict  # by the names in MEASURES
    evaluation: dict  # the part of them that evaler.py measured
    state: str  # finished, diverged or unfinished
    commit: str | None = None  # of the code that made it

    @property
    def arm(self) -> str:
        """The norm as compare.py's --norm_type spells it."""
        config = self.config
        return config.norm_type + "+ws" * config.weight_standardization + "+acc" * config.accumulate

    @property
    def training_accuracy(self) -> float | None:
        """The mean over the last epoch, of the rows that log_step steps lie between; None before there is one."""
        epoch = math.ceil(self.settings["train"] / self.config.max_batch_size)
        rows = [row for row in self.rows if row["step"] % self.config.log_step == 0 and "loss/accuracy" in row]
        last = [row["loss/accuracy"] for row in rows if row["step"] > self.config.max_training_step - epoch]
        return statistics.mean(last) if last and self.state == "finished" else None


def comparable(config: Config, data: dict) -> dict:
    """The settings that make runs alike: all but the seed, places, and what has no effect."""
    settings = dataclasses.asdict(config) | data
    if config.norm_type != "group":
        settings |= {"groups": None, "group_size": None}
    elif config.group_size is not None:
        settings["groups"] = None
    return {name: value for name, value in settings.items() if name not in IGNORED}


def read_run(path: Path) -> Run:
    """The Run in a folder; UserError if one of its files is damaged."""
    config, data = read_config(path)
    rows = read_rows(path / "metrics.jsonl")
    state = "unfinished"
    if rows and rows[-1]["step"] >= config.max_training_step:
        state = "finished"
    if rows and rows[-1].get("diverged"):
        state = "diverged"
    accuracies = evaluation = read_evaluation(path / "evaluation.json", config)
    if state == "finished" and "test_loss/accuracy" in rows[-1]:  # trainer.py's last test is what evaler.py repeats
        accuracies = {"accuracy": rows[-1]["test_loss/accuracy"]} | last_epochs(config, data, rows) | accuracies
    source = json.loads((path / "config.json").read_text()).get("source") or {}
    return Run(path, config, comparable(config, data), rows, accuracies, evaluation, state, source.get("commit"))


def last_epochs(config: Config, data: dict, rows: list) -> dict:
    """{"last_epochs": median accuracy over the tests of the last epochs}, where a dataset's recipe says of how many."""
    epochs = datasets.recipe_of(config.dataset).get("reported_epochs")
    if epochs is None:
        return {}
    start = config.max_training_step - epochs * math.ceil(data["train"] / config.max_batch_size)
    tests = [row["test_loss/accuracy"] for row in rows if row["step"] > start and "test_loss/accuracy" in row]
    return {"last_epochs": statistics.median(tests)}


def read_rows(path: Path) -> list:
    """The rows of metrics.jsonl; a last line that a kill cut short does not count."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    try:
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        [row["step"] for row in rows]
        return rows
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): it should hold a JSON object with its step per line") from error


def write_evaluation(run_dir: Path, split: str, step: int, checkpoint: str, class_names: list, results: dict) -> None:
    """Put the results {measure: dict} of an evaluation into evaluation.json, which keeps one result for each split and
    measure: {split: {measure: {"step", "checkpoint", "accuracy", "loss", ...}}}."""
    path = run_dir / "evaluation.json"
    splits = read_evaluations(path)
    made = {measure: {"step": step, "checkpoint": checkpoint} | result for measure, result in results.items()}
    splits[split] = splits.get(split, {}) | made
    write_whole(path, json.dumps({"class_names": class_names, "splits": splits}, indent=1) + "\n")


def read_evaluations(path: Path) -> dict:
    """{split: {measure: result}} of evaluation.json, empty if there is none; UserError if it is damaged."""
    if not path.exists():
        return {}
    try:
        stored = json.loads(path.read_text())
        if "splits" in stored:
            return stored["splits"]
        # Written before there was a result for each split: one evaluation, of all measures.
        results = {name: stored[name] for name in MEASURES if isinstance(stored.get(name), dict)}
        results["accuracy"] = {name: value for name, value in stored.items() if name not in (*results, "split")}
        return {stored["split"]: {name: {"step": stored["step"]} | result for name, result in results.items()}}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it and run evaler.py again") from error


def read_evaluation(path: Path, config: Config) -> dict:
    """{measure: accuracy} of the last step on the split that the run was tested on; empty if there is none."""
    results = read_evaluations(path).get("validation" if config.validation else "test", {})
    try:
        return {
            name: results[name]["accuracy"]
            for name in MEASURES
            if name in results
            and results[name]["step"] == config.max_training_step
            # Statistics were once re-estimated over images as they are, whatever a run was trained on.
            and (name != "reestimated" or results[name].get("augment") == config.augment)
        }
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it and run evaler.py again") from error


def read_runs(folders) -> list[Run]:
    """The Runs among `folders` and below them, sorted by path."""
    paths = {path.parent for folder in folders for path in Path(folder).glob("**/config.json")}
    return [read_run(path) for path in sorted(paths)]
