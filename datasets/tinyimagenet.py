"""Tiny ImageNet: 100,000 + 10,000 images of 64x64 in 200 classes (Stanford CS231n, http://cs231n.stanford.edu/)."""

import io
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from command import reading
from datasets.hdf5 import Source
from datasets.images import load_image

EPOCHS, FLIPPED, FETCHED_ON_FIRST_USE = 30, True, False
FILES = {"tiny-imagenet-200.zip": (248100043, "6198c8ae015e2b3e007c7841da39ec069199b9aa3bfa943a462022fe5e43c821")}
MIRRORS = ("http://cs231n.stanford.edu/",)
ROOT = "tiny-imagenet-200/"
PART = 1024  # images


def read(archive_dir):
    """Return the Source of tiny-imagenet-200.zip; the class index is the line of wnids.txt.

    The test split is val, labeled by val_annotations.txt; the archive's own `test` has no labels and is skipped.
    """
    path = os.path.join(archive_dir, "tiny-imagenet-200.zip")
    with reading(path):
        archive = zipfile.ZipFile(path)
        wnids = archive.read(ROOT + "wnids.txt").decode().split()
        index = {wnid: i for i, wnid in enumerate(wnids)}
        rows = archive.read(ROOT + "val/val_annotations.txt").decode().splitlines()
        wnid_of = dict(row.split("\t")[:2] for row in rows)  # val image: wnid
        splits = ([], [])  # (member, label)
        for member in archive.namelist():
            folders, name = member.removeprefix(ROOT).split("/")[:-1], os.path.basename(member)
            if folders[:1] == ["train"] and name.endswith(".JPEG"):
                splits[0].append((member, index[folders[1]]))
            elif folders[:1] == ["val"] and name.endswith(".JPEG"):
                splits[1].append((member, index[wnid_of[name]]))
    return Source(wnids, (64, 64, 3), len(splits[0]) + len(splits[1]), parts(archive, path, splits))


def parts(archive, path, splits):
    """Yield the decoded images of both splits, PART at a time."""

    def decode(member, data):
        return load_image(io.BytesIO(data), f"{path}, member {member}")

    with reading(path), ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow releases Python's lock while decoding
        for split, members in enumerate(splits):
            for i in range(0, len(members), PART):
                names, labels = zip(*members[i : i + PART])
                images = list(pool.map(decode, names, map(archive.read, names)))
                yield split, np.stack(images), labels, [os.path.basename(name) for name in names]
