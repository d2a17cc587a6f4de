"""Tiny archives in the exact official formats, made from random images, and what a reader must find in them.

splits, class_names = archives.make("CIFAR10", folder)
splits["train"]        (images uint8 [N, h, w, c] or a list of JPEG files, labels [N]), in the archive's order
"""

import functools
import gzip
import io
import os
import pickle
import struct
import tarfile
import zipfile

import h5py
import numpy as np
from PIL import Image
from scipy.io import savemat

import datasets
import download

FASHION = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot".split(",")
CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
WNIDS = ("n03000001", "n01000002", "n02000003", "n00500004")  # not sorted: order matters


def pack(name, folder, **kwargs):
    """Make and pack archives; return (their splits, class names, train and test)."""
    splits, class_names = make(name, folder / "archives", **kwargs)
    download.prepare(name, folder / "data", folder / "archives", checksum=False)
    return splits, class_names, datasets.create_default_splits(name, folder / "data")


def make(name, folder, per_class=2):
    """Write the archives of dataset `name` into `folder`; return ({"train": ..., "test": ...}, class names)."""
    os.makedirs(folder, exist_ok=True)
    return MAKERS[name](str(folder), per_class, np.random.default_rng(0))


def pictures(rng, classes, per_class, shape):
    """Return random uint8 images [N, *shape], brighter the higher their class, and their shuffled labels."""
    labels = rng.permutation(np.repeat(np.arange(classes), per_class))
    brightness = 120 * labels.reshape(-1, *[1] * len(shape)) // (classes - 1)
    return (rng.integers(0, 120, (len(labels), *shape)) + brightness).astype(np.uint8), labels


def idx(path, array):
    """Write an IDX file: big-endian magic 0x08 (uint8) and rank, the sizes, the bytes."""
    header = struct.pack(f">{1 + array.ndim}i", 2048 + array.ndim, *array.shape)
    with gzip.open(path, "wb") as file:
        file.write(header + array.astype(np.uint8).tobytes())


def make_mnist(folder, per_class, rng, class_names=tuple("0123456789")):
    splits = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = pictures(rng, 10, per_class, (28, 28))
        idx(os.path.join(folder, f"{prefix}-images-idx3-ubyte.gz"), images)
        idx(os.path.join(folder, f"{prefix}-labels-idx1-ubyte.gz"), labels)
        splits[split] = images[..., None], labels
    return splits, list(class_names)


def make_svhn(folder, per_class, rng):
    splits = {}
    for split in ("train", "test"):
        images, labels = pictures(rng, 10, per_class, (32, 32, 3))
        stored = {"X": images.transpose(1, 2, 3, 0), "y": np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]}
        savemat(os.path.join(folder, f"{split}_32x32.mat"), stored, do_compression=True)
        splits[split] = images, labels
    return splits, list("0123456789")


class Python2Pickler(pickle._Pickler):
    """Pickles bytes as Python 2 did its strings."""

    def save_bytes(self, data):
        self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)

    dispatch = {**pickle._Pickler.dispatch, bytes: save_bytes}


def python2_pickle(value):
    """Return the pickle of a value as Python 2 and the NumPy of its time wrote it."""
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(value)
    return file.getvalue().replace(b"numpy._core", b"numpy.core")


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def cifar10_members(per_class, rng):
    """Return ({member: bytes} of the archive, in the official, unsorted order, splits)."""
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    batches = [pictures(rng, 10, per_class, (32, 32, 3)) for _ in names]
    pickles = {"batches.meta": {b"num_cases_per_batch": 10000, b"label_names": CIFAR10.encode().split()}}
    for name, (images, labels) in zip(names, batches):
        rows = images.transpose(0, 3, 1, 2).reshape(len(images), 3072)
        pickles[name] = {b"batch_label": name.encode(), b"data": rows, b"labels": labels.tolist()}
    members = {name: python2_pickle(value) for name, value in pickles.items()} | {"readme.html": b"<meta>"}
    order = "data_batch_4 readme.html test_batch data_batch_3 batches.meta data_batch_2 data_batch_5 data_batch_1"
    train = tuple(np.concatenate(arrays) for arrays in zip(*batches[:5]))
    members = {"cifar-10-batches-py/" + name: members[name] for name in order.split()}
    return members, {"train": train, "test": batches[5]}


