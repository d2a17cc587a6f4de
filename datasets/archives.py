"""How archives are read that nobody vouches for: streamed, never extracted, with a bound on everything they claim.

What is wrong in one ends in a UserError that names the archive and the member; only errors of the disk pass through.
"""
import contextlib
import gzip
import io
import os
import stat
import struct
import tarfile
import zipfile
import zlib

import numpy as np

from datasets.errors import UserError, WorldError, one_line

MAX_PIXELS = 100_000_000                                                # the largest image of ImageNet has 61 million


@contextlib.contextmanager
def refusing(path, member=None):
    """Turn whatever parsing `path` (or a member of it) raises into a UserError; keep errors of the disk as they are."""
    try:
        yield
    except (UserError, WorldError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:      # parsers raise OSErrors without a number
            raise
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


def check_tar_end(file, path):
    """Raise UserError unless the file ends as a tar does, in zeros: one cut between two members looks whole otherwise."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - 1024))
    if file.read().strip(b"\0"):
        raise UserError(f"{path} is cut short: it does not end as a tar does")
    file.seek(0)


def tar_files(file, path, limit):
    """Yield (name, stream) of each regular file of the tar stream `file`, each of at most `limit` bytes, in order.

    Raises UserError for links, devices, names that lead out of the archive and members that are too big.
    """
    with refusing(path), tarfile.open(fileobj=file, mode="r|", bufsize=1 << 20) as tar:
        for member in tar:
            check_name(member.name, path)
            tar.members.clear()                                         # or the list of a million members stays
            if member.isdir():
                continue
            if not member.isreg():
                raise UserError(f"{path}, member {member.name!r} is a link or a device; refused")
            if member.size > limit:
                raise UserError(f"{path}, member {member.name!r} claims {member.size} bytes, more than {limit}; refused")
            yield member.name, tar.extractfile(member)


def tar_gz_files(path, limit, total):
    """Yield (name, stream) as tar_files does, of a tar.gz of at most `total` bytes unpacked."""
    with refusing(path), gzip.open(path) as file:
        yield from tar_files(Bounded(file, total, path), path, limit)


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
    Nothing is read before every element was found to unpack to at most `limit` bytes in all.
    """
    from scipy.io import loadmat, whosmat
    with refusing(path):
        check_mat_size(file, path, limit)
        file.seek(0)
        found = {name: (shape, kind) for name, shape, kind in whosmat(file)}
        for name, is_right in shapes.items():
            if name not in found:
                raise UserError(f"{path} has no variable {name}, only {', '.join(found) or 'none'}")
            if not is_right(*found[name]):
                shape, kind = found[name]
                raise UserError(f"{path}: variable {name} is {kind} of shape {shape}: that is not this dataset's")
        file.seek(0)
        return loadmat(file, variable_names=list(shapes), squeeze_me=False)


def check_mat_size(file, path, limit):
    """Raise UserError unless the elements of a MATLAB v5 file are whole and unpack to at most `limit` bytes."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    header = file.read(128)
    if header[126:128] not in (b"IM", b"MI") or header[124:126] not in (b"\x00\x01", b"\x01\x00"):
        raise UserError(f"{path} is not a MATLAB v5 file")
    order = "<" if header[126:128] == b"IM" else ">"
    unpacked = 0
    while file.tell() < size:
        kind, length = struct.unpack(order + "II", file.read(8))
        if kind not in (14, 15) or length > size - file.tell():
            raise UserError(f"{path} is cut short or no MATLAB v5 file: an element of type {kind} claims {length} bytes")
        end = file.tell() + length
        inflate = zlib.decompressobj()
        while kind == 15 and file.tell() < end:                         # 15: a zlib stream around an element
            data = file.read(min(1 << 16, end - file.tell()))
            while data:
                unpacked += len(inflate.decompress(data, 1 << 20))
                if unpacked > limit:
                    raise UserError(f"{path} unpacks to more than {limit} bytes; refused")
                data = inflate.unconsumed_tail
        file.seek(end)


def open_image(data, path, member):
    """Return the JPEG or PNG file `data` as a PIL image, not decoded yet. Raises UserError if it is none or too big."""
    from PIL import Image
    with refusing(path, member):
        image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG"))
        if image.width * image.height > MAX_PIXELS:
            raise UserError(f"{path}, member {member} claims {image.width}x{image.height} pixels; refused")
    return image


def decode_rgb(data, path, member):
    """Return the JPEG or PNG file `data` (gray, CMYK or RGB) as uint8 [h, w, 3]."""
    with refusing(path, member):
        return np.asarray(open_image(data, path, member).convert("RGB"))
