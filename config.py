"""The flags of trainer.py, evaler.py and model.py, and the settings derived from them. Imports no TensorFlow.

flags, run_dir = config.parse_training()    # the flags alone
config = config.derive(flags, train)        # with the settings derived from flags and data
"""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import NamedTuple

import datasets
from command import ArgumentParser, UserError, flag, within

# arXiv 1512.03385, section 4.2: resnet8 ... resnet110, without resnet50, which is the name of a large one.
SMALL_RESNETS = tuple(f"resnet{6 * n + 2}" for n in range(1, 19) if n != 8)
LARGE_RESNETS = {  # arXiv 1512.03385, table 1: whether blocks are bottlenecks, and the blocks of each stage
    "resnet18": (False, [2, 2, 2, 2]),
    "resnet34": (False, [3, 4, 6, 3]),
    "resnet50": (True, [3, 4, 6, 3]),
    "resnet101": (True, [3, 4, 23, 3]),
}
MODELS = ("convnet",) + SMALL_RESNETS + tuple(LARGE_RESNETS)
NORM_TYPES = ("batch", "group", "layer", "instance", "none", "batch+renorm")  # renorm: arXiv 1702.03275
STANDARDIZED = tuple(f"{norm}+ws" for norm in NORM_TYPES if norm != "batch+renorm")  # ws: arXiv 1903.10520
NORM_NAMES = tuple(f"{norm}{acc}" for acc in ("", "+acc") for norm in NORM_TYPES + STANDARDIZED)  # for --norm_type
LEARNING_RATES = {"adam": 1e-3, "momentum": 0.2}  # at max_batch_size images per update: figure/studies/recipe
SCALING = {"adam": "square root", "momentum": "linear"}  # by images per update: arXiv 2205.10287, 1706.02677
WEIGHT_DECAY = {"adam": 0.0, "momentum": 1e-4}
MAX_BATCH_SIZE = 64  # images per step, unless the dataset has its own default
MEMORY_BATCH_SIZES = (1, 2, 4, 8, 16, 32)
SMALL_DATASET = 10_000  # a user's folders with fewer training images get a smaller default network
CLIP_NORM = 20.0  # gradients are clipped to this global norm, as in the 2018 repo
EVALUATION_BATCH = 250  # images: fast, and a divisor of most test splits
EVALUATION_PIXELS = 2**20  # of an evaluation batch at most, so that it needs less memory than a step of training
PREDICTED_CLASSES = 5  # per image, with --predict

# Metadata of the fields below, besides help and range:
#   on_resume: may be given with --resume.
#   derived: derive() may replace the value.
#   local: a path, a timeout or a setting of the display, which does not affect the results.
#   ignored: ignored when deciding whether two runs differ only in their seed.


@dataclasses.dataclass(frozen=True)
class Network:
    """The flags that choose a network, shared by model.py and trainer.py."""

    model: str | None = flag(
        None,
        f"{MODELS[0]}, {SMALL_RESNETS[0]}, {SMALL_RESNETS[1]} ... {SMALL_RESNETS[-1]} or "
        f"{', '.join(LARGE_RESNETS)}; by default resnet20 up to 64 pixels, resnet50 above, or resnet18 for "
        f"image folders with fewer than {SMALL_DATASET} training images",
        choices=MODELS,
        metavar="MODEL",
        derived=True,
    )
    norm_type: str = flag(
        "batch",
        f"the normalization: {', '.join(NORM_TYPES)}; all but batch+renorm also with +ws for "
        "--weight_standardization, and all with +acc at the end for --accumulate",
        choices=NORM_NAMES,
        metavar="NORM",
    )
    groups: int | None = flag(
        None,
        "number of groups of group norm; by default 16 for ResNets for small images, 32 for other networks",
        low=1,
        derived=True,
        exclusive="groups",
    )
    group_size: int | None = flag(None, "channels per group, instead of --groups", low=1, exclusive="groups")
    weight_standardization: bool = flag(False, "standardize the weights of the convolutions (arXiv 1903.10520)")


