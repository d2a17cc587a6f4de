"""Read DIR/<class>/<image> as a user's own dataset, and find image files to predict."""

import collections
import hashlib
import itertools
import os
import re
import shlex

import numpy as np

from command import UserError, one_line
from datasets.hdf5 import Source
from datasets.images import load_image
from datasets.own import SPLIT_SEED

SUFFIXES = tuple(".jpg .jpeg .jpe .jfif .pjpeg .png .bmp .gif .tif .tiff .webp .ppm .pgm .jp2 .tga .avif".split())
SPLIT_NAME = re.compile("(train|val|test|training|valid|validation|testing)([ _-]?(set|data|images|split))?", re.I)
PART = 1 << 24  # bytes of images in memory at once


def list_splits(image_dir, test_image_dir=None, wanted=lambda path: True):
    """Return (class names, train, test); train and test are lists of (path, label), sorted by class and path.

    The test split is test_image_dir, with the same classes, or by default a fifth of each class (see split_classes).
    Images of which wanted(path) is false are skipped. Raises UserError if the folders make no dataset.
    """
    class_names = class_folders(image_dir)
    splits = [name for name in class_names if SPLIT_NAME.fullmatch(name)]
    train = [name for name in splits if name.lower().startswith("train")]
    if train and (len(splits) > len(train) or splits == class_names):
        paths = {name: shlex.quote(os.path.join(image_dir, name)) for name in splits}
        others = [f" --test_image_dir {paths[name]}" for name in splits if name not in train]
        raise UserError(
            f"--image_dir {image_dir} holds {' '.join(splits)}, which are splits, not classes: "
            f"give --image_dir {paths[train[0]]}{''.join(others[-1:])}"
        )
    if len(class_names) < 2:
        raise UserError(f"--image_dir {image_dir} has {len(class_names)} class folders: make 2 or more")
    top = os.path.realpath(image_dir)
    if test_image_dir is not None and os.path.commonpath([top, os.path.realpath(test_image_dir)]) == top:
        raise UserError(f"--test_image_dir {test_image_dir} is --image_dir or in it: omit it, or give another folder")
    files = list_images(image_dir, class_names, wanted)
    empty = sorted(set(range(len(class_names))) - {label for _, label in files})
    if empty:  # neither skipped, which would change later labels, nor kept, as no network can learn it
        path = os.path.join(image_dir, class_names[empty[0]])
        raise UserError(f"the class folder {path} has no images ({' '.join(SUFFIXES)}): add some, or remove the folder")
    if test_image_dir is None:
        train, test = split_classes(files, class_names)
    else:
        unknown = sorted(set(class_folders(test_image_dir)) - set(class_names))
        if unknown:
            path = os.path.join(test_image_dir, unknown[0])
            raise UserError(f"{path} is a class that {image_dir} does not have: rename or remove it")
        train, test = files, list_images(test_image_dir, class_names, wanted)
    if not test:
        problem = f"no class of {image_dir} has 2 images" if test_image_dir is None else f"{test_image_dir} has none"
        raise UserError(f"no images to test, as {problem}: add some, or give another --test_image_dir DIR")
    return class_names, train, test


def read(image_dir, test_image_dir=None, image_size=None, skip_broken=False):
    """Return the Source of image_dir/<class>/*: images uint8 [N, h, w, 3], resized to image_size (h, w) if given.

    Files that cannot be read are printed. They are skipped with skip_broken; otherwise packing fails at the end.
    """
    skipped = []

    def wanted(path):
        if not skip_broken or try_load(path) is not None:
            return True
        skipped.append(os.path.realpath(path))
        return False

    class_names, train, test = list_splits(image_dir, test_image_dir, wanted)
    warn_of_copies(train, test)
    shape = (*image_size, 3) if image_size else load_image(train[0][0], train[0][0]).shape
    images = parts((train, test), (image_dir, test_image_dir or image_dir), shape, image_size)
    return Source(class_names, shape, len(train) + len(test), images, {"skipped": sorted(skipped)})


def id_of(path, split, folder):
    """Return train/<class>/<image> or test/<class>/<image>; split: 0 or 1, of the images in `folder`."""
    return f"{('train', 'test')[split]}/{os.path.relpath(path, folder)}"


def try_load(path, image_size=None):
    """Return an image file as load_image does; if it cannot be read, print the reason and return None."""
    try:
        return load_image(path, path, image_size)
    except (UserError, OSError) as error:
        print(f"warning: {one_line(error)}")
        return None


def warn_of_copies(train, test):
    """Print how many test images are copies of training images, with an example."""
    train_sizes, test_sizes = ({path: os.path.getsize(path) for path, _ in files} for files in (train, test))
    in_both = set(train_sizes.values()) & set(test_sizes.values())  # only files of the same size can be copies
    originals = {digest(path): path for path, size in train_sizes.items() if size in in_both}
    digests = {path: digest(path) for path, size in test_sizes.items() if size in in_both}
    copies = [(path, originals[found]) for path, found in digests.items() if found in originals]
    if copies:
        print(
            f"warning: {len(copies)} of {len(test)} test images are copies of training images, which makes the test "
            f"accuracy too high: {copies[0][0]} is a copy of {copies[0][1]}"
        )


