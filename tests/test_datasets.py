"""The readers against tiny archives in the official formats, element by element; hostile archives; own datasets."""

import gzip
import hashlib
import io
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
import threading
import tracemalloc
import zipfile
import zlib

import h5py
import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

import archives
import datasets
import download
from datasets import cifar10, digits, hdf5, imagenet, mnist, svhn, tinyimagenet
from command import UserError, one_line

CIFAR, ZIP = "cifar-10-python.tar.gz", "tiny-imagenet-200.zip"


def packed(name, tmp_path, **kwargs):
    """Make and pack tiny archives; return (expected splits, expected class names, train and test)."""
    splits, class_names = archives.make(name, tmp_path / "archives", **kwargs)
    download.prepare(name, tmp_path / "data", tmp_path / "archives", checksum=False)
    return splits, class_names, datasets.create_default_splits(name, tmp_path / "data")


# --- what the readers find --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["MNIST", "Fashion", "SVHN", "CIFAR10"])
def test_images_and_labels_are_those_of_the_archive(name, tmp_path):
    splits, class_names, found = packed(name, tmp_path, per_class=3)
    for split, dataset in zip(("train", "test"), found):
        images, labels = splits[split]
        np.testing.assert_array_equal(dataset.images(), images)
        np.testing.assert_array_equal(dataset.labels, labels)
        assert dataset.class_names == class_names and dataset.num_classes == 10 and not dataset.encoded
        assert dataset.image_shape == images.shape[1:] and dataset.nbytes == images.nbytes and dataset.dtype == np.uint8
        assert dataset.is_train == (split == "train") and dataset.labels.dtype == np.int32
    ids = (tmp_path / "data" / name.lower() / "id.txt").read_text().split()
    assert ids == found[0].ids + found[1].ids and len(set(ids)) == len(ids)


def test_svhn_keeps_all_of_train_and_calls_ten_zero(tmp_path):
    _, _, (train, test) = packed("SVHN", tmp_path, per_class=3)
    assert len(train) == len(test) == 30 and sorted(set(train.labels.tolist())) == list(range(10))


def test_cifar_pixels_are_channel_row_column_in_the_archive(tmp_path):
    members, _ = archives.cifar10_members(1, np.random.default_rng(0))
    image = np.arange(3072, dtype=np.int64).reshape(1, 3072) % 251
    members["cifar-10-batches-py/test_batch"] = archives.py2_dict(
        data=archives.py2_array(image.astype(np.uint8)), labels=archives.py2_list([b"K\x07"])
    )
    archives.tar_gz(tmp_path / CIFAR, members)
    *_, (split, images, labels, _) = cifar10.read(tmp_path).parts
    assert split == 1 and images.shape == (1, 32, 32, 3) and labels.tolist() == [7]
    assert images[0, 5, 9].tolist() == [(channel * 1024 + 5 * 32 + 9) % 251 for channel in range(3)]


def test_tinyimagenet_maps_val_labels_by_file_name(tmp_path):
    splits, wnids, found = packed("TinyImageNet", tmp_path, per_class=5)
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


def test_imagenet_index_is_the_rank_of_the_wnid(tmp_path):
    splits, class_names, (train, test) = packed("ImageNet", tmp_path, per_class=3)
    assert train.class_names == class_names == [f"name of {wnid}" for wnid in sorted(archives.WNIDS)]
    assert train.encoded and train.image_shape == (None, None, 3)
    np.testing.assert_array_equal(train.labels, splits["train"][1])
    np.testing.assert_array_equal(test.labels, splits["test"][1])
    assert test.read(np.arange(len(test))) == splits["test"][0]
    jpegs = train.read(np.arange(len(train)))
    assert jpegs[3:] == splits["train"][0][3:] and jpegs[1] == splits["train"][0][1]  # RGB and gray as they are
    for i in (0, 2):  # CMYK and PNG are JPEG in RGB now
        image = Image.open(io.BytesIO(jpegs[i]))
        original = Image.open(io.BytesIO(splits["train"][0][i])).convert("RGB")
        assert image.format == "JPEG" and image.mode == "RGB"
        assert np.abs(np.asarray(image, int) - np.asarray(original, int)).max() <= 8
    assert train.nbytes == sum(map(len, jpegs)) and train.get_data(train.ids[4])[0].shape == (72, 96, 3)
    with pytest.raises(TypeError, match="read"):
        train.images()


@pytest.mark.parametrize("last", [1, hdf5.JPEG_CHUNK])
def test_encoded_images_of_any_size_are_stored_in_a_row(tmp_path, last):
    sizes = [100, 3 * hdf5.JPEG_CHUNK, hdf5.JPEG_CHUNK - 100, 700_000, 700_000, 1, 1_800_000]
    sizes.append(-sum(sizes) % hdf5.JPEG_CHUNK + last)  # that of the last chunk
    images = [np.random.default_rng(i).bytes(size) for i, size in enumerate(sizes)]
    parts = [(0, images[:3], [0, 1, 0], None), (0, images[3:4], [1], None), (1, images[4:], [0, 1, 0, 1], None)]
    hdf5.write(tmp_path, hdf5.Source(["a", "b"], None, None, iter(parts)))
    train, test = hdf5.open_packed(tmp_path, "MINE")
    assert train.read(range(4)) == images[:4] and test.read([3, 0, 1, 2]) == [images[i] for i in (7, 4, 5, 6)]
    with h5py.File(tmp_path / "data.hdf5", locking=False) as file:
        assert file["jpeg"].shape == (sum(sizes),)


def test_digits_are_those_of_scikit_learn(tmp_path):
    from sklearn.datasets import load_digits

    download.prepare("Digits", tmp_path)
    train, test = datasets.create_default_splits("Digits", tmp_path)
    assert len(train) == 1437 and len(test) == 360
    original = load_digits()
    for split in (train, test):
        rows = [int(id.split("_")[1]) for id in split.ids]
        np.testing.assert_array_equal(split.images()[..., 0], np.floor(original.images[rows] * 255 / 16 + 0.5))
        np.testing.assert_array_equal(split.labels, original.target[rows])
    assert next(digits.read().parts)[3] == train.ids  # the same split every time


