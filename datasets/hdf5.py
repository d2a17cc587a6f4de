"""The data file <folder>/data.hdf5, which download.py writes and all other scripts read.

    image       uint8 [N, h, w, c], one contiguous array; for ImageNet instead
    jpeg        uint8 [bytes] with offset int64 [N + 1]: image i is jpeg[offset[i]:offset[i + 1]]
    label       int32 [N]
    split       uint8 [N], 0 train and 1 test: train first, in the archive's order
    id          the ids, bytes [N]; id.txt has them too, one per line
    class_names strings [classes]
    recipe      the origin as JSON: {"made_from": words} or, for a folder of images, the flags of download.py
    attributes  `sha256` of the images; `packed`: the mark of a complete file, written last

The file is written under another name, synced and renamed. Files without the mark are ignored.
"""

import dataclasses
import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import h5py
import numpy as np

from command import UserError, reading, sync, atomic_file, write_atomically
from datasets.images import load_image

DATA, IDS, UNFINISHED = "data.hdf5", "id.txt", ".unfinished"
FORMAT = 1
REPACK = "delete it and run download.py again"
OWN_IMAGES = "a folder of images"  # made_from; the same wherever the folder is
IN_MEMORY = 6 << 30  # bytes; splits with larger images are read from the file, batch by batch
IMAGENET_SIZE = 224  # pixels: height and width of the crops of JPEG files


class Source(NamedTuple):
    """A dataset to pack, returned by read() of each dataset module.

    parts yields (split, images, labels, ids), all of split 0 before split 1: images uint8 [n, h, w, c] or a list of n
    JPEG files as bytes, labels int [n], ids a list of n strings or None for running numbers.
    """

    class_names: list
    image_shape: tuple | None  # (h, w, c), None for JPEG files
    num_images: int | None  # None if unknown (JPEG files)
    parts: Iterator
    origin: dict | None = None  # `recipe`


def write(folder: str, source: Source, bar=None) -> None:
    """Pack `source` into folder/data.hdf5 and folder/id.txt; update the progress bar `bar`.

    Even after a failure data.hdf5 is the old file, if there was one, or the complete new file.
    Raises UserError for inconsistent data, OSError if the files cannot be written.
    """
    data, ids = os.path.join(folder, DATA), os.path.join(folder, IDS)
    try:
        with atomic_file(data, data + UNFINISHED) as part:  # renamed last, after id.txt
            with h5py.File(part, "w") as file:
                names, file.attrs["sha256"] = fill(file, source, bar)
                file["recipe"] = json.dumps(source.origin or {})
                file.flush()
                file.attrs["packed"] = FORMAT
            write_atomically(ids, "".join(name + "\n" for name in names), ids + UNFINISHED)
        sync(folder)
    except Exception as error:
        number = re.search(r"errno = (\d+)", str(error))  # h5py raises many types for errors of the disk
        if number is None or isinstance(error, UserError):
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), data) from error


def fill(file, source, bar):
    """Write the arrays of `source` to an open file; returns the ids, and the SHA-256 of all images."""
    encoded, shape, total = source.image_shape is None, source.image_shape, source.num_images
    if encoded:
        image = file.create_dataset("jpeg", (0,), np.uint8, maxshape=(None,), chunks=(1 << 20,))
    else:
        image = file.create_dataset("image", (total, *shape), np.uint8)
    labels, splits, ids, lengths, digest = [], [], [], [], hashlib.sha256()
    for split, images, part_labels, part_ids in source.parts:
        start, stop = len(labels), len(labels) + len(images)
        if encoded:
            lengths.extend(map(len, images))
            data, size = b"".join(images), len(image)
            image.resize(size + len(data), axis=0)
            image[size:] = np.frombuffer(data, np.uint8)
            digest.update(data)
        elif images.shape[1:] != tuple(shape) or stop > total:
            raise UserError(f"images {start} to {stop - 1} are {images.shape[1:]}: expected {total} images of {shape}")
        else:
            image[start:stop] = images
            digest.update(np.ascontiguousarray(images))
        labels.extend(np.asarray(part_labels).tolist())
        splits.extend([split] * len(images))
        ids.extend(part_ids or [f"{('train', 'test')[split]}_{i:06d}" for i in range(start, stop)])
        if bar is not None:
            bar.update(len(images))
    check(np.asarray(labels), np.asarray(splits), ids, source.class_names, len(lengths) if encoded else len(image))
    if encoded:
        file["offset"] = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    file["label"], file["split"] = np.asarray(labels, np.int32), np.asarray(splits, np.uint8)
    file["id"] = np.array([name.encode() for name in ids])
    file.create_dataset("class_names", data=list(source.class_names), dtype=h5py.string_dtype())
    return ids, digest.hexdigest()


