"""Every flag of trainer.py, evaler.py and model.py, what follows from them, and config.json. Imports no TensorFlow.

flags, run_dir = config.parse_training()    # the flags alone
config = config.derive(flags, train)        # with all that follows from them and the data
config, data = config.read_config("train_dir/RUN")
"""

import dataclasses
import json
import math
import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import datasets
from command import ArgumentParser, UserError, flag, within, write_whole

SMALL_RESNETS = tuple(f"resnet{6 * n + 2}" for n in range(1, 19) if n != 8)  # arXiv 1512.03385, section 4.2
LARGE_RESNETS = {  # its table 1: whether blocks are bottlenecks, and the blocks of each stage
    "resnet18": (False, [2, 2, 2, 2]),
    "resnet34": (False, [3, 4, 6, 3]),
    "resnet50": (True, [3, 4, 6, 3]),
    "resnet101": (True, [3, 4, 23, 3]),
}
MODELS = ("convnet",) + SMALL_RESNETS + tuple(LARGE_RESNETS)
NORM_TYPES = ("batch", "group", "layer", "instance", "none", "batch+renorm")  # the last: arXiv 1702.03275
NORMS = (*NORM_TYPES[:-1], *(f"{norm}+ws" for norm in NORM_TYPES[:-1]), NORM_TYPES[-1])  # ws: arXiv 1903.10520
ARMS = (*NORMS, *(f"{norm}+acc" for norm in NORMS))  # what --norm_type may be
AUGMENTATIONS = ("crop", "flip+crop")
LEARNING_RATES = {"adam": 1e-3, "momentum": 0.2}  # at max_batch_size images per update: figure/studies/recipe
SCALING = {"adam": "square root", "momentum": "linear"}  # with the images per update: arXiv 2205.10287, 1706.02677
WEIGHT_DECAY = {"adam": 0.0, "momentum": 1e-4}
MAX_BATCH_SIZE = 64  # images per step, where the dataset has no recipe of its own
MEMORY_BATCH_SIZES = (1, 2, 4, 8, 16, 32)
SMALL_DATASET = 10_000  # images in a user's folders: below, the default network is a smaller one
CLIP_NORM = 20.0  # gradients are clipped to this global norm, as in the original repo
EVALUATION_BATCH = 250  # images: fast, and a divisor of most test splits; results do not depend on it
PREDICTED_CLASSES = 5  # that --predict names for each image


# The metadata of a field, beside its help and its range: on_resume: it may be given with --resume. derived: what
# follows from the flags replaces it. place: it names a place, or how the run is shown. ignored: it does not matter when
# deciding whether two runs differ only in their seed.


@dataclasses.dataclass(frozen=True)
class Network:
    """The flags that choose a network, of model.py and trainer.py alike."""

    model: str | None = flag(
        None,
        f"{MODELS[0]}, {SMALL_RESNETS[0]}, {SMALL_RESNETS[1]} ... {SMALL_RESNETS[-1]} or "
        f"{', '.join(LARGE_RESNETS)}; by default resnet20 up to 64 pixels, resnet50 above, resnet18 for "
        f"folders of fewer than {SMALL_DATASET} images",
        choices=MODELS,
        metavar="MODEL",
        derived=True,
    )
    norm_type: str = flag(
        "batch",
        f"the normalization, of {', '.join(NORMS)}: +ws is short for --weight_standardization, +acc at the end for "
        "--accumulate",
        choices=ARMS,
        metavar="NORM",
    )
    groups: int | None = flag(
        None, "groups of group norm; by default 32, in the 6n+2 nets 16", low=1, derived=True, exclusive="groups"
    )
    group_size: int | None = flag(None, "channels per group, instead of --groups", low=1, exclusive="groups")
    weight_standardization: bool = flag(False, "standardize the weights of the convolutions (arXiv 1903.10520)")


