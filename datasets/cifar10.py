"""CIFAR-10: 50,000 + 10,000 images of 32x32 (Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html)."""

import io
import os
import pickle
import pickletools

import numpy as np

from datasets.archives import refusing, tar_gz_files
from command import UserError
from datasets.hdf5 import Source

EPOCHS, MIRRORED, FETCHED_ON_FIRST_USE = 30, True, True
FILES = {
    "cifar-10-python.tar.gz": (170498071, "sha256", "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce")
}
MIRRORS = ("https://www.cs.toronto.edu/~kriz/", "https://storage.googleapis.com/skypilot-example-data/datasets/")
BATCHES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
MAX_MEMBER, MAX_TOTAL = 1 << 26, 1 << 29  # a batch has 31 million bytes, all have 186
MAX_OPCODES, MAX_AGAIN = 1 << 18, 16  # of a pickle; a batch has some 30,000 steps


def read(archive_dir):
    """Return the Source of cifar-10-python.tar.gz, in the order of the batches: images uint8 [N, 32, 32, 3]."""
    path = os.path.join(archive_dir, "cifar-10-python.tar.gz")
    batches = {}
    for member, stream in tar_gz_files(path, MAX_MEMBER, MAX_TOTAL):
        name = member.removeprefix("./").removeprefix("cifar-10-batches-py/")
        if name == "batches.meta" or name in BATCHES:
            with refusing(path, member):
                batches[name] = load_batch(stream.read(), name)
    missing = [name for name in BATCHES + ["batches.meta"] if name not in batches]
    if missing:
        raise UserError(f"{path} has no cifar-10-batches-py/{missing[0]}")
    class_names = batches.pop("batches.meta")
    parts = ((int(name == "test_batch"), *batches[name], None) for name in BATCHES)
    return Source(class_names, (32, 32, 3), sum(len(labels) for _, labels in batches.values()), parts)


def load_batch(data, name):
    """Return (images uint8 [n, 32, 32, 3], labels int [n]) of a pickled batch, or the class names of batches.meta."""
    batch = unpickle(data)
    if name == "batches.meta":
        return [label.decode() for label in flat_list(batch, b"label_names", bytes)]
    labels, array = flat_list(batch, b"labels", int), batch.get(b"data")
    if not isinstance(array, Array) or array.array.shape != (len(labels), 3072):
        raise ValueError(
            f"data {array.array.shape if isinstance(array, Array) else ''} and {len(labels)} labels: "
            "expected an array [N, 3072] and N labels"
        )
    # channel, row, column -> row, column, channel
    return array.array.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), np.asarray(labels, np.int64)


def flat_list(batch, key, kind):
    """Return batch[key] if it is a list of `kind` and nothing else: a list in it may unfold to more than memory."""
    items = batch.get(key) if isinstance(batch, dict) else None
    if not isinstance(items, list) or not all(type(item) is kind for item in items):
        raise ValueError(f"{key.decode()} is missing, or no flat list: expected a dict with a list of {kind.__name__}")
    return items


def unpickle(data):
    """Return what a Python 2 pickle holds, where only lists, dicts, strings, numbers and uint8 arrays are let through.

    Raises pickle.UnpicklingError for anything else before it is built, and for a pickle that names an object again
    and again: lists and tuples of themselves unfold without end when they are hashed, printed or converted.
    """
    again = 0
    for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        again += opcode.name == "DUP" or opcode.name.endswith("GET")
        put = argument if opcode.name.endswith("PUT") else 0
        if opcode.proto > 2 or put > MAX_OPCODES or number > MAX_OPCODES or again > MAX_AGAIN:
            raise pickle.UnpicklingError(
                f"{opcode.name}, its {number}. step, is nothing that a batch of CIFAR-10 "
                f"needs: expected at most {MAX_OPCODES} steps, {MAX_AGAIN} of them repeats"
            )
    return BatchUnpickler(io.BytesIO(data), encoding="bytes").load()


class Array:
    """Stands in for numpy.ndarray, whose own __setstate__ need not see foreign bytes."""

    def __setstate__(self, state):
        _, shape, dtype, fortran_order, data = state
        if dtype.name not in (b"u1", b"|u1", "u1", "|u1") or fortran_order or not isinstance(data, bytes):
            kind = dtype.name if isinstance(dtype.name, (str, bytes)) else type(dtype.name)
            raise pickle.UnpicklingError(f"an array of {kind}: expected uint8 in C order")
        self.array = np.frombuffer(data, np.uint8).reshape(shape)


class DType:
    """Stands in for numpy.dtype."""

    def __init__(self, name, *_):
        self.name = name

    def __setstate__(self, state):
        """The byte order: nothing that uint8 depends on."""


class BatchUnpickler(pickle.Unpickler):
    """Knows the three names in the pickles of CIFAR-10 and refuses every other."""

    def find_class(self, module, name):
        if (module, name) == ("numpy", "ndarray"):
            return "ndarray"
        if (module, name) == ("numpy", "dtype"):
            return DType
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return lambda *_: Array()
        raise pickle.UnpicklingError(f"the pickle asks for {module}.{name}; refused")
