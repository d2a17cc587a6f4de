"""Read image files as 8-bit RGB: upright, with transparent parts on white."""

import contextlib
import io
import logging
import warnings

import numpy as np
from PIL import Image, ImageChops

from command import UserError, reading

ORIENTATION, BITS_PER_SAMPLE = 0x0112, 0x0102  # tags of EXIF and TIFF
TURNS = {  # orientation: the operation that makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Image.MAX_IMAGE_PIXELS = 1 << 28  # Pillow refuses twice as many; its own limit is too small for some phones
logging.getLogger("PIL").setLevel(logging.CRITICAL)  # our errors are enough
warnings.filterwarnings("ignore", module="PIL")


@contextlib.contextmanager
def open_image(file, name):
    """Open an image file, a path or a stream of bytes; Pillow decodes it when its pixels are needed.

    Raises UserError, with `name` for the file, if it cannot be read or has more than 8 bits per channel.
    """
    with reading(name, "replace it, or convert it to JPEG or PNG"), Image.open(file) as image:
        # Pillow silently keeps the upper 8 bits of RGB;16, and of a PPM file with values above 255. In a TIFF file
        # with 16 bits in planes it takes each byte for a pixel.
        layouts = [str(tile[3]) for tile in image.tile]
        is_deep = any(";16" in layout and "BGR" not in layout for layout in layouts)
        is_deep |= image.format == "TIFF" and max(image.tag_v2.get(BITS_PER_SAMPLE, [1])) > 8
        is_deep |= image.mode == "RGB" and any(tile[0].startswith("ppm") and tile[3][1] > 255 for tile in image.tile)
        if image.mode[0] in "IF" or is_deep:
            deep = f"more than 8 bits per channel (mode {image.mode})"
            raise UserError(
                f"{name} has {deep}: run `magick IN -depth 8 OUT`, or store floats in data.hdf5 (see README.md)"
            )
        yield image


def turn_of(image):
    """Return the member of TURNS that makes a PIL image upright; None if it is upright."""
    try:
        return TURNS.get(image.getexif().get(ORIENTATION))
    except Exception:  # Pillow raises many errors for broken EXIF data; the pixels can still be read
        return None


def to_rgb(image):
    """Convert a PIL image to RGB, upright, with transparent parts on white."""
    image.load()  # turns TIFF files upright
    turn = turn_of(image)
    # Pillow inverts the CMYK values of every JPEG file, but only files with Adobe's marker store them inverted.
    is_negative = image.mode == "CMYK" and image.format in ("JPEG", "MPO") and "adobe" not in image.info
    if turn is not None:
        image = image.transpose(turn)
    if is_negative:
        image = ImageChops.invert(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getextrema()[3][1] > 0:  # some TGA files declare alpha, but store 0 everywhere
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def load_image(file, name, image_size=None, channels=3):
    """Return an image file as uint8 [h, w, channels]: RGB, or gray as 0.299 R + 0.587 G + 0.114 B.

    Args:
        file, name: as in open_image().
        image_size: (h, w) to resize to, or None.
        channels: 3 or 1.

    Raises:
        UserError, OSError: if the file cannot be read.
    """
    with open_image(file, name) as image:
        image = to_rgb(image)
        if image_size is not None and image.size != tuple(image_size)[::-1]:
            image = image.resize(tuple(image_size)[::-1], Image.Resampling.BILINEAR)
        return np.asarray(image if channels == 3 else image.convert("L")).reshape(image.height, image.width, channels)


def as_jpeg(data, name):
    """Return the bytes of an image file as an upright JPEG file in RGB or gray, unchanged if they are one already.

    Raises UserError, with `name` for the file, if it cannot be read.
    """
    with open_image(io.BytesIO(data), name) as image:
        if image.format == "JPEG" and image.mode in ("L", "RGB") and turn_of(image) is None:
            return data
        buffer = io.BytesIO()
        to_rgb(image).save(buffer, "JPEG", quality=95, subsampling=0)
        return buffer.getvalue()
