"""The readers against tiny archives in the official formats, element by element; damaged archives; own datasets."""

import gzip
import io
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
import threading
import zipfile

import archives
import h5py
import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

import datasets
import download
from command import UserError, one_line
from datasets import cifar10, digits, hdf5, imagenet, mnist, svhn, tinyimagenet

CIFAR, ZIP = "cifar-10-python.tar.gz", "tiny-imagenet-200.zip"


def packed(name, tmp_path, **kwargs):
    """Make and pack tiny archives; return (expected splits, expected class names, train and test)."""
    splits, class_names = archives.make(name, tmp_path / "archives", **kwargs)
    download.prepare(name, tmp_path / "data", tmp_path / "archives", checksum=False)
    return splits, class_names, datasets.create_default_splits(name, tmp_path / "data")


# what the readers find


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
    assert split == 1 and images.shape == (1, 32, 32, 3) and labels == [7]
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
    assert train.nbytes == sum(map(len, jpegs))
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
    assert train.read(range(4)) == images[:4]
    assert test.read([3, 0, 1, 0, 2]) == [images[i] for i in (7, 4, 5, 4, 6)]
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


# Dataset


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


@pytest.mark.parametrize("name", ["MNIST", "ImageNet"])
def test_get_data_is_that_of_the_original_repo(name, tmp_path):
    _, _, (train, _) = packed(name, tmp_path)
    image, label = train.get_data(train.ids[5])
    (stored,) = train.read([5])
    pixels = np.asarray(Image.open(io.BytesIO(stored)).convert("RGB")) if train.encoded else stored
    np.testing.assert_array_equal(image, pixels / np.float32(255))
    assert image.dtype == label.dtype == np.float32
    assert label.tolist() == np.eye(train.num_classes)[train.labels[5]].tolist()
    with pytest.raises(UserError, match="'none'"):
        train.get_data("none")


def test_max_examples_are_spread_over_the_split(tmp_path):
    splits, _, (whole, _) = packed("CIFAR10", tmp_path, per_class=2)
    train, test = datasets.create_default_splits("CIFAR10", tmp_path / "data", max_examples=25)
    assert len(train) == 25 and len(test) == 20 and train.ids == whole.ids[::4]
    np.testing.assert_array_equal(train.images(), splits["train"][0][::4])
    np.testing.assert_array_equal(train.labels, splits["train"][1][::4])


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


def move_out(file, name):
    """Move an array of an HDF5 file into another file beside it, and link to it."""
    with h5py.File(os.path.join(os.path.dirname(file.filename), "elsewhere.hdf5"), "w") as other:
        other[name] = file[name][()]
    replace(file, name, h5py.ExternalLink("elsewhere.hdf5", name))


def link_inside(file, name):
    file.move(name, "moved")
    file[name] = h5py.SoftLink("/moved")


def store_outside(file, name):
    """Let an array of an HDF5 file be that of the same shape and type in /etc/passwd."""
    shape, dtype = file[name].shape, file[name].dtype
    del file[name]
    file.create_dataset(name, shape, dtype, external=[("/etc/passwd", 0, int(np.prod(shape)) * dtype.itemsize)])


def make_virtual(file, name):
    layout = h5py.VirtualLayout(file[name].shape, np.uint8)
    layout[:] = h5py.VirtualSource("other.hdf5", name, file[name].shape)
    del file[name]
    file.create_virtual_dataset(name, layout)


def make_group(file, name):
    del file[name]
    file.create_group(name)


ELSEWHERE = [(move_out, "link"), (link_inside, "link"), (store_outside, "another file"), (make_virtual, "another file")]


@pytest.mark.parametrize(
    "name, change, said",
    [
        *[("image", *case) for case in ELSEWHERE],
        ("label", move_out, "link"),
        ("id", store_outside, "another file"),
        ("class_names", link_inside, "link"),
        ("image", make_group, "is a group"),
        ("label", lambda file, name: file.pop(name), "has no 'label'"),
        ("image", lambda file, name: replace(file, name, np.zeros((3, 8, 8, 1), np.uint8)), "3 images, 1797 labels"),
        ("label", lambda file, name: file[name].write_direct(np.full(1797, 10)), "0 to 9"),
        ("split", lambda file, name: replace(file, name, np.ones(1797, np.uint8)), "train split is empty"),
        ("id", lambda file, name: replace(file, name, np.arange(1797)), "'int' object"),
    ],
)
def test_a_packed_file_that_was_changed(tmp_path, name, change, said):
    download.prepare("Digits", tmp_path)
    path = tmp_path / "digits" / "data.hdf5"
    with h5py.File(path, "r+") as file:
        change(file, name)
    assert datasets.is_prepared("Digits", tmp_path)
    with pytest.raises(UserError) as error:
        datasets.create_default_splits("Digits", tmp_path)
    for word in (said, str(path)):
        assert word in str(error.value)
    assert str(error.value) == one_line(error.value)