def tar_gz(path, members):
    """Write {name: bytes} as a tar.gz with the folder of the members."""
    with tarfile.open(path, "w:gz") as tar:
        folder = tarfile.TarInfo(os.path.dirname(next(iter(members))))
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in members.items():
            add(tar, name, data)


def make_cifar10(folder, per_class, rng):
    members, splits = cifar10_members(per_class, rng)
    tar_gz(os.path.join(folder, "cifar-10-python.tar.gz"), members)
    return splits, CIFAR10.split()


def picture_file(image, mode="RGB", kind="JPEG"):
    """Return uint8 [h, w, 3] as an image file in `mode`; flat 8x8 blocks survive JPEG nearly unchanged."""
    buffer, quality = io.BytesIO(), {"quality": 95, "subsampling": 0} if (mode, kind) == ("RGB", "JPEG") else {}
    Image.fromarray(image).convert(mode).save(buffer, kind, **quality)
    return buffer.getvalue()


def cmyk_file(values, is_adobe):
    """Return CMYK values, uint8 [h, w, 4] with 0 for no ink, as a JPEG file: inverted with Adobe's marker, as Pillow
    writes them (0xFFEE, of 14 bytes), or neither."""
    buffer = io.BytesIO()
    Image.fromarray(values if is_adobe else 255 - values, "CMYK").save(buffer, "JPEG", quality=100)
    start = buffer.getvalue().index(b"\xff\xee\x00\x0eAdobe")
    return buffer.getvalue() if is_adobe else buffer.getvalue()[:start] + buffer.getvalue()[start + 16 :]