@dataclasses.dataclass(frozen=True)
class Config(Network):
    """What a run is: the flags of trainer.py, and below what follows from them and the data."""

    dataset: str | None = flag(None, f"{', '.join(datasets.NAMES)} or your own")
    prefix: str = flag("default", "first part of the run folder's name", place=True)
    batch_size: int | None = flag(
        None,
        "images per update and replica, all of which batch norm sees together; by default a whole step in one update, "
        "for ImageNet 32",
        low=1,
        derived=True,
    )
    max_batch_size: int | None = flag(
        None,
        f"images per step, over all replicas, a multiple of what an update has; by default {MAX_BATCH_SIZE}, for "
        "ImageNet 256",
        low=1,
        derived=True,
    )
    replicas: int | None = flag(
        None,
        "devices of this host to train on, by default 1, each with --batch_size images per update; hosts by TF_CONFIG",
        low=1,
        on_resume=True,
        ignored=True,
    )
    sync_batch_norm: bool = flag(False, "batch norm takes its statistics over the images of all replicas")
    worker_timeout: float = flag(
        300.0, "seconds to wait for the other hosts of TF_CONFIG", above=0, on_resume=True, place=True
    )
    accumulate: bool = flag(
        False,
        "average the gradients of all batches of a step and update the weights once: the memory of batch_size images, "
        "updates of max_batch_size; batch norm still sees batch_size",
    )
    max_training_step: int | None = flag(
        None,
        "steps to train; by default a number of epochs that suits the dataset",
        low=1,
        derived=True,
        exclusive="length",
    )
    epochs: int | None = flag(
        None, "passes over the training images, instead of --max_training_step", low=1, exclusive="length", ignored=True
    )
    optimizer: str | None = flag(
        None,
        f"by default momentum (0.9), for convnet adam; gradients are clipped to the global norm {CLIP_NORM:g}",
        choices=tuple(LEARNING_RATES),
        derived=True,
    )
    learning_rate: float | None = flag(
        None,
        "rate at max_batch_size images per update; by default "
        + " and ".join(f"{rate:g} for {name}" for name, rate in LEARNING_RATES.items())
        + ", for ImageNet with momentum 0.1 at 256 images",
        above=0,
        ignored=True,
    )
    no_adjust_learning_rate: bool = flag(
        False,
        "do not scale the rate with the images per update: by their share in max_batch_size for momentum (arXiv "
        "1706.02677), by its square root for adam (arXiv 2205.10287)",
        ignored=True,
    )
    lr_schedule: str | None = flag(
        None,
        "constant; step: a tenth after 30, 60 and 90 %% of the steps; cosine: to 0 at the end; by default cosine, "
        "for ImageNet step",
        choices=("constant", "step", "cosine"),
        derived=True,
    )
    warmup_steps: int = flag(0, "steps of linear increase of the rate at the start", low=0)
    weight_decay: float | None = flag(
        None,
        "L2 penalty on all weights, gamma and beta included; by default 1e-4 with momentum, 0 with adam",
        low=0,
        derived=True,
    )
    augment: str | None = flag(
        None,
        "cut images at random (for digits and signs), or mirror them too, which --augment alone means and is the "
        "default for photographs",
        choices=AUGMENTATIONS,
        nargs="?",
        const="flip+crop",
        derived=True,
        exclusive="augmentation",
    )
    no_augment: bool = flag(False, "show the images as they are", exclusive="augmentation", ignored=True)
    dtype: str = flag(
        "float32",
        "bfloat16: Keras' mixed precision; statistics, gamma, beta and logits stay float32",
        choices=("float32", "bfloat16"),
    )
    jit_compile: bool = flag(False, "compile the training step with XLA")
    seed: int = flag(0, "of initialisation, order, augmentation and dropout", low=0, ignored=True)
    validation: int | None = flag(
        None,
        "hold out N training images, of each class its share and always the same ones, and test on them instead of "
        "the test split: for choosing settings",
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
        "steps between rows of metrics.jsonl, which have the mean training loss and accuracy of the last log_step "
        "steps; the console shows them beside its bar, and a line for each test",
        low=1,
        place=True,
    )
    write_summary_step: int = flag(
        10, "steps between TensorBoard scalars; each is a row of metrics.jsonl too", low=1, place=True
    )
    test_sample_step: int | None = flag(
        None, "steps between tests on the whole test split; by default an epoch", low=1, derived=True, ignored=True
    )
    ckpt_save_step: int = flag(
        1000, "steps between checkpoints; there is one every 10 minutes at least", low=1, ignored=True
    )
    data_dir: str | None = flag(datasets.DATA_DIR, "where the datasets are", on_resume=True, place=True)
    train_dir: str = flag("train_dir", "where to make the run folder", place=True)

    base_learning_rate: float | None = None  # --learning_rate, or the optimizer's default
    learning_rate_scaling: str | None = None  # none, linear or square root
    peak_learning_rate: float | None = None  # of the schedule: scaled with the images per update
    batch_norm_momentum: float | None = None  # of the moving statistics, per batch
    updates_per_step: int | None = None
    num_replicas: int = 1  # on all hosts

    @property
    def batches_per_step(self) -> int:
        """How many batches each replica goes through in a step: an update for each, or one update with --accumulate."""
        return self.max_batch_size // (self.num_replicas * self.batch_size)

    @property
    def arm(self) -> str:
        """The norm as compare.py's --norm_type spells it."""
        return self.norm_type + "+ws" * self.weight_standardization + "+acc" * self.accumulate


