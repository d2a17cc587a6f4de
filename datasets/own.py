"""A user's own dataset, datasets/YOUR_DATASET/, in the layout of the 2018 repo.

    data.hy or data.hdf5      one group per id, with `image` [h, w, c] or [h, w] and `label`, one-hot [classes]
    id.txt                    the ids, one per line
    id_train.txt, id_test.txt optional: the split; the default is 80/20 after a shuffle with a fixed seed

Integer images must be in 0 ... 255 and become uint8; float images must be finite and become float32.
"""

import contextlib
import glob
import hashlib
import itertools
import os
import zipfile

import h5py
import numpy as np

from command import UserError, reading, atomic_file
from datasets.hdf5 import IDS, Dataset, empty, open_array, repeated

EPOCHS, FLIPPED, FETCHED_ON_FIRST_USE = 30, False, False
DATA_FILES = ("data.hy", "data.hdf5")
SPLIT_SEED = 123
MANY_IDS, CACHE = 5000, ".cache.npz"
BLOCK = 1 << 20  # bytes per read of the copy
LARGEST_FLOAT = 20.0  # larger float images were probably not scaled for a network


def open_own(folder, name):
    """Return (train, test), two Datasets in memory. Raises UserError for wrong data, with the id and the value."""
    found = [os.path.join(folder, file) for file in DATA_FILES if os.path.isfile(os.path.join(folder, file))]
    if len(found) > 1:
        raise UserError(f"dataset {name}: {folder} has both data.hy and data.hdf5: keep one of them")
    if not found:
        pack = f"pack images with `python download.py --dataset {name} --image_dir DIR`, or see README.md"
        raise UserError(f"dataset {name}: {folder} has neither data.hy nor data.hdf5: {pack}")
    train_ids, test_ids = read_splits(folder)
    ids, path = train_ids + test_ids, found[0]
    labels, num_classes, images = read_or_reuse(path, ids, len(train_ids))
    if len(set(labels[: len(train_ids)].tolist())) < 2:
        raise UserError(f"{path}: all training images are of class {labels[0]}: a classifier needs at least 2 classes")
    digest = hashlib.sha256()
    for of_split in images:
        digest.update(of_split)
    names, splits = [str(i) for i in range(num_classes)], np.split(labels, [len(train_ids)])
    return tuple(
        Dataset(split_ids, name, split_labels, names, image, rows=np.arange(len(image)), digest=digest.hexdigest())
        for split_ids, split_labels, image in zip((train_ids, test_ids), splits, images)
    )


def read_ids(path):
    """Return the ids in a text file, one per line; empty lines are skipped."""
    if not os.path.isfile(path):
        raise UserError(f"{path} is missing: it must hold the ids, one per line")
    with reading(path, "save it as UTF-8"), open(path, encoding="utf-8-sig") as file:  # a byte order mark may be there
        ids = [line.strip() for line in file if line.strip()]
    strange = next((id for id in ids if "/" in id or "\0" in id or id in (".", "..")), None)
    if strange is not None:
        raise UserError(
            f"{path}: id {strange!r} cannot be the name of a group: rename it; or if download.py packed this folder, "
            "data.hdf5 is damaged: delete it, and run download.py again"
        )
    if not ids:
        raise UserError(f"{path} is empty: it must hold the ids, one per line")
    if repeated(ids) is not None:
        raise UserError(f"{path}: id {repeated(ids)!r} is repeated: remove one")
    return ids


def read_splits(folder):
    """Return the ids of (train, test)."""
    ids = read_ids(os.path.join(folder, IDS))
    files = [os.path.join(folder, f"id_{split}.txt") for split in ("train", "test")]
    found = [file for file in files if os.path.exists(file)]
    if len(found) == 1:
        (missing,) = set(files) - set(found)
        raise UserError(f"{found[0]} exists without {os.path.basename(missing)}: add it, or remove both to split 80/20")
    if not found:
        if len(ids) < 5:
            raise UserError(f"{folder}/{IDS} has {len(ids)} ids: an 80/20 split needs at least 5")
        shuffled = [ids[i] for i in np.random.RandomState(SPLIT_SEED).permutation(len(ids))]  # the same in every run
        num_train = len(ids) - len(ids) // 5
        return shuffled[:num_train], shuffled[num_train:]
    train, test = (read_ids(file) for file in files)
    known, train_set = set(ids), set(train)
    for file, split in zip(files, (train, test)):
        unknown = next((id for id in split if id not in known), None)
        if unknown is not None:
            raise UserError(f"{file}: id {unknown!r} is not in {IDS}")
    both = next((id for id in test if id in train_set), None)
    if both is not None:
        raise UserError(f"{files[1]}: id {both!r} is in id_train.txt too: train and test must not overlap")
    return train, test