@pytest.mark.parametrize(
    "name, epochs, mirrored, fetched",
    [
        ("MNIST", 5, False, True),
        ("Fashion", 10, True, True),
        ("SVHN", 10, False, True),
        ("CIFAR10", 30, True, True),
        ("TinyImageNet", 30, True, False),
        ("ImageNet", 100, True, False),
        ("Digits", 20, False, True),
        ("Mine", 30, False, False),
    ],
)
def test_how_a_dataset_is_trained_by_default(name, epochs, mirrored, fetched):
    """A mirrored digit is another sign; of a user's own images nobody knows. The recipe is that of arXiv 1803.08494."""
    facts = datasets.module_of(name)
    assert (facts.EPOCHS, facts.MIRRORED, facts.FETCHED_ON_FIRST_USE) == (epochs, mirrored, fetched)
    recipe = dict(batch_size=32, max_batch_size=256, momentum_rate=0.1, lr_schedule="step", reported_epochs=5)
    assert datasets.recipe_of(name) == (recipe if name == "ImageNet" else {})


# --- Dataset ----------------------------------------------------------------------------------------------------------


def test_read_takes_any_order_with_repeats(tmp_path):
    splits, _, (train, _) = packed("CIFAR10", tmp_path, per_class=2)
    images, positions = splits["train"][0], [7, 3, 3, 99, 0, 7]
    for _ in range(2):
        np.testing.assert_array_equal(train.read(positions), images[positions])
        np.testing.assert_array_equal(train.read([4, 5, 6]), images[4:7])
        assert train.read(np.array([], int)).shape == (0, 32, 32, 3)
        train.images()  # and once more from memory
    with pytest.raises(IndexError):
        train.read([100])


def test_read_from_many_threads(tmp_path):
    splits, _, (train, _) = packed("CIFAR10", tmp_path, per_class=2)
    wrong = []

    def work(seed):
        for positions in np.random.default_rng(seed).integers(0, len(train), (20, 16)):
            if not np.array_equal(train.read(positions), splits["train"][0][positions]):
                wrong.append(positions)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_get_data_is_that_of_the_original_repo(tmp_path):
    splits, _, (train, _) = packed("MNIST", tmp_path)
    image, label = train.get_data(train.ids[5])
    np.testing.assert_array_equal(image, splits["train"][0][5] / np.float32(255))
    assert image.dtype == label.dtype == np.float32 and label.tolist() == np.eye(10)[splits["train"][1][5]].tolist()
    with pytest.raises(UserError, match="no id 'none'"):
        train.get_data("none")


def test_max_examples_are_spread_over_the_split(tmp_path):
    splits, _, (whole, _) = packed("CIFAR10", tmp_path, per_class=2)
    train, test = datasets.create_default_splits("CIFAR10", tmp_path / "data", max_examples=25)
    assert len(train) == 25 and len(test) == 20 and train.ids == whole.ids[::4]
    np.testing.assert_array_equal(train.images(), splits["train"][0][::4])
    np.testing.assert_array_equal(train.labels, splits["train"][1][::4])
    with pytest.raises(UserError, match="at least 1"):
        datasets.create_default_splits("CIFAR10", tmp_path / "data", max_examples=0)


def peak_memory(code, *args):
    """Run `code` in a process of its own; return by how many bytes its memory peaked above what its imports took."""
    code = (
        "import sys, datasets, download, h5py\nfrom PIL import Image\n"
        "def peak():\n    return int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) * 1024\n"
        f"before = peak()\n{code}\nprint(peak() - before)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
        cwd=os.path.dirname(datasets.DATA_DIR),
    )
    assert result.returncode == 0, result.stderr
    return int(result.stdout.splitlines()[-1])


OPEN = "for split in datasets.create_default_splits('Mine', sys.argv[1]{}):\n    split.images()\n"


def test_images_are_in_memory_once(tmp_path):
    """Opening 200 MB of images of one's own takes 1.3 times that at most, and so does packing and opening a folder."""
    archives.make_own(tmp_path / "Mine", num=66, shape=(1000, 1000, 3))
    assert 198e6 < peak_memory(OPEN.format(""), tmp_path) < 1.3 * 198e6
    shutil.rmtree(tmp_path / "Mine")
    for i in range(66):
        os.makedirs(tmp_path / "images" / str(i % 2), exist_ok=True)
        Image.new("RGB", (1000, 1000), (i, 0, 0)).save(tmp_path / "images" / str(i % 2) / f"{i}.bmp")
    pack = "download.prepare_folder('Mine', sys.argv[1] + '/images', data_dir=sys.argv[1])"
    assert peak_memory(pack, tmp_path) < 0.5 * 198e6
    assert 198e6 < peak_memory(OPEN.format(""), tmp_path) < 1.3 * 198e6
    assert peak_memory(OPEN.format(", max_examples=50"), tmp_path) < 1.3 * 64 * 3e6


def test_images_in_memory_can_be_shared_with_tensorflow(tmp_path):
    """They begin at a multiple of 64 bytes."""
    archives.make_own(tmp_path / "Mine", shape=(5, 5, 1), num=23)
    download.prepare("Digits", tmp_path)
    for name, max_examples in (("Mine", None), ("Digits", None), ("Digits", 50)):
        for split in datasets.create_default_splits(name, tmp_path, max_examples):
            array = split.images()
            assert array.ctypes.data % 64 == 0 and array.flags.c_contiguous and array.flags.writeable