FIELDS = dataclasses.fields(Config)


def default_model(image_shape: tuple, is_small: bool = False) -> str:
    """resnet20 for images of at most 64 pixels a side; above, resnet50, or resnet18 for a small dataset."""
    height, width, _ = image_shape
    if height and max(height, width) <= 64:
        return "resnet20"
    return "resnet18" if is_small else "resnet50"


def default_groups(model: str) -> int:
    """32 as in arXiv 1803.08494, and 16 for the 6n + 2 nets, whose first stage has 16 channels: of 2, 4, 8 and 16 the
    best on held-out images (figure/studies/recipe)."""
    return 16 if model in SMALL_RESNETS else 32


def channels_of(model: str) -> tuple:
    """The numbers of channels that the norms of a network see."""
    if model == "convnet":
        return 64, 128, 256, 512
    if model in SMALL_RESNETS:
        return 16, 32, 64
    bottleneck, _ = LARGE_RESNETS[model]
    return (64, 128, 256, 512, 1024, 2048)[: 6 if bottleneck else 4]


# How many processes and devices train together. TF_CONFIG is read here, without starting TensorFlow.


class Workers(NamedTuple):
    """The processes of a run: their addresses, host:port, and which of them this one is. Number 0 is the chief."""

    addresses: tuple = ("",)
    index: int = 0

    @property
    def is_chief(self):
        return self.index == 0


def workers() -> Workers:
    """The workers that TF_CONFIG names; this process alone without it."""
    text = os.environ.get("TF_CONFIG", "").strip() or "{}"
    wanted = '{"cluster": {"worker": ["HOST:PORT", ...]}, "task": {"type": "worker", "index": 0}}'
    try:
        found = json.loads(text)
        cluster, task = found.get("cluster", {}), found.get("task", {})
        if not cluster:
            return Workers()
        addresses, index = tuple(cluster["worker"]), int(task["index"])
        [int(address.rsplit(":", 1)[1]) for address in addresses]
        if set(cluster) != {"worker"} or task["type"] != "worker" or not 0 <= index < len(addresses):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise UserError(f"TF_CONFIG is {text}, but should be like {wanted}: workers alone, which all run it") from None
    if len(set(addresses)) < len(addresses):
        raise UserError(f"TF_CONFIG names an address twice: {', '.join(addresses)}")
    return Workers(addresses, index)


def number_of_replicas(here: int | None) -> int:
    """How many replicas train together, with `here` of them in each process."""
    return (here or 1) * len(workers().addresses)


# The flags of the scripts.


