"""A folder of class folders of images, DIR/<class>/<image>, packed as a user's own dataset."""
import os
import warnings

import numpy as np

from datasets.archives import MAX_PIXELS, refusing
from datasets.errors import UserError
from datasets.hdf5 import Source
from datasets.own import split_80_20

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
PART = 256


def read(image_dir, test_image_dir=None, image_size=None):
    """Return the Source of image_dir/<class>/*: images uint8 [N, h, w, 3], resized to image_size (h, w) if given.

    The test split is test_image_dir, with the same classes, or a fifth of image_dir by a shuffle with a fixed seed.
    """
    class_names = class_folders(image_dir)
    if len(class_names) < 2:
        raise UserError(f"--image_dir {image_dir} has {len(class_names)} class folders: expected DIR/<class>/<image>, "
                        "at least 2 classes")
    files = list_images(image_dir, class_names)
    if test_image_dir is None:
        train, test = ([files[i] for i in rows] for rows in split_80_20(len(files)))
        train, test = sorted(train), sorted(test)
    else:
        strange = sorted(set(class_folders(test_image_dir)) - set(class_names))
        if strange:
            raise UserError(f"--test_image_dir {test_image_dir} has the class {strange[0]}: {image_dir} has not")
        train, test = files, list_images(test_image_dir, class_names)
    if not train or not test:
        raise UserError(f"{len(train)} train and {len(test)} test images in {test_image_dir or image_dir}: none may be "
                        "empty, and without --test_image_dir there must be at least 5 images")
    shape = (*image_size, 3) if image_size else load(train[0][0], None).shape
    return Source(class_names, shape, len(train) + len(test), parts((train, test), shape, image_size))


def class_folders(folder):
    """Return the sorted names of the folders in `folder`."""
    if not os.path.isdir(folder):
        raise UserError(f"{folder} is not a folder")
    return sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))


def list_images(folder, class_names):
    """Return [(path, label)] of the images in the class folders, sorted; other files are named and left out."""
    files, ignored = [], []
    for label, name in enumerate(class_names):
        place = os.path.join(folder, name)
        for file in sorted(os.listdir(place)) if os.path.isdir(place) else []:
            is_image = file.lower().endswith(SUFFIXES) and not file.startswith(".")
            (files if is_image else ignored).append((os.path.join(place, file), label))
    if ignored:
        print(f"{folder}: left out {len(ignored)} files that are no images by their names, such as {ignored[0][0]}")
    return files


def parts(splits, shape, image_size):
    """Yield the images of both splits, PART at a time."""
    for split, files in enumerate(splits):
        for i in range(0, len(files), PART):
            paths, labels = zip(*files[i:i + PART])
            images = [load(path, image_size) for path in paths]
            for path, image in zip(paths, images):
                if image.shape != shape:
                    raise UserError(f"{path} has {image.shape[0]}x{image.shape[1]} pixels, {splits[0][0][0]} has "
                                    f"{shape[0]}x{shape[1]}: give --image_size H W to resize all")
            ids = ["/".join((("train", "test")[split], *path.split(os.sep)[-2:])) for path in paths]
            yield split, np.stack(images), labels, ids


def load(path, image_size):
    """Return an image file (gray, palette, CMYK, alpha or 16 bits) as uint8 [h, w, 3], upright, its first frame."""
    import imageio.v3 as iio
    from PIL import Image
    with refusing(path), warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with iio.imopen(path, "r", plugin="pillow") as file:
            if int(np.prod(file.properties(index=0).shape[:2])) > MAX_PIXELS:
                raise UserError(f"{path} has more than {MAX_PIXELS} pixels")
            deep = file.metadata(index=0).get("mode", "").startswith("I")
            image = file.read(index=0, rotate=True, mode=None if deep else "RGB")
        if deep:                                                        # Pillow would clip 16 bits instead of scaling
            image = np.repeat((np.asarray(image, np.int64) >> 8).clip(0, 255).astype(np.uint8)[..., np.newaxis], 3, -1)
        if image_size is not None and image.shape[:2] != tuple(image_size):
            image = np.asarray(Image.fromarray(image).resize(tuple(image_size)[::-1], Image.Resampling.BILINEAR))
    return image