def blocks(rng, classes, per_class, height, width):
    """Return images [N, height, width, 3] of flat 8x8 blocks, and their labels."""
    images, labels = pictures(rng, classes, per_class, (height // 8, width // 8, 3))
    return images.repeat(8, axis=1).repeat(8, axis=2), labels


def make_tinyimagenet(folder, per_class, rng):
    train, train_labels = blocks(rng, len(WNIDS), per_class, 64, 64)
    val, val_labels = blocks(rng, len(WNIDS), per_class, 64, 64)
    root = "tiny-imagenet-200/"
    with zipfile.ZipFile(os.path.join(folder, "tiny-imagenet-200.zip"), "w") as archive:
        archive.writestr(root, "")
        archive.writestr(root + "wnids.txt", "".join(wnid + "\n" for wnid in WNIDS))
        for i, (image, label) in enumerate(zip(train, train_labels)):
            mode = "L" if i == 0 else "RGB"
            archive.writestr(f"{root}train/{WNIDS[label]}/images/{WNIDS[label]}_{i}.JPEG", picture_file(image, mode))
        for i, image in enumerate(val):
            archive.writestr(f"{root}val/images/val_{i}.JPEG", picture_file(image))
        lines = [f"val_{i}.JPEG\t{WNIDS[label]}\t0\t0\t63\t63\n" for i, label in enumerate(val_labels)]
        archive.writestr(root + "val/val_annotations.txt", "".join(lines[i] for i in rng.permutation(len(lines))))
        archive.writestr(root + "test/images/test_0.JPEG", picture_file(val[0]))
    train[0] = np.asarray(Image.fromarray(train[0]).convert("L"))[..., None]
    return {"train": (train, train_labels), "test": (val, val_labels)}, list(WNIDS)


def devkit(path, wnids, ids, truth):
    """Write the devkit: ids is the ILSVRC2012_ID of each WNID, truth that of each val image in name order."""
    rows = sorted((int(id), wnid, f"name of {wnid}", "gloss", 0) for id, wnid in zip(ids, wnids))
    rows.append((len(rows) + 1, "n00000001", "an inner node", "gloss", 3))
    fields = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children")
    synsets = np.array(rows, [(field, "O") for field in fields]).reshape(-1, 1)
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    lines = "".join(f"{id}\n" for id in truth).encode()
    data = "ILSVRC2012_devkit_t12/data/"
    tar_gz(path, {data + "meta.mat": meta.getvalue(), data + "ILSVRC2012_validation_ground_truth.txt": lines})


def make_imagenet(folder, per_class, rng):
    wnids, ids = sorted(WNIDS), rng.permutation(len(WNIDS)) + 1
    train, train_labels = blocks(rng, len(wnids), per_class, 72, 96)
    order = np.argsort(train_labels, kind="stable")
    train, train_labels = train[order], train_labels[order]
    odd = [picture_file(train[0], "CMYK"), picture_file(train[1], "L"), picture_file(train[2], "RGB", "PNG")]
    jpegs = odd + [picture_file(image) for image in train[3:]]
    with tarfile.open(os.path.join(folder, "ILSVRC2012_img_train.tar"), "w") as tar:
        for label, wnid in enumerate(wnids):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as class_tar:
                for i in np.flatnonzero(train_labels == label):
                    add(class_tar, f"{wnid}_{i}.JPEG", jpegs[i])
            add(tar, f"{wnid}.tar", inner.getvalue())
    val, val_labels = blocks(rng, len(wnids), per_class, 64, 80)
    in_tar = rng.permutation(len(val))
    val_jpegs = [picture_file(image) for image in val]
    with tarfile.open(os.path.join(folder, "ILSVRC2012_img_val.tar"), "w") as tar:
        for i in in_tar:
            add(tar, f"ILSVRC2012_val_{i + 1:08d}.JPEG", val_jpegs[i])
    devkit(os.path.join(folder, "ILSVRC2012_devkit_t12.tar.gz"), wnids, ids, ids[val_labels])
    test = [val_jpegs[i] for i in in_tar], val_labels[in_tar]
    return {"train": (jpegs, train_labels), "test": test}, [f"name of {wnid}" for wnid in wnids]


MAKERS = {
    "MNIST": make_mnist,
    "Fashion": functools.partial(make_mnist, class_names=FASHION),
    "SVHN": make_svhn,
    "CIFAR10": make_cifar10,
    "TinyImageNet": make_tinyimagenet,
    "ImageNet": make_imagenet,
}


def make_own(folder, num=20, classes=2, shape=(8, 8, 3), dtype=np.uint8, file="data.hy", scale=1):
    """Write random images of 0 to 255 * scale as an own dataset into `folder`; return (ids, images, labels)."""
    rng = np.random.default_rng(0)
    ids, labels = [str(i) for i in rng.permutation(num)], np.arange(num) % classes
    images = (rng.integers(0, 256, (num, *shape), np.uint8) * scale).astype(dtype)
    write_own(folder, ids, images, np.eye(classes)[labels], file)
    return ids, images, labels


def open_own(folder, images, labels):
    """Write and open a dataset in the original repo's layout, of which the last five images are the test split."""
    ids = [f"example{i}" for i in range(len(images))]
    write_own(folder / "OWN", ids, images, np.eye(max(labels) + 1)[labels])
    for split, found in (("train", ids[:-5]), ("test", ids[-5:])):
        (folder / "OWN" / f"id_{split}.txt").write_text("\n".join(found))
    return datasets.create_default_splits("OWN", folder)


def write_own(folder, ids, images, one_hot, file="data.hy"):
    """Write a dataset in the original repo's layout: a group per id with `image` and one-hot `label`, and id.txt."""
    os.makedirs(folder, exist_ok=True)
    with h5py.File(os.path.join(folder, file), "w") as data:
        for id, image, label in zip(ids, images, one_hot):
            group = data.create_group(id)
            group["image"], group["label"] = image, label
    with open(os.path.join(folder, "id.txt"), "w") as text:
        text.writelines(id + "\n" for id in ids)


def write_photos(folder, numbers):
    """Write numbers[i] images of 12 by 10 pixels, all different, into the class folder i."""
    rng = np.random.default_rng(0)
    for label, number in enumerate(numbers):
        os.makedirs(folder / f"class{label}")
        for i in range(number):
            pixels = rng.integers(0, 256, (12, 10, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"class{label}" / f"{i:03d}.png")
