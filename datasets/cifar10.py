"""CIFAR-10: 50,000 + 10,000 images of 32x32 (Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html)."""

import os
import pickle
import tarfile

import numpy as np

from command import reading
from datasets.hdf5 import Source

EPOCHS, FLIPPED, FETCHED_ON_FIRST_USE = 30, True, True
FILES = {"cifar-10-python.tar.gz": (170498071, "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce")}
MIRRORS = ("https://www.cs.toronto.edu/~kriz/", "https://storage.googleapis.com/skypilot-example-data/datasets/")
BATCHES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]


def read(archive_dir):
    """Return the Source of cifar-10-python.tar.gz, in the order of the batches: images uint8 [N, 32, 32, 3]."""
    path = os.path.join(archive_dir, "cifar-10-python.tar.gz")
    with reading(path), tarfile.open(path) as tar:
        files = {}
        for member in tar:  # in the order of the archive: seeking back in a gzip file is slow
            name = os.path.basename(member.name)
            if name in (*BATCHES, "batches.meta"):
                files[name] = BatchUnpickler(tar.extractfile(member), encoding="bytes").load()
        class_names = [name.decode() for name in files["batches.meta"][b"label_names"]]
        batches = [
            # channel, row, column -> row, column, channel
            (files[name][b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), files[name][b"labels"])
            for name in BATCHES
        ]
    parts = ((int(name == "test_batch"), *batch, None) for name, batch in zip(BATCHES, batches))
    return Source(class_names, (32, 32, 3), sum(len(labels) for _, labels in batches), parts)


class BatchUnpickler(pickle.Unpickler):
    """Loads only the three names in CIFAR-10's pickles, which run no code."""

    def find_class(self, module, name):
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return super().find_class("numpy._core.multiarray", name)
        raise pickle.UnpicklingError(f"the pickle refers to {module}.{name}, which is not allowed")