@dataclasses.dataclass(frozen=True)
class Config(Network):
    """The configuration of a run: the flags of trainer.py, then the settings derived from flags and data."""

    dataset: str | None = flag(None, f"{', '.join(datasets.NAMES)} or your own")
    prefix: str = flag("default", "first part of the run folder's name", local=True)
    batch_size: int | None = flag(
        None,
        "images per batch on each replica, which batch norm normalizes together; each batch is an update, unless "
        "--accumulate is given; by default a complete step, for ImageNet 32",
        low=1,
        derived=True,
    )
    max_batch_size: int | None = flag(
        None,
        f"images per step over all replicas, a multiple of the images per update; by default {MAX_BATCH_SIZE}, for "
        "ImageNet 256",
        low=1,
        derived=True,
    )
    replicas: int | None = flag(
        None,
        "devices of this host, by default 1, each with --batch_size images per update; several hosts need TF_CONFIG",
        low=1,
        on_resume=True,
        ignored=True,
    )
    sync_batch_norm: bool = flag(False, "compute batch norm's statistics over the images of all replicas")
    worker_timeout: float = flag(300.0, "seconds to wait for the other hosts", above=0, on_resume=True, local=True)
    accumulate: bool = flag(
        False,
        "average the gradients of all batches of a step, and update the weights once: this needs the memory of "
        "batch_size images for an update of max_batch_size images; batch norm still sees batch_size images",
    )
    max_training_step: int | None = flag(
        None, "steps to train; by default the dataset's usual number of epochs", low=1, derived=True, exclusive="length"
    )
    epochs: int | None = flag(
        None,
        "passes over the training images, each rounded up to complete steps",
        low=1,
        exclusive="length",
        ignored=True,
    )
    optimizer: str | None = flag(
        None,
        f"by default momentum (0.9), for convnet adam; gradients are clipped to a global norm of {CLIP_NORM:g}",
        choices=tuple(LEARNING_RATES),
        derived=True,
    )
    learning_rate: float | None = flag(
        None,
        "learning rate at max_batch_size images per update; by default "
        + " and ".join(f"{rate:g} for {name}" for name, rate in LEARNING_RATES.items())
        + ", for ImageNet with momentum 0.1 at 256 images per update",
        above=0,
        ignored=True,
    )
    no_adjust_learning_rate: bool = flag(
        False,
        "use the learning rate as given; by default, with s = images per update / max_batch_size, it is multiplied by "
        "s for momentum (arXiv 1706.02677), and by the square root of s for adam (arXiv 2205.10287)",
        ignored=True,
    )
    lr_schedule: str | None = flag(
        None,
        "constant; step: divided by 10 after 30, 60 and 90 %% of the steps; cosine: to 0 at the end; by default "
        "cosine, for ImageNet step",
        choices=("constant", "step", "cosine"),
        derived=True,
    )
    warmup_steps: int = flag(0, "steps in which the learning rate rises linearly at the start", low=0)
    weight_decay: float | None = flag(
        None, "L2 penalty, also on gamma and beta; by default 1e-4 with momentum, 0 with adam", low=0, derived=True
    )
    augment: str | None = flag(
        None,
        "crop: crop images at random, for digits and signs; flip+crop: also flip them, the default for CIFAR10, "
        "Fashion, TinyImageNet, ImageNet and image folders; --augment alone means flip+crop",
        choices=("crop", "flip+crop"),
        nargs="?",
        const="flip+crop",
        derived=True,
        exclusive="augmentation",
    )
    no_augment: bool = flag(False, "train on unchanged images", exclusive="augmentation", ignored=True)
    dtype: str = flag(
        "float32",
        "bfloat16 is Keras' mixed precision, in which statistics, gamma, beta and logits stay float32",
        choices=("float32", "bfloat16"),
    )
    jit_compile: bool = flag(False, "compile the updates with XLA")
    seed: int = flag(0, "seed of initialization, image order, augmentation and dropout", low=0, ignored=True)
    validation: int | None = flag(
        None,
        "hold out N training images, and test on them instead of the test split, to choose settings; they are always "
        "the same images, from each class in proportion",
        low=1,
        metavar="N",
    )
    checkpoint: str | None = flag(
        None,
        "start from the weights of this checkpoint or run folder; other classes get a new last layer, and any norm but "
        "none can become group, layer or instance norm",
    )
    freeze_batch_norm: bool = flag(False, "with --checkpoint: keep batch norm's moving statistics of the checkpoint")
    log_step: int = flag(
        10,
        "steps between rows of metrics.jsonl, at most an epoch; they hold the mean training loss and accuracy of the "
        "last log_step steps; the console shows these beside the progress bar, and prints a line for each test",
        low=1,
        local=True,
        derived=True,
    )
    write_summary_step: int = flag(10, "steps between TensorBoard scalars, also in metrics.jsonl", low=1, local=True)
    test_sample_step: int | None = flag(
        None, "steps between tests on the complete test split; by default an epoch", low=1, derived=True, ignored=True
    )
    ckpt_save_step: int = flag(1000, "steps between checkpoints, besides one every 10 minutes", low=1, ignored=True)
    data_dir: str | None = flag(datasets.DATA_DIR, "folder of the datasets", on_resume=True, local=True)
    train_dir: str = flag("train_dir", "folder in which to create the run folder", local=True)

    base_learning_rate: float | None = None  # --learning_rate, or the default of optimizer and dataset
    learning_rate_scaling: str | None = None  # none, linear or square root
    peak_learning_rate: float | None = None  # highest of the schedule, scaled with the images per update
    batch_norm_momentum: float | None = None  # of the moving statistics, per batch
    updates_per_step: int | None = None
    num_replicas: int = 1  # on all hosts

    @property
    def batches_per_step(self) -> int:
        """Batches per step of each replica: one update for each batch, or with --accumulate one for all."""
        return self.max_batch_size // (self.num_replicas * self.batch_size)

    @property
    def norm(self) -> str:
        """The norm as written in --norm_type, such as group+ws+acc."""
        return self.norm_type + "+ws" * self.weight_standardization + "+acc" * self.accumulate


