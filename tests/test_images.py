"""Image files of many kinds as RGB of 8 bits, and folders of class folders of them as a dataset."""

import os
import struct

import archives
import h5py
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import datasets
import download
from command import UserError
from datasets.images import load_image


def gray(values):
    """uint8 [h, w, 3] of gray values [h, w]."""
    return np.repeat(np.asarray(values, np.uint8)[..., None], 3, axis=-1)


def loaded(path, image=None, **saved):
    """What is read of the image file `path`, where a PIL image, an array or bytes are written first, if given."""
    if isinstance(image, bytes):
        path.write_bytes(image)
    elif image is not None:
        image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        image.save(path, **saved)
    return load_image(str(path), str(path))


DEEP = {
    "png": Image.fromarray(np.full((3, 4), 300, np.uint16)),
    "tif": Image.fromarray(np.full((3, 4), 300, np.int32)),
    "tiff": Image.fromarray(np.full((3, 4), 0.5, np.float32)),
    "pgm": b"P5 1 1 4095\n\1\1",
    "PNG": tf.io.encode_png(np.full((3, 4, 3), 300, np.uint16)).numpy(),
}


@pytest.mark.parametrize("suffix", DEEP)
def test_images_of_more_than_8_bits_are_refused(tmp_path, suffix):
    with pytest.raises(UserError) as error:
        loaded(tmp_path / f"0.{suffix}", DEEP[suffix])
    assert f"0.{suffix}" in str(error.value) and "-depth 8" in str(error.value) and "data.hdf5" in str(error.value)


def test_a_bitmap_of_5_6_and_5_bits_a_color_is_not_one_of_16(tmp_path):
    header = struct.pack("<4I2i2H6I3I", 70, 0, 66, 40, 2, 1, 1, 16, 3, 4, 0, 0, 0, 0, 0xF800, 0x7E0, 0x1F)
    bitmap = b"BM" + header + struct.pack("<2H", 0xF800, 0x1F)
    np.testing.assert_array_equal(loaded(tmp_path / "0.bmp", bitmap), [[[255, 0, 0], [0, 0, 255]]])


STROKE = Image.fromarray(np.array([[[0, 0, 0, alpha] for alpha in (0, 255, 128, 255)]], np.uint8))
PALETTE = Image.fromarray(np.array([[0, 1, 2, 1]], np.uint8)).convert("P")
PALETTE.putpalette([0, 0, 0, 0, 0, 0, 0, 0, 0])
ON_WHITE = gray([[255, 0, 127, 0]])


@pytest.mark.parametrize(
    "image, transparency, shown",
    [
        (STROKE, None, ON_WHITE),
        (STROKE.convert("LA"), None, ON_WHITE),
        (PALETTE, bytes([0, 255, 128]), ON_WHITE),
        (PALETTE, 0, gray([[255, 0, 0, 0]])),
        (np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8), (1, 2, 3), [[[255, 255, 255], [4, 5, 6]]]),
    ],
)
def test_transparent_images_lie_on_white(tmp_path, image, transparency, shown):
    saved = {} if transparency is None else {"transparency": transparency}
    np.testing.assert_array_equal(loaded(tmp_path / "0.png", image, **saved), shown)