def read_or_reuse(path, ids, num_train):
    """Return read_examples() of a file. With many ids, a copy is kept beside the file, which opens a hundred
    times faster; it is used as long as the file and the ids are the same."""
    if len(ids) < MANY_IDS:
        return read_examples(path, ids, num_train)
    copy, status = path + CACHE, os.stat(path)
    names = hashlib.sha256("\n".join([str(num_train), *ids]).encode()).hexdigest()
    key = f"{status.st_size} {status.st_mtime_ns} {names}"
    with contextlib.suppress(OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile), np.load(copy) as stored:
        if stored["key"] == key:
            images = tuple(read_once(stored.zip, split) for split in ("train", "test"))
            return stored["labels"], int(stored["num_classes"]), images
    print(f"reading {len(ids)} examples from {path}, which is slow only this first time")
    labels, num_classes, images = read_examples(path, ids, num_train)
    with contextlib.suppress(OSError):
        for left in glob.glob(f"{glob.escape(copy)}.*.part"):  # of a killed process; a live one then makes no copy
            os.remove(left)
        with atomic_file(copy) as part, open(part, "wb") as file:
            np.savez(file, key=key, labels=labels, num_classes=num_classes, train=images[0], test=images[1])
    return labels, num_classes, images


def read_once(archive, name):
    """Return an array of an open .npz file, aligned as empty() does; np.load would need a second array in memory."""
    with archive.open(f"{name}.npy") as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        array = empty(shape, dtype)
        content = memoryview(array).cast("B")
        for start in range(0, len(content), BLOCK):
            file.readinto(content[start : start + BLOCK])
    return array


def read_examples(path, ids, num_train):
    """Return (labels int32 [N], number of classes, (train images, test images)); the first `num_train` ids are train.

    Images are uint8 or float32 [n, h, w, c].
    """
    labels, num_classes, images = np.empty(len(ids), np.int32), None, None
    with reading(path), h5py.File(path, "r", locking=False) as file:
        for i, id in enumerate(ids):
            image, label = (open_array(file, f"{id}/{name}") for name in ("image", "label"))
            labels[i], num_classes = read_label(f"{path}: label of id {id!r}", label, num_classes)
            title = f"{path}: image of id {id!r}"
            found = image_type(title, image)
            if images is None:
                dtype, shape = found
                images = allocate(path, num_train, len(ids), shape, dtype)
                into = itertools.chain(*images)
            if found != (dtype, shape):
                raise UserError(
                    f"{title} is {image.dtype} of {image.shape}, but that of id {ids[0]!r} is {np.dtype(dtype)} of "
                    f"{shape}: all images must agree"
                )
            read_image(title, image, next(into))
    warn_of_range(path, images[0])
    return labels, num_classes, images


def read_label(title, data, num_classes):
    """Return (label, number of classes) of a one-hot label; num_classes: of the other labels, or None."""
    if len(data.shape) != 1 or data.shape[0] != (num_classes or data.shape[0]):
        expected = f"[{num_classes}] like the other labels" if num_classes else "[classes]"
        raise UserError(f"{title} has the shape {data.shape}: expected one-hot {expected}")
    label = data[()]
    if np.count_nonzero(label) != 1 or label.max() != 1:
        raise UserError(f"{title} is {label[:20].tolist()}: expected one-hot, a single 1 among zeros")
    return label.argmax(), len(label)


def allocate(path, num_train, num, shape, dtype):
    """Return empty arrays for the images of both splits. Raises UserError if they do not fit into memory."""
    size = int(np.prod(shape, dtype=object)) * num * np.dtype(dtype).itemsize
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > 0.8 * memory:
        need = f"{size / 1e9:.1f} GB, but this machine has {memory / 1e9:.1f} GB"
        raise UserError(f"{path}: {num} images of {shape} need {need}: use fewer ids in id.txt, or smaller images")
    return tuple(empty((count, *shape), dtype) for count in (num_train, num - num_train))


def warn_of_range(path, images):
    """Print a warning if float images have large values."""
    largest = max(images.max(), -images.min()) if images.dtype == np.float32 else 0  # without a copy of the images
    if largest > LARGEST_FLOAT:
        problem = f"float images have values up to {largest:g}, with which networks learn slowly or not at all"
        print(f"warning: {path}: {problem}: store uint8 images of 0 to 255, or divide by 255")


def image_type(title, data):
    """Return (np.uint8 or np.float32, (h, w, c)): the type and shape in which to read an image, an h5py array."""
    shape, dtype = data.shape, data.dtype
    if len(shape) not in (2, 3) or min(shape) < 1 or dtype.kind not in "uif":
        raise UserError(f"{title} is {dtype} of shape {shape}: expected uint8 or float [h, w, c]")
    if len(shape) == 3 and shape[0] in (1, 3, 4) and shape[2] > 4:
        raise UserError(f"{title} has the shape {shape}, channels first: store np.transpose(image, (1, 2, 0))")
    return np.float32 if dtype.kind == "f" else np.uint8, shape if len(shape) == 3 else (*shape, 1)


def read_image(title, data, into):
    """Read an image, an h5py array, into the array `into`, and check its values."""
    image = data[()].reshape(into.shape)
    if into.dtype == np.uint8 and image.dtype != np.uint8 and (image.min() < 0 or image.max() > 255):
        raise UserError(f"{title} has values from {image.min()} to {image.max()}: expected 0 to 255, or float numbers")
    with np.errstate(over="ignore"):
        into[...] = image
    if into.dtype == np.float32 and not np.isfinite(into).all():
        bad = np.argwhere(~np.isfinite(into))[0].tolist()
        raise UserError(f"{title} has the value {image[tuple(bad)]} at {bad}: pixels must be finite")