FIELDS = dataclasses.fields(Config)


def default_model(image_shape: tuple, is_small: bool = False) -> str:
    """resnet20 for images of at most 64 pixels per side; for larger ones resnet50, or resnet18 for a small dataset."""
    if max(image_shape[:2]) <= 64:
        return "resnet20"
    return "resnet18" if is_small else "resnet50"


def evaluation_batch(image_shape: tuple) -> int:
    """Images at a time in evaluation. Results do not depend on it, except for re-estimated statistics."""
    height, width = image_shape[:2]
    return max(8, min(EVALUATION_BATCH, EVALUATION_PIXELS // (height * width)))


def default_groups(model: str) -> int:
    """32 as in arXiv 1803.08494; 16 for SMALL_RESNETS, whose first stage has 16 channels.

    Of 2, 4, 8 and 16, 16 was the best for group norm on held-out images; for group+ws the four were level
    (figure/studies/recipe).
    """
    return 16 if model in SMALL_RESNETS else 32


def channels_of(model: str) -> tuple:
    """The channels of a network's norms."""
    if model == "convnet":
        return 64, 128, 256, 512
    if model in SMALL_RESNETS:
        return 16, 32, 64
    bottleneck, _ = LARGE_RESNETS[model]
    return (64, 128, 256, 512, 1024, 2048)[: 6 if bottleneck else 4]


class Workers(NamedTuple):
    """The processes of a run: their addresses (host:port), and the index of this process. Index 0 is the chief."""

    addresses: tuple = ("",)
    index: int = 0

    @property
    def is_chief(self):
        return self.index == 0


def workers() -> Workers:
    """The workers in TF_CONFIG, read without starting TensorFlow; only this process if TF_CONFIG is unset."""
    text = os.environ.get("TF_CONFIG", "").strip() or "{}"
    example = '{"cluster": {"worker": ["HOST:PORT", ...]}, "task": {"type": "worker", "index": 0}}'
    try:
        found = json.loads(text)
        cluster, task = found.get("cluster", {}), found.get("task", {})
        if not cluster:
            return Workers()
        addresses, index = tuple(cluster["worker"]), int(task["index"])
        [int(address.rsplit(":", 1)[1]) for address in addresses]  # raises an error unless each is HOST:PORT
        if set(cluster) != {"worker"} or task["type"] != "worker" or not 0 <= index < len(addresses):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise UserError(f"TF_CONFIG is {text}, but should be like {example}, with workers only") from None
    if len(set(addresses)) < len(addresses):
        raise UserError(f"TF_CONFIG has an address twice: {', '.join(addresses)}; give each worker its own")
    return Workers(addresses, index)


def number_of_replicas(here: int | None) -> int:
    """The number of replicas in all processes, with `here` replicas in each."""
    return (here or 1) * len(workers().addresses)


def training_parser() -> ArgumentParser:
    parser = ArgumentParser(description="Train a classifier with the normalization and batch size of your choice.")
    parser.add_flags(Config)
    parser.add_argument("--resume", metavar="RUN_FOLDER", help="continue this run with its own flags")
    return parser


def parse_training(argv=None) -> tuple[Config, Path | None]:
    """(Config with the flags of trainer.py but no derived settings, run folder to resume or None)."""
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
                f"--resume continues with the flags of the run, so --{field.name} {getattr(flags, field.name)} has no "
                f"effect: remove it, or start a new run (from the weights of this one: --checkpoint {resume})"
            )
    return flags, Path(resume)


def spell_out(flags: Config) -> Config:
    """Replace a --norm_type such as group+ws+acc with the flags it stands for."""
    norm = flags.norm_type
    return dataclasses.replace(
        flags,
        norm_type=norm.replace("+ws", "").replace("+acc", ""),
        weight_standardization=flags.weight_standardization or "+ws" in norm,
        accumulate=flags.accumulate or "+acc" in norm,
    )


def check_flags(flags: Config) -> None:
    """Raise UserError for flags that contradict each other or have no effect."""
    if flags.dataset is None:
        raise UserError(f"--dataset is missing: give one of {', '.join(datasets.NAMES)} or your own")
    if not flags.prefix or any(c in flags.prefix for c in "/\\\0") or flags.prefix in (".", ".."):
        raise UserError(f"--prefix {flags.prefix!r} begins the name of a folder: use letters, digits, - and _")
    check_path(Path(flags.train_dir) / flags.prefix)
    check_network(flags, flags.model)
    if flags.seed >= 2**31:
        raise UserError(f"--seed must be below 2147483648, not {flags.seed}")
    check_batches(flags)
    if flags.freeze_batch_norm and (flags.norm_type != "batch" or not flags.checkpoint):
        raise UserError("--freeze_batch_norm needs --norm_type batch and --checkpoint: add them, or remove it")


def check_network(flags: Network, model: str | None = None) -> None:
    """Raise UserError for flags that do not suit the norm, or groups that do not divide the channels of `model`."""
    if flags.weight_standardization and f"{flags.norm_type}+ws" not in STANDARDIZED:
        raise UserError(f"--weight_standardization does not go with --norm_type {flags.norm_type}: remove it")
    for name in ("groups", "group_size"):
        value = getattr(flags, name)
        if value is not None and flags.norm_type != "group":
            raise UserError(f"--{name} {value} has no effect with --norm_type {flags.norm_type}: use --norm_type group")
    for channels in channels_of(model) if model and flags.norm_type == "group" else ():
        divisor = flags.group_size or flags.groups or default_groups(model)
        if channels % divisor:
            groups = f"groups of {divisor}" if flags.group_size else f"{divisor} groups"
            valid = ", ".join(str(d) for d in range(1, 65) if min(channels_of(model)) % d == 0)
            raise UserError(f"{model}: {channels} channels cannot be split into {groups}; valid numbers are {valid}")


def check_batches(flags: Config) -> None:
    """Raise UserError unless a step consists of complete updates, and for flags that do not fit batches or replicas."""
    number = number_of_replicas(flags.replicas)
    batch_size, max_batch_size = batch_sizes(flags)
    images = batch_size * number
    if max_batch_size % images:
        fitting = -(-max_batch_size // images) * images
        each = f"--batch_size {batch_size}" if number == 1 else f"{number} replicas of {batch_size} images"
        raise UserError(
            f"--max_batch_size {max_batch_size} is not a multiple of {each}, but a step consists of complete updates: "
            f"use --max_batch_size {fitting}"
        )
    if flags.accumulate and max_batch_size == images:
        raise UserError(f"--accumulate has no effect when one batch is a complete step ({images} images): remove it")
    if flags.sync_batch_norm and (flags.norm_type != "batch" or number == 1):
        reason = f"--norm_type {flags.norm_type}" if flags.norm_type != "batch" else "one replica"
        raise UserError(f"--sync_batch_norm has no effect with {reason}: remove it")
    if flags.jit_compile and number > 1:
        raise UserError(f"--jit_compile does not work with {number} replicas: remove it")


def check_path(path) -> None:
    """Raise UserError for a path in which TensorFlow cannot find checkpoints: it needs UTF-8, and expands patterns."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"{os.fsencode(path)!r} is not UTF-8: use a name of letters and digits") from None
    found = sorted(set("*?[]\\") & set(str(path)))
    if found:
        raise UserError(f"{path} contains {' '.join(found)}: TensorFlow needs a path without * ? [ ] and \\")


def parse_evaluation(argv=None):
    """The flags of evaler.py."""
    parser = ArgumentParser(description="Evaluate a run on a complete split, in inference mode.")
    run = parser.add_mutually_exclusive_group()
    run.add_argument("run", nargs="?", metavar="RUN_FOLDER", help="by default the newest run in --train_dir")
    run.add_argument("--train_dir", default="train_dir", help="folder that holds the run folders, or one run folder")
    run.add_argument("--checkpoint", help="evaluate this checkpoint; by default the newest of the run")
    parser.add_argument("--dataset", help="evaluate the newest run of this dataset")
    parser.add_argument("--split", choices=("test", "train"), default="test", help="which split to evaluate")
    size = f"images at a time; by default {EVALUATION_BATCH}, or fewer above 64 pixels"
    parser.add_argument("--batch_size", type=within(int, low=1), help=size)
    parser.add_argument("--data_dir", default=datasets.DATA_DIR, help="folder of the datasets")
    parser.add_argument(
        "--batch_statistics",
        choices=("moving", "reestimate", "reestimate_small", "batch"),
        nargs="+",
        default=["moving"],
        help="batch norm's statistics, one or more: moving are those of the checkpoint; reestimate computes them anew "
        "from training images, augmented as in training, in large batches, and reestimate_small in batches of the "
        "training batch size; batch are those of each test batch of the training batch size",
    )
    held_out = "evaluate on the N training images that the run held out with the same flag"
    parser.add_argument("--validation", type=within(int, low=1), metavar="N", help=held_out)
    shown = f"only print the {PREDICTED_CLASSES} most likely classes of these image files, and those in these folders"
    parser.add_argument("--predict", nargs="+", metavar="PATH", help=shown)
    parser.add_argument("--output", metavar="FILE", help="also write the results of --predict to this CSV file")
    exported = "also write the network to this new folder, in files that load without this repo, with a README.md"
    parser.add_argument("--export", metavar="DIR", help=exported)
    flags = parser.parse_args(argv)
    for path in flags.predict or ():
        if os.path.isfile(os.path.join(path, "config.json")):
            raise UserError(f"--predict {path} is a run folder: give it first: evaler.py RUN --predict PATH")
    if flags.predict:
        without_effect, why = ("split", "batch_statistics", "validation", "export"), "with --predict"
    elif flags.export is not None:
        without_effect, why = ("split", "batch_statistics", "validation", "output"), "with --export"
    else:
        without_effect, why = ("output",), "without --predict"
    for name in parser.names_given(argv):
        if name in without_effect:
            raise UserError(f"--{name} has no effect {why}: remove it")
    if flags.validation is not None and flags.split == "train":
        raise UserError(f"--validation {flags.validation} and --split train contradict each other: give one of them")
    if flags.dataset is not None:
        datasets.folder_of(flags.dataset, flags.data_dir)  # raises UserError for an invalid name
    if flags.run is not None and not os.path.isdir(flags.run):
        raise UserError(f"{flags.run} is not a folder: give a run folder, or a checkpoint with --checkpoint")
    flags.train_dir = flags.run or flags.train_dir
    return flags


def parse_network(argv=None):
    """The flags of model.py: (Config, image shape, number of classes, batch sizes for the memory measurement)."""
    parser = ArgumentParser(description="Print the layers, shapes and parameter counts of a model.")
    parser.add_flags(Network)
    positive = within(int, low=1)
    shape = "height, width (or one number for both), and channels (3 if not given)"
    parser.add_argument("--image_size", type=positive, nargs="+", default=[32], metavar="N", help=shape)
    parser.add_argument("--classes", type=within(int, low=2), default=10, help="number of classes")
    parser.add_argument(
        "--memory",
        nargs="*",
        type=positive,
        metavar="BATCH_SIZE",
        help="also measure the peak memory of an update with batch norm, group norm and group+ws; by default at "
        f"batch sizes {' '.join(map(str, MEMORY_BATCH_SIZES))}",
    )
    flags = vars(parser.parse_args(argv))
    memory = flags.pop("memory")
    memory = MEMORY_BATCH_SIZES if memory == [] else memory
    size, classes = flags.pop("image_size"), flags.pop("classes")
    if len(size) > 3:
        raise UserError(f"--image_size {' '.join(map(str, size))}: give height, width and channels only")
    image_shape = tuple(size) if len(size) == 3 else (size[0], size[-1], 3)
    config = spell_out(Config(**flags))
    if config.accumulate:
        raise UserError(f"--norm_type {flags['norm_type']}: +acc changes the training, not the model: remove +acc")
    config = dataclasses.replace(config, model=config.model or default_model(image_shape), batch_norm_momentum=0.9)
    check_network(config, config.model)
    return config, image_shape, classes, memory


def batch_sizes(flags: Config) -> tuple[int, int]:
    """(images per update and replica, images per step): from the flags, or the dataset's defaults if they fit."""
    own = datasets.defaults_of(flags.dataset)
    most = flags.max_batch_size or own.get("max_batch_size", MAX_BATCH_SIZE)
    if flags.batch_size is not None:
        return flags.batch_size, most
    usual, number = own.get("batch_size", most), number_of_replicas(flags.replicas)
    return max(1, most // number) if most % (usual * number) else usual, most


def derive(flags: Config, train) -> Config:
    """The configuration of a run: the flags, and the settings derived from them and the training images."""
    facts, own = datasets.module_of(flags.dataset), datasets.defaults_of(flags.dataset)
    is_small = train.from_folder and len(train) + (flags.validation or 0) < SMALL_DATASET
    model = flags.model or default_model(train.network_shape, is_small)
    check_network(flags, model)
    flips = facts.FLIPPED or train.from_folder
    optimizer = flags.optimizer or ("adam" if model == "convnet" else "momentum")
    number = number_of_replicas(flags.replicas)
    batch_size, max_batch_size = batch_sizes(flags)
    batch_share = number * batch_size / max_batch_size
    update_share = 1.0 if flags.accumulate else batch_share
    learning_rate = flags.learning_rate or LEARNING_RATES[optimizer]
    if "momentum_rate" in own and optimizer == "momentum" and flags.learning_rate is None:
        learning_rate = own["momentum_rate"] * max_batch_size / own["max_batch_size"]  # arXiv 1706.02677
    scaling = "none" if flags.no_adjust_learning_rate else SCALING[optimizer]
    scale = {"none": 1.0, "linear": update_share, "square root": math.sqrt(update_share)}[scaling]
    epoch = math.ceil(len(train) / max_batch_size)
    steps = flags.max_training_step or (flags.epochs or facts.EPOCHS) * epoch
    if flags.warmup_steps > steps:
        raise UserError(f"--warmup_steps {flags.warmup_steps} exceeds the {steps} steps of this run: give fewer")
    return dataclasses.replace(
        flags,
        model=model,
        groups=flags.groups or default_groups(model),
        batch_size=batch_size,
        max_batch_size=max_batch_size,
        updates_per_step=1 if flags.accumulate else max_batch_size // (number * batch_size),
        num_replicas=number,
        optimizer=optimizer,
        lr_schedule=flags.lr_schedule or own.get("lr_schedule", "cosine"),
        base_learning_rate=learning_rate,
        learning_rate_scaling=scaling,
        peak_learning_rate=learning_rate * scale,
        weight_decay=WEIGHT_DECAY[optimizer] if flags.weight_decay is None else flags.weight_decay,
        # A step replaces a tenth of the statistics in any number of batches, so that every batch size averages over
        # the same number of images.
        batch_norm_momentum=0.9**batch_share,
        augment=flags.augment or ("flip+crop" if flips and not flags.no_augment else None),
        max_training_step=steps,
        log_step=min(flags.log_step, steps, epoch),  # checkpoints hold the metrics of so many steps
        test_sample_step=flags.test_sample_step or epoch,
    )