# Rows first, as NumPy has them: what an image [h, w, c] that was stored with an EXIF orientation looks like.
SHOWN = {
    1: lambda image: image,
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: image[::-1].swapaxes(0, 1),
    7: lambda image: image[::-1, ::-1].swapaxes(0, 1),
    8: lambda image: image[:, ::-1].swapaxes(0, 1),
    9: lambda image: image,  # means nothing
}
CORNER = np.zeros((16, 24, 3), np.uint8)
CORNER[:8, :8], CORNER[:8, 8:16] = 80, 200


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
@pytest.mark.parametrize("orientation", SHOWN)
def test_images_are_upright(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = loaded(tmp_path / f"0.{suffix}", CORNER, exif=exif)
    np.testing.assert_allclose(found, SHOWN[orientation](CORNER), atol=3)  # JPEG


@pytest.mark.parametrize("orientation, exif", [(6, None), (1, b"Exif\0\0no table")])
def test_broken_exif_spoils_no_photograph(tmp_path, orientation, exif):
    """A tag that Pillow cannot write again beside the orientation, and EXIF that it cannot read."""
    exif = exif or archives.exif(orientation, struct.pack("<HHII", 0x0100, 9, 1, 0xFFFFFFFF))
    found = loaded(tmp_path / "0.jpg", CORNER, exif=exif, dpi=(72, 72), quality=95)
    np.testing.assert_allclose(found, SHOWN[orientation](CORNER), atol=3)


@pytest.mark.parametrize("is_adobe", [True, False])
def test_cmyk_is_the_ink_that_lets_white_through(tmp_path, is_adobe):
    """In flat blocks: red is what cyan and black leave, and so on. Adobe alone stores it inverted, and marks it."""
    ink = np.random.default_rng(0).integers(0, 256, (3, 4, 4), np.uint8).repeat(8, 0).repeat(8, 1)
    left = 255 - ink.astype(np.float64)
    found = loaded(tmp_path / "0.jpg", archives.cmyk_file(ink, is_adobe))
    np.testing.assert_allclose(found, left[..., :3] * left[..., 3:] / 255, rtol=0, atol=3)


# folders


def many_images(folder, numbers):
    """Write numbers[i] images of the gray value i, 4 by 5 pixels, into a class folder each."""
    for label, number in enumerate(numbers):
        os.makedirs(folder / f"class{label}")
        for i in range(number):
            Image.new("L", (5, 4), label).save(folder / f"class{label}" / f"{i:03d}.png")


def test_a_fifth_of_each_class_is_test(tmp_path, capsys):
    numbers = (50, 2, 3, 10, 1, 7, 8)
    many_images(tmp_path / "images", numbers)
    download.prepare_folder("Many", tmp_path / "images", data_dir=tmp_path)
    assert "class4" in capsys.readouterr().out  # its single image is in train
    train, test = datasets.create_default_splits("Many", tmp_path)
    assert np.bincount(test.labels, minlength=7).tolist() == [10, 1, 1, 2, 0, 1, 2]
    assert (np.bincount(train.labels) + np.bincount(test.labels, minlength=7)).tolist() == list(numbers)
    assert {id.split("/", 1)[1] for id in train.ids} & {id.split("/", 1)[1] for id in test.ids} == set()
    assert test.labels.tolist() == sorted(test.labels) and train.ids == sorted(train.ids)
    positions = (0, 8, 10, 12, 13, 18, 29, 30, 40, 46)  # in every run and every version
    assert [id for id in test.ids if "class0" in id] == [f"test/class0/{position:03d}.png" for position in positions]


@pytest.mark.parametrize(
    "numbers, said", [((1, 1, 1), "2 images"), ((3, 0, 4), "class1"), ((5,), "1 class"), ((0, 0), "class0")]
)
def test_folders_that_are_no_dataset(tmp_path, numbers, said):
    many_images(tmp_path / "images", numbers)
    with pytest.raises(UserError) as error:
        download.prepare_folder("Few", tmp_path / "images", data_dir=tmp_path)
    assert said in str(error.value) and str(tmp_path / "images") in str(error.value)
    assert not datasets.is_prepared("Few", tmp_path)


def test_another_way_of_packing_is_refused(tmp_path, monkeypatch):
    many_images(tmp_path / "images", (5, 5))
    many_images(tmp_path / "others", (5, 5))
    packed = tmp_path / "Pets" / "data.hdf5"

    def again(*args):
        download.prepare_folder("Pets", *args, data_dir=tmp_path)
        return packed.stat().st_ino, datasets.create_default_splits("Pets", tmp_path)[0].image_shape

    first = again(tmp_path / "images", None, [8, 6])
    monkeypatch.chdir(tmp_path)
    assert again("others/../images/", None, (8, 6)) == first  # the same folder
    for args, said in (
        ((tmp_path / "images", None, [16, 6]), "--image_size 8 6, not 16 6"),
        ((tmp_path / "images", None, None), "--image_size 8 6, not none"),
        ((tmp_path / "others", None, [8, 6]), f"--image_dir {tmp_path}/images, not {tmp_path}/others"),
        ((tmp_path / "images", "others", [8, 6]), f"--test_image_dir none, not {tmp_path}/others"),
    ):
        with pytest.raises(UserError) as error:
            again(*args)
        assert said in str(error.value) and f"delete {packed}" in str(error.value)
    with h5py.File(packed, "r+") as file:  # as it was written before
        del file.attrs["recipe"]
    assert again(tmp_path / "others", None, [16, 6]) == first
    os.remove(packed)
    assert again(tmp_path / "others", None, [16, 6])[1] == (16, 6, 3)


@pytest.mark.parametrize("place", ["class1/caf\udce9.png", "caf\udce9/0.png", "class1/a\nb.png"])
def test_a_name_that_cannot_be_an_id(tmp_path, place):
    many_images(tmp_path / "images", (5, 5))
    path = tmp_path / "images" / place
    path.parent.mkdir(exist_ok=True)
    os.rename(tmp_path / "images" / "class0" / "000.png", path)
    with pytest.raises(UserError, match="rename") as error:
        download.prepare_folder("Pets", tmp_path / "images", data_dir=tmp_path)
    name = path.name if path.parent.name == "class1" else path.parent.name
    assert repr(os.fsencode(name))[2:-1] in str(error.value)


@pytest.mark.parametrize("name", ["0.bmp", "0.tif"])
def test_an_image_that_does_not_decode_is_named_in_one_line(tmp_path, name, caplog):
    """Of 12 samples per pixel, tag 277 of a TIFF file, Pillow would log a line of its own."""
    Image.new("RGB", (5, 4)).save(tmp_path / name)
    data, tag = (tmp_path / name).read_bytes(), struct.pack("<HHI", 277, 3, 1)
    with pytest.raises(UserError, match=name):
        loaded(tmp_path / name, data.replace(tag + b"\3", tag + b"\14") if name == "0.tif" else b"BM no image")
    assert caplog.records == []
