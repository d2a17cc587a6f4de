"""The readers against tiny archives in the official formats, element by element; damaged archives; own datasets."""

import io
import os
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor

import archives
import h5py
import numpy as np
import pytest
from PIL import Image
from scripts import REPO, refused

import datasets
import download
from datasets import imagenet

CIFAR, ZIP, DEVKIT = "cifar-10-python.tar.gz", "tiny-imagenet-200.zip", "ILSVRC2012_devkit_t12.tar.gz"


@pytest.mark.parametrize("name", ["MNIST", "Fashion", "SVHN", "CIFAR10"])
def test_images_and_labels_are_those_of_the_archive(name, tmp_path):
    splits, class_names, found = archives.pack(name, tmp_path, per_class=3)
    for split, dataset in zip(("train", "test"), found):
        images, labels = splits[split]
        np.testing.assert_array_equal(dataset.images(), images)
        np.testing.assert_array_equal(dataset.labels, labels)
        assert dataset.class_names == class_names and dataset.num_classes == 10 and not dataset.encoded
        assert dataset.image_shape == images.shape[1:] and dataset.nbytes == images.nbytes and dataset.dtype == np.uint8
        assert dataset.labels.dtype == np.int32
    ids = (tmp_path / "data" / name.lower() / "id.txt").read_text().split()
    assert ids == found[0].ids + found[1].ids and len(set(ids)) == len(ids)


def test_tinyimagenet_maps_val_labels_by_file_name(tmp_path):
    splits, wnids, found = archives.pack("TinyImageNet", tmp_path, per_class=5)
    assert found[0].class_names == wnids == list(archives.WNIDS)  # the order of wnids.txt, which is not sorted
    for split, dataset in zip(("train", "test"), found):
        images, labels = splits[split]
        np.testing.assert_array_equal(dataset.labels, labels)
        assert dataset.image_shape == (64, 64, 3)
        rest = slice(1, None) if split == "train" else slice(None)  # train image 0 is gray
        assert np.abs(dataset.images()[rest].astype(int) - images[rest]).max() <= 6  # JPEG, quality 95
    assert found[1].ids[:3] == ["val_0.JPEG", "val_1.JPEG", "val_2.JPEG"]
    gray = found[0].images()[0]
    assert (gray == gray[..., :1]).all()


def test_imagenet_index_is_the_rank_of_the_wnid(tmp_path, monkeypatch):
    monkeypatch.setattr(imagenet, "PART", 5)  # images, of 12
    splits, class_names, (train, test) = archives.pack("ImageNet", tmp_path, per_class=3)
    assert train.class_names == class_names == [f"name of {wnid}" for wnid in sorted(archives.WNIDS)]
    assert train.encoded and train.image_shape == (None, None, 3)
    np.testing.assert_array_equal(train.labels, splits["train"][1])
    np.testing.assert_array_equal(test.labels, splits["test"][1])
    assert test.read(np.arange(len(test))) == splits["test"][0]
    assert test.read([3, 0, 11, 0, 2]) == [splits["test"][0][i] for i in (3, 0, 11, 0, 2)]
    jpegs = train.read(np.arange(len(train)))
    assert jpegs[3:] == splits["train"][0][3:] and jpegs[1] == splits["train"][0][1]  # RGB and gray as they are
    for i in (0, 2):  # CMYK and PNG are JPEG in RGB now
        image = Image.open(io.BytesIO(jpegs[i]))
        original = Image.open(io.BytesIO(splits["train"][0][i])).convert("RGB")
        assert image.format == "JPEG" and image.mode == "RGB"
        assert np.abs(np.asarray(image, int) - np.asarray(original, int)).max() <= 8
    with pytest.raises(TypeError, match="read"):
        train.images()


def test_digits_are_those_of_scikit_learn(digits):
    from sklearn.datasets import load_digits

    original = load_digits()
    assert [len(split) for split in digits] == [1437, 360]
    for split in digits:
        rows = [int(id.split("_")[1]) for id in split.ids]
        np.testing.assert_array_equal(split.images()[..., 0], np.floor(original.images[rows] * 255 / 16 + 0.5))
        np.testing.assert_array_equal(split.labels, original.target[rows])
    assert next(datasets.digits.read().parts)[3] == digits[0].ids  # the same split every time


def test_how_a_dataset_is_trained_by_default():
    """A flipped digit is another sign; of a user's own images nobody knows."""
    modules = {name: datasets.module_of(name) for name in (*datasets.NAMES, "Mine")}
    assert [module.EPOCHS for module in modules.values()] == [5, 10, 10, 30, 30, 100, 20, 30]
    assert [name for name in modules if modules[name].FLIPPED] == ["Fashion", "CIFAR10", "TinyImageNet", "ImageNet"]
    unasked = ["MNIST", "Fashion", "SVHN", "CIFAR10", "Digits"]  # are fetched and packed when trainer.py needs them
    assert [name for name in modules if modules[name].FETCHED_ON_FIRST_USE] == unasked


