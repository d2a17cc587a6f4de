"""Folders of a user's images: subfolders, splits, broken files, copies, changes."""

import os
import shutil

import archives
import numpy as np
import pytest
from PIL import Image
from scripts import refused

import datasets
from config import derive, parse_training
from datasets import folder, hdf5
import runs
from download import prepare_folder


@pytest.fixture
def photos(tmp_path):
    """photos/{class0,class1}/000.png ... 009.png."""
    archives.write_photos(tmp_path / "photos", (10, 10))
    return tmp_path / "photos"


def pack(photos, **kwargs):
    data_dir = photos.parent / "data"
    prepare_folder("Pets", photos, data_dir=data_dir, **kwargs)
    return datasets.create_default_splits("Pets", data_dir)


def pack_again(photos):
    os.remove(photos.parent / "data" / "Pets" / "data.hdf5")
    return pack(photos)


def test_a_fifth_of_each_class_is_test(tmp_path, capsys):
    numbers = (50, 2, 3, 10, 1, 7, 8)
    archives.write_photos(tmp_path / "photos", numbers)
    train, test = pack(tmp_path / "photos")
    assert "class4" in capsys.readouterr().out  # its single image is in train
    assert np.bincount(test.labels, minlength=7).tolist() == [10, 1, 1, 2, 0, 1, 2]
    assert (np.bincount(train.labels) + np.bincount(test.labels, minlength=7)).tolist() == list(numbers)
    assert {id.split("/", 1)[1] for id in train.ids} & {id.split("/", 1)[1] for id in test.ids} == set()
    assert test.labels.tolist() == sorted(test.labels) and train.ids == sorted(train.ids)
    positions = (0, 8, 10, 12, 13, 18, 29, 30, 40, 46)  # in every run and every version
    assert [id for id in test.ids if "class0" in id] == [f"test/class0/{position:03d}.png" for position in positions]


@pytest.mark.parametrize("numbers, said", [((1, 1, 1), "2 images"), ((3, 0, 4), "class1"), ((5,), "1 class")])
def test_folders_that_are_no_dataset(tmp_path, numbers, said):
    archives.write_photos(tmp_path / "photos", numbers)
    with refused(said, tmp_path / "photos"):
        pack(tmp_path / "photos")
    assert not datasets.is_prepared("Pets", tmp_path / "data")
    with refused("nowhere"):
        prepare_folder("Nothing", tmp_path / "nowhere", data_dir=tmp_path / "data")
    assert not (tmp_path / "data" / "Nothing").exists()


def test_suffixes_are_read_or_counted_in_subfolders_too(photos, capsys):
    os.symlink("nowhere", photos / "class0" / "link.jpg")
    os.symlink(photos / "class1", photos / "class0" / "linked")
    shutil.copy(photos / "class0" / "000.png", photos / "loose.png")
    os.makedirs(photos / "class1" / "puppies" / "small")
    pixels = Image.open(photos / "class0" / "000.png")
    for name, kind in (("0.jfif", "JPEG"), ("1.pjpeg", "JPEG"), ("2.jp2", "JPEG2000"), ("puppies/small/3.tga", "TGA")):
        pixels.save(photos / "class1" / name, kind)
    for name in ("a.HEIC", "b.heic", "c.heif", "notes.txt"):
        (photos / "class1" / name).write_bytes(b"no image")
    labels = {id.partition("/")[2]: label for split in pack(photos) for id, label in zip(split.ids, split.labels)}
    said = capsys.readouterr().out
    assert len(labels) == 24 and labels["class1/puppies/small/3.tga"] == 1
    assert "6 files (2 .heic, 1 .heif, 1 .jpg, 1 .txt, 1 link to a folder)" in said and "loose.png" in said


@pytest.mark.parametrize("names", [("train", "val"), ("train", "single", "test"), ("Training_set", "Testing_set")])
def test_a_folder_of_splits_is_refused_with_the_flags(photos, names):
    for name in names:
        shutil.copytree(photos, photos.parent / "splits" / name)
    top = photos.parent / "splits"
    with refused(f"--image_dir {top}/{names[0]} --test_image_dir {top}/{names[-1]}"):
        folder.list_splits(top)