def training_parser() -> ArgumentParser:
    parser = ArgumentParser(description="Train a classifier with the normalization and batch size of your choice.")
    parser.add_flags(Config)
    parser.add_argument("--resume", metavar="RUN_DIR", help="go on with this run, with the flags that it was given")
    return parser


def parse_training(argv=None) -> tuple[Config, Path | None]:
    """(Config of the flags of trainer.py alone, run folder to resume or None)."""
    parser = training_parser()
    parsed = vars(parser.parse_args(argv))
    resume = parsed.pop("resume")
    flags = spell_out(Config(**parsed))
    if resume is None:
        check_flags(flags)
        return flags, None
    given = parser.names_given(argv)
    for field in FIELDS:
        if field.name in given and not field.metadata.get("on_resume"):
            raise UserError(
                f"--resume goes on with the flags of the run, so --{field.name} {getattr(flags, field.name)} has no "
                f"effect: leave it out, or start a new run (from the weights of this one: --checkpoint {resume})"
            )
    return flags, Path(resume)


def spell_out(flags: Config) -> Config:
    """The flags that a --norm_type such as group+ws+acc is short for."""
    norm, *more = flags.norm_type.replace("batch+renorm", "renorm").split("+")
    return dataclasses.replace(
        flags,
        norm_type="batch+renorm" if norm == "renorm" else norm,
        weight_standardization=flags.weight_standardization or "ws" in more,
        accumulate=flags.accumulate or "acc" in more,
    )


def check_flags(flags: Config) -> None:
    """Raise UserError for flags that contradict each other or have no effect."""
    if flags.dataset is None:
        raise UserError(f"--dataset is missing: give one of {', '.join(datasets.NAMES)} or your own")
    if not flags.prefix or any(c in flags.prefix for c in "/\\\0") or flags.prefix in (".", ".."):
        raise UserError(f"--prefix {flags.prefix!r} must be a plain name, for it begins the name of a folder")
    check_path(Path(flags.train_dir) / flags.prefix)
    check_network(flags)
    if flags.seed >= 2**31:
        raise UserError(f"--seed must be below 2147483648, not {flags.seed}")
    check_batches(flags)
    if flags.freeze_batch_norm and (flags.norm_type != "batch" or not flags.checkpoint):
        raise UserError("--freeze_batch_norm is for --norm_type batch and weights of --checkpoint: leave it out")
    if flags.max_training_step is not None and flags.warmup_steps > flags.max_training_step:
        raise UserError(
            f"--warmup_steps {flags.warmup_steps} is more than --max_training_step {flags.max_training_step}"
        )


def check_network(flags: Network, model: str | None = None) -> None:
    """Raise UserError for groups that have no effect, or do not divide the channels of `model`, once it is known."""
    for name in ("groups", "group_size"):
        value = getattr(flags, name)
        if value is not None and flags.norm_type != "group":
            raise UserError(f"--{name} {value} has no effect with --norm_type {flags.norm_type}: use --norm_type group")
    for channels in channels_of(model) if model and flags.norm_type == "group" else ():
        divisor = flags.group_size or flags.groups or default_groups(model)
        if channels % divisor:
            what = f"groups of {divisor}" if flags.group_size else f"{divisor} groups"
            valid = ", ".join(str(d) for d in range(1, 65) if min(channels_of(model)) % d == 0)
            raise UserError(f"{model}: {channels} channels cannot be split into {what}; valid here are {valid}")


