"""The datasets: their names, where they are kept, and a user's own.

    train, test = datasets.create_default_splits("CIFAR10")

A known dataset NAME is kept in <data_dir>/<name in lower case>/ (download.py puts it there), a user's own in
<data_dir>/NAME/; both come back as datasets.hdf5.Dataset.
"""

import importlib
import os
import re

import numpy as np

from datasets import hdf5, own
from command import UserError

NAMES = ("MNIST", "Fashion", "SVHN", "CIFAR10", "TinyImageNet", "ImageNet", "Digits")
OTHER_NAMES = {"Fashion": ("fashionmnist",), "TinyImageNet": ("tinyimagenet200",), "ImageNet": ("imagenet1k",)}
VALIDATION_SEED = 0
DATA_DIR = os.path.dirname(os.path.abspath(__file__))


def folder_of(name: str, data_dir: str = DATA_DIR) -> str:
    """Return the folder of dataset `name`. Raises UserError for a name that can name no dataset."""
    if name in NAMES:
        return os.path.join(os.path.abspath(data_dir), name.lower())
    is_free = not os.path.isdir(os.path.join(data_dir, str(name)))
    letters = re.sub("[^a-z0-9]", "", str(name).lower())
    for known in NAMES:
        likely = (known.lower(), *OTHER_NAMES.get(known, ()))
        if known.lower() == str(name).lower() or (is_free and letters in likely):
            raise UserError(f"dataset {name!r}: did you mean {known}?")
    if os.sep in str(name) and os.path.isdir(str(name)):
        raise UserError(
            f"dataset {name!r} is a folder: pack its images first, by `python download.py --dataset MY_DATA "
            f"--image_dir {name}`, then use --dataset MY_DATA"
        )
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}", str(name)):
        raise UserError(
            f"dataset name {name!r}: use one of {' '.join(NAMES)}, or letters, digits, '_' and '-' for a "
            "folder of your own in the data folder (no slashes, no dots)"
        )
    return os.path.join(os.path.abspath(data_dir), name)


def module_of(name: str):
    """Return the module of dataset `name`, of a user's own datasets.own.

    It has EPOCHS to train by default, whether images may be MIRRORED, whether it is FETCHED_ON_FIRST_USE, and that of a
    known dataset FILES, MIRRORS and read().
    """
    return importlib.import_module(f"datasets.{name.lower()}") if name in NAMES else own


def recipe_of(name: str) -> dict:
    """Return the RECIPE of the module of dataset `name`, which replaces defaults of trainer.py; {} without one.

    Keys: batch_size, max_batch_size, momentum_rate (at max_batch_size images per update), lr_schedule,
    reported_epochs.
    """
    return getattr(module_of(name), "RECIPE", {})


def is_prepared(name: str, data_dir: str = DATA_DIR) -> bool:
    """Return whether `name` can be read: packed to the end, or a user's own data with its id.txt."""
    folder = folder_of(name, data_dir)
    return hdf5.is_packed(folder) or (name not in NAMES and own.is_there(folder))


def create_default_splits(
    name: str, data_dir: str = DATA_DIR, max_examples: int | None = None, validation: int | None = None
) -> tuple[hdf5.Dataset, hdf5.Dataset]:
    """Return (train, test), two datasets.hdf5.Dataset.

    max_examples: of each split at most so many, evenly spaced: archives sorted by class keep all their classes.
    validation: that many training images are held out (see hold_out), and returned in place of the test split.
    Raises UserError if the data is missing, broken or not in the layout.
    """
    folder = folder_of(name, data_dir)
    if name in NAMES and not hdf5.is_packed(folder):
        raise UserError(
            f"{name} is not prepared in {folder}: run `python download.py --dataset {name}`"
            + ("" if os.path.dirname(folder) == DATA_DIR else f" with --data_dir {data_dir}")
        )
    train, test = hdf5.open_packed(folder, name) if hdf5.is_packed(folder) else own.open_own(folder, name)
    if max_examples is not None:
        train, test = (
            split.subset(np.arange(max_examples) * len(split) // max_examples, split.is_train)
            if max_examples < len(split)
            else split
            for split in (train, test)
        )
    if validation is not None:
        train, test = hold_out(train, validation)
    warn_of_unseen_classes(train, test)
    return train, test


def warn_of_unseen_classes(train: hdf5.Dataset, test: hdf5.Dataset):
    """Print a line that names the classes of the test split that have no training image."""
    unseen = np.setdiff1d(test.labels, train.labels)
    if len(unseen):
        names = " ".join(train.class_names[label] for label in unseen[:10]) + " ..." * (len(unseen) > 10)
        print(
            f"warning: {train.name} tests {len(unseen)} of {train.num_classes} classes but has no training image of "
            f"them, so that no network can learn them: {names}; add training images of them",
            flush=True,
        )


def hold_out(train: hdf5.Dataset, count: int) -> tuple[hdf5.Dataset, hdf5.Dataset]:
    """Return (train without `count` images, those images): the same in every run, and every class in proportion."""
    if not 0 < count < len(train):
        raise UserError(
            f"--validation {count}: {train.name} has {len(train)} training images, and both what is held "
            f"out and what is left must have some: give 1 to {len(train) - 1}"
        )
    order = np.random.RandomState(VALIDATION_SEED).permutation(len(train))
    order = order[np.argsort(train.labels[order], kind="stable")]  # class after class, shuffled in each
    held = np.zeros(len(train), bool)
    held[order[(2 * np.arange(count) + 1) * len(train) // (2 * count)]] = True
    return train.subset(np.flatnonzero(~held), True), train.subset(np.flatnonzero(held), False)