def test_all_broken_images_are_named_and_left_out_if_wanted(photos, capsys, monkeypatch):
    for name in ("class0/003.png", "class1/007.png"):
        (photos / name).write_bytes(b"broken")
    with refused("2 of 20", "--skip_broken"):
        pack(photos)
    os.makedirs(photos / "class2")
    (photos / "class2" / "0.png").write_bytes(b"broken")
    with refused("class2", "no images"):
        pack(photos, skip_broken=True)
    shutil.rmtree(photos / "class2")
    said = capsys.readouterr().out
    assert "class0/003.png" in said and "class1/007.png" in said
    assert not os.path.exists(photos.parent / "data" / "Pets" / hdf5.DATA)
    for name in ("class0/004.png", "class0/005.png"):
        (photos / name).unlink()
    train, test = pack(photos, skip_broken=True)
    assert np.bincount(train.labels).tolist() == [6, 7]  # of 7 and 9 images that can be read
    assert np.bincount(test.labels).tolist() == [1, 2]
    monkeypatch.chdir(photos)
    prepare_folder("Pets", "../photos", data_dir="../data")  # it knows which images it skipped


def test_a_long_list_of_images_that_were_left_out_is_kept(photos):
    """HDF5 limits attributes to 64 kB."""
    origin = {"--image_dir": str(photos), "skipped": ["x" * 70_000]}
    parts = [(split, np.zeros((1, 2, 2, 3), np.uint8), [split], None) for split in (0, 1)]
    hdf5.write(str(photos), hdf5.Source(["a", "b"], (2, 2, 3), 2, iter(parts), origin))
    assert hdf5.read_origin(str(photos)) == origin


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path):
    """Its images would be missing without a word."""
    with pytest.raises(FileNotFoundError):
        folder.find_files(tmp_path / "gone")


def test_images_in_both_splits_are_counted(photos, capsys):
    for inside in (photos / ".." / "photos", photos / "class1"):
        with refused("--test_image_dir", inside):
            pack(photos, test_image_dir=inside)
    shutil.copytree(photos, photos.parent / "test")
    shutil.copytree(photos / "class0", photos / "class2")  # without a test image
    for path in (photos / "class2").iterdir():
        Image.fromarray(np.full((12, 10, 3), int(path.stem), np.uint8)).save(path)
    (photos.parent / "test" / "class0" / "000.png").unlink()
    pack(photos, test_image_dir=photos.parent / "test")
    assert "19 of 19" in capsys.readouterr().out
    shutil.rmtree(photos.parent / "test")
    pack(photos, test_image_dir=photos.parent / "test")
    assert "already packed" in capsys.readouterr().out


def test_a_folder_that_changed_is_named(photos):
    pack(photos)
    shutil.copytree(photos / "class1", photos / "wolf")
    (photos / "class0" / "005.png").unlink()
    os.utime(photos / "class1" / "002.png", (2e9, 2e9))  # written again
    with refused("10 more", "wolf/", "1 fewer", "class0/005.png", "1 changed", "class1/002.png", "delete"):
        pack(photos)


def test_a_photo_that_an_older_file_replaced_is_named(photos):
    shutil.copy(photos / "class0" / "000.png", photos.parent / "older.png")
    os.utime(photos.parent / "older.png", (1e9, 1e9))
    pack(photos)
    os.replace(photos.parent / "older.png", photos / "class1" / "002.png")
    with refused("1 changed", "class1/002.png"):
        pack(photos)


def test_a_mistyped_folder_of_a_packed_dataset_is_named_alone(photos):
    pack(photos)
    with refused("other is not a folder") as error:
        pack(photos.parent / "other")
    assert "delete" not in str(error.value)


def test_an_image_that_moved_from_training_to_test_is_named(photos):
    archives.write_photos(photos.parent / "test", (2, 2))
    pack(photos, test_image_dir=photos.parent / "test")
    os.rename(photos / "class0" / "005.png", photos.parent / "test" / "class0" / "005.png")
    with refused("1 more", "test/class0/005.png", "1 fewer", "train/class0/005.png", "delete"):
        pack(photos, test_image_dir=photos.parent / "test")


def test_a_run_knows_a_folder_that_was_packed_again_with_other_images(photos):
    """The numbers are the same, but images that it was trained on may be test images now."""
    before = pack(photos)
    os.rename(photos / "class0" / "005.png", photos / "class1" / "a.png")
    os.rename(photos / "class1" / "005.png", photos / "class0" / "a.png")
    now = pack_again(photos)
    assert [len(split) for split in before] == [len(split) for split in now]
    runs.check_data("RUN", runs.describe_data(*before), *before)
    with refused("RUN was trained on other data", "images or labels of Pets"):
        runs.check_data("RUN", runs.describe_data(*before), *now)


def test_a_run_knows_photos_that_changed_under_the_same_names(photos):
    before = pack(photos)
    os.replace(photos / "class0" / "003.png", photos / "class0" / "004.png")
    shutil.copy(photos / "class0" / "004.png", photos / "class0" / "003.png")
    now = pack_again(photos)
    assert [split.ids for split in before] == [split.ids for split in now]
    with refused("RUN was trained on other data", "images or labels of Pets"):
        runs.check_data("RUN", runs.describe_data(*before), *now)


