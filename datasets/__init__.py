"""The datasets: their names, their folders, and a user's own datasets.

    train, test = datasets.create_default_splits("CIFAR10")

download.py packs a known dataset into <data_dir>/<name in lower case>/; a user's own dataset is in <data_dir>/<name>/.
Both are returned as datasets.hdf5.Dataset.
"""

import importlib
import os
import re
import shlex

import numpy as np

from datasets import hdf5, own
from command import UserError

NAMES = ("MNIST", "Fashion", "SVHN", "CIFAR10", "TinyImageNet", "ImageNet", "Digits")
OTHER_NAMES = {"Fashion": ("fashionmnist",), "TinyImageNet": ("tinyimagenet200",), "ImageNet": ("imagenet1k",)}
DATA_DIR = os.path.dirname(os.path.abspath(__file__))


def folder_of(name: str, data_dir: str = DATA_DIR) -> str:
    """Return the folder of dataset `name`. Raises UserError if the name is misspelled or not allowed."""
    if name in NAMES:
        return os.path.join(os.path.abspath(data_dir), name.lower())
    is_free = not os.path.isdir(os.path.join(data_dir, name))
    letters = re.sub("[^a-z0-9]", "", name.lower())
    for known in NAMES:
        likely = (known.lower(), *OTHER_NAMES.get(known, ()))
        if known.lower() == name.lower() or (is_free and letters in likely):
            raise UserError(f"dataset {name!r}: did you mean {known}?")
    if os.sep in name and os.path.isdir(name):
        command = f"python download.py --dataset MY_DATA --image_dir {shlex.quote(name)}"
        raise UserError(f"dataset {name!r} is a folder: pack its images with `{command}`, then use --dataset MY_DATA")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}", name):
        known = " ".join(NAMES)
        raise UserError(f"dataset name {name!r}: use {known}, or a name of letters, digits, '_' and '-'")
    return os.path.join(os.path.abspath(data_dir), name)


def module_of(name: str):
    """Return the module of dataset `name`; for a user's own dataset it is datasets.own.

    Its constants: EPOCHS to train by default, whether images may be FLIPPED, and whether trainer.py downloads the
    dataset if it is missing (FETCHED_ON_FIRST_USE). Modules of known datasets also have FILES, MIRRORS and read().
    """
    return importlib.import_module(f"datasets.{name.lower()}") if name in NAMES else own


def defaults_of(name: str) -> dict:
    """Return the DEFAULTS of dataset `name`, which replace those of trainer.py; {} if it has none.

    Keys: batch_size, max_batch_size, momentum_rate (at max_batch_size images per update), lr_schedule,
    reported_epochs.
    """
    return getattr(module_of(name), "DEFAULTS", {})


def is_prepared(name: str, data_dir: str = DATA_DIR) -> bool:
    """Return whether dataset `name` is completely packed."""
    return hdf5.is_packed(folder_of(name, data_dir))


def create_default_splits(
    name: str, data_dir: str = DATA_DIR, validation: int | None = None
) -> tuple[hdf5.Dataset, hdf5.Dataset]:
    """Return (train, test), two datasets.hdf5.Dataset.

    Args:
        name, data_dir: of the dataset.
        validation: number of training images to hold out (see hold_out) and return instead of the test split.

    Raises:
        UserError: if the data is missing, broken or in another layout.
    """
    folder = folder_of(name, data_dir)
    if name in NAMES and not hdf5.is_packed(folder):
        raise UserError(
            f"{name} is not prepared in {folder}: run `python download.py --dataset {name}`"
            + ("" if os.path.dirname(folder) == DATA_DIR else f" with --data_dir {data_dir}")
        )
    train, test = hdf5.open_packed(folder, name) if hdf5.is_packed(folder) else own.open_own(folder, name)
    if validation is not None:
        train, test = hold_out(train, validation)
    warn_of_unseen_classes(train, test)
    return train, test


def warn_of_unseen_classes(train: hdf5.Dataset, test: hdf5.Dataset):
    """Print the classes of the test split that have no training image."""
    unseen = np.setdiff1d(test.labels, train.labels)
    if len(unseen):
        names = " ".join(train.class_names[label] for label in unseen[:10]) + " ..." * (len(unseen) > 10)
        share = f"{len(unseen)} of {train.num_classes} classes of {train.name}"
        print(f"warning: {share} have test images but no training images: {names}; add some")


def hold_out(train: hdf5.Dataset, count: int) -> tuple[hdf5.Dataset, hdf5.Dataset]:
    """Return (train without `count` images, these images): the same in every run, with every class in proportion."""
    if not 0 < count < len(train):
        raise UserError(f"--validation {count} must be less than the {len(train)} training images of {train.name}")
    order = np.random.RandomState(0).permutation(len(train))
    order = order[np.argsort(train.labels[order], kind="stable")]  # by class, shuffled within each class
    held = np.zeros(len(train), bool)
    held[order[(2 * np.arange(count) + 1) * len(train) // (2 * count)]] = True  # the middles of `count` equal parts
    return train.subset(np.flatnonzero(~held)), train.subset(np.flatnonzero(held))
