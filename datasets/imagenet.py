"""ImageNet (ILSVRC 2012): 1,281,167 + 50,000 images of 1000 classes (Russakovsky et al., arXiv 1409.0575).

https://image-net.org gives the three files to those who log in and accept its non-commercial research terms, so no tool
fetches them unattended. The images stay JPEG files in the store.
"""

import io
import os
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from datasets.archives import (
    encode_jpeg,
    is_plain_jpeg,
    load_mat,
    open_image,
    refusing,
    tar_files,
    tar_gz_files,
    to_rgb,
)
from command import UserError
from datasets.hdf5 import Source

EPOCHS, MIRRORED, FETCHED_ON_FIRST_USE = 100, True, False
RECIPE = {  # of arXiv 1803.08494, section 4.1
    "batch_size": 32,
    "max_batch_size": 256,
    "momentum_rate": 0.1,  # at max_batch_size images per update
    "lr_schedule": "step",
    "reported_epochs": 5,  # the result is the median over the tests of so many last epochs
}
FILES = {
    "ILSVRC2012_img_train.tar": (147897477120, "md5", "1d675b47d978889d74fa0da5fadfb00e"),
    "ILSVRC2012_img_val.tar": (6744924160, "md5", "29b22e2961454d5413ddabcf34fc5622"),
    "ILSVRC2012_devkit_t12.tar.gz": (2568634, "md5", "fa75699e90414af021442c21a62c3abf"),
}
MIRRORS = ()
META, TRUTH = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"
SHAPES = {
    "synsets": lambda shape, kind: kind == "struct" and 0 < max(shape, default=0) < 100_000 and sum(shape) - 1 in shape
}
MAX_DEVKIT, MAX_JPEG, MAX_CLASS = 1 << 28, 1 << 26, 1 << 31  # bytes: the devkit, one image, the tar of a class
PART = 32  # images: what is read stays in the cache of the processor until it is written


def read_original(archive_dir):
    """read() for archives with the hashes of FILES: their photographs are known to decode."""
    return read(archive_dir, is_original=True)


def read(archive_dir, is_original=False):
    """Return the Source of the three archives: JPEG files; the class index is the rank of the WNID in sorted order."""
    wnids, class_names, truth = read_devkit(os.path.join(archive_dir, "ILSVRC2012_devkit_t12.tar.gz"))
    train = train_files(
        os.path.join(archive_dir, "ILSVRC2012_img_train.tar"), {wnid: i for i, wnid in enumerate(wnids)}
    )
    val = val_files(os.path.join(archive_dir, "ILSVRC2012_img_val.tar"), truth)
    return Source(class_names, None, None, parts(is_original, train, val))


def read_devkit(path):
    """Return the sorted WNIDs, their names and the class index of each val image in the order of the file names."""
    files = {}
    for member, stream in tar_gz_files(path, MAX_DEVKIT, MAX_DEVKIT):
        name = member.removeprefix("./").removeprefix("ILSVRC2012_devkit_t12/")
        if name in (META, TRUTH):
            with refusing(path, member):
                files[name] = stream.read()
    for name in (META, TRUTH):
        if name not in files:
            raise UserError(f"{path} has no ILSVRC2012_devkit_t12/{name}")
    synsets = load_mat(io.BytesIO(files[META]), f"{path}, member {META}", SHAPES, MAX_DEVKIT)["synsets"].reshape(-1)
    with refusing(path, META):
        wnid_of, words_of = {}, {}
        for row in synsets:
            number, wnid, words, children = (
                row[field].reshape(-1)[0] for field in ("ILSVRC2012_ID", "WNID", "words", "num_children")
            )
            if int(children) == 0:  # the others are inner nodes, no classes
                wnid_of[int(number)], words_of[str(wnid)] = str(wnid), str(words)
        wnids = sorted(words_of)
        if len(wnid_of) != len(wnids):
            raise UserError(f"{path}, member {META} gives one WNID to two ILSVRC2012_IDs")
        index = {wnid: i for i, wnid in enumerate(wnids)}
        numbers = [int(line) for line in files[TRUTH].split()]
    strange = next((number for number in numbers if number not in wnid_of), None)
    if strange is not None:
        raise UserError(f"{path}, member {TRUTH}: {strange} is the ILSVRC2012_ID of no class")
    return wnids, [words_of[wnid] for wnid in wnids], [index[wnid_of[number]] for number in numbers]


def train_files(path, index):
    """Yield (path, name, JPEG file, label) of the tar of tars, one <wnid>.tar a class."""
    seen = set()
    with open(path, "rb") as file:
        for member, inner in tar_files(file, path, MAX_CLASS):
            wnid = member.removesuffix(".tar")
            if wnid not in index or wnid in seen:
                raise UserError(f"{path}, member {member}: a class that the devkit does not name, or twice")
            seen.add(wnid)
            for name, stream in tar_files(inner, f"{path}, member {member}", MAX_JPEG):
                with refusing(path, name):
                    jpeg = stream.read()
                yield path, os.path.basename(name), jpeg, index[wnid]
    if len(seen) != len(index):
        print(f"warning: {path} has {len(seen)} of the devkit's {len(index)} classes", flush=True)


def val_files(path, truth):
    """Yield (path, name, JPEG file, label) of the flat tar: name ILSVRC2012_val_<i>.JPEG has the label truth[i - 1]."""
    seen = set()
    with open(path, "rb") as file:
        for name, stream in tar_files(file, path, MAX_JPEG):
            with refusing(path, name):
                jpeg = stream.read()
                number = int(os.path.splitext(name)[0].rsplit("_", 1)[1])
            if not 1 <= number <= len(truth) or number in seen:
                raise UserError(f"{path}, member {name}: the devkit has labels for 1 to {len(truth)}, each once")
            seen.add(number)
            yield path, os.path.basename(name), jpeg, truth[number - 1]
    if len(seen) != len(truth):
        raise UserError(f"{path} has {len(seen)} images, the devkit has {len(truth)} labels")


def parts(is_original, *splits):
    """Yield the JPEG files of the splits, PART at a time; those that are not original are decoded first."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        check = map if is_original else pool.map  # a header is read sooner than it is handed to a thread
        for split, files in enumerate(splits):
            while part := list(islice(files, PART)):
                jpegs = list(check(lambda file: as_rgb_jpeg(file[2], file[0], file[1], is_original), part))
                yield split, jpegs, [label for *_, label in part], [name for _, name, *_ in part]


def as_rgb_jpeg(data, path, name, is_original):
    """Return `data` itself if it is a plain JPEG file, which decodes or is original; another as an upright RGB JPEG."""
    image = open_image(data, path, name)
    with refusing(path, name):
        if not is_plain_jpeg(image):
            return encode_jpeg(to_rgb(image))
        if not is_original:
            image.draft(image.mode, (1, 1))  # decode at 1/8 of the size: every byte is parsed
            image.load()
        return data
