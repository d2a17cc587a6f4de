"""A folder of class folders of images, DIR/<class>/<image>, packed as a user's own dataset; image files to predict.

Images become RGB of 8 bits: transparent ones on white, floats 0 ... 1 and integers of up to 16 bits scaled.
"""

import contextlib
import itertools
import logging
import os
import warnings

import numpy as np

from datasets.archives import MAX_PIXELS, encode_jpeg, is_plain_jpeg, refusing, to_rgb, upright
from command import UserError
from datasets.hdf5 import Source
from datasets.own import SPLIT_SEED

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
PART = 1 << 24  # bytes of images that are in memory at once
BITS = (8, 10, 12, 14, 16)  # of the images of integers that do not say it themselves: cameras and scanners have these


def read(image_dir, test_image_dir=None, image_size=None):
    """Return the Source of image_dir/<class>/*: images uint8 [N, h, w, 3], resized to image_size (h, w) if given.

    The test split is test_image_dir, with the same classes, or a fifth of each class of image_dir, see split_classes.
    """
    class_names = class_folders(image_dir)
    if len(class_names) < 2:
        raise UserError(
            f"--image_dir {image_dir} has {len(class_names)} class folders: expected DIR/<class>/<image>, "
            "at least 2 classes"
        )
    files = list_images(image_dir, class_names)
    empty = sorted(set(range(len(class_names))) - {label for _, label in files})
    if empty:  # left out, it would shift the labels of the classes behind it; kept, nothing could learn it
        raise UserError(
            f"the class folder {os.path.join(image_dir, class_names[empty[0]])} has no image: put some in "
            f"({' '.join(SUFFIXES)}), or remove it"
        )
    if test_image_dir is None:
        train, test = split_classes(files, class_names)
    else:
        strange = sorted(set(class_folders(test_image_dir)) - set(class_names))
        if strange:
            raise UserError(f"--test_image_dir {test_image_dir} has the class {strange[0]}: {image_dir} has not")
        train, test = files, list_images(test_image_dir, class_names)
    if not test:
        raise UserError(
            f"no test images: no class of {image_dir} has 2 images, one of which could be in the test split"
            if test_image_dir is None
            else f"--test_image_dir {test_image_dir} has no images"
        )
    bits = depth(max(highest_value(path) for path, _ in train + test))
    shape = (*image_size, 3) if image_size else load(train[0][0], None, bits).shape
    images = parts((train, test), shape, image_size, bits)
    return Source(class_names, shape, len(train) + len(test), images, {"bits": bits})


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
        raise UserError(f"{folder} is not a folder")
    return [name for name in names_in(folder) if os.path.isdir(os.path.join(folder, name)) and not name.startswith(".")]


def list_images(folder, class_names):
    """Return [(path, label)] of the images in the class folders, sorted; other files are named and left out."""
    files, ignored = [], []
    for label, name in enumerate(class_names):
        place = os.path.join(folder, name)
        for file in names_in(place) if os.path.isdir(place) else []:
            (files if is_image_name(file) else ignored).append((os.path.join(place, file), label))
    say_left_out([path for path, _ in ignored])
    return files


def say_left_out(files):
    """Print how many files were left out, and one of them."""
    if files:
        print(f"left out {len(files)} files that are no images by their names, such as {files[0]}", flush=True)


