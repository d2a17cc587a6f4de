"""MNIST: 60,000 + 10,000 handwritten digits of 28x28 (LeCun, Cortes, Burges: http://yann.lecun.com/exdb/mnist/)."""

import gzip
import os
import struct

import numpy as np

from command import reading
from datasets.hdf5 import Source

EPOCHS, FLIPPED, FETCHED_ON_FIRST_USE = 5, False, True  # flipping changes a digit
FILES = {  # name: bytes, hash
    "train-images-idx3-ubyte.gz": (9912422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
    "train-labels-idx1-ubyte.gz": (28881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
    "t10k-images-idx3-ubyte.gz": (1648877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
    "t10k-labels-idx1-ubyte.gz": (4542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
}
MIRRORS = (
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "http://yann.lecun.com/exdb/mnist/",
)
CLASS_NAMES = [str(digit) for digit in range(10)]


def read(archive_dir, class_names=CLASS_NAMES):
    """Return the Source of the four IDX files in archive_dir: images uint8 [N, 28, 28, 1]."""
    parts = []
    for split, prefix in enumerate(("train", "t10k")):
        images = read_idx(os.path.join(archive_dir, f"{prefix}-images-idx3-ubyte.gz"), 3)
        labels = read_idx(os.path.join(archive_dir, f"{prefix}-labels-idx1-ubyte.gz"), 1)
        parts.append((split, images[..., np.newaxis], labels, None))
    return Source(class_names, (28, 28, 1), sum(len(images) for _, images, _, _ in parts), iter(parts))


def read_idx(path, rank):
    """Return the uint8 array of a gzipped IDX file: magic number and sizes as big-endian int32, then the values."""
    with reading(path), gzip.open(path) as file:
        data = file.read()
        _, *shape = struct.unpack_from(f">{1 + rank}i", data)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)
