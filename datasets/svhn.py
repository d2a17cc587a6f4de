"""SVHN, cropped digits of 32x32: 73,257 + 26,032 (Netzer et al., http://ufldl.stanford.edu/housenumbers/)."""

import os

import numpy as np

from datasets.archives import load_mat
from command import UserError
from datasets.hdf5 import Source

EPOCHS, MIRRORED, FETCHED_ON_FIRST_USE = 10, False, True  # a mirrored digit is another sign
FILES = {
    "train_32x32.mat": (182040794, "sha256", "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8"),
    "test_32x32.mat": (64275384, "sha256", "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b"),
}
MIRRORS = ("http://ufldl.stanford.edu/housenumbers/",)
CLASS_NAMES = [str(digit) for digit in range(10)]
SHAPES = {
    "X": lambda shape, kind: len(shape) == 4 and shape[:3] == (32, 32, 3) and shape[3] > 0 and kind == "uint8",
    "y": lambda shape, kind: len(shape) == 2 and shape[0] > 0 and shape[1] == 1,
}
MAX_BYTES = 1 << 28  # train has 225 million
PART = 4096


def read(archive_dir):
    """Return the Source of train_32x32.mat and test_32x32.mat: all of train is train; the label 10 means digit 0."""
    splits = [read_mat(os.path.join(archive_dir, f"{split}_32x32.mat")) for split in ("train", "test")]
    parts = (
        (split, np.ascontiguousarray(x[..., i : i + PART].transpose(3, 0, 1, 2)), labels[i : i + PART], None)
        for split, (x, labels) in enumerate(splits)
        for i in range(0, len(labels), PART)
    )
    return Source(CLASS_NAMES, (32, 32, 3), sum(len(labels) for _, labels in splits), parts)


def read_mat(path):
    """Return X, uint8 [32, 32, 3, N] as it is stored, and the labels, int [N] in 0 ... 9."""
    with open(path, "rb") as file:
        variables = load_mat(file, path, SHAPES, MAX_BYTES)
    x, y = variables["X"], variables["y"].reshape(-1)
    if x.dtype != np.uint8 or x.shape != (32, 32, 3, len(y)):
        raise UserError(
            f"{path}: X is {x.dtype} of shape {x.shape}: expected uint8 of (32, 32, 3, {len(y)}), one a label"
        )
    if y.dtype.kind not in "uif" or not np.isin(y, np.arange(1, 11)).all():
        raise UserError(f"{path}: y has labels other than 1 ... 10")
    return x, y.astype(np.int64) % 10
