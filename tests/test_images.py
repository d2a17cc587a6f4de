"""Image files of many kinds as RGB of 8 bits."""

import struct

import archives
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from scripts import refused

from datasets.images import load_image, open_image


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


def planar_tiff():
    """A TIFF file of 4 by 1 pixels with 16 bits per channel and a plane for each of the three channels."""
    # tag, type, count and value
    entries = [(256, 3, 1, 4), (257, 3, 1, 1), (258, 3, 1, 16), (262, 3, 1, 2), (273, 4, 3, 122)]
    entries += [(277, 3, 1, 3), (278, 3, 1, 1), (279, 4, 3, 134), (284, 3, 1, 2)]
    table = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    places = struct.pack("<6I", 146, 154, 162, 8, 8, 8)  # of the planes, and their bytes
    return struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + table + bytes(4) + places + bytes(24)


DEEP = {
    "png": Image.fromarray(np.full((3, 4), 300, np.uint16)),
    "tiff": Image.fromarray(np.full((3, 4), 0.5, np.float32)),
    "tif": planar_tiff(),
    "ppm": b"P6 4 3 65535 " + bytes(4 * 3 * 6),
    "PPM": b"P3 1 1 300 1 2 3",
    "PNG": tf.io.encode_png(np.full((3, 4, 3), 300, np.uint16)).numpy(),
}


@pytest.mark.parametrize("suffix", DEEP)
def test_images_of_more_than_8_bits_are_refused(tmp_path, suffix):
    with refused(f"0.{suffix}", "-depth 8", "data.hdf5"):
        loaded(tmp_path / f"0.{suffix}", DEEP[suffix])


def test_the_images_of_phones_are_not_too_large(tmp_path):
    Image.new("1", (16320, 12240)).save(tmp_path / "0.png")
    with open_image(tmp_path / "0.png", "0.png") as image:
        assert image.size == (16320, 12240)


@pytest.mark.parametrize("data, shown", [(b"P6 1 1 15 \x0f\5\0", [[[255, 85, 0]]]), (b"P1 2 1 0 1", gray([[255, 0]]))])
def test_ppm_files_of_few_bits_are_read(tmp_path, data, shown):
    np.testing.assert_array_equal(loaded(tmp_path / "0.ppm", data), shown)


def test_a_bitmap_of_5_6_and_5_bits_a_color_is_not_one_of_16(tmp_path):
    header = struct.pack("<4I2i2H6I3I", 70, 0, 66, 40, 2, 1, 1, 16, 3, 4, 0, 0, 0, 0, 0xF800, 0x7E0, 0x1F)
    bitmap = b"BM" + header + struct.pack("<2H", 0xF800, 0x1F)
    np.testing.assert_array_equal(loaded(tmp_path / "0.bmp", bitmap), [[[255, 0, 0], [0, 0, 255]]])


STROKE = Image.fromarray(np.array([[[0, 0, 0, alpha] for alpha in (0, 255, 128, 255)]], np.uint8))
BLACK = Image.fromarray(np.array([[0, 1, 2, 1]], np.uint8)).convert("P")
BLACK.putpalette([0, 0, 0, 0, 0, 0, 0, 0, 0])
COLOURS = BLACK.copy()
COLOURS.putpalette([0, 10, 20, 30, 40, 50, 60, 70, 80])
ON_WHITE = gray([[255, 0, 127, 0]])


@pytest.mark.parametrize(
    "image, transparency, shown",
    [
        (STROKE, None, ON_WHITE),
        (STROKE.convert("LA"), None, ON_WHITE),
        (BLACK, bytes([0, 255, 128]), ON_WHITE),
        (BLACK, 0, gray([[255, 0, 0, 0]])),
        (np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8), (1, 2, 3), [[[255, 255, 255], [4, 5, 6]]]),
        (COLOURS, None, [[[0, 10, 20], [30, 40, 50], [60, 70, 80], [30, 40, 50]]]),
        (Image.fromarray(np.array([[0, 100, 255]], np.uint8)), None, gray([[0, 100, 255]])),
    ],
)
def test_every_mode_becomes_rgb_with_transparent_parts_on_white(tmp_path, image, transparency, shown):
    saved = {} if transparency is None else {"transparency": transparency}
    np.testing.assert_array_equal(loaded(tmp_path / "0.png", image, **saved), shown)


def test_alpha_of_0_everywhere_hides_nothing(tmp_path):
    """As in TGA files whose header says that they have no alpha."""
    pixels = np.array([[[200, 100, 50, 0]]], np.uint8)
    np.testing.assert_array_equal(loaded(tmp_path / "0.png", Image.fromarray(pixels)), pixels[..., :3])


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
    entries = struct.pack("<HHIIHHII", 0x0112, 3, 1, orientation, 0x0100, 9, 1, 0xFFFFFFFF)
    exif = exif or b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4)
    found = loaded(tmp_path / "0.jpg", CORNER, exif=exif, dpi=(72, 72), quality=95)
    np.testing.assert_allclose(found, SHOWN[orientation](CORNER), atol=3)


@pytest.mark.parametrize("is_adobe", [True, False])
def test_cmyk_is_the_ink_that_lets_white_through(tmp_path, is_adobe):
    """In flat blocks: red is what cyan and black leave, and so on. Adobe alone stores it inverted, and marks it."""
    ink = np.random.default_rng(0).integers(0, 256, (3, 4, 4), np.uint8).repeat(8, 0).repeat(8, 1)
    left = 255 - ink.astype(np.float64)
    found = loaded(tmp_path / "0.jpg", archives.cmyk_file(ink, is_adobe))
    np.testing.assert_allclose(found, left[..., :3] * left[..., 3:] / 255, rtol=0, atol=3)


def test_resizing_keeps_a_ramp(tmp_path):
    """Red along the columns, green along the rows, blue level."""
    row, column = np.meshgrid(np.arange(36), np.arange(50), indexing="ij")
    Image.fromarray(np.stack([4 * column, 6 * row, 0 * row + 90], -1).astype(np.uint8)).save(tmp_path / "ramp.png")
    made = load_image(tmp_path / "ramp.png", "ramp.png", (12, 10))
    assert made.shape == (12, 10, 3)
    row, column = np.meshgrid(np.arange(12) * 3 + 1, np.arange(10) * 5 + 2, indexing="ij")  # middles of 3 by 5 pixels
    expected = np.stack([4 * column, 6 * row, 0 * row + 90], -1)
    np.testing.assert_allclose(made[1:-1, 1:-1], expected[1:-1, 1:-1], rtol=0, atol=1)  # rounded


@pytest.mark.parametrize("name", ["0.bmp", "0.tif"])
def test_an_image_that_does_not_decode_is_named_in_one_line(tmp_path, name, caplog):
    """Of 12 samples per pixel, tag 277 of a TIFF file, Pillow would log a line of its own."""
    Image.new("RGB", (5, 4)).save(tmp_path / name)
    data, tag = (tmp_path / name).read_bytes(), struct.pack("<HHI", 277, 3, 1)
    with refused(name, "convert it to JPEG or PNG"):
        loaded(tmp_path / name, data.replace(tag + b"\3", tag + b"\14") if name == "0.tif" else b"BM no image")
    assert caplog.records == []
