"""A folder of class folders of images, DIR/<class>/<image>, as a user's own dataset; image files to predict."""

import itertools
import os

import numpy as np

from command import UserError
from datasets.hdf5 import Source
from datasets.images import load_image
from datasets.own import SPLIT_SEED

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
PART = 1 << 24  # bytes of images that are in memory at once


def read(image_dir, test_image_dir=None, image_size=None):
    """Return the Source of image_dir/<class>/*: images uint8 [N, h, w, 3], resized to image_size (h, w) if given.

    The test split is test_image_dir, with the same classes, or a fifth of each class of image_dir: see split_classes.
    Raises UserError.
    """
    class_names = class_folders(image_dir)
    if len(class_names) < 2:
        raise UserError(
            f"--image_dir {image_dir} has {len(class_names)} class folders: expected DIR/<class>/<image>, "
            "at least 2 classes"
        )
    files = list_images(image_dir, class_names)
    empty = sorted(set(range(len(class_names))) - {label for _, label in files})
    if empty:  # without it the labels of the classes behind it would change; with it nothing could learn it
        raise UserError(
            f"the class folder {os.path.join(image_dir, class_names[empty[0]])} has no image: add some "
            f"({' '.join(SUFFIXES)}), or remove it"
        )
    if test_image_dir is None:
        train, test = split_classes(files, class_names)
    else:
        unknown = sorted(set(class_folders(test_image_dir)) - set(class_names))
        if unknown:
            raise UserError(f"--test_image_dir {test_image_dir} has the class {unknown[0]}, but {image_dir} has not")
        train, test = files, list_images(test_image_dir, class_names)
    if not test:
        raise UserError(
            f"no test images: no class of {image_dir} has 2 images, one of which could be in the test split"
            if test_image_dir is None
            else f"--test_image_dir {test_image_dir} has no images"
        )
    shape = (*image_size, 3) if image_size else load_image(train[0][0], train[0][0]).shape
    return Source(class_names, shape, len(train) + len(test), parts((train, test), shape, image_size))


def names_in(folder):
    """Return the sorted names in `folder`. Raises UserError for a name that cannot be part of an id."""
    names = sorted(os.listdir(folder))
    for name in (str(folder), *names):
        check_name(name, folder)
    return names


def check_name(name, folder):
    """Raise UserError for a name that cannot stand in a line of text."""
    if "\n" in name or "\r" in name or name != name.encode(errors="replace").decode():
        raise UserError(
            f"the name {os.fsencode(name)!r} in {folder} is not UTF-8, or has a line break in it: rename it"
        )


def class_folders(folder):
    """Return the sorted names of the folders in `folder`."""
    if not os.path.isdir(folder):
        raise UserError(f"{folder} is not a folder: name one that holds DIR/<class>/<image>")
    return [name for name in names_in(folder) if os.path.isdir(os.path.join(folder, name)) and not name.startswith(".")]


def list_images(folder, class_names):
    """Return [(path, label)] of the images in the class folders, sorted, and print what is skipped."""
    files, skipped = [], []
    for label, name in enumerate(class_names):
        class_folder = os.path.join(folder, name)
        for file in names_in(class_folder) if os.path.isdir(class_folder) else []:
            (files if is_image_name(file) else skipped).append((os.path.join(class_folder, file), label))
    print_skipped([path for path, _ in skipped])
    return files


def print_skipped(files):
    """Print how many files are skipped, and one of them."""
    if files:
        print(f"skipped {len(files)} files that are no images by their names, such as {files[0]}", flush=True)


def is_image_name(name):
    """Return whether a file is an image by its name."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def find_images(paths):
    """Return the files among `paths`, and in place of a folder the sorted images in it and below.

    Hidden files and links to folders are not looked at, files that are no images by their names are counted in a line.
    Raises UserError for a path that does not exist, and for a folder without images.
    """
    files = []
    for path in paths:
        if os.path.isfile(path):
            files.append(path)
            continue
        if not os.path.isdir(path):
            raise UserError(f"{path!r} is no file and no folder: name image files, or folders of them")
        found, skipped = [], []
        for folder, folders, names in os.walk(path):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in [name for name in names if not name.startswith(".")]:
                file = os.path.join(folder, name)
                (found if is_image_name(name) and os.path.isfile(file) else skipped).append(file)
        print_skipped(sorted(skipped))
        if not found:
            raise UserError(f"the folder {path} has no image in it or below it ({' '.join(SUFFIXES)})")
        files += sorted(found)
    return files


def split_classes(files, class_names):
    """Return the sorted [(path, label)] `files` as (train, test): a fifth of each class, at least one image, is test.

    The shuffle of each class has the same fixed seed, so that another class changes nothing. A single image is train.
    """
    train, test, single = [], [], []
    for label, group in itertools.groupby(files, key=lambda file: file[1]):
        own = list(group)
        order = np.random.RandomState(SPLIT_SEED).permutation(len(own))
        num_test = max(1, round(len(own) / 5)) if len(own) > 1 else 0
        train.extend(own[i] for i in sorted(order[num_test:]))
        test.extend(own[i] for i in sorted(order[:num_test]))
        if num_test == 0:
            single.append(class_names[label])
    if single:
        print(
            f"{len(single)} of {len(class_names)} classes have a single image, which is in train: "
            f"{' '.join(single[:10])}",
            flush=True,
        )
    return train, test


def parts(splits, shape, image_size):
    """Yield the images of both splits, PART bytes at a time."""
    num = max(1, PART // int(np.prod(shape)))
    for split, files in enumerate(splits):
        for i in range(0, len(files), num):
            paths, labels = zip(*files[i : i + num])
            pixels = np.empty((len(paths), *shape), np.uint8)
            for image, path in zip(pixels, paths):
                loaded = load_image(path, path, image_size)
                if loaded.shape != shape:
                    raise UserError(
                        f"{path} has {loaded.shape[0]}x{loaded.shape[1]} pixels, {splits[0][0][0]} has "
                        f"{shape[0]}x{shape[1]}: give --image_size H W to resize all"
                    )
                image[...] = loaded
            yield split, pixels, labels, ["/".join((("train", "test")[split], *p.split(os.sep)[-2:])) for p in paths]