@pytest.mark.parametrize("damage", ["truncate", "label", "split", "image", "text"])
def test_a_packed_file_that_was_damaged(tmp_path, damage):
    download.prepare("Digits", tmp_path)
    path = tmp_path / "digits" / "data.hdf5"
    if damage == "truncate":
        os.truncate(path, path.stat().st_size // 2)
    elif damage == "text":
        path.write_text("<html>")
    else:
        with h5py.File(path, "r+") as file:
            if damage == "label":
                file["label"][3] = 10
            elif damage == "split":
                file["split"][0] = 1
            else:
                del file["image"]
                file["image"] = np.zeros((3, 8, 8, 1), np.uint8)
    with pytest.raises(UserError, match="download.py"):
        datasets.create_default_splits("Digits", tmp_path)


def external_link(file, name):
    """Move an array of an HDF5 file into another file beside it, and link to it."""
    with h5py.File(os.path.join(os.path.dirname(file.filename), "elsewhere.hdf5"), "w") as other:
        other[name] = file[name][()]
    del file[name]
    file[name] = h5py.ExternalLink("elsewhere.hdf5", name)


def elsewhere(file, name):
    """Let an array of an HDF5 file be that of the same shape and type in /etc/passwd."""
    shape, dtype = file[name].shape, file[name].dtype
    del file[name]
    file.create_dataset(name, shape, dtype, external=[("/etc/passwd", 0, int(np.prod(shape)) * dtype.itemsize)])


def virtual_packed(file, name):
    shape = file[name].shape
    layout = h5py.VirtualLayout(shape, np.uint8)
    layout[:] = h5py.VirtualSource("other.hdf5", name, shape)
    del file[name]
    file.create_virtual_dataset(name, layout)


def claim(**kwargs):
    """A change that lets an array claim far more than the file holds."""

    def change(file, name):
        del file[name]
        file.create_dataset(name, **kwargs)

    return change


def other(value):
    """A change of an array to what value(array) gives."""

    def change(file, name):
        replace(file, name, value(file[name][()]))

    return change


PACKED_MISTAKES = {
    "image by an external link": ("image", external_link, "link"),
    "label by an external link": ("label", external_link, "link"),
    "class names by a soft link": (
        "class_names",
        lambda file, name: (file.move(name, "x"), file.update(class_names=h5py.SoftLink("x"))),
        "link",
    ),
    "image in /etc/passwd": ("image", elsewhere, "another file"),
    "id in /etc/passwd": ("id", elsewhere, "another file"),
    "virtual image": ("image", virtual_packed, "another file"),
    "image claims 4.3 GB": ("image", claim(shape=(1797, 8, 8, 37400), dtype=np.uint8), "more than the file can hold"),
    "image claims 4.3 GB in chunks": (
        "image",
        claim(shape=(1797, 8, 8, 37400), dtype=np.uint8, chunks=(64, 8, 8, 64)),
        "more than the file can hold",
    ),
    "labels claim 4.3 GB": ("label", claim(shape=(1 << 30,), dtype=np.int32), "more than the file can hold"),
    "image is a group": ("image", lambda file, name: (file.pop(name), file.create_group(name)), "is a group"),
    "image of float": ("image", other(lambda image: image.astype(float)), "float64"),
    "image of rank 3": ("image", other(lambda image: image[..., 0]), "(1797, 8, 8)"),
    "image of text": ("image", other(lambda image: ["a"] * len(image)), "object"),
    "image of no channel": ("image", other(lambda image: image[..., :0]), "(1797, 8, 8, 0)"),
    "no label": ("label", lambda file, name: file.pop(name), "no label"),
    "label one-hot": ("label", other(lambda label: np.eye(10, dtype=int)[label]), "(1797, 10)"),
    "label of float": ("label", other(lambda label: label.astype(float)), "float64"),
    "label of text": ("label", other(lambda label: label.astype("S1")), "S1"),
    "label a number": ("label", other(lambda label: 1), "()"),
    "label beyond 32 bits": ("label", other(lambda label: label.astype(int) + (1 << 32)), "4294967296"),
    "split of rank 2": ("split", other(lambda split: split[:, None]), "(1797, 1)"),
    "splits that are mixed": ("split", other(lambda split: np.r_[split[:9], 1, split[10:]]), "before"),
    "id of numbers": ("id", other(lambda ids: np.arange(len(ids))), "int64"),
    "id of rank 2": ("id", other(lambda ids: ids[:, None]), "(1797, 1)"),
    "id no text": ("id", other(lambda ids: np.array([b"\xff%d" % i for i in range(len(ids))])), "utf-8"),
    "class names of numbers": ("class_names", other(lambda names: np.arange(10)), "int64"),
    "class names of rank 2": ("class_names", other(lambda names: names[None]), "(1, 10)"),
    "JPEG files of rank 2": ("image", lambda file, name: (file.move(name, "jpeg"), replace(file, "offset", 1)), "jpeg"),
}


@pytest.mark.parametrize("mistake", PACKED_MISTAKES)
def test_a_packed_file_is_believed_no_more_than_any_other(tmp_path, mistake):
    """The mark says that a file is whole, not who wrote it."""
    download.prepare("Digits", tmp_path)
    os.rename(tmp_path / "digits", tmp_path / "Mine")
    path = tmp_path / "Mine" / "data.hdf5"
    name, change, said = PACKED_MISTAKES[mistake]
    with h5py.File(path, "r+") as file:
        file["offset"] = 0
        change(file, name)
    with pytest.raises(UserError) as error:
        datasets.create_default_splits("Mine", tmp_path)
    for word in (said, name if "jpeg" not in said else "jpeg", "download.py"):
        assert word in str(error.value)
    assert str(error.value).count(str(path)) == 1 and str(error.value) == one_line(error.value)


def test_whether_a_file_is_packed_is_asked_of_this_file_alone(tmp_path):
    """No link is followed for it: not to the right file, not to one that is missing."""
    download.prepare("Digits", tmp_path)
    path = tmp_path / "digits" / "data.hdf5"
    with h5py.File(path, "r+") as file:
        replace(file, "image", h5py.ExternalLink("missing.hdf5", "image"))
    assert datasets.is_prepared("Digits", tmp_path)
    with pytest.raises(UserError, match="image is a soft or external link"):
        datasets.create_default_splits("Digits", tmp_path)
    for mark in ([1], [1, 1], "1", 1.0, 2):
        with h5py.File(path, "r+") as file:
            file.attrs["packed"] = mark
        assert not datasets.is_prepared("Digits", tmp_path)


def test_offsets_of_jpeg_files_that_run_around(tmp_path):
    """The difference of two int64 can pass for positive after it has overflown."""
    archives.make("ImageNet", tmp_path / "archives")
    download.prepare("ImageNet", tmp_path, tmp_path / "archives", checksum=False)
    with h5py.File(tmp_path / "imagenet" / "data.hdf5", "r+") as file:
        file["offset"][1], file["offset"][2] = (1 << 63) - 1, -2
    with pytest.raises(UserError, match="the offsets do not fit"):
        datasets.create_default_splits("ImageNet", tmp_path)


def test_an_array_that_lies_beyond_the_end_of_the_file(tmp_path):
    """It is refused (by HDF5 itself) when it is opened, not in the middle of training."""
    download.prepare("Digits", tmp_path)
    path = tmp_path / "digits" / "data.hdf5"
    with h5py.File(path) as file:
        image = file["image"].id
        place, size = image.get_offset(), image.get_storage_size()
    data, found = path.read_bytes(), struct.pack("<QQ", place, size)
    assert data.count(found) == 1
    path.write_bytes(data.replace(found, struct.pack("<QQ", len(data) - 1000, size)))
    with pytest.raises(UserError, match="is broken .*download.py"):
        datasets.create_default_splits("Digits", tmp_path)


def test_a_class_name_that_claims_gigabytes(tmp_path):
    """HDF5 makes room for a string of any length that is claimed, before it looks."""
    download.prepare("Digits", tmp_path)
    path = tmp_path / "digits" / "data.hdf5"
    with h5py.File(path) as file:
        place = file["class_names"].id.get_offset()
    data = bytearray(path.read_bytes())
    data[place : place + 4] = struct.pack("<I", 1 << 29)
    path.write_bytes(data)
    code = (
        "try:\n    datasets.create_default_splits('Digits', sys.argv[1])\n"
        "except datasets.UserError as error:\n    assert 'class_names' in str(error)"
    )
    assert peak_memory(code, tmp_path) < 50e6


def test_nothing_here_loads_tensorflow_or_what_only_packing_needs():
    code = (
        "import sys, datasets, download; "
        "sys.exit(str({'tensorflow', 'scipy', 'sklearn', 'imageio', 'PIL'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=os.path.dirname(datasets.DATA_DIR),
    )
    assert result.stderr.strip() == "set()"


# --- hostile archives -------------------------------------------------------------------------------------------------


def refused(read, *words):
    """Check that reading raises a UserError in one line with all of `words`."""
    with pytest.raises(UserError) as error:
        source = read()
        list(source.parts)
    for word in words:
        assert word in str(error.value)
    assert str(error.value) == one_line(error.value)


CIFAR_MEMBERS = {
    "path traversal": ({"name": "../../evil"}, "leads out"),
    "absolute path": ({"name": "/tmp/evil"}, "leads out"),
    "symbolic link": ({"name": "link", "type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "link"),
    "hard link": ({"name": "link", "type": tarfile.LNKTYPE, "linkname": "readme.html"}, "link"),
    "device": ({"name": "null", "type": tarfile.CHRTYPE}, "device"),
    "huge member": ({"name": "cifar-10-batches-py/data_batch_1", "size": 1 << 40}, "claims 1099511627776 bytes"),
}


@pytest.mark.parametrize("kind", CIFAR_MEMBERS)
def test_hostile_members_of_a_tar(tmp_path, kind):
    fields, said = CIFAR_MEMBERS[kind]
    members, _ = archives.cifar10_members(1, np.random.default_rng(0))
    archives.tar_gz(tmp_path / "good.tar.gz", members)
    data = gzip.decompress((tmp_path / "good.tar.gz").read_bytes())
    info = tarfile.TarInfo()
    for field, value in fields.items():
        setattr(info, field, value)
    (tmp_path / CIFAR).write_bytes(gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + data))
    refused(lambda: cifar10.read(tmp_path), CIFAR, fields["name"], said)
    assert sorted(os.listdir(tmp_path)) == sorted([CIFAR, "good.tar.gz"])


def bad_pickle(data):
    """A tar of CIFAR-10 whose first batch is `data`."""
    members, _ = archives.cifar10_members(1, np.random.default_rng(0))
    return {**members, "cifar-10-batches-py/data_batch_1": data}


class Touch:
    """Pickles to a call of os.mkdir."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize(
    "data, said",
    [
        (b"cos\nsystem\n(U\x04trueRt.", "os.system"),
        (b"\x80\x02cbuiltins\neval\nU\x011\x85R.", "builtins.eval"),
        (b"\x80\x02cnumpy\nload\n.", "numpy.load"),
        (b"\x80\x02}r\xff\xff\xff\x7f.", "LONG_BINPUT"),
        (b"\x80\x04\x95", "broken"),
        (pickle.dumps({b"data": 1}, 4), "nothing that"),
        (b"\x80\x02]q\x00.", "broken"),
        (b"", "broken"),
        (
            archives.py2_dict(
                data=archives.py2_array(np.zeros((2, 3071), np.uint8)), labels=archives.py2_list([b"K\x01"])
            ),
            "3071",
        ),
        (
            archives.py2_dict(
                data=archives.py2_array(np.zeros((2, 3072), np.uint8)), labels=archives.py2_list([b"K\x01"])
            ),
            "(2, 3072)",
        ),
        (
            archives.py2_dict(
                data=archives.py2_array(np.zeros((1, 3072), np.uint8)).replace(b"u1K", b"O8K"),
                labels=archives.py2_list([b"K\x01"]),
            ),
            "O8",
        ),
    ],
)
def test_hostile_pickles(tmp_path, data, said):
    archives.tar_gz(tmp_path / CIFAR, bad_pickle(data))
    refused(lambda: cifar10.read(tmp_path), CIFAR, "data_batch_1", said)


def nested(depth, start=b"]", repeated=9):
    """A pickled list (or with start=b"(" tuple) that holds `repeated` times one that holds `repeated` times one ..."""
    end = b"e" if start == b"]" else b""
    inner = start + (b"(K\x01" + end if end else b"K\x01t") + b"q\x00"
    for i in range(1, depth):
        again = b"h" + bytes([i - 1])
        inner += b"0" + start + (b"(" if end else b"") + again * repeated + (end or b"t") + b"q" + bytes([i])
    return inner


ONE_IMAGE = archives.py2_array(np.zeros((1, 3072), np.uint8))


UNFOLDING = {
    "labels": ("data_batch_1", archives.py2_dict(data=ONE_IMAGE, labels=nested(8))),
    "a type": ("data_batch_1", archives.py2_dict(data=ONE_IMAGE.replace(b"U\x02u1", nested(7)), labels=nested(1))),
    "a key, all of which is hashed": ("data_batch_1", b"\x80\x02}" + nested(7, b"(") + b"K\x01s."),
    "a key of doubles": ("data_batch_1", b"\x80\x02}K\x01" + b"2\x86" * 23 + b"K\x01s."),
    "lists in lists": ("data_batch_1", archives.py2_dict(data=ONE_IMAGE, labels=b"](](](K\x01eee")),
    "a boolean": ("data_batch_1", archives.py2_dict(data=ONE_IMAGE, labels=archives.py2_list([b"\x88"]))),
    "too many labels": ("data_batch_1", archives.py2_dict(data=ONE_IMAGE, labels=archives.py2_list([b"K\x01"] * 2))),
    "labels as text": ("data_batch_1", archives.py2_dict(data=ONE_IMAGE, labels=archives.py2_string(b"\x01"))),
    "data a number": ("data_batch_1", archives.py2_dict(data=b"K\x01", labels=archives.py2_list([b"K\x01"]))),
    "millions of lists": ("data_batch_1", b"\x80\x02" + b"]" * 2_000_000 + b"."),
    "names": ("batches.meta", archives.py2_dict(label_names=nested(7))),
    "names as text": ("batches.meta", archives.py2_dict(label_names=archives.py2_string(b"cat"))),
    "names as numbers": ("batches.meta", archives.py2_dict(label_names=archives.py2_list([b"K\x01"]))),
    "a number": ("batches.meta", b"\x80\x02K\x01."),
}


@pytest.mark.parametrize("what", UNFOLDING)
def test_pickles_that_unfold(tmp_path, what):
    """A few hundred bytes that name one list again and again must not become gigabytes, nor a message of megabytes."""
    (name, data), (members, _) = UNFOLDING[what], archives.cifar10_members(1, np.random.default_rng(0))
    archives.tar_gz(tmp_path / CIFAR, {**members, "cifar-10-batches-py/" + name: data})
    tracemalloc.start()
    refused(lambda: cifar10.read(tmp_path), CIFAR, name, "expected", "repeats" if "a key" in what else "")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30_000_000


def test_a_pickle_that_runs_code_does_not_run(tmp_path):
    archives.tar_gz(tmp_path / CIFAR, bad_pickle(pickle.dumps(Touch(str(tmp_path / "evil")), 2)))
    refused(lambda: cifar10.read(tmp_path), "mkdir; refused")
    assert not (tmp_path / "evil").exists()


def test_cifar_labels_out_of_range_and_missing_batches(tmp_path):
    batch = archives.py2_dict(
        data=archives.py2_array(np.zeros((1, 3072), np.uint8)), labels=archives.py2_list([b"K\x0a"])
    )
    archives.tar_gz(tmp_path / CIFAR, bad_pickle(batch))
    with pytest.raises(UserError, match="0 to 10: expected 0 to 9"):
        download.prepare("CIFAR10", tmp_path / "data", tmp_path, checksum=False)
    members = bad_pickle(batch)
    del members["cifar-10-batches-py/data_batch_3"]
    archives.tar_gz(tmp_path / CIFAR, members)
    refused(lambda: cifar10.read(tmp_path), "data_batch_3")


@pytest.mark.parametrize(
    "name, file",
    [
        ("CIFAR10", CIFAR),
        ("MNIST", "train-images-idx3-ubyte.gz"),
        ("SVHN", "train_32x32.mat"),
        ("TinyImageNet", ZIP),
        ("ImageNet", "ILSVRC2012_img_train.tar"),
        ("ImageNet", "ILSVRC2012_devkit_t12.tar.gz"),
    ],
)
@pytest.mark.parametrize("damage", ["empty", "first half", "all but a byte", "html", "a byte lost"])
def test_damaged_archives(tmp_path, name, file, damage):
    archives.make(name, tmp_path)
    data = (tmp_path / file).read_bytes()
    end = {"all but a byte": -1 if not file.endswith(".tar") else -20_000}.get(damage)
    (tmp_path / file).write_bytes(
        {
            "empty": b"",
            "first half": data[: len(data) // 2],
            "all but a byte": data[:end],
            "html": b"<html>" + b" " * 2000,
            "a byte lost": data[: len(data) // 2] + data[len(data) // 2 + 1 :],
        }[damage]
    )
    reader = {"CIFAR10": cifar10, "MNIST": mnist, "SVHN": svhn, "TinyImageNet": tinyimagenet, "ImageNet": imagenet}[
        name
    ]
    refused(lambda: reader.read(tmp_path), file)


def test_a_tar_bomb(tmp_path):
    with gzip.open(tmp_path / CIFAR, "wb", compresslevel=1) as file:
        for i in range(9):
            info = tarfile.TarInfo(f"cifar-10-batches-py/{i}")
            info.size = 1 << 26
            file.write(info.tobuf())
            file.write(bytes(1 << 26))
    refused(lambda: cifar10.read(tmp_path), "unpacks to more than")


@pytest.mark.parametrize(
    "shape, said",
    [
        ((10**6, 10**3, 10**3), "claims"),
        ((-1, 28, 28), "claims"),
        ((0, 28, 28), "claims"),
        ((2, 28, 27), "more bytes"),
        ((2, 28, 29), "only"),
    ],
)
def test_idx_sizes(tmp_path, shape, said):
    archives.make("MNIST", tmp_path)
    with gzip.open(tmp_path / "t10k-images-idx3-ubyte.gz", "wb") as file:
        file.write(struct.pack(">4i", 2051, *shape) + bytes(2 * 28 * 28))
    refused(lambda: mnist.read(tmp_path), "t10k-images", said)


def test_idx_labels_for_images(tmp_path):
    archives.make("MNIST", tmp_path)
    os.replace(tmp_path / "t10k-labels-idx1-ubyte.gz", tmp_path / "t10k-images-idx3-ubyte.gz")
    refused(lambda: mnist.read(tmp_path), "2049", "2051")


def bomb():
    """A MATLAB file whose only element unpacks to more than is let through."""
    packer = zlib.compressobj(1)
    data = b"".join(packer.compress(bytes(1 << 24)) for _ in range(17)) + packer.flush()
    return b" " * 124 + b"\x00\x01IM" + struct.pack("<II", 15, len(data)) + data


@pytest.mark.parametrize(
    "variables, said",
    [
        ({"X": np.zeros((32, 32, 3, 4), np.uint8)}, "no variable y"),
        ({"X": np.zeros((32, 32, 4), np.uint8)}, "(32, 32, 4)"),
        ({"X": np.zeros((32, 32, 3, 4), np.float32)}, "single"),
        ({"X": "text"}, "char"),
        ({"X": np.zeros((32, 32, 3, 4), np.uint8), "y": np.ones((3, 1))}, "one a label"),
        ({"X": np.zeros((32, 32, 3, 4), np.uint8), "y": np.zeros((4, 1))}, "1 ... 10"),
        ({"X": np.zeros((32, 32, 3, 4), np.uint8), "y": np.full((4, 1), 1.5)}, "1 ... 10"),
        (bomb, "unpacks to more"),
    ],
)
def test_mat_of_another_shape(tmp_path, variables, said):
    archives.make("SVHN", tmp_path)
    if callable(variables):
        (tmp_path / "test_32x32.mat").write_bytes(variables())
    else:
        savemat(tmp_path / "test_32x32.mat", variables, do_compression=True)
    refused(lambda: svhn.read(tmp_path), "test_32x32.mat", said)


def test_mat_with_an_unknown_element_type_does_not_reach_scipy(tmp_path):
    archives.make("SVHN", tmp_path)
    savemat(tmp_path / "test_32x32.mat", {"X": np.zeros((32, 32, 3, 4), np.uint8), "y": np.ones((4, 1))})
    data = (tmp_path / "test_32x32.mat").read_bytes()
    tag = struct.pack("<II", 2, 32 * 32 * 3 * 4)  # the pixels: type uint8
    (tmp_path / "test_32x32.mat").write_bytes(data.replace(tag, struct.pack("<II", 132, 32 * 32 * 3 * 4)))
    refused(lambda: svhn.read(tmp_path), "element of type 132")


@pytest.mark.parametrize(
    "add, said",
    [
        (("../../evil", b""), "leads out"),
        (("/etc/evil", b""), "leads out"),
        (("big", bytes((1 << 23) + 1)), "claims"),
        (("tiny-imagenet-200/train/n00500004/images/x.JPEG", b"\xff\xd8 no image"), "x.JPEG"),
        (("tiny-imagenet-200/train/n99999999/images/y.JPEG", b""), "y.JPEG"),
        (("tiny-imagenet-200/val/images/val_99.JPEG", b""), "val_99.JPEG"),
        (("tiny-imagenet-200/val/images/val_0.JPEG", archives.picture_file(np.zeros((64, 63, 3), np.uint8))), "64x63"),
    ],
)
def test_hostile_members_of_a_zip(tmp_path, add, said):
    archives.make("TinyImageNet", tmp_path)
    with pytest.warns(UserWarning) if add[0].endswith("val_0.JPEG") else open(os.devnull):
        with zipfile.ZipFile(tmp_path / ZIP, "a", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(*add)
    refused(lambda: tinyimagenet.read(tmp_path), ZIP, add[0].rsplit("/", 1)[-1], said)
    assert os.listdir(tmp_path) == [ZIP]


def test_a_link_in_a_zip(tmp_path):
    archives.make("TinyImageNet", tmp_path)
    info = zipfile.ZipInfo("tiny-imagenet-200/link")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / ZIP, "a") as archive:
        archive.writestr(info, "/etc/passwd")
    refused(lambda: tinyimagenet.read(tmp_path), "link")


def bomb_png():
    """A PNG that claims 50,000 x 50,000 pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">2I5B", 50000, 50000, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    "name, jpeg, said",
    [
        ("val_00000009.JPEG", b"no image", "val_00000009"),
        ("val_00000010.JPEG", b"", "1 to 9"),
        ("val_x.JPEG", b"", "val_x"),
        ("../val_00000009.JPEG", b"", "leads out"),
        ("val_00000002.JPEG", b"", "each once"),
        ("val_00000009.JPEG", archives.picture_file(np.zeros((64, 64, 3), np.uint8))[:400], "val_00000009"),
        ("val_00000009.JPEG", bomb_png(), "val_00000009"),
        ("folder/", b"", "8 images"),
    ],
)
def test_hostile_images_of_imagenet(tmp_path, name, jpeg, said):
    archives.make("ImageNet", tmp_path)
    archives.devkit(tmp_path / "ILSVRC2012_devkit_t12.tar.gz", sorted(archives.WNIDS), [1, 2, 3, 4], [1] * 9)
    with tarfile.open(tmp_path / "ILSVRC2012_img_val.tar", "a") as tar:
        archives.add(tar, name, jpeg, **({"type": tarfile.DIRTYPE} if name == "folder/" else {}))
    refused(lambda: imagenet.read(tmp_path), "ILSVRC2012_img_val.tar", said)


def test_photographs_of_the_original_archives_are_not_decoded_again(tmp_path, monkeypatch):
    """Those that a pinned hash vouches for: one that does not decode goes through. Others are refused."""
    archives.make("ImageNet", tmp_path / "imagenet")
    with tarfile.open(tmp_path / "imagenet" / "ILSVRC2012_img_val.tar") as tar:
        jpegs = {member.name: tar.extractfile(member).read() for member in tar}
    last = max(jpegs)
    with tarfile.open(tmp_path / "imagenet" / "ILSVRC2012_img_val.tar", "w") as tar:
        for name, jpeg in jpegs.items():
            archives.add(tar, name, jpeg[:-40] if name == last else jpeg)
    flags = ("ImageNet", tmp_path / "data", tmp_path / "imagenet")
    refused(lambda: download.prepare(*flags, checksum=False), last, "truncated")
    found = {}
    for file in imagenet.FILES:
        data = (tmp_path / "imagenet" / file).read_bytes()
        found[file] = (len(data), "md5", hashlib.md5(data).hexdigest())
    monkeypatch.setattr(imagenet, "FILES", found)
    download.prepare(*flags)
    _, test = datasets.create_default_splits("ImageNet", tmp_path / "data")
    assert test.read([test.ids.index(last)]) == [jpegs[last][:-40]]


def test_imagenet_devkit_that_does_not_fit(tmp_path):
    archives.make("ImageNet", tmp_path)
    path, wnids = tmp_path / "ILSVRC2012_devkit_t12.tar.gz", sorted(archives.WNIDS)
    archives.devkit(path, wnids, [1, 2, 3, 4], [1, 2, 5] + [1] * 5)  # 5 is the inner node
    refused(lambda: imagenet.read(tmp_path), "5 is the ILSVRC2012_ID of no class")
    archives.devkit(path, wnids[:3], [1, 2, 3], [1] * 8)
    refused(lambda: imagenet.read(tmp_path), "n03000001.tar", "the devkit does not name")


# --- own datasets in the original repo's layout -----------------------------------------------------------------------


@pytest.mark.parametrize("file", ["data.hy", "data.hdf5"])
@pytest.mark.parametrize(
    "shape, dtype",
    [((8, 6, 3), np.uint8), ((8, 6), np.uint8), ((5, 5, 1), np.float32), ((4, 4, 2), ">f8"), ((4, 4, 3), np.int64)],
)
def test_own_data(tmp_path, file, shape, dtype):
    ids, images, labels = archives.make_own(tmp_path / "Mine", shape=shape, dtype=dtype, file=file, classes=3)
    assert datasets.is_prepared("Mine", tmp_path) and not datasets.is_prepared("Other", tmp_path)
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
    image, label = splits[0].get_data(splits[0].ids[0])
    scale = 1 if images.dtype.kind == "f" else 255
    np.testing.assert_allclose(image.reshape(shape), images[ids.index(splits[0].ids[0])] / scale, rtol=1e-7)
    assert label.sum() == 1
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


def replace(file, name, value):
    """Replace an array of an HDF5 file."""
    del file[name]
    file[name] = value


def in_file(change):
    """A change of the open HDF5 file, given its first id."""

    def apply(folder, ids):
        with h5py.File(folder / "data.hy", "r+") as file:
            change(file, ids[0])

    return apply


def in_text(name, lines):
    """A change of a text file: lines(ids) are its new ids."""
    return lambda folder, ids: (folder / name).write_text("".join(f"{line}\n" for line in lines(ids)))


def split_files(train, test):
    """A change that writes both split files."""

    def apply(folder, ids):
        in_text("id_train.txt", train)(folder, ids)
        in_text("id_test.txt", test)(folder, ids)

    return apply


def all_labels(value):
    """A change of every label."""

    def change(file, id):
        for name in file:
            replace(file, name + "/label", value)

    return in_file(change)


def external_storage(file, id):
    del file[id]["image"]
    file[id].create_dataset("image", (8, 8, 3), np.uint8, external=[("/etc/passwd", 0, 192)])


def virtual(file, id):
    layout = h5py.VirtualLayout((8, 8, 3), np.uint8)
    layout[:] = h5py.VirtualSource("other.hdf5", "image", (8, 8, 3))
    del file[id]["image"]
    file[id].create_virtual_dataset("image", layout)


def huge(**kwargs):
    """A change that lets an image claim far more than the file holds."""

    def change(file, id):
        del file[id]["image"]
        file[id].create_dataset("image", dtype=np.uint8, **kwargs)

    return in_file(change)


def deflate_bomb(file, id):
    del file[id]["image"]
    data = file[id].create_dataset(
        "image", (1 << 15, 1 << 15, 3), np.uint8, chunks=(1 << 13, 1 << 13, 1), compression="gzip"
    )
    data[: 1 << 13, : 1 << 13, 0] = 0


def chunk_bomb(file, id):
    """A few bytes that HDF5 would make room for a gigabyte to unpack."""
    del file[id]["image"]
    data = file[id].create_dataset(
        "image", (8, 8, 3), np.uint8, maxshape=(None,) * 3, chunks=(1 << 10, 1 << 10, 1 << 10), compression="gzip"
    )
    data.id.write_direct_chunk((0, 0, 0), zlib.compress(bytes(1000)))


def nan(file, id):
    image = np.zeros((8, 8, 3), np.float32)
    image[1, 2, 0] = np.nan
    for name in file:
        replace(file, name + "/image", image)


MISTAKES = {
    "no data": (lambda folder, ids: os.remove(folder / "data.hy"), "neither data.hy nor data.hdf5"),
    "two files": (
        lambda folder, ids: (folder / "data.hdf5").write_bytes((folder / "data.hy").read_bytes()),
        "keep one",
    ),
    "no id.txt": (lambda folder, ids: os.remove(folder / "id.txt"), "id.txt is missing"),
    "empty id.txt": (in_text("id.txt", lambda ids: []), "id.txt is empty"),
    "id.txt no text": (lambda folder, ids: (folder / "id.txt").write_bytes(b"\xff\xfe\x00"), "id.txt"),
    "too few ids": (in_text("id.txt", lambda ids: ids[:4]), "4 ids"),
    "unknown id": (in_text("id.txt", lambda ids: [*ids, "nobody"]), "'nobody'"),
    "doubled id": (in_text("id.txt", lambda ids: [*ids, ids[3]]), "twice"),
    "id with a slash": (in_text("id.txt", lambda ids: [*ids, "a/b"]), "'a/b'"),
    "id is a dot": (in_text("id.txt", lambda ids: [*ids, ".."]), "'..'"),
    "only id_train.txt": (in_text("id_train.txt", lambda ids: ids), "without id_test.txt"),
    "empty test split": (split_files(lambda ids: ids, lambda ids: []), "id_test.txt is empty"),
    "empty train split": (split_files(lambda ids: [], lambda ids: ids), "id_train.txt is empty"),
    "overlapping splits": (split_files(lambda ids: ids[:9], lambda ids: ids[8:]), "overlap"),
    "unknown id in a split": (split_files(lambda ids: ids[:9], lambda ids: ["x9"]), "'x9' is not in id.txt"),
    "doubled id in a split": (split_files(lambda ids: ids[:9] + ids[:1], lambda ids: ids[9:]), "twice"),
    "no image": (in_file(lambda file, id: file[id].pop("image")), "/image"),
    "no label": (in_file(lambda file, id: file[id].pop("label")), "/label"),
    "image is a group": (
        in_file(lambda file, id: (file[id].pop("image"), file[id].create_group("image"))),
        "is a group",
    ),
    "id is an array": (in_file(lambda file, id: replace(file, id, np.zeros(3))), "is broken"),
    "label not one-hot": (in_file(lambda file, id: replace(file, id + "/label", [1.0, 1.0])), "[1.0, 1.0]"),
    "label all zero": (in_file(lambda file, id: replace(file, id + "/label", [0.0, 0.0])), "[0.0, 0.0]"),
    "label of another size": (in_file(lambda file, id: replace(file, id + "/label", [0, 1, 0])), "one-hot"),
    "label a number": (all_labels(1), "one-hot"),
    "label NaN": (in_file(lambda file, id: replace(file, id + "/label", [np.nan, 0])), "[nan, 0.0]"),
    "label text": (in_file(lambda file, id: replace(file, id + "/label", "cat")), "object"),
    "one class": (all_labels([1.0]), "1 class"),
    "all of one class": (all_labels([0, 1]), "all train images are of class 1"),
    "image of another size": (
        in_file(lambda file, id: replace(file, id + "/image", np.zeros((8, 9, 3), np.uint8))),
        "(8, 9, 3)",
    ),
    "image of another type": (in_file(lambda file, id: replace(file, id + "/image", np.zeros((8, 8, 3)))), "float64"),
    "image of rank 4": (in_file(lambda file, id: replace(file, id + "/image", np.zeros((1, 8, 8, 3)))), "(1, 8, 8, 3)"),
    "channels first": (
        in_file(lambda file, id: replace(file, id + "/image", np.zeros((3, 8, 8), np.uint8))),
        "(3, 8, 8), channels first: expected [h, w, c], which np.transpose(image, (1, 2, 0)) makes of it",
    ),
    "one channel first": (
        in_file(lambda file, id: replace(file, id + "/image", np.zeros((1, 9, 8), np.uint8))),
        "(1, 9, 8), channels first",
    ),
    "image empty": (in_file(lambda file, id: replace(file, id + "/image", np.zeros((0, 8, 3), np.uint8))), "(0, 8, 3)"),
    "image of objects": (in_file(lambda file, id: replace(file, id + "/image", ["a", "b"])), "object"),
    "image of booleans": (in_file(lambda file, id: replace(file, id + "/image", np.zeros((8, 8, 3), bool))), "bool"),
    "image complex": (
        in_file(lambda file, id: replace(file, id + "/image", np.zeros((8, 8, 3), complex))),
        "complex128",
    ),
    "image of 16 bits": (in_file(lambda file, id: replace(file, id + "/image", np.full((8, 8, 3), 300))), "300"),
    "image negative": (in_file(lambda file, id: replace(file, id + "/image", np.full((8, 8, 3), -1))), "-1"),
    "NaN pixel": (in_file(nan), "nan at [1, 2, 0]"),
    "soft link": (
        in_file(lambda file, id: (file[id].pop("image"), file[id].update(image=h5py.SoftLink("/1/image")))),
        "link",
    ),
    "external link": (in_file(lambda file, id: replace(file, id, h5py.ExternalLink("x.hdf5", "/"))), "link"),
    "external storage": (in_file(external_storage), "another file"),
    "virtual array": (in_file(virtual), "another file"),
    "claims a terabyte": (huge(shape=(1 << 20, 1 << 20, 1)), "more than the file can hold"),
    "claims a terabyte in chunks": (
        huge(shape=(1 << 20, 1 << 20, 1), chunks=(64, 64, 1)),
        "more than the file can hold",
    ),
    "deflate bomb": (in_file(deflate_bomb), "more than the file can hold"),
    "a chunk that is a bomb": (in_file(chunk_bomb), "more than the file can hold"),
    "never written": (huge(shape=(8, 8, 3)), "more than the file can hold"),
    "truncated": (lambda folder, ids: os.truncate(folder / "data.hy", 5000), "truncated"),
    "empty file": (lambda folder, ids: os.truncate(folder / "data.hy", 0), "data.hy"),
    "no HDF5": (lambda folder, ids: (folder / "data.hy").write_text("image,label\n"), "data.hy"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_own_data(tmp_path, mistake):
    ids, _, _ = archives.make_own(tmp_path / "Mine")
    change, said = MISTAKES[mistake]
    change(tmp_path / "Mine", ids)
    with pytest.raises(UserError) as error:
        datasets.create_default_splits("Mine", tmp_path)
    assert said in str(error.value) and str(tmp_path / "Mine") in str(error.value)
    assert str(error.value) == one_line(error.value)


@pytest.mark.parametrize(
    "name, said",
    [
        ("cifar10", "did you mean CIFAR10"),
        ("imagenet", "did you mean ImageNet"),
        ("", "name ''"),
        ("a/b", "no slashes"),
        ("..", "no dots"),
        ("data.hy", "no dots"),
        ("-x", "letters"),
        ("MNIST", "download.py --dataset MNIST"),
        ("Nowhere", "neither data.hy"),
    ],
)
def test_names(tmp_path, name, said):
    with pytest.raises(UserError, match="dataset|MNIST") as error:
        datasets.create_default_splits(name, tmp_path)
    assert said in str(error.value)


def test_a_few_mutated_files_end_in_user_errors(tmp_path):
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "fuzz_readers.py")
    result = subprocess.run(
        [sys.executable, script, "--files", "180", "--keep", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
