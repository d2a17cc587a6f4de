"""MNIST: 60,000 + 10,000 handwritten digits of 28x28 (LeCun, Cortes, Burges: http://yann.lecun.com/exdb/mnist/)."""

import gzip
import os
import struct

import numpy as np

from datasets.archives import refusing
from command import UserError
from datasets.hdf5 import Source

EPOCHS, MIRRORED, FETCHED_ON_FIRST_USE = 5, False, True  # a mirrored digit is another sign
FILES = {  # name: bytes, kind of hash, hash
    "train-images-idx3-ubyte.gz": (
        9912422,
        "sha256",
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    ),
    "train-labels-idx1-ubyte.gz": (28881, "sha256", "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
    "t10k-images-idx3-ubyte.gz": (
        1648877,
        "sha256",
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    ),
    "t10k-labels-idx1-ubyte.gz": (4542, "sha256", "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
}
MIRRORS = (
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "http://yann.lecun.com/exdb/mnist/",
)
CLASS_NAMES = [str(digit) for digit in range(10)]
MAX_BYTES = 1 << 28  # MNIST itself has 47 million


def read(archive_dir, class_names=CLASS_NAMES):
    """Return the Source of the four IDX files in archive_dir: images uint8 [N, h, w, 1]."""
    splits = []
    for prefix in ("train", "t10k"):
        path = os.path.join(archive_dir, f"{prefix}-images-idx3-ubyte.gz")
        images = read_idx(path, 2051, 3)[..., np.newaxis]
        labels = read_idx(os.path.join(archive_dir, f"{prefix}-labels-idx1-ubyte.gz"), 2049, 1)
        if len(images) != len(labels):
            raise UserError(f"{path} has {len(images)} images, but there are {len(labels)} labels")
        splits.append((len(splits), images, labels, None))
    return Source(class_names, splits[0][1].shape[1:], sum(len(images) for _, images, _, _ in splits), iter(splits))


def read_idx(path, magic, rank):
    """Return the uint8 array of a gzipped IDX file: a big-endian int32 header (magic, sizes), then the bytes."""
    with refusing(path), gzip.open(path) as file:
        found, *shape = struct.unpack(f">{1 + rank}i", file.read(4 + 4 * rank))
        size = int(np.prod(shape, dtype=object))
        if found != magic:
            raise UserError(f"{path} starts with the number {found}: an IDX file of {rank} axes starts with {magic}")
        if min(shape) < 1 or size > MAX_BYTES:
            raise UserError(f"{path} claims the shape {shape}; refused")
        data = file.read(size + 1)  # one more: to see that this is the end
        if len(data) != size:
            raise UserError(
                f"{path} claims the shape {shape} but holds "
                + (f"only {len(data)} bytes" if len(data) < size else "more bytes")
            )
    return np.frombuffer(data, np.uint8).reshape(shape)
