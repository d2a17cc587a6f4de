"""ImageNet (ILSVRC 2012): 1,281,167 + 50,000 images of 1000 classes (Russakovsky et al., arXiv 1409.0575).

https://image-net.org gives the three files to users who log in and accept its non-commercial research terms, so
download.py cannot fetch them. The images are stored as JPEG files.
"""

import io
import os
import tarfile
from itertools import islice

from scipy.io import loadmat

from command import UserError, reading
from datasets.hdf5 import Source
from datasets.images import as_jpeg

EPOCHS, FLIPPED, FETCHED_ON_FIRST_USE = 100, True, False
DEFAULTS = {  # of arXiv 1803.08494, section 4.1
    "batch_size": 32,
    "max_batch_size": 256,
    "momentum_rate": 0.1,  # at max_batch_size images per update
    "lr_schedule": "step",
    "reported_epochs": 5,  # the result is the median of the tests of the last 5 epochs
}
FILES = {
    "ILSVRC2012_img_train.tar": (147897477120, "1d675b47d978889d74fa0da5fadfb00e"),
    "ILSVRC2012_img_val.tar": (6744924160, "29b22e2961454d5413ddabcf34fc5622"),
    "ILSVRC2012_devkit_t12.tar.gz": (2568634, "fa75699e90414af021442c21a62c3abf"),
}
MIRRORS = ()
DEVKIT = "ILSVRC2012_devkit_t12/data/"
PART = 32  # images, few enough to stay in the processor's cache until they are written


def read(archive_dir):
    """Return the Source of the three archives: JPEG files; the class index is the position of the sorted WNID."""
    wnids, class_names, truth = read_devkit(os.path.join(archive_dir, "ILSVRC2012_devkit_t12.tar.gz"))
    train = train_files(os.path.join(archive_dir, "ILSVRC2012_img_train.tar"), wnids)
    val = val_files(os.path.join(archive_dir, "ILSVRC2012_img_val.tar"), truth)
    return Source(class_names, None, None, parts(train, val))


def read_devkit(path):
    """Return the sorted WNIDs, their names, and the class index of each val image in the order of the file names."""
    with reading(path), tarfile.open(path) as tar:
        meta = io.BytesIO(tar.extractfile(DEVKIT + "meta.mat").read())
        truth = tar.extractfile(DEVKIT + "ILSVRC2012_validation_ground_truth.txt").read()
        wnid_of, name_of = {}, {}
        for row in loadmat(meta, squeeze_me=True)["synsets"]:
            if row["num_children"] == 0:  # the others are inner nodes of the hierarchy, not classes
                wnid_of[int(row["ILSVRC2012_ID"])] = str(row["WNID"])
                name_of[str(row["WNID"])] = str(row["words"])
        wnids = sorted(name_of)
        index = {wnid: i for i, wnid in enumerate(wnids)}
        return wnids, [name_of[wnid] for wnid in wnids], [index[wnid_of[int(line)]] for line in truth.split()]


def train_files(path, wnids):
    """Yield (path, name, JPEG file, label) of the tar that holds one <wnid>.tar per class."""
    found = set()
    with reading(path), tarfile.open(path) as tar:
        for member in tar:
            wnid = member.name.removesuffix(".tar")
            label = wnids.index(wnid)
            found.add(wnid)
            with tarfile.open(fileobj=tar.extractfile(member)) as class_tar:
                for image in class_tar:
                    yield path, image.name, class_tar.extractfile(image).read(), label
    if len(found) != len(wnids):
        print(f"warning: {path} has {len(found)} of the devkit's {len(wnids)} classes")


def val_files(path, truth):
    """Yield (path, name, JPEG file, label) of the flat tar: name ILSVRC2012_val_<i>.JPEG has the label truth[i - 1]."""
    found = 0
    with reading(path), tarfile.open(path) as tar:
        for image in tar:
            number = int(image.name.removesuffix(".JPEG").rsplit("_", 1)[1])
            found += 1
            yield path, image.name, tar.extractfile(image).read(), truth[number - 1]
    if found != len(truth):
        raise UserError(f"{path} has {found} images, but the devkit has {len(truth)} labels: use files of one release")


def parts(*splits):
    """Yield the JPEG files of the splits, PART at a time."""
    for split, files in enumerate(splits):
        while part := list(islice(files, PART)):
            jpegs = [as_jpeg(data, f"{path}, member {name}") for path, name, data, _ in part]
            yield split, jpegs, [label for *_, label in part], [name for _, name, *_ in part]