def test_a_damaged_file_is_named_with_the_remedy(photos):
    pack(photos)
    os.truncate(photos.parent / "data" / "Pets" / "data.hdf5", 5000)
    with refused("id.txt", "data.hdf5 is damaged", "delete"):
        datasets.create_default_splits("Pets", photos.parent / "data")
    with refused("data.hdf5 is damaged or was not packed by download.py", "delete it"):
        pack(photos)


def test_another_way_of_packing_is_refused(photos, monkeypatch):
    archives.write_photos(photos.parent / "others", (5, 5))
    packed, others = photos.parent / "data" / "Pets" / "data.hdf5", photos.parent / "others"
    first = pack(photos, image_size=[8, 6])[0].image_shape
    monkeypatch.chdir(photos.parent)
    prepare_folder("Pets", "others/../photos/", image_size=(8, 6), data_dir="data")  # the same folder
    for args, said in (
        ((photos, None, [16, 6]), "--image_size 8 6, not 16 6"),
        ((photos, None, None), "--image_size 8 6, not none"),
        ((others, None, [8, 6]), f"--image_dir {photos}, not {others}"),
        ((photos, "others", [8, 6]), f"--test_image_dir none, not {others}"),
    ):
        with refused(said, f"delete {packed}"):
            prepare_folder("Pets", *args, data_dir=photos.parent / "data")
    assert first == (8, 6, 3)
    os.remove(packed)
    assert pack(photos, image_size=[16, 6])[0].image_shape == (16, 6, 3)


@pytest.mark.parametrize("place", ["class1/caf\udce9.png", "caf\udce9/0.png", "class1/a\nb.png"])
def test_a_name_that_cannot_be_an_id(photos, place):
    (photos / place).parent.mkdir(exist_ok=True)
    os.rename(photos / "class0" / "000.png", photos / place)
    name = place.removeprefix("class1/").removesuffix("/0.png")
    with refused("rename", repr(os.fsencode(name))[2:-1]):
        pack(photos)


def test_photographs_are_flipped_unless_flags_say_no_and_few_large_ones_get_a_small_network(photos):
    train, _ = pack(photos, image_size=(70, 70))
    for flags, augment in (((), "flip+crop"), (("--no_augment",), None), (("--augment", "crop"), "crop")):
        config = derive(parse_training(["--dataset", "Pets", *flags])[0], train)
        assert (config.augment, config.model) == (augment, "resnet18")


@pytest.mark.parametrize("scale, warned", [(255, True), (-255, True), (1, False)])
def test_own_floats_of_a_range_that_networks_learn_badly_from_are_named(scale, warned, tmp_path, capsys):
    """And the mark that some editors write before the first id is none of its letters."""
    images = np.linspace(0, scale, 10 * 12, dtype=np.float32).reshape(10, 4, 3, 1)
    ids = [str(i) for i in range(10)]
    archives.write_own(tmp_path / "Mine", ids, images, np.eye(2)[np.arange(10) % 2])
    (tmp_path / "Mine" / "id.txt").write_text("\n".join(ids), encoding="utf-8-sig")
    train, test = datasets.create_default_splits("Mine", str(tmp_path))
    assert sorted(train.ids + test.ids) == ids
    assert ("warning" in capsys.readouterr().out) == warned


def test_many_own_ids_are_read_again_only_if_something_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.own, "MANY_IDS", 10)
    images, ids = np.random.default_rng(0).random((10, 4, 3, 1), np.float32), [str(i) for i in range(10)]
    folder = tmp_path / "Mine"

    def same_as(images):
        splits = datasets.create_default_splits("Mine", str(tmp_path))
        found = {id: image for split in splits for id, image in zip(split.ids, split.images())}
        return all(np.array_equal(found[id], image) for id, image in zip(ids, images))

    archives.write_own(folder, ids, images, np.eye(2)[np.arange(10) % 2])
    (folder / "data.hy.cache.npz.123.part").write_text("of a process that was killed")
    assert same_as(images)
    assert sorted(os.listdir(folder)) == ["data.hy", "data.hy.cache.npz", "id.txt"]
    with monkeypatch.context() as patch:
        patch.delattr(datasets.own, "read_examples")
        assert same_as(images)
    archives.write_own(folder, ids, 1 - images, np.eye(2)[np.arange(10) % 2])
    assert same_as(1 - images)
    (folder / "id_train.txt").write_text("0\n1\n2\n3\n")
    (folder / "id_test.txt").write_text("4\n5\n")
    monkeypatch.setattr(datasets.own, "MANY_IDS", 5)
    for left in (b"", b"broken", b""):
        assert [len(split) for split in datasets.create_default_splits("Mine", str(tmp_path))] == [4, 2]
        (folder / "data.hy.cache.npz").write_bytes(left)