def check_batches(flags: Config) -> None:
    """Raise UserError unless a step is whole updates of all replicas, and for what their number makes impossible."""
    number = number_of_replicas(flags.replicas)
    batch_size, max_batch_size = batch_sizes(flags)
    images = batch_size * number
    if max_batch_size % images:
        fitting = -(-max_batch_size // images) * images
        each = f"--batch_size {batch_size}" if number == 1 else f"{number} replicas of {batch_size} images"
        raise UserError(
            f"{each} does not divide --max_batch_size {max_batch_size}: a step is max_batch_size images in whole "
            f"updates; --max_batch_size {fitting} would do"
        )
    if flags.accumulate and max_batch_size == images:
        raise UserError(f"--accumulate has no effect where one batch is a whole step ({images} images): leave it out")
    if flags.sync_batch_norm and (flags.norm_type != "batch" or number == 1):
        what = f"--norm_type {flags.norm_type}" if flags.norm_type != "batch" else "one replica"
        raise UserError(f"--sync_batch_norm has no effect with {what}: leave it out")
    if flags.jit_compile and number > 1:
        raise UserError(f"--jit_compile does not go with {number} replicas: leave it out")


def check_path(path) -> None:
    """Raise UserError for a run folder whose checkpoints TensorFlow would not find: it reads paths as patterns, in
    UTF-8."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"{os.fsencode(path)!r} is not UTF-8: choose a name of letters and digits") from None
    found = sorted(set("*?[]\\") & set(str(path)))
    if found:
        raise UserError(
            f"{path} has {' '.join(found)} in it, which TensorFlow reads as a pattern: choose a name without * ? [ ] "
            f"and \\"
        )


def parse_evaluation(argv=None):
    """The flags of evaler.py."""
    parser = ArgumentParser(description="Evaluate a run over a whole split, in inference mode.")
    parser.add_argument("run", nargs="?", metavar="RUN", help="the run folder; by default the newest in --train_dir")
    parser.add_argument("--dataset", help="the newest run of this dataset, one of the known or your own")
    parser.add_argument("--train_dir", default="train_dir", help="where the run folders are, or one run folder")
    parser.add_argument("--checkpoint", help="evaluate this checkpoint; by default the newest of the run")
    parser.add_argument("--split", choices=("test", "train"), default="test", help="which split to evaluate")
    parser.add_argument("--batch_size", type=within(int, low=1), default=EVALUATION_BATCH, help="images at a time")
    parser.add_argument("--data_dir", default=datasets.DATA_DIR, help="where the datasets are")
    parser.add_argument(
        "--batch_statistics",
        choices=("moving", "reestimate", "reestimate_small", "batch"),
        nargs="+",
        default=["moving"],
        help="of batch norm: those that training left; also those re-estimated over training images, augmented as in "
        "training, in large batches or in batches of the training batch size; also those of the test batch, at the "
        "training batch size",
    )
    parser.add_argument(
        "--validation",
        type=within(int, low=1),
        metavar="N",
        help="evaluate on the N training images that the run held out by the same flag",
    )
    parser.add_argument(
        "--predict",
        nargs="+",
        metavar="PATH",
        help=f"print the {PREDICTED_CLASSES} most likely classes of image files, and of those in folders and below, "
        "instead of evaluating",
    )
    parser.add_argument("--output", metavar="FILE", help="write what --predict prints as a CSV file, too")
    parser.add_argument(
        "--export",
        metavar="DIR",
        help="also write the network into this new folder, in files that load without this repo, with a README.md",
    )
    flags = parser.parse_args(argv)
    if flags.predict:
        without_effect, why = ("split", "batch_statistics", "validation", "export"), "with --predict"
    elif flags.export is not None:
        without_effect, why = ("split", "batch_statistics", "validation", "output"), "with --export"
    else:
        without_effect, why = ("output",), "without --predict"
    for name in parser.names_given(argv):
        if name in without_effect:
            raise UserError(f"--{name} has no effect {why}: leave it out")
    if flags.validation is not None and flags.split == "train":
        raise UserError(f"--validation {flags.validation} and --split train contradict each other: give one of them")
    if flags.dataset is not None:
        datasets.folder_of(flags.dataset, flags.data_dir)  # refuses a name that can name no dataset
    if flags.run is not None:
        if "train_dir" in parser.names_given(argv):
            raise UserError(f"{flags.run} and --train_dir {flags.train_dir} both name runs: give one of them")
        flags.train_dir = flags.run
    return flags


def parse_network(argv=None):
    """The flags of model.py: (Config, image shape, number of classes, batch sizes of which to measure the memory)."""
    parser = ArgumentParser(description="Print the layers, shapes and parameter counts of a model.")
    parser.add_flags(Network)
    size = within(int, low=1)
    shape = "height, width and channels; a single number is both height and width; by default 3 channels"
    parser.add_argument("--image_size", type=size, nargs="+", default=[32], metavar="N", help=shape)
    parser.add_argument("--classes", type=within(int, low=2), default=10, help="number of classes")
    parser.add_argument(
        "--memory",
        nargs="*",
        type=within(int, low=1),
        metavar="BATCH_SIZE",
        help="also measure the peak memory of a training step with batch, group and no norm; by default at batch "
        f"sizes {' '.join(map(str, MEMORY_BATCH_SIZES))}",
    )
    flags = vars(parser.parse_args(argv))
    memory = flags.pop("memory")
    if memory == []:
        memory = MEMORY_BATCH_SIZES
    size, classes = flags.pop("image_size"), flags.pop("classes")
    if len(size) > 3:
        raise UserError(f"--image_size {' '.join(map(str, size))}: expected height, width and channels")
    image_shape = (size[0], size[min(1, len(size) - 1)], size[2] if len(size) == 3 else 3)
    config = spell_out(Config(**flags))
    if config.accumulate:
        raise UserError(f"--norm_type {flags['norm_type']}: +acc changes the training, not the model: leave it out")
    config = dataclasses.replace(config, model=config.model or default_model(image_shape), batch_norm_momentum=0.9)
    check_network(config, config.model)
    return config, image_shape, classes, memory


# What follows from the flags and the data.


def batch_sizes(flags: Config) -> tuple[int, int]:
    """(images per update and replica, images per step): the flags, else the dataset's recipe where it fits them."""
    recipe = datasets.recipe_of(flags.dataset)
    most = flags.max_batch_size or recipe.get("max_batch_size", MAX_BATCH_SIZE)
    number = number_of_replicas(flags.replicas)
    usual = recipe.get("batch_size", most)
    return flags.batch_size or (max(1, most // number) if most % (usual * number) else usual), most


def derive(flags: Config, train) -> Config:
    """The configuration: the flags, and what follows from them and the training images. Nothing changes it later."""
    facts, recipe = datasets.module_of(flags.dataset), datasets.recipe_of(flags.dataset)
    is_small = train.from_folder and len(train) < SMALL_DATASET
    model = flags.model or default_model(train.network_shape, is_small)
    check_network(flags, model)
    is_mirrored = facts.MIRRORED or train.from_folder
    optimizer = flags.optimizer or ("adam" if model == "convnet" else "momentum")
    number = number_of_replicas(flags.replicas)
    batch_size, max_batch_size = batch_sizes(flags)
    batch_share = number * batch_size / max_batch_size
    update_share = 1.0 if flags.accumulate else batch_share
    learning_rate = flags.learning_rate or LEARNING_RATES[optimizer]
    if "momentum_rate" in recipe and optimizer == "momentum" and flags.learning_rate is None:
        learning_rate = recipe["momentum_rate"] * max_batch_size / recipe["max_batch_size"]  # arXiv 1706.02677
    scaling = "none" if flags.no_adjust_learning_rate else SCALING[optimizer]
    scale = {"none": 1.0, "linear": update_share, "square root": math.sqrt(update_share)}[scaling]
    epoch = math.ceil(len(train) / max_batch_size)
    steps = flags.max_training_step or (flags.epochs or facts.EPOCHS) * epoch
    if flags.warmup_steps > steps:
        raise UserError(f"--warmup_steps {flags.warmup_steps} is more than the {steps} steps of this run")
    return dataclasses.replace(
        flags,
        model=model,
        groups=flags.groups or default_groups(model),
        batch_size=batch_size,
        max_batch_size=max_batch_size,
        updates_per_step=1 if flags.accumulate else max_batch_size // (number * batch_size),
        num_replicas=number,
        optimizer=optimizer,
        lr_schedule=flags.lr_schedule or recipe.get("lr_schedule", "cosine"),
        base_learning_rate=learning_rate,
        learning_rate_scaling=scaling,
        peak_learning_rate=learning_rate * scale,
        weight_decay=WEIGHT_DECAY[optimizer] if flags.weight_decay is None else flags.weight_decay,
        # A step forgets a tenth of the statistics, in however many batches: every batch size averages over the same
        # number of images.
        batch_norm_momentum=0.9**batch_share,
        augment=flags.augment or ("flip+crop" if is_mirrored and not flags.no_augment else None),
        max_training_step=steps,
        test_sample_step=flags.test_sample_step or epoch,
    )


# config.json.


def describe_data(train, test) -> dict:
    """What config.json records of the data."""
    return {
        "train": len(train),
        "test": len(test),
        "image_shape": list(train.network_shape),
        "num_classes": train.num_classes,
        "class_names": list(train.class_names),
        "made_from": train.made_from,
    }


def check_data(run_dir, data: dict, train, test, counts: bool = True) -> None:
    """Raise UserError unless the splits are the data that a run was trained on, as config.json describes them.

    counts: False where the run held out images that are not held out now, so that the numbers of images differ.
    """
    here = describe_data(train, test)
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
    given = {field.name: getattr(flags, field.name) for field in FIELDS if "help" in field.metadata}
    given["data_dir"] = None if flags.data_dir == datasets.DATA_DIR else str(Path(flags.data_dir).resolve())
    derived = [field.name for field in FIELDS if "help" not in field.metadata or field.metadata.get("derived")]
    stored = {
        "flags": given,
        "derived": {name: getattr(config, name) for name in derived},
        "data": data,
        "versions": versions(),
        "machine": {"architecture": platform.machine(), "processor": processor(), "processors": os.cpu_count()},
        "source": source(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    write_whole(run_dir / "config.json", json.dumps(stored, indent=1) + "\n")


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
        runs = sorted(Path(run_dir).glob("*/config.json"), key=lambda path: -path.stat().st_mtime)
        raise UserError(
            f"{run_dir} is no run folder: it has no config.json, which trainer.py writes"
            + (f"; it holds {len(runs)}: {', '.join(str(path.parent) for path in runs[:5])}" if runs else "")
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {error}): it should be the JSON object that trainer.py wrote"
        ) from None
    if isinstance(settings["augment"], bool):  # of a run before --augment had choices
        settings["augment"] = "flip+crop" if settings["augment"] else None
    known = {field.name for field in FIELDS}
    return Config(**{name: value for name, value in settings.items() if name in known}), data


def flags_given(run_dir) -> dict:
    """The flags of a run that are not their defaults, without those that name places."""
    given = json.loads((Path(run_dir) / "config.json").read_text())["flags"]
    return {
        field.name: given[field.name]
        for field in FIELDS
        if field.name in given and given[field.name] not in (field.default, None) and not field.metadata.get("place")
    }


def settings_of(config: Config, data: dict) -> dict:
    """The settings in which alike runs agree: all but the seed, places, and what has no effect."""
    settings = {
        field.name: getattr(config, field.name)
        for field in FIELDS
        if not (field.metadata.get("place") or field.metadata.get("ignored"))
    }
    if config.norm_type != "group":
        settings |= {"groups": None, "group_size": None}
    elif config.group_size is not None:
        settings["groups"] = None
    return settings | {name: value for name, value in data.items() if name != "class_names"}


def versions() -> dict:
    """The versions of Python and of what computes."""
    packages = ("tensorflow", "keras", "numpy")
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in packages}


def processor() -> str:
    """The CPU's name."""
    try:
        names = [line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
        return names[0]
    except (OSError, IndexError):  # not Linux
        return platform.processor()


def source() -> dict | None:
    """The git commit of this code, and whether the tree differs from it; None where there is no git."""

    def git(*words):
        command = ["git", "-C", str(Path(__file__).resolve().parent), *words]
        return subprocess.run(command, text=True, check=True, capture_output=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.CalledProcessError):
        return None
