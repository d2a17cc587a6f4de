"""Digits: 1,797 handwritten digits of 8x8 (UCI, Alpaydin and Kaynak), included in scikit-learn."""

import numpy as np

from datasets.hdf5 import Source

EPOCHS, FLIPPED, FETCHED_ON_FIRST_USE = 20, False, True  # flipping changes a digit
FILES = {}
MIRRORS = ()
CLASS_NAMES = [str(digit) for digit in range(10)]
NUM_TRAIN, SPLIT_SEED = 1437, 0


def read(archive_dir=None):
    """Return the Source of scikit-learn's digits, scaled from 0 ... 16 to 0 ... 255, split 1437 + 360 at random."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images[..., np.newaxis] * 255 / 16).astype(np.uint8)
    order = np.random.RandomState(SPLIT_SEED).permutation(len(images))  # RandomState never changes with NumPy
    parts = (
        (split, images[rows], digits.target[rows], [f"digit_{row:04d}" for row in rows])
        for split, rows in enumerate((order[:NUM_TRAIN], order[NUM_TRAIN:]))
    )
    return Source(CLASS_NAMES, (8, 8, 1), len(images), parts)