def digest(path):
    """Return the SHA-256 of a file's contents."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def check_name(name, folder):
    """Raise UserError for the name of a file or folder in `folder` that is not a line of text."""
    if "\n" in name or "\r" in name or name != name.encode(errors="replace").decode():
        raise UserError(f"the name {os.fsencode(name)!r} in {folder} is not UTF-8 or has a line break: rename it")


def class_folders(folder):
    """Return the sorted names of the folders in `folder`."""
    if not os.path.isdir(folder):
        raise UserError(f"{folder} is not a folder: give a folder DIR that holds DIR/<class>/<image>")
    names = [name for name in sorted(os.listdir(folder)) if os.path.isdir(os.path.join(folder, name))]
    return [name for name in names if not name.startswith(".")]


def list_images(folder, class_names, wanted):
    """Return [(path, label)] of the wanted images in and below the class folders, and print the files skipped.

    A class may lack a folder: then it has no images here.
    """
    files, skipped = [], []
    loose = sorted(name for name in os.listdir(folder) if is_image_name(name) and not name.startswith("."))
    if loose:
        print(f"warning: skipped {len(loose)} images outside the class folders of {folder}, such as {loose[0]}")
    for label, name in enumerate(class_names):
        top = os.path.join(folder, name)
        found, others = find_files(top) if os.path.isdir(top) else ([], [])
        for path in found:
            check_name(os.path.relpath(path, folder), folder)
        files += [(path, label) for path in found if wanted(path)]
        skipped += others
    print_skipped(skipped)
    return files


def find_files(folder):
    """Return the sorted (images, other files) in and below `folder`, by suffix.

    Skips hidden files and folders; links to folders are other files. Raises OSError for a folder that cannot be read.
    """

    def fail(error):
        raise error

    found, others = [], []
    for directory, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        others += [path for path in (os.path.join(directory, name) for name in folders) if os.path.islink(path)]
        for name in [name for name in names if not name.startswith(".")]:
            file = os.path.join(directory, name)
            (found if is_image_name(name) and os.path.isfile(file) else others).append(file)
    return sorted(found), sorted(others)


def suffix_of(path):
    """Return '.jpg' of 'A.JPG'."""
    return os.path.splitext(path)[1].lower()


def is_image_name(name):
    """Return whether the suffix of a file is that of an image."""
    return suffix_of(name) in SUFFIXES


def print_skipped(files):
    """Print how many files, and links to folders, are skipped, by suffix."""
    if files:
        kinds = ["link to a folder" if os.path.isdir(file) else suffix_of(file) or "no suffix" for file in files]
        counts = ", ".join(f"{number} {kind}" for kind, number in sorted(collections.Counter(kinds).items()))
        print(f"warning: skipped {len(files)} files ({counts}), such as {files[0]}; convert images to JPEG or PNG")


def find_images(paths):
    """Return the files in `paths`, with each folder replaced by the sorted images in and below it.

    Raises UserError for a path that does not exist and for a folder without images.
    """
    files = []
    for path in paths:
        if os.path.isfile(path):
            files.append(path)
            continue
        if not os.path.isdir(path):
            raise UserError(f"{path!r} is not a file or folder: give image files, or folders of images")
        found, others = find_files(path)
        print_skipped(others)
        if not found:
            raise UserError(f"the folder {path} has no images in or below it ({' '.join(SUFFIXES)})")
        files += found
    return files


def split_classes(files, class_names):
    """Split sorted [(path, label)] into (train, test): a fifth of each class, at least one image, is for testing.

    Each class is shuffled with the same fixed seed, so adding a class does not change the others. The only image of a
    class is for training.
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
        names = " ".join(single[:10])
        print(f"{len(single)} of {len(class_names)} classes have a single image, for training: {names}")
    return train, test


def parts(splits, folders, shape, image_size):
    """Yield the images of both splits, PART bytes at a time; raise UserError at the end if some cannot be read."""
    num, broken = max(1, PART // int(np.prod(shape))), []
    for split, files in enumerate(splits):
        for i in range(0, len(files), num):
            paths, labels = zip(*files[i : i + num])
            pixels = np.empty((len(paths), *shape), np.uint8)
            for image, path in zip(pixels, paths):
                loaded = try_load(path, image_size)
                if loaded is None:
                    broken.append(path)
                    continue
                if loaded.shape != shape:
                    raise UserError(
                        f"{path} has {loaded.shape[0]}x{loaded.shape[1]} pixels, but {splits[0][0][0]} has "
                        f"{shape[0]}x{shape[1]}: give --image_size H W to resize all images"
                    )
                image[...] = loaded
            yield split, pixels, labels, [id_of(path, split, folders[split]) for path in paths]
    if broken:
        share = f"{len(broken)} of {sum(map(len, splits))}"
        raise UserError(f"{share} images cannot be read, such as {broken[0]}: remove them, or add --skip_broken")
