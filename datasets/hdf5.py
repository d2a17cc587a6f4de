"""The one store: <folder>/data.hdf5, written once by download.py and read by everything else.

    image       uint8 [N, h, w, c], one contiguous array; for ImageNet instead
    jpeg        uint8 [bytes] with offset int64 [N + 1]: image i is jpeg[offset[i]:offset[i + 1]]
    label       int32 [N]
    split       uint8 [N], 0 train and 1 test: train first, in the archive's order
    id          the ids, bytes [N]; id.txt holds them too, one a line
    class_names strings [classes]
    attribute `recipe`: what it was packed from, as JSON: {"made_from": words}, and of a folder of images the flags of
                download.py and `bits`, see folder.depth
    attribute `packed`: the mark, written last

The file is built beside its target under another name, synced and renamed: a file without the mark, or under another
name, does not count. The mark says that a file is whole, not who wrote it: nothing a file claims is believed before it
was compared with what it holds.
"""

import json
import os
import re
import threading
from typing import NamedTuple
from collections.abc import Iterator

import h5py
import numpy as np

from command import UserError, one_line, sync, whole_file, write_whole

DATA, IDS, UNFINISHED = "data.hdf5", "id.txt", ".unfinished"
FORMAT = 1
JPEG_CHUNK = 1 << 20  # bytes
MAX_CHUNK, MAX_RATIO = 1 << 28, 1100  # bytes; deflate packs at most 1 : 1032
KINDS = {"buif": "uint8 or float numbers", "ui": "integers", "S": "bytes", "SO": "strings"}  # numpy's letters
LOCK = threading.Lock()  # HDF5 serves one thread at a time anyway


class Source(NamedTuple):
    """What a dataset module's read() returns.

    parts yields (split, images, labels, ids), all of split 0 before split 1: images uint8 [n, h, w, c] or a list of n
    JPEG files as bytes, labels int [n], ids a list of n strings or None for running numbers.
    """

    class_names: list
    image_shape: tuple | None  # (h, w, c), None for JPEG files
    num_images: int | None  # None where only the end tells (JPEG files)
    parts: Iterator
    recipe: dict | None = None  # what it was packed from, and how


def write(folder: str, source: Source, bar=None) -> None:
    """Pack `source` into folder/data.hdf5 and folder/id.txt; `bar` is updated with the images written.

    Whatever happens on the way, data.hdf5 is the old one, none, or the whole new one.
    Raises UserError for data that does not fit together, OSError if it cannot be written.
    """
    data, ids = os.path.join(folder, DATA), os.path.join(folder, IDS)
    remove_unfinished(folder)
    try:
        with whole_file(data, data + UNFINISHED) as part:  # takes its name last: it is what counts
            with h5py.File(part, "w") as file:
                names = fill(file, source, bar)
                if source.recipe is not None:
                    file.attrs["recipe"] = np.bytes_(json.dumps(source.recipe))
                file.flush()
                file.attrs["packed"] = FORMAT
            write_whole(ids, "".join(name + "\n" for name in names), ids + UNFINISHED)
        sync(folder)
    except Exception as error:
        number = re.search(r"errno = (\d+)", str(error))  # h5py says so, whatever the class of the error
        if number is None or isinstance(error, UserError):
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), data) from error


def fill(file, source, bar):
    """Write the arrays of `source` to an open file and return the ids."""
    encoded, shape, total = source.image_shape is None, source.image_shape, source.num_images
    if encoded:
        image = file.create_dataset("jpeg", (0,), np.uint8, maxshape=(None,), chunks=(JPEG_CHUNK,))
        lengths, rest = [], b""
    else:
        image = file.create_dataset("image", (total, *shape), np.uint8)
    labels, splits, ids = [], [], []
    for split, images, part_labels, part_ids in source.parts:
        start, stop = len(labels), len(labels) + len(images)
        if encoded:
            rest = add_chunks(image, b"".join([rest, *images]))
            lengths.extend(len(jpeg) for jpeg in images)
        else:
            if images.shape[1:] != tuple(shape) or stop > total:
                raise UserError(f"images {start} to {stop} have shape {images.shape[1:]}: expected {total} of {shape}")
            image[start:stop] = images
        labels.extend(np.asarray(part_labels).tolist())
        splits.extend([split] * len(images))
        ids.extend(part_ids or [f"{('train', 'test')[split]}_{i:06d}" for i in range(start, stop)])
        if bar is not None:
            bar.update(len(images))
    if not encoded and len(labels) != total:
        raise UserError(f"found {len(labels)} images where {total} were expected")
    check(np.asarray(labels), np.asarray(splits), ids, source.class_names)
    if encoded:
        image.resize(sum(lengths), axis=0)
        image[len(image) - len(rest) :] = np.frombuffer(rest, np.uint8)
        file["offset"] = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    file["label"], file["split"] = np.asarray(labels, np.int32), np.asarray(splits, np.uint8)
    file["id"] = np.array([name.encode() for name in ids])
    file.create_dataset("class_names", data=list(source.class_names), dtype=h5py.string_dtype())
    return ids


