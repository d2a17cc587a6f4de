"""SVHN, cropped digits of 32x32: 73,257 + 26,032 (Netzer et al., http://ufldl.stanford.edu/housenumbers/)."""

import os

import numpy as np
from scipy.io import loadmat

from command import reading
from datasets.hdf5 import Source

EPOCHS, FLIPPED, FETCHED_ON_FIRST_USE = 10, False, True  # flipping changes a digit
FILES = {
    "train_32x32.mat": (182040794, "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8"),
    "test_32x32.mat": (64275384, "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b"),
}
MIRRORS = ("http://ufldl.stanford.edu/housenumbers/",)
CLASS_NAMES = [str(digit) for digit in range(10)]
PART = 4096  # images


def read(archive_dir):
    """Return the Source of train_32x32.mat and test_32x32.mat; the label 10 means digit 0."""
    splits = [read_mat(os.path.join(archive_dir, f"{split}_32x32.mat")) for split in ("train", "test")]
    parts = (
        (split, np.ascontiguousarray(x[..., i : i + PART].transpose(3, 0, 1, 2)), labels[i : i + PART], None)
        for split, (x, labels) in enumerate(splits)
        for i in range(0, len(labels), PART)
    )
    return Source(CLASS_NAMES, (32, 32, 3), sum(len(labels) for _, labels in splits), parts)


def read_mat(path):
    """Return X, uint8 [32, 32, 3, N], and the labels, int [N] in 0 ... 9."""
    with reading(path):
        variables = loadmat(path, variable_names=["X", "y"])
        return variables["X"], variables["y"].reshape(-1).astype(np.int64) % 10
