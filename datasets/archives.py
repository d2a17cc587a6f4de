"""How archives are read that nobody vouches for: streamed, never extracted, with a bound on everything they claim.

What is wrong in one ends in a UserError that names the archive and the member; only errors of the disk pass through.
"""

import contextlib
import errno
import gzip
import io
import os
import stat
import struct
import tarfile
import zipfile
import zlib

import numpy as np

from command import UserError, WorldError, one_line

MAX_PIXELS = 100_000_000  # the largest image of ImageNet has 61 million
ORIENTATION = 0x0112  # the EXIF tag
TURNS = {  # what makes an image upright, by its orientation: names of PIL.Image.Transpose
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


@contextlib.contextmanager
def refusing(path, member=None):
    """Turn whatever parsing `path` (or a member of it) raises into a UserError; keep errors of the disk as they are."""
    try:
        yield
    except (UserError, WorldError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # parsers' own have no number, or
            raise  # come from a seek to a place that cannot be
        where = f"{path}, member {member}" if member else path
        if isinstance(error, MemoryError):
            raise UserError(f"{where} does not fit in memory") from error
        raise UserError(f"{where} is broken: {type(error).__name__}: {one_line(error, 300)}") from error


def check_name(name, path):
    """Raise UserError for a member that would land outside the folder it is unpacked in."""
    if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or name[1:2] == ":" or "\0" in name:
        raise UserError(f"{path}, member {name!r}: the name leads out of the archive; refused")


class Bounded:
    """A stream that raises UserError once more than `limit` bytes were read from it."""

    def __init__(self, file, limit, path):
        self.file, self.left, self.limit, self.path = file, limit, limit, path

    def read(self, size):
        data = self.file.read(size)
        self.left -= len(data)
        if self.left < 0:
            raise UserError(f"{self.path} unpacks to more than {self.limit} bytes; refused")
        return data


class StrictTarInfo(tarfile.TarInfo):
    """Makes a broken header an error: tarfile takes it, or a missing one, for the end of the archive."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # the zeros that end every tar
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"cut short or changed ({error})") from error


def tar_files(file, path, limit):
    """Yield (name, stream) of each regular file of the tar `file`, each of at most `limit` bytes, in order.

    A file that can be sought in is read four times as fast as one that is a stream, such as a gzip file.
    Raises UserError for links, devices, names that lead out of the archive and members that are too big.
    """
    mode = "r|" if isinstance(file, Bounded) else "r:"
    with refusing(path), tarfile.open(fileobj=file, mode=mode, bufsize=1 << 20, tarinfo=StrictTarInfo) as tar:
        for member in tar:
            check_name(member.name, path)
            tar.members.clear()  # or the list of a million members stays
            if member.isdir():
                continue
            if not member.isreg():
                raise UserError(f"{path}, member {member.name!r} is a link or a device; refused")
            if member.size > limit:
                raise UserError(
                    f"{path}, member {member.name!r} claims {member.size} bytes, more than {limit}; refused"
                )
            yield member.name, tar.extractfile(member)


def tar_gz_files(path, limit, total):
    """Yield (name, stream) as tar_files does, of a tar.gz of at most `total` bytes unpacked."""
    with refusing(path), gzip.open(path) as file:
        bounded = Bounded(file, total, path)
        yield from tar_files(bounded, path, limit)
        while bounded.read(1 << 20):  # to the end, where gzip keeps its checksum
            continue


def zip_files(archive, path, limit):
    """Return the ZipInfo of each file of an open ZipFile, each of at most `limit` bytes, in the archive's order."""
    with refusing(path):
        infos = [info for info in archive.infolist() if not info.is_dir()]
        for info in infos:
            check_name(info.filename, path)
            if stat.S_ISLNK(info.external_attr >> 16):
                raise UserError(f"{path}, member {info.filename!r} is a link; refused")
            if info.file_size > limit:
                raise UserError(f"{path}, member {info.filename!r} claims {info.file_size} bytes, more than {limit}")
    return infos


def open_zip(path):
    """Open a zip file. Raises UserError if it is none."""
    with refusing(path):
        return zipfile.ZipFile(path)


def load_mat(file, path, shapes, limit):
    """Return the variables of a MATLAB v5 file that are named in `shapes`, as scipy.io.loadmat gives them.

    file: a seekable binary file. shapes: {name: function of (shape, MATLAB class) that says whether it may be read}.
    SciPy sees nothing before it was unpacked to at most `limit` bytes, and its elements were found to be in order.
    """
    from scipy.io import loadmat, whosmat

    with refusing(path):
        file = unpack_mat(file, path, limit)
        found = {name: (shape, kind) for name, shape, kind in whosmat(file)}
        for name, is_right in shapes.items():
            if name not in found:
                raise UserError(f"{path} has no variable {name}, only {', '.join(found) or 'none'}")
            if not is_right(*found[name]):
                shape, kind = found[name]
                raise UserError(f"{path}: variable {name} is {kind} of shape {shape}: that is not this dataset's")
        return loadmat(file, variable_names=list(shapes))


def unpack_mat(file, path, limit):
    """Return a MATLAB v5 file with its compressed elements (type 15) unpacked, as a binary file. Raises UserError."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    header = file.read(128)
    if header[126:128] not in (b"IM", b"MI") or header[124:126] not in (b"\x00\x01", b"\x01\x00"):
        raise UserError(f"{path} is not a MATLAB v5 file")
    order = "<" if header[126:128] == b"IM" else ">"
    unpacked = io.BytesIO()
    unpacked.write(header)
    while file.tell() < size:
        tag = file.read(8)
        kind, length = struct.unpack(order + "II", tag)
        if kind not in (14, 15) or length > size - file.tell():
            raise UserError(
                f"{path} is cut short or no MATLAB v5 file: an element of type {kind} claims {length} bytes"
            )
        if kind == 14:
            data = tag + file.read(length)
        else:
            data = zlib.decompressobj().decompress(file.read(length), limit + 1)
        if unpacked.tell() + len(data) > limit:
            raise UserError(f"{path} unpacks to more than {limit} bytes; refused")
        check_mat(memoryview(data), order, path)
        unpacked.write(data)
    unpacked.seek(0)
    return unpacked


def check_mat(data, order, path, depth=0):
    """Raise UserError unless `data` is a row of whole elements of known types: SciPy takes their word for it, and dies.
    (Tried without this check: of 200 mutated files of ImageNet's labels one ended in a segmentation fault.)

    An element is type and length, uint32 each, and its bytes, filled up to 8; one of up to 4 bytes has the length in
    the upper half of the type. A matrix (type 14) holds elements: flags with its class, sizes, name, and what depends
    on the class.
    """
    position, elements = 0, []
    while position < len(data):
        kind, length = struct.unpack_from(order + "II", data, position)
        start, step = position + 8, 8 + (length + 7) // 8 * 8
        is_small = kind >> 16 > 0
        if is_small:
            kind, length, start, step = kind & 0xFFFF, kind >> 16, position + 4, 8
        inner = data[start : start + length]
        if (
            kind not in (1, 2, 3, 4, 5, 6, 7, 9, 12, 13, 14, 16, 17, 18)
            or len(inner) < length
            or (is_small and length > 4)
        ):
            raise UserError(f"{path} is broken: an element of type {kind} claims {length} bytes")
        if kind == 14 and length:
            check_mat(inner, order, path, depth + 1)
        elements.append((kind, inner))
        position += step
    if depth > 0:
        check_matrix(elements, order, path, depth)


def check_matrix(elements, order, path, depth):
    """Raise UserError unless [(type, bytes)] are flags, sizes, name and the contents of a cell, struct, char or numeric
    matrix, in the number that its sizes say."""
    kinds, sizes = [kind for kind, _ in elements], [len(inner) for _, inner in elements]
    is_right = kinds[:3] == [6, 5, 1] and sizes[0] == 8 and sizes[1] in range(8, 36, 4) and depth <= 8
    if is_right:
        flags = struct.unpack_from(order + "I", elements[0][1])[0]
        matrix_class, is_complex = flags & 255, flags & 0x800
        shape = np.frombuffer(elements[1][1], order + "i4").tolist()
        count = int(np.prod(shape, dtype=object))
        if matrix_class == 2 and kinds[3:5] == [5, 1] and sizes[3] == 4:  # struct: the length of a name, all names
            length = struct.unpack_from(order + "I", elements[3][1])[0]
            fields = sizes[4] // length if 0 < length <= 64 else 0
            is_right = fields > 0 and kinds[5:] == [14] * (fields * count)
        elif matrix_class == 1:  # cell
            is_right = kinds[3:] == [14] * count
        elif matrix_class == 4:  # char: count is of characters
            is_right = len(kinds) == 4 and kinds[3] in (1, 2, 4, 16, 17, 18) and (sizes[3] >= count)
        else:  # double, single, int8 ... uint64
            item = {1: 1, 2: 1, 3: 2, 4: 2, 5: 4, 6: 4, 7: 4, 9: 8, 12: 8, 13: 8}
            is_right = (
                6 <= matrix_class <= 15
                and not is_complex
                and len(kinds) == 4
                and kinds[3] in item
                and sizes[3] == count * item[kinds[3]]
            )
        is_right = is_right and min(shape) >= 0
    if not is_right:
        raise UserError(f"{path} is broken: a matrix has elements of the types {kinds[:8]} and sizes {sizes[:8]}")


def open_image(data, path, member):
    """Return the JPEG or PNG file `data` as a PIL image, not decoded yet. Raises UserError if it is none or too big."""
    from PIL import Image

    with refusing(path, member):
        image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG"))
        if image.width * image.height > MAX_PIXELS:
            raise UserError(f"{path}, member {member} claims {image.width}x{image.height} pixels; refused")
    return image


def turn_of(image):
    """Return the turn, one of TURNS, that makes a PIL image upright; None if there is none to make."""
    try:
        return TURNS.get(image.getexif().get(ORIENTATION))
    except Exception:  # whatever Pillow stumbles over in broken EXIF data, the picture may be whole
        return None


def upright(image):
    """Return a PIL image turned as its EXIF orientation asks, its values in CMYK with 0 for no ink.

    Pillow inverts the CMYK values of every JPEG file, but only files with Adobe's marker store them inverted.
    """
    from PIL import Image, ImageChops

    image.load()  # where Pillow itself turns TIFF files
    turn = turn_of(image)
    shown = image.transpose(Image.Transpose[turn]) if turn else image
    is_negative = image.mode == "CMYK" and image.format in ("JPEG", "MPO") and "adobe" not in image.info
    return ImageChops.invert(shown) if is_negative else shown


def to_rgb(image):
    """Return a PIL image of 8 bits a channel in RGB, upright, transparent parts on white."""
    from PIL import Image

    image = upright(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def is_plain_jpeg(image):
    """Return whether a PIL image is a JPEG file in RGB or gray that is upright: stored, and decoded, as it is."""
    return image.format == "JPEG" and image.mode in ("L", "RGB") and turn_of(image) is None


def encode_jpeg(image):
    """Return a PIL image in RGB as a JPEG file, bytes: what is stored of a photograph that is no plain JPEG file."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def decode_rgb(data, path, member):
    """Return the JPEG or PNG file `data` as uint8 [h, w, 3], by to_rgb."""
    with refusing(path, member):
        return np.asarray(to_rgb(open_image(data, path, member)))
