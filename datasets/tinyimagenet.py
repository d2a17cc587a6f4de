"""Tiny ImageNet: 100,000 + 10,000 images of 64x64 in 200 classes (Stanford CS231n, http://cs231n.stanford.edu/)."""

import os
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from datasets.archives import decode_rgb, open_zip, refusing, zip_files
from command import UserError
from datasets.hdf5 import Source

EPOCHS, MIRRORED, FETCHED_ON_FIRST_USE = 30, True, False
FILES = {
    "tiny-imagenet-200.zip": (248100043, "sha256", "6198c8ae015e2b3e007c7841da39ec069199b9aa3bfa943a462022fe5e43c821")
}
MIRRORS = ("http://cs231n.stanford.edu/",)
ROOT = "tiny-imagenet-200/"
MAX_MEMBER = 1 << 23  # words.txt has 2.5 million bytes
PART = 1024


def read(archive_dir):
    """Return the Source of tiny-imagenet-200.zip: the class index is the line of wnids.txt. The test split is val,
    whose labels val_annotations.txt gives by file name; the archive's own `test` has no labels and stays out."""
    path = os.path.join(archive_dir, "tiny-imagenet-200.zip")
    archive = open_zip(path)
    infos = zip_files(archive, path, MAX_MEMBER)
    wnids = text(archive, path, "wnids.txt").split()
    index = {wnid: i for i, wnid in enumerate(wnids)}
    rows = [line.split("\t") for line in text(archive, path, "val/val_annotations.txt").splitlines() if line]
    if len(index) != len(wnids) or any(len(row) < 2 or row[1] not in index for row in rows):
        raise UserError(f"{path}: wnids.txt repeats a class, or val_annotations.txt names one that is not in it")
    truth = {row[0]: index[row[1]] for row in rows}
    splits = ([], [])
    for info in infos:
        name = info.filename.removeprefix(ROOT)
        if train := re.fullmatch(r"train/([^/]+)/images/[^/]+\.JPEG", name):
            splits[0].append((info, index.get(train[1])))
        elif val := re.fullmatch(r"val/images/([^/]+\.JPEG)", name):
            splits[1].append((info, truth.get(val[1])))
    unknown = next((info.filename for split in splits for info, label in split if label is None), None)
    if unknown:
        raise UserError(f"{path}, member {unknown}: its class is not in wnids.txt or val_annotations.txt")
    return Source(wnids, (64, 64, 3), len(splits[0]) + len(splits[1]), parts(archive, path, splits))


def text(archive, path, name):
    """Return a text file of the archive."""
    with refusing(path, ROOT + name):
        return archive.read(ROOT + name).decode()


def parts(archive, path, splits):
    """Yield the decoded images of both splits, PART at a time."""

    def decode(member):
        name, jpeg = member
        image = decode_rgb(jpeg, path, name)
        if image.shape != (64, 64, 3):
            raise UserError(f"{path}, member {name} has {image.shape[0]}x{image.shape[1]} pixels: expected 64x64")
        return image

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes outside of Python's lock
        for split, members in enumerate(splits):
            for i in range(0, len(members), PART):
                infos, labels = zip(*members[i : i + PART])
                names = [os.path.basename(info.filename) for info in infos]
                jpegs = []
                for info in infos:
                    with refusing(path, info.filename):
                        jpegs.append((info.filename, archive.read(info)))
                yield split, np.stack(list(pool.map(decode, jpegs))), labels, names
