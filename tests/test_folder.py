"""Folders of a user's images: subfolders, splits, broken files, copies, changes."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image

import archives
import datasets
from config import derive, parse_training
from datasets import folder, hdf5
from download import prepare_folder
from command import UserError


@pytest.fixture
def photos(tmp_path):
    """photos/{cat,dog}/0.png ... 9.png of 12 by 10 pixels, all different."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        os.makedirs(tmp_path / "photos" / name)
        for i in range(10):
            pixels = rng.integers(0, 256, (12, 10, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    return tmp_path / "photos"


def pack(photos, **kwargs):
    prepare_folder("Pets", photos, data_dir=str(photos.parent / "data"), **kwargs)
    return datasets.create_default_splits("Pets", str(photos.parent / "data"))


def test_subfolders_of_a_class_belong_to_it(photos):
    os.makedirs(photos / "dog" / "puppies" / "small")
    shutil.copy(photos / "cat" / "0.png", photos / "dog" / "puppies" / "small" / "a.png")
    train, test = pack(photos)
    assert len(train) + len(test) == 21
    label = {id.partition("/")[2]: n for split in (train, test) for id, n in zip(split.ids, split.labels)}
    assert label["dog/puppies/small/a.png"] == 1


def test_suffixes_are_read_or_counted(photos, capsys):
    pixels = Image.open(photos / "cat" / "0.png")
    for suffix, kind in (
        (".jfif", "JPEG"),
        (".jpe", "JPEG"),
        (".pjpeg", "JPEG"),
        (".jp2", "JPEG2000"),
        (".tga", "TGA"),
    ):
        pixels.save(photos / "cat" / f"more{suffix}", kind)
    for name in ("a.HEIC", "b.heic", "c.heif", "notes.txt"):
        (photos / "dog" / name).write_bytes(b"no image")
    train, test = pack(photos)
    said = capsys.readouterr().out
    assert len(train) + len(test) == 25 and "2 .heic, 1 .heif" in said and "notes.txt" in said


@pytest.mark.parametrize("names", [("train", "val"), ("test", "train", "val")])
def test_a_folder_of_splits_is_refused_with_the_flags(photos, names):
    for name in names:
        shutil.copytree(photos, photos.parent / "splits" / name)
    with pytest.raises(UserError) as error:
        folder.list_splits(photos.parent / "splits")
    top = photos.parent / "splits"
    assert f"--image_dir {top}/train --test_image_dir {top}/val" in str(error.value)


def test_all_broken_images_are_named_and_left_out_if_wanted(photos, capsys):
    for name in ("cat/3.png", "dog/7.png"):
        (photos / name).write_bytes(b"broken")
    with pytest.raises(UserError, match="2 of 20.*--skip_broken"):
        pack(photos)
    said = capsys.readouterr().out
    assert "cat/3.png" in said and "dog/7.png" in said
    assert not os.path.exists(photos.parent / "data" / "Pets" / hdf5.DATA)
    train, test = pack(photos, skip_broken=True)
    assert len(train) + len(test) == 18
    pack(photos)  # it knows which images it left out


def test_images_in_both_splits_are_counted(photos, capsys):
    with pytest.raises(UserError, match="--test_image_dir"):
        pack(photos, test_image_dir=photos / ".." / "photos")
    shutil.copytree(photos, photos.parent / "test")
    (photos.parent / "test" / "cat" / "0.png").unlink()
    pack(photos, test_image_dir=photos.parent / "test")
    assert "19 of 19" in capsys.readouterr().out


def test_a_folder_that_changed_is_named(photos):
    pack(photos)
    pack(photos)
    shutil.copytree(photos / "dog", photos / "wolf")
    (photos / "cat" / "5.png").unlink()
    with pytest.raises(UserError, match="10 more.*wolf/.*1 fewer.*cat/5.png.*delete"):
        pack(photos)


def test_photographs_are_mirrored_unless_flags_say_no(photos):
    train, _ = pack(photos)
    for flags, augment in (((), "flip+crop"), (("--no_augment",), None), (("--augment", "crop"), "crop")):
        assert derive(parse_training(["--dataset", "Pets", *flags])[0], train).augment == augment


def test_the_default_network_of_few_large_photographs_is_small(photos):
    train, _ = pack(photos, image_size=(70, 70))
    assert derive(parse_training(["--dataset", "Pets"])[0], train).model == "resnet18"


@pytest.mark.parametrize("scale, warned", [(255, True), (1, False)])
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
    assert same_as(images)
    with monkeypatch.context() as patch:
        patch.delattr(datasets.own, "read_examples")
        assert same_as(images)
    archives.write_own(folder, ids, 1 - images, np.eye(2)[np.arange(10) % 2])
    assert same_as(1 - images)
    (folder / "id_train.txt").write_text("0\n1\n2\n3\n")
    (folder / "id_test.txt").write_text("4\n5\n")
    monkeypatch.setattr(datasets.own, "MANY_IDS", 5)
    for _ in range(2):
        assert [len(split) for split in datasets.create_default_splits("Mine", str(tmp_path))] == [4, 2]
        (folder / "data.hy.cache.npz").write_bytes(b"broken")