def add_chunks(image, data):
    """Append the whole chunks in `data` to a dataset of whole chunks, past HDF5's cache, and return the rest."""
    data, old = memoryview(data), len(image)
    image.resize(old + len(data) // JPEG_CHUNK * JPEG_CHUNK, axis=0)
    for start in range(0, len(image) - old, JPEG_CHUNK):
        image.id.write_direct_chunk((old + start,), data[start : start + JPEG_CHUNK])
    return data[len(image) - old :].tobytes()


def check(labels, splits, ids, class_names):
    """Raise UserError unless labels, splits and ids make two whole splits."""
    if len(class_names) < 2:
        raise UserError(f"only {len(class_names)} class: a classifier needs at least 2")
    if not len(labels) == len(splits) == len(ids):
        raise UserError(f"{len(labels)} labels, {len(splits)} splits and {len(ids)} ids do not belong together")
    for split, name in enumerate(("train", "test")):
        if not np.any(splits == split):
            raise UserError(f"the {name} split is empty")
    if np.any(np.diff(splits) < 0) or splits[0] != 0 or splits[-1] != 1:
        raise UserError("split: train images must come before test images, 0 before 1")
    if labels.min() < 0 or labels.max() >= len(class_names):
        raise UserError(f"labels run from {labels.min()} to {labels.max()}: expected 0 to {len(class_names) - 1}")
    if len(set(ids)) != len(ids):
        raise UserError(f"id {first_repeated(ids)!r} is there twice")
    broken = next((name for name in ids if not name or "\n" in name or "\r" in name), None)
    if broken is not None:
        raise UserError(f"id {broken!r} is empty or has a line break in it")


def first_repeated(ids):
    """Return the first of `ids` that was there before."""
    seen = set()
    return next(name for name in ids if name in seen or seen.add(name))


def remove_unfinished(folder):
    """Remove what a killed run may have left in `folder`."""
    for name in (DATA, IDS):
        if os.path.exists(os.path.join(folder, name + UNFINISHED)):
            os.remove(os.path.join(folder, name + UNFINISHED))


def open_array(file, path, name, kinds="buif"):
    """Return (h5py.h5d.DatasetID, shape, dtype) of an array in an HDF5 file, after everything it claims was checked.

    name: "array" or "group/array". kinds: of KINDS, what may be read.
    Raises UserError for links, for what lies in another file, and for what claims more than the file can hold.
    """
    for link in (name.split("/")[0].encode(), name.encode()):
        if not file.id.links.exists(link):
            raise UserError(f"{path}: there is no {link.decode()}")
        if file.id.links.get_info(link).type != h5py.h5l.TYPE_HARD:
            raise UserError(f"{path}: {link.decode()} is a soft or external link; copy the data into the file")
    data = h5py.h5o.open(file.id, name.encode())
    if not isinstance(data, h5py.h5d.DatasetID):
        raise UserError(f"{path}: {name} is a group: expected an array")
    creation, shape, dtype = data.get_create_plist(), data.shape, data.dtype
    if dtype.kind not in kinds or (dtype.kind == "O" and not h5py.check_string_dtype(dtype)):
        raise UserError(f"{path}: {name} has the type {dtype}: expected {KINDS[kinds]}")
    layout, held = creation.get_layout(), os.path.getsize(path)
    if layout == h5py.h5d.VIRTUAL or creation.get_external_count():
        raise UserError(f"{path}: {name} lies in another file; copy the data into this one")
    chunk = creation.get_chunk() if layout == h5py.h5d.CHUNKED else ()
    size = int(np.prod(shape or (0,), dtype=object)) * dtype.itemsize
    if (
        size > min(data.get_storage_size(), held) * (MAX_RATIO if creation.get_nfilters() else 1)
        or int(np.prod(chunk, dtype=object)) * dtype.itemsize > MAX_CHUNK
        or (dtype.kind == "O" and longest_string(data, path, name) > held)
    ):
        raise UserError(
            f"{path}: {name} claims the shape {shape} in pieces of {chunk or shape} of {dtype}: "
            "more than the file can hold"
        )
    return data, shape, dtype


def longest_string(data, path, name):
    """Return the greatest length that strings claim: HDF5 would make room for it before it looks whether it is true."""
    num, size = int(np.prod(data.shape)), data.get_storage_size()
    if num == 0 or data.get_create_plist().get_layout() != h5py.h5d.CONTIGUOUS:
        raise UserError(f"{path}: {name} holds {num} strings, or not in one piece: expected them contiguous")
    with open(path, "rb") as file:
        file.seek(data.get_offset())  # each a length, uint32, and where it lies
        return int(np.ndarray(num, "<u4", file.read(size), strides=size // num).max())


def open_table(file, path):
    """Return (image, offset, labels, splits, ids, class_names) of a packed file; image is an h5py.Dataset."""

    def column(name, kinds):
        data, shape, dtype = open_array(file, path, name, kinds)
        if len(shape) != 1:
            raise UserError(f"{path}: {name} has the shape {shape}: expected one axis")
        array = h5py.Dataset(data)[:]
        return array.astype(np.int64) if dtype.kind in "ui" else [text.decode() for text in array.tolist()]

    name = "jpeg" if file.id.links.exists(b"jpeg") else "image"
    data, shape, dtype = open_array(file, path, name)
    if dtype != np.uint8 or len(shape) != (1 if name == "jpeg" else 4) or min(shape) < 1:
        raise UserError(
            f"{path}: {name} is {dtype} of shape {shape}: expected uint8 "
            + ("[bytes]" if name == "jpeg" else "[N, h, w, c]")
        )
    return (
        h5py.Dataset(data),
        column("offset", "ui") if name == "jpeg" else None,
        column("label", "ui"),
        column("split", "ui"),
        column("id", "S"),
        column("class_names", "SO"),
    )


def is_packed(folder: str) -> bool:
    """Return whether folder/data.hdf5 was packed to its end and can be opened; no link in it is followed."""
    try:
        with h5py.File(os.path.join(folder, DATA), "r", locking=False) as file:
            mark = file.attrs.get_id("packed")
            is_whole = mark.shape == () and mark.dtype.kind in "iu" and file.attrs["packed"] == FORMAT
            return bool(is_whole and (file.id.links.exists(b"image") or file.id.links.exists(b"jpeg")))
    except (OSError, RuntimeError, KeyError, ValueError, TypeError):
        return False


def read_recipe(folder: str) -> dict:
    """Return the recipe that folder/data.hdf5 was packed by, {} if it does not say."""
    path = os.path.join(folder, DATA)
    try:
        with h5py.File(path, "r", locking=False) as file:
            if "recipe" not in file.attrs or file.attrs.get_id("recipe").dtype.kind != "S":
                return {}
            recipe = json.loads(file.attrs["recipe"])
            return recipe if isinstance(recipe, dict) else {}
    except Exception as error:
        raise UserError(f"{path} is broken ({one_line(error, 300)}): delete it and run download.py again") from error


def open_packed(folder, name, max_examples=None):
    """Return (train, test), two Datasets on folder/data.hdf5. Raises UserError if the file does not hold together."""
    path = os.path.join(folder, DATA)
    try:
        file = h5py.File(path, "r", locking=False, rdcc_nbytes=0)  # no chunk cache: read just the bytes asked for
        image, offset, labels, splits, ids, class_names = open_table(file, path)
        check(labels, splits, ids, class_names)
        if (len(image) if offset is None else len(offset) - 1) != len(labels):
            raise UserError(f"{len(labels)} labels, but {len(image) if offset is None else len(offset) - 1} images")
        if offset is not None and (offset[0] != 0 or np.any(offset[1:] <= offset[:-1]) or offset[-1] != len(image)):
            raise UserError("the offsets do not fit the JPEG files")
    except Exception as error:
        what = one_line(error, 300).removeprefix(f"{path}: ")
        raise UserError(f"{path} is broken ({what}): delete it and run download.py again") from error
    bounds, made_from = (0, np.count_nonzero(splits == 0), len(splits)), read_recipe(folder).get("made_from")
    return tuple(
        Dataset(
            ids[a:b],
            name,
            max_examples,
            a == 0,
            labels=labels[a:b],
            class_names=class_names,
            image=image,
            rows=np.arange(a, b),
            offset=offset,
            made_from=made_from,
        )
        for a, b in zip(bounds, bounds[1:])
    )


def empty(shape: tuple, dtype) -> np.ndarray:
    """Return an empty array that begins at a multiple of 64 bytes, where TensorFlow can share it without a copy."""
    size = int(np.prod(shape, dtype=object)) * np.dtype(dtype).itemsize
    block = np.empty(size + 64, np.uint8)
    start = -block.ctypes.data % 64
    return block[start : start + size].view(dtype).reshape(shape)


class Dataset:
    """One split of a dataset.

    ids [N] strings, name, is_train, class_names, num_classes, labels int32 [N], dtype (np.uint8, or np.float32 for own
    float images), image_shape (h, w, c) or (None, None, 3) when encoded, encoded: whether images are JPEG files, nbytes
    of the images of this split. `max_examples` keeps that many, evenly spaced, so that archives sorted by class keep
    all their classes.

    image: where the images are, uint8 or float32 [rows, h, w, c] as an array or an h5py dataset, or the `jpeg` bytes
    with their int64 `offset` [rows + 1]; rows: int [N], the row of each id. made_from: words, None where unknown.
    """

    def __init__(
        self,
        ids,
        name,
        max_examples=None,
        is_train=True,
        *,
        labels,
        class_names,
        image,
        rows,
        offset=None,
        made_from=None,
    ):
        kept = np.arange(len(ids))
        if max_examples is not None and max_examples < len(ids):
            kept = np.arange(max_examples) * len(ids) // max_examples
        self.ids, self.name, self.is_train, self.made_from = [ids[i] for i in kept], name, is_train, made_from
        self.labels, self.class_names = np.ascontiguousarray(labels[kept], np.int32), list(class_names)
        self.num_classes, self.encoded = len(self.class_names), offset is not None
        self.image_shape = (None, None, 3) if self.encoded else tuple(int(size) for size in image.shape[1:])
        self.dtype = np.uint8 if image.dtype == np.uint8 else np.float32
        self._image, self._rows, self._offset = image, np.asarray(rows, np.int64)[kept], offset
        self._images = self._position = None
        if self.encoded:
            self.nbytes = int((offset[self._rows + 1] - offset[self._rows]).sum())
        else:
            self.nbytes = len(kept) * int(np.prod(self.image_shape)) * np.dtype(self.dtype).itemsize

    def subset(self, positions, is_train):
        """Return the Dataset of the images at `positions` (int [n]), in that order."""
        return Dataset(
            [self.ids[i] for i in positions],
            self.name,
            is_train=is_train,
            labels=self.labels[positions],
            class_names=self.class_names,
            image=self._image,
            rows=self._rows[positions],
            offset=self._offset,
            made_from=self.made_from,
        )

    def __len__(self):
        return len(self.ids)

    def __repr__(self):
        return f"Dataset({self.name}, {'train' if self.is_train else 'test'}, {len(self)} images of {self.image_shape})"

    def images(self):
        """Return the whole split as one array [N, h, w, c], read once and kept. TypeError when encoded.

        Without `max_examples`, or from a packed file, it begins at a multiple of 64 bytes: see empty().
        """
        if self.encoded:
            raise TypeError(f"{self.name} holds JPEG files of many sizes: use read()")
        if self._images is None:
            in_memory = isinstance(self._image, np.ndarray)
            self._images = self.read(np.arange(len(self))) if in_memory else self._read_rows(self._rows)
        return self._images

    def _read_rows(self, rows):
        """Read the `rows` of the file, not encoded, into one array: rows that follow one another in one go."""
        images = empty((len(rows), *self.image_shape), self.dtype)
        breaks = np.flatnonzero(np.diff(rows) != 1) + 1
        with LOCK:
            for a, b in zip([0, *breaks], [*breaks, len(rows)]):
                if b > a:
                    self._image.read_direct(images, np.s_[rows[a] : rows[b - 1] + 1], np.s_[a:b])
        return images

    def read(self, positions):
        """Return the images at `positions`, int [n] in 0 ... N - 1 in any order, with repeats: [n, h, w, c], or a list
        of n bytes when encoded. Reads each row once, in the file's order; may be called from several threads."""
        positions = np.asarray(positions, np.int64).reshape(-1)
        if self._images is not None:
            return self._images[positions]
        rows = self._rows[positions]
        if isinstance(self._image, np.ndarray):
            in_order = len(rows) > 0 and np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows)))
            return self._image[rows[0] : rows[-1] + 1] if in_order else self._image[rows]
        unique, inverse = np.unique(rows, return_inverse=True)
        if self.encoded:
            with LOCK:
                jpegs = [self._image[self._offset[row] : self._offset[row + 1]].tobytes() for row in unique]
            return [jpegs[i] for i in inverse]
        images = self._read_rows(unique)
        return images if np.array_equal(unique, rows) else images[inverse]

    def get_data(self, id):
        """Return (image, label) of one id: float32 [h, w, c], uint8 images scaled to 0 ... 1, and one-hot float32
        [num_classes]. Raises UserError for an unknown id."""
        if self._position is None:
            self._position = {name: i for i, name in enumerate(self.ids)}
        if id not in self._position:
            raise UserError(f"{self.name} has no id {id!r} in its {'train' if self.is_train else 'test'} split")
        position = self._position[id]
        image = self.read([position])[0]
        if self.encoded:
            from datasets.archives import decode_rgb

            image = decode_rgb(image, self.name, id)
        image = image.astype(np.float32) / 255 if image.dtype == np.uint8 else image
        return image, np.eye(self.num_classes, dtype=np.float32)[self.labels[position]]