@pytest.mark.parametrize("mark", [None, "1", 2])
def test_a_file_without_the_mark_is_not_packed(tmp_path, mark):
    download.prepare("Digits", tmp_path)
    with h5py.File(tmp_path / "digits" / "data.hdf5", "r+") as file:
        del file.attrs["packed"]
        if mark is not None:
            file.attrs["packed"] = mark
    assert not datasets.is_prepared("Digits", tmp_path)
    with pytest.raises(UserError, match="download.py --dataset Digits"):
        datasets.create_default_splits("Digits", tmp_path)


@pytest.mark.parametrize("data", [b"<html>", b"\x89HDF\r\n\x1a\n" + bytes(100), None])
def test_a_packed_file_that_is_cut_short_is_packed_anew(tmp_path, data):
    download.prepare("Digits", tmp_path)
    path = tmp_path / "digits" / "data.hdf5"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if data is None else data)
    with pytest.raises(UserError, match="download.py --dataset Digits"):
        datasets.create_default_splits("Digits", tmp_path)
    download.prepare("Digits", tmp_path)
    assert len(datasets.create_default_splits("Digits", tmp_path)[0]) == 1437


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


def refused(read, *words):
    """Check that reading raises a UserError in one line with all of `words`."""
    with pytest.raises(UserError) as error:
        list(read().parts)
    assert all(word in str(error.value) for word in words) and str(error.value) == one_line(error.value)


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
@pytest.mark.parametrize("damage", ["empty", "first half", "html", "missing"])
def test_damaged_archives(tmp_path, name, file, damage):
    archives.make(name, tmp_path)
    data = (tmp_path / file).read_bytes()
    if damage == "missing":
        os.remove(tmp_path / file)
        with pytest.raises(FileNotFoundError, match=file):  # one line of run(), and exit code 2
            list(datasets.module_of(name).read(tmp_path).parts)
        return
    new = {"empty": b"", "first half": data[: len(data) // 2], "html": b"<html>" + b" " * 2000}[damage]
    (tmp_path / file).write_bytes(new)
    refused(lambda: datasets.module_of(name).read(tmp_path), file, "replace")


def batch(labels=b"K\x01", pixels=3072, **items):
    """A pickled batch of CIFAR-10 with one black image."""
    array = archives.py2_array(np.zeros((1, pixels), np.uint8))
    return archives.py2_dict(**{"data": array, "labels": archives.py2_list([labels])} | items)


class Touch:
    """Pickles to a call of os.mkdir."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize(
    "data, said",
    [
        (b"cos\nsystem\n(U\x04trueRt.", "os.system; refused"),
        (b"\x80\x02cbuiltins\neval\nU\x011\x85R.", "builtins.eval; refused"),
        (b"\x80\x02cnumpy\nload\n.", "numpy.load; refused"),
        (b"\x80\x02cnumpy.core.multiarray\nscalar\n.", "scalar; refused"),
        (b"\x80\x04cnumpy.core.multiarray\n_reconstruct.__globals__\n.", "refused"),
        (pickle.dumps(Touch("made by a pickle"), 2), "mkdir; refused"),
        (b"", "EOFError"),
        (batch(pixels=3071), "3071"),
        (archives.py2_dict(labels=archives.py2_list([b"K\x01"])), "data"),
        (batch(labels=b"K\x0a"), "0 to 10: expected 0 to 9"),
        (batch(labels=b"K\x01K\x02"), "2 labels"),
        (None, "data_batch_3"),
    ],
)
def test_batches_of_cifar_that_are_none(tmp_path, monkeypatch, data, said):
    monkeypatch.chdir(tmp_path)
    members, _ = archives.cifar10_members(1, np.random.default_rng(0))
    if data is None:
        del members["cifar-10-batches-py/data_batch_3"]
    else:
        members["cifar-10-batches-py/data_batch_1"] = data
    archives.tar_gz(tmp_path / CIFAR, members)
    with pytest.raises(UserError) as error:
        download.prepare("CIFAR10", tmp_path, tmp_path, checksum=False)
    assert said in str(error.value) and "CIFAR10" in str(error.value) and str(error.value) == one_line(error.value)
    assert sorted(os.listdir(tmp_path)) == [CIFAR, "cifar10"] and os.listdir("cifar10") == [".lock"]


@pytest.mark.parametrize(
    "file, shape",
    [("images", (2, 28, 29)), ("images", (2, 28, 27)), ("images", (2,)), ("labels", (9,)), ("labels", (2, 28, 28))],
)
def test_idx_files_of_other_sizes(tmp_path, file, shape):
    archives.make("MNIST", tmp_path)
    with gzip.open(tmp_path / f"t10k-{file}-idx{3 if file == 'images' else 1}-ubyte.gz", "wb") as gz:
        gz.write(struct.pack(f">{1 + len(shape)}i", 2048 + len(shape), *shape) + bytes(2 * 28 * 28))
    refused(lambda: mnist.read(tmp_path), f"t10k-{file}")


def test_mat_without_labels(tmp_path):
    archives.make("SVHN", tmp_path)
    savemat(tmp_path / "test_32x32.mat", {"X": np.zeros((32, 32, 3, 4), np.uint8)})
    refused(lambda: svhn.read(tmp_path), "test_32x32.mat", "'y'")


@pytest.mark.parametrize(
    "add, said",
    [
        (("train/n00500004/images/x.JPEG", b"\xff\xd8 no image"), "x.JPEG"),
        (("train/n99999999/images/y.JPEG", b""), "n99999999"),
        (("val/images/val_99.JPEG", b""), "val_99.JPEG"),
        (("val/images/val_0.JPEG", archives.picture_file(np.zeros((64, 63, 3), np.uint8))), "shape"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_members_of_a_zip_that_do_not_fit(tmp_path, add, said):
    archives.make("TinyImageNet", tmp_path)
    with zipfile.ZipFile(tmp_path / ZIP, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tiny-imagenet-200/" + add[0], add[1])
    refused(lambda: tinyimagenet.read(tmp_path), ZIP, said)


@pytest.mark.parametrize(
    "name, jpeg, said",
    [
        ("val_00000009.JPEG", b"no image", "val_00000009"),
        ("val_00000010.JPEG", archives.picture_file(np.zeros((64, 64, 3), np.uint8)), "IndexError"),
        ("val_x.JPEG", b"", "'x'"),
        (None, b"", "8 images, but the devkit has 9 labels"),
    ],
)
def test_images_of_imagenet_that_do_not_fit(tmp_path, name, jpeg, said):
    archives.make("ImageNet", tmp_path)
    archives.devkit(tmp_path / "ILSVRC2012_devkit_t12.tar.gz", sorted(archives.WNIDS), [1, 2, 3, 4], [1] * 9)
    with tarfile.open(tmp_path / "ILSVRC2012_img_val.tar", "a") as tar:
        if name is not None:
            archives.add(tar, name, jpeg)
    refused(lambda: imagenet.read(tmp_path), "ILSVRC2012_img_val.tar", said)


def test_imagenet_devkit_that_does_not_fit(tmp_path):
    archives.make("ImageNet", tmp_path)
    path, wnids = tmp_path / "ILSVRC2012_devkit_t12.tar.gz", sorted(archives.WNIDS)
    archives.devkit(path, wnids, [1, 2, 3, 4], [1, 2, 5] + [1] * 5)  # 5 is the inner node
    refused(lambda: imagenet.read(tmp_path), "devkit", "5")
    archives.devkit(path, wnids[:3], [1, 2, 3], [1] * 8)
    refused(lambda: imagenet.read(tmp_path), "ILSVRC2012_img_train.tar", "n03000001")


# own datasets in the original repo's layout


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
    "image is a group": (in_file(lambda file, id: make_group(file, id + "/image")), "is a group"),
    "id is an array": (in_file(lambda file, id: replace(file, id, np.zeros(3))), "is broken"),
    "label not one-hot": (in_file(lambda file, id: replace(file, id + "/label", [1.0, 1.0])), "[1.0, 1.0]"),
    "label all zero": (in_file(lambda file, id: replace(file, id + "/label", [0.0, 0.0])), "[0.0, 0.0]"),
    "label of another size": (in_file(lambda file, id: replace(file, id + "/label", [0, 1, 0])), "one-hot"),
    "label a number": (all_labels(1), "one-hot"),
    "label NaN": (in_file(lambda file, id: replace(file, id + "/label", [np.nan, 0])), "[nan, 0.0]"),
    "label text": (in_file(lambda file, id: replace(file, id + "/label", "cat")), "one-hot"),
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
    **{
        f"{change.__name__}, an image": (in_file(lambda file, id, change=change: change(file, id + "/image")), said)
        for change, said in ELSEWHERE[1:]
    },
    "external link": (in_file(lambda file, id: replace(file, id, h5py.ExternalLink("x.hdf5", "/"))), "link"),
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