def check(labels, splits, ids, class_names, num_images):
    """Raise UserError unless the arrays make two complete splits."""
    if len(class_names) < 2:
        raise UserError(f"only {len(class_names)} class: a classifier needs at least 2")
    if not len(labels) == len(splits) == len(ids) == num_images:
        raise UserError(f"{num_images} images, {len(labels)} labels and {len(ids)} ids: expected as many of each")
    for split, name in enumerate(("train", "test")):
        if not np.any(splits == split):
            raise UserError(f"the {name} split is empty")
    if labels.min() < 0 or labels.max() >= len(class_names):
        raise UserError(f"labels run from {labels.min()} to {labels.max()}: expected 0 to {len(class_names) - 1}")
    if repeated(ids) is not None:
        raise UserError(f"id {repeated(ids)!r} is repeated")


def repeated(ids):
    """Return an id that is there more than once, None if there is none."""
    id, count = Counter(ids).most_common(1)[0]
    return id if count > 1 else None


def open_array(file, name):
    """Return the array `name`, or "group/name", of an open HDF5 file. Raises UserError if it is not in this file."""
    for part in (name.partition("/")[0], name):
        link = file.get(part, getlink=True)
        if link is None:
            raise UserError(f"{file.filename} has no {part!r}")
        if not isinstance(link, h5py.HardLink):
            raise UserError(f"{file.filename}: {part} is a soft or external link: copy the data into the file")
    data = file[name]
    if not isinstance(data, h5py.Dataset):
        raise UserError(f"{file.filename}: {name} is a group: expected an array")
    creation = data.id.get_create_plist()
    if creation.get_layout() == h5py.h5d.VIRTUAL or creation.get_external_count():
        raise UserError(f"{file.filename}: {name} is stored in another file: copy the data into this one")
    return data


def is_packed(folder: str) -> bool:
    """Return whether folder/data.hdf5 has the mark of a complete file."""
    try:
        with h5py.File(os.path.join(folder, DATA), "r", locking=False) as file:
            return bool(file.attrs.get("packed") == FORMAT)
    except PermissionError:
        raise
    except (OSError, RuntimeError):  # missing or damaged
        return False


def read_origin(folder: str) -> dict:
    """Return the origin of the images in folder/data.hdf5, {} if it is not stored."""
    path = os.path.join(folder, DATA)
    with reading(path, REPACK), h5py.File(path, "r", locking=False) as file:
        return json.loads(file["recipe"][()])


def open_packed(folder, name):
    """Return (train, test), two Datasets on folder/data.hdf5. Raises UserError if the file is damaged."""
    path = os.path.join(folder, DATA)
    with reading(path, REPACK):
        file = h5py.File(path, "r", locking=False, rdcc_nbytes=0)  # no chunk cache: read only the bytes needed
        encoded = "jpeg" in file
        image = open_array(file, "jpeg" if encoded else "image")
        offset = open_array(file, "offset")[:] if encoded else None
        labels, splits, ids = (open_array(file, column)[:] for column in ("label", "split", "id"))
        ids, class_names = [text.decode() for text in ids.tolist()], open_array(file, "class_names").asstr()[:].tolist()
        digest = file.attrs["sha256"]
    origin = read_origin(folder)
    num_train = np.count_nonzero(splits == 0)
    columns = {"class_names": class_names, "image": image, "digest": digest, "offset": offset}
    from_folder = "--image_dir" in origin
    columns |= {"made_from": OWN_IMAGES if from_folder else origin.get("made_from"), "from_folder": from_folder}
    bounds = (0, num_train), (num_train, len(ids))
    return tuple(Dataset(ids[a:b], name, labels[a:b], rows=np.arange(a, b), **columns) for a, b in bounds)


def empty(shape: tuple, dtype) -> np.ndarray:
    """Return an empty array that begins at a multiple of 64 bytes, so TensorFlow can use it without a copy."""
    size = int(np.prod(shape, dtype=object)) * np.dtype(dtype).itemsize
    block = np.empty(size + 64, np.uint8)
    start = -block.ctypes.data % 64
    return block[start : start + size].view(dtype).reshape(shape)