def test_read_takes_any_order_with_repeats_from_many_threads(tmp_path):
    splits, _, (train, _) = archives.pack("CIFAR10", tmp_path, per_class=2)
    batches = [[7, 3, 3, 99, 0, 7], [4, 5, 6], [], *np.random.default_rng(0).integers(0, len(train), (120, 16))]
    for _ in range(2):
        with ThreadPoolExecutor(6) as pool:
            for positions, images in zip(batches, pool.map(train.read, batches), strict=True):
                np.testing.assert_array_equal(images, splits["train"][0][np.asarray(positions, int)])
        train.images()  # and once more from memory
    with pytest.raises(IndexError):
        train.read([100])


@pytest.mark.parametrize("name", ["MNIST", "ImageNet"])
def test_get_data_is_that_of_the_original_repo(name, tmp_path):
    _, _, (train, _) = archives.pack(name, tmp_path)
    image, label = train.get_data(train.ids[5])
    (stored,) = train.read([5])
    pixels = np.asarray(Image.open(io.BytesIO(stored)).convert("RGB")) if train.encoded else stored
    np.testing.assert_array_equal(image, pixels / np.float32(255))
    assert image.dtype == label.dtype == np.float32
    assert label.tolist() == np.eye(train.num_classes)[train.labels[5]].tolist()
    with refused("'none'"):
        train.get_data("none")


PEAK = """
import os, sys, datasets, download
import numpy as np
from PIL import Image

def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024

def read(name):
    return [split.images() for split in datasets.create_default_splits(name, folder)]

folder, before = sys.argv[1], peak()
for i in range(33):
    os.makedirs(f"{folder}/images/{i % 2}", exist_ok=True)
    Image.new("RGB", (1000, 1000), (i, 0, 0)).save(f"{folder}/images/{i % 2}/{i}.bmp")
download.prepare_folder("Packed", f"{folder}/images", data_dir=folder)
print(peak() - before)
datasets.own.MANY_IDS = 33
for name in ("Packed", "Mine", "Mine"):
    read(name)
    print(peak() - before)
"""


def test_images_are_in_memory_once(tmp_path):
    """Packing 100 MB of images takes less than their size, and opening them, or a copy, 1.3 times that at most."""
    archives.make_own(tmp_path / "Mine", num=33, shape=(1000, 1000, 3))
    printed = subprocess.check_output([sys.executable, "-c", PEAK, tmp_path], cwd=REPO, text=True)
    packing, packed, own, copy = [int(line) for line in printed.splitlines() if line.isdecimal()]
    assert packing < 0.8 * 99e6 and 99e6 < packed <= own <= copy < 1.3 * 99e6


def test_images_in_memory_can_be_shared_with_tensorflow(tmp_path):
    """They begin at a multiple of 64 bytes."""
    archives.make_own(tmp_path / "Mine", shape=(5, 5, 1), num=23)
    download.prepare("Digits", tmp_path)
    for name, held_out in (("Mine", None), ("Digits", None), ("Digits", 50)):
        for split in datasets.create_default_splits(name, tmp_path, held_out):
            array = split.images()
            assert array.ctypes.data % 64 == 0 and array.flags.c_contiguous and array.flags.writeable


def replace(file, name, value):
    """Replace an array of an HDF5 file, by nothing if the value is None."""
    del file[name]
    if isinstance(value, h5py.VirtualLayout):
        file.create_virtual_dataset(name, value)
    elif value is not None:
        file[name] = value


@pytest.mark.parametrize(
    "name, value, said", [("image", None, "'image'"), ("label", h5py.VirtualLayout((1797,), int), "another file")]
)
def test_a_packed_file_that_was_changed(tmp_path, name, value, said):
    download.prepare("Digits", tmp_path)
    path = tmp_path / "digits" / "data.hdf5"
    with h5py.File(path, "r+") as file:
        replace(file, name, value)
    assert datasets.is_prepared("Digits", tmp_path)
    with refused(said, path):
        datasets.create_default_splits("Digits", tmp_path)