def is_image_name(name):
    """Return whether a file is an image by its name."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def find_images(paths):
    """Return the files among `paths` as they are named, and in place of a folder all images in it and below, sorted;
    what is no image by its name is counted in a line.

    Raises UserError for a path that is not there, and for a folder without images.
    """
    files = []
    for path in paths:
        if os.path.isdir(path):
            found, others = images_below(path)
            say_left_out(others)
            if not found:
                raise UserError(f"the folder {path} has no image in it or below it ({' '.join(SUFFIXES)})")
            files += found
        elif os.path.isfile(path):
            files.append(path)
        else:
            raise UserError(f"{path!r} is no file and no folder: name image files, or folders of them")
    return files


def images_below(folder):
    """Return the sorted paths of all images in `folder` and below, and of the other files, without what is hidden and
    linked folders."""
    found, others = [], []
    for name in sorted(name for name in os.listdir(folder) if not name.startswith(".")):
        path = os.path.join(folder, name)
        if not os.path.isdir(path):
            is_special = os.path.exists(path) and not os.path.isfile(path)  # such as a pipe, which to read has no end
            (found if is_image_name(name) and not is_special else others).append(path)
        elif not os.path.islink(path):
            below = images_below(path)
            found, others = found + below[0], others + below[1]
    return found, others


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


def parts(splits, shape, image_size, bits):
    """Yield the images of both splits, PART bytes at a time."""
    num = max(1, PART // int(np.prod(shape)))
    for split, files in enumerate(splits):
        for i in range(0, len(files), num):
            images = np.empty((len(files[i : i + num]), *shape), np.uint8)
            for image, (path, _) in zip(images, files[i : i + num]):
                loaded = load(path, image_size, bits)
                if loaded.shape != shape:
                    raise UserError(
                        f"{path} has {loaded.shape[0]}x{loaded.shape[1]} pixels, {splits[0][0][0]} has "
                        f"{shape[0]}x{shape[1]}: give --image_size H W to resize all"
                    )
                image[...] = loaded
            ids = ["/".join((("train", "test")[split], *path.split(os.sep)[-2:])) for path, _ in files[i : i + num]]
            yield split, images, [label for _, label in files[i : i + num]], ids


@contextlib.contextmanager
def opened(path):
    """Open an image file, not decoded yet. What is wrong with it ends in a UserError that names it."""
    from PIL import Image, UnidentifiedImageError

    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # or it says a line of its own beside our error
    with refusing(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(path)
        except UnidentifiedImageError:
            raise UserError(f"{path} is no image file that Pillow can read") from None
        with image:
            if image.width * image.height > MAX_PIXELS:
                raise UserError(f"{path} has {image.width}x{image.height} pixels: expected {MAX_PIXELS} at most")
            yield image


def highest_value(path):
    """Return the highest value of an image file of integers that does not say how many bits they have; -1 of others."""
    with opened(path) as image:
        if is_deep_color(image):  # of which Pillow reads the upper half
            return int(np.max(image)) << 8 | 255
        if image.mode.startswith("I") and own_depth(image) is None:
            return int(integers(image, path).max())
    return -1


def depth(highest):
    """Return the bits, one of BITS, of all images whose highest_value() is not -1, by the highest of all; None without
    such images.

    Cameras and scanners put 10, 12 or 14 bits in files of 16. One answer for all of train and test keeps a dim image
    dimmer than a bright one.
    """
    if highest < 0:
        return None
    bits = next(bits for bits in BITS if highest < 2**bits)
    print(
        f"of the images with more than 8 bits the highest value is {highest}: all are read as {bits}-bit images, "
        f"0 to {2**bits - 1}",
        flush=True,
    )
    return bits


def own_depth(image):
    """Return the bits that a file of integers claims: a TIFF file those of a sample, where it is no round number, and
    a PGM file 16, to which Pillow scales its highest value; None if it does not say."""
    bits = image.tag_v2.get(258, (16,))[0] if image.format == "TIFF" else 16
    return 16 if image.format == "PPM" else bits if bits < 16 else None


def is_deep_color(image):
    """Return whether a file not decoded yet has 16 bits in each of several channels."""
    return not image.mode.startswith("I") and any(";16" in str(tile[3]) for tile in image.tile)


def integers(image, path, highest=65535):
    """Return the values of an image of integers, [h, w], which must lie in 0 ... highest."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > highest:
        raise UserError(f"{path} has values from {values.min()} to {values.max()}: expected 0 to {highest}")
    return values


def scaled(values, highest):
    """Return 0 ... highest as gray 0 ... 255, uint8 [h, w, 3]."""
    gray = (values * np.float32(255 / highest) + np.float32(0.5)).astype(np.uint8)
    return np.repeat(gray[..., np.newaxis], 3, axis=-1)


def luminance(pixels):
    """Return the luminance, uint8 [h, w, 1], of uint8 [h, w, 3]: 0.299 R + 0.587 G + 0.114 B; gray stays as it is."""
    from PIL import Image

    return np.asarray(Image.fromarray(pixels).convert("L"))[..., np.newaxis]


def read_jpeg(path, bits):
    """Return an image file as the JPEG file, bytes, that ImageNet's store holds of it; bits: what depth() told."""
    from PIL import Image

    with opened(path) as image:
        is_plain = is_plain_jpeg(image)
    if not is_plain:
        return encode_jpeg(Image.fromarray(load(path, None, bits)))
    with open(path, "rb") as file:
        return file.read()


def load(path, image_size, bits):
    """Return an image file as uint8 [h, w, 3], upright, its first frame; bits: what depth() told."""
    from PIL import Image

    with opened(path) as file:
        if is_deep_color(file) and bits < 16:
            raise UserError(
                f"{path} is a color image of 16 bits a channel, but images of more than 8 bits are read as those of "
                f"{bits} bits here, of which {bits - 8} could be read: save it with 8 bits a channel"
            )
        own_bits = own_depth(file)
        if file.mode == "F":
            values = np.asarray(upright(file))
            if not (values.min() >= 0 and values.max() <= 1):  # nor NaN
                raise UserError(
                    f"{path} has float values from {values.min()} to {values.max()}: expected 0 to 1, or integers"
                )
            pixels = scaled(values, 1)
        elif file.mode.startswith("I"):
            highest = 2 ** (own_bits or bits) - 1
            pixels = scaled(integers(upright(file), path, highest), highest)
        else:
            pixels = np.asarray(to_rgb(file))
        if image_size is not None and pixels.shape[:2] != tuple(image_size):
            pixels = np.asarray(Image.fromarray(pixels).resize(tuple(image_size)[::-1], Image.Resampling.BILINEAR))
    return pixels