@dataclasses.dataclass(eq=False, repr=False)
class Dataset:
    """One split of a dataset.

    Attributes:
        ids: [N] strings.
        name: of the dataset.
        labels: int32 [N].
        class_names: [num_classes] strings.
        image: uint8 or float32 [rows, h, w, c], an array or an h5py dataset, or with `offset` the bytes `jpeg`.
        rows: int64 [N], the row of `image` of each id.
        digest: SHA-256 of the images of the dataset.
        offset: int64 [rows + 1], the first byte of each JPEG file in `image`, or None.
        made_from: the origin of the images in words, None if unknown.
        from_folder: whether they were packed from a user's image folders.
    """

    ids: list
    name: str
    labels: np.ndarray
    class_names: list
    image: np.ndarray | h5py.Dataset
    rows: np.ndarray
    digest: str = ""
    offset: np.ndarray | None = None
    made_from: str | None = None
    from_folder: bool = False

    def __post_init__(self):
        self._images = self._position = None  # all images, and the position of each id, once they are needed

    def subset(self, positions):
        """Return the Dataset of the images at `positions` (int [n]), in that order."""
        ids, labels, rows = [self.ids[i] for i in positions], self.labels[positions], self.rows[positions]
        return dataclasses.replace(self, ids=ids, labels=labels, rows=rows)

    @property
    def num_classes(self):
        return len(self.class_names)

    @property
    def encoded(self):
        """Whether the images are JPEG files."""
        return self.offset is not None

    @property
    def image_shape(self):
        """(h, w, c), or (None, None, 3) if encoded."""
        return (None, None, 3) if self.encoded else tuple(int(size) for size in self.image.shape[1:])

    @property
    def dtype(self):
        """np.uint8, or np.float32 for a user's float images."""
        return np.uint8 if self.image.dtype == np.uint8 else np.float32

    @property
    def nbytes(self):
        """Bytes of the images of this split, which are not encoded."""
        return len(self) * int(np.prod(self.image_shape)) * np.dtype(self.dtype).itemsize

    @property
    def in_memory(self):
        """Whether input_ops.py loads all images at once."""
        return not self.encoded and self.nbytes <= IN_MEMORY

    @property
    def network_shape(self):
        """(height, width, channels) of the batches of create_input_ops."""
        return (IMAGENET_SIZE, IMAGENET_SIZE, 3) if self.encoded else self.image_shape

    def __len__(self):
        return len(self.ids)

    def images(self):
        """Return all images as one array [N, h, w, c], read once and kept. Raises TypeError if encoded.

        An array from a packed file begins at a multiple of 64 bytes (see empty).
        """
        if self.encoded:
            raise TypeError(f"{self.name} holds JPEG files of many sizes: use read()")
        if self._images is None:
            is_array = isinstance(self.image, np.ndarray)
            self._images = self.read(np.arange(len(self))) if is_array else self._read_rows(self.rows)
        return self._images

    def _read_rows(self, rows):
        """Read the `rows` of an h5py dataset of images into one array, consecutive rows in one call."""
        images = empty((len(rows), *self.image_shape), self.dtype)
        breaks = np.flatnonzero(np.diff(rows) != 1) + 1
        for a, b in zip([0, *breaks], [*breaks, len(rows)]):
            if b > a:
                self.image.read_direct(images, np.s_[rows[a] : rows[b - 1] + 1], np.s_[a:b])
        return images

    def read(self, positions):
        """Return the images at `positions` as [n, h, w, c], or as a list of n bytes if encoded. Thread-safe.

        positions: int [n] in 0 ... N - 1, in any order, with repeats. Each row is read once, in the file's order.
        """
        positions = np.asarray(positions, np.int64).reshape(-1)
        if self._images is not None:
            return self._images[positions]
        rows = self.rows[positions]
        if isinstance(self.image, np.ndarray):
            in_order = len(rows) > 0 and np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows)))
            return self.image[rows[0] : rows[-1] + 1] if in_order else self.image[rows]
        unique, inverse = np.unique(rows, return_inverse=True)
        if self.encoded:
            jpegs = [self.image[self.offset[row] : self.offset[row + 1]].tobytes() for row in unique]
            return [jpegs[i] for i in inverse]
        images = self._read_rows(unique)
        return images if np.array_equal(unique, rows) else images[inverse]

    def get_data(self, id):
        """Return (image, label) of an id, as the 2018 repo does. Raises UserError for an unknown id.

        image: float32 [h, w, c], uint8 images scaled to 0 ... 1. label: one-hot float32 [num_classes].
        """
        if self._position is None:
            self._position = {name: i for i, name in enumerate(self.ids)}
        if id not in self._position:
            raise UserError(f"this split of {self.name} has no id {id!r}")
        position = self._position[id]
        image = self.read([position])[0]
        if self.encoded:
            image = load_image(io.BytesIO(image), f"{self.name}, id {id}")
        image = image.astype(np.float32) / 255 if image.dtype == np.uint8 else image
        return image, (np.arange(self.num_classes) == self.labels[position]).astype(np.float32)