@pytest.mark.parametrize("is_cut", [True, False])
def test_a_packed_file_without_the_mark_of_a_complete_one_is_packed_anew(tmp_path, is_cut):
    download.prepare("Digits", tmp_path)
    path = tmp_path / "digits" / "data.hdf5"
    if is_cut:
        os.truncate(path, path.stat().st_size // 2)
    else:
        with h5py.File(path, "r+") as file:
            file.attrs["packed"] = 2
    assert not datasets.is_prepared("Digits", tmp_path)
    with refused("download.py --dataset Digits"):
        datasets.create_default_splits("Digits", tmp_path)
    download.prepare("Digits", tmp_path)
    assert len(datasets.create_default_splits("Digits", tmp_path)[0]) == 1437


ARCHIVES = [(name, file) for name in datasets.NAMES for file in datasets.module_of(name).FILES]


@pytest.mark.parametrize("name, file", ARCHIVES)
def test_archives_that_are_cut_short(tmp_path, name, file):
    archives.make(name, tmp_path)
    os.truncate(tmp_path / file, (tmp_path / file).stat().st_size // 3)
    with refused(file, "replace"):
        download.prepare(name, tmp_path, tmp_path, checksum=False)


MKDIR = b"cos\nmkdir\n(S'made by a pickle'\ntR."  # a pickle that calls os.mkdir


@pytest.mark.parametrize("data, said", [(MKDIR, "mkdir"), (None, "data_batch_3")])
def test_batches_of_cifar_that_are_none(tmp_path, monkeypatch, data, said):
    """A pickle that calls a function is refused before it is called."""
    monkeypatch.chdir(tmp_path)
    members, _ = archives.cifar10_members(1, np.random.default_rng(0))
    members["cifar-10-batches-py/data_batch_3"] = data
    archives.tar_gz(tmp_path / CIFAR, {name: member for name, member in members.items() if member is not None})
    with refused(said, "CIFAR10"):
        download.prepare("CIFAR10", tmp_path, tmp_path, checksum=False)
    assert sorted(os.listdir(tmp_path)) == [CIFAR, "cifar10"] and os.listdir("cifar10") == [".lock"]


def add_image(path):
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("tiny-imagenet-200/train/n00500004/images/x.JPEG", b"no image")


WNIDS = sorted(archives.WNIDS)


@pytest.mark.parametrize(
    "name, change, file, arguments, said",
    [
        ("MNIST", archives.idx, "t10k-labels-idx1-ubyte.gz", [np.zeros(19)], ["40 images, 39 labels"]),
        ("TinyImageNet", add_image, ZIP, [], [ZIP, "x.JPEG"]),
        ("ImageNet", archives.devkit, DEVKIT, [WNIDS, [1, 2, 3, 4], [1] * 9], ["img_val.tar", "8 images", "9 labels"]),
        ("ImageNet", archives.devkit, DEVKIT, [WNIDS[:3], [1, 2, 3], [1] * 8], ["img_train.tar", "n03000001"]),
    ],
)
def test_archives_whose_parts_do_not_fit(tmp_path, name, change, file, arguments, said):
    archives.make(name, tmp_path)
    change(tmp_path / file, *arguments)
    with refused(name, *said):
        download.prepare(name, tmp_path, tmp_path, checksum=False)


@pytest.mark.parametrize("file", ["data.hy", "data.hdf5"])
@pytest.mark.parametrize(
    "shape, dtype",
    [((8, 6, 3), np.uint8), ((8, 6), np.uint8), ((5, 5, 1), np.float32), ((4, 4, 2), ">f8"), ((4, 4, 3), np.int64)],
)
def test_own_data(tmp_path, file, shape, dtype):
    ids, images, labels = archives.make_own(tmp_path / "Mine", shape=shape, dtype=dtype, file=file, classes=3)
    splits = datasets.create_default_splits("Mine", tmp_path)
    assert [len(split) for split in splits] == [16, 4] and set(splits[0].ids + splits[1].ids) == set(ids)
    for split in splits:
        rows = [ids.index(id) for id in split.ids]
        expected = images[rows] if len(shape) == 3 else images[rows][..., None]
        np.testing.assert_array_equal(split.images(), expected)
        np.testing.assert_array_equal(split.read([2, 0]), expected[[2, 0]])
        assert split.images().dtype == split.dtype == (np.float32 if images.dtype.kind == "f" else np.uint8)
        np.testing.assert_array_equal(split.labels, labels[rows])
        assert split.num_classes == 3 and split.image_shape == expected.shape[1:]
    assert splits[1].ids == [ids[i] for i in (6, 18, 2, 13)]  # in every run and every version


@pytest.mark.parametrize("num, classes, validation", [(5, 5, None), (6, 6, 3), (20, 2, None)])
def test_classes_that_are_tested_but_never_trained_are_named_in_a_line(tmp_path, capsys, num, classes, validation):
    archives.make_own(tmp_path / "Mine", num=num, classes=classes)
    train, test = datasets.create_default_splits("Mine", tmp_path, validation=validation)
    unseen = [str(label) for label in sorted(set(test.labels) - set(train.labels))]
    assert len(unseen) == {5: 1, 6: 3, 20: 0}[num]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == bool(unseen)
    assert all(f"{len(unseen)} of {classes} classes" in line and f": {' '.join(unseen)};" in line for line in lines)


def test_what_is_held_out_is_the_same_in_every_version(data_dir):
    _, held = datasets.create_default_splits("Digits", data_dir, validation=12)
    numbers = "1738 0122 0564 0372 1662 0356 1478 0846 0758 1046 0499 0680".split()
    assert held.ids == [f"digit_{number}" for number in numbers]


def test_own_split_files_fix_the_split(tmp_path):
    ids, images, _ = archives.make_own(tmp_path / "Mine")
    (tmp_path / "Mine" / "id_train.txt").write_text("\n".join(ids[7:1:-1]))
    (tmp_path / "Mine" / "id_test.txt").write_text("\n".join(ids[10:13]) + "\n\n")
    train, test = datasets.create_default_splits("Mine", tmp_path)
    assert train.ids == ids[7:1:-1] and test.ids == ids[10:13]
    np.testing.assert_array_equal(train.images(), images[7:1:-1])


VIRTUAL = h5py.VirtualLayout((8, 8, 3), np.uint8)
VIRTUAL[:] = h5py.VirtualSource("other.hdf5", "image", (8, 8, 3))
NAN = np.zeros((8, 8, 3), np.float32)
NAN[1, 2, 0] = np.nan
MISTAKES = [  # ({file, or array of the example 0 or of all examples *: what takes its place}, words of the error)
    ({"data.hdf5": ""}, "both data.hy and data.hdf5"),
    ({"data.hy": "image,label"}, "data.hy"),
    ({"id.txt": None}, "id.txt"),
    ({"id.txt": ""}, "id.txt is empty"),
    ({"id.txt": "\udcff"}, "save it as UTF-8"),
    ({"id.txt": "0 1 2 3"}, "4 ids"),
    ({"id.txt": "0 1 2 3 4 nobody"}, "'nobody'"),
    ({"id.txt": "0 1 2 3 4 1"}, "'1'"),
    ({"id.txt": "0 1 2 3 4 a/b"}, "'a/b'"),
    ({"id_train.txt": "0 1"}, "without id_test.txt"),
    ({"id_train.txt": "0 1", "id_test.txt": "1 2"}, "'1'"),
    ({"id_train.txt": "0 1", "id_test.txt": "x9"}, "'x9'"),
    ({"0/image": None}, "/image"),
    ({"0/label": [1.0, 1.0]}, "[1.0, 1.0]"),
    ({"0/label": [0, 1, 0]}, "(3,)"),
    ({"*/label": 1}, "one-hot"),
    ({"*/label": [1.0]}, "2 classes"),
    ({"*/label": [0, 1]}, "class 1"),
    ({"0/image": np.zeros((8, 9, 3), np.uint8)}, "(8, 9, 3)"),
    ({"0/image": np.zeros((1, 8, 8, 3))}, "(1, 8, 8, 3)"),
    ({"0/image": np.zeros((3, 8, 8), np.uint8)}, "np.transpose(image, (1, 2, 0))"),
    ({"0/image": np.zeros((8, 8, 3), bool)}, "bool"),
    ({"0/image": np.full((8, 8, 3), 300)}, "300"),  # 16 bits
    ({"*/image": NAN}, "nan at [1, 2, 0]"),
    ({"0/image": VIRTUAL}, "another file"),
    ({"0": h5py.ExternalLink("x.hdf5", "/")}, "link"),
]


@pytest.mark.parametrize("changes, said", MISTAKES)
def test_mistakes_in_own_data(tmp_path, changes, said):
    ids, _, _ = archives.make_own(tmp_path / "Mine")
    for name, value in changes.items():
        path = tmp_path / "Mine" / name
        if not path.suffix:
            with h5py.File(tmp_path / "Mine" / "data.hy", "r+") as file:
                for array in [name.replace("*", id) for id in (ids if "*" in name else ids[:1])]:
                    replace(file, array, value)
        elif value is None:
            path.unlink()
        else:
            path.write_text("\n".join(value.split()), errors="surrogateescape")
    with refused(said, tmp_path / "Mine"):
        datasets.create_default_splits("Mine", tmp_path)


@pytest.mark.parametrize("name, said", [("cifar10", "CIFAR10"), ("..", "'..'"), ("Nowhere", "nor data.hdf5")])
def test_names(tmp_path, name, said):
    with refused(said):
        datasets.create_default_splits(name, tmp_path)
