"""Fetch the archives of datasets, verify them, and pack each dataset into datasets/<name>/data.hdf5.

    python download.py --dataset MNIST Fashion SVHN CIFAR10 TinyImageNet Digits
    python download.py --dataset ImageNet --archive_dir DIR          # three files that you fetch yourself
    python download.py --dataset NAME --image_dir DIR --image_size 64 64    # DIR/<class>/<image>, your own dataset

Your images are converted to 8-bit RGB, with transparent parts on white; images of more than 8 bits per channel are
refused, except for AVIF and coloured JPEG 2000, which are reduced to 8 bits. Packed datasets are skipped. An
interrupted download continues where it stopped.
"""

import fcntl
import hashlib
import os
import time

import requests
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from urllib3.exceptions import ConnectTimeoutError, HTTPError, NameResolutionError, NewConnectionError
from urllib3.util import Retry

import datasets
from command import ArgumentParser, UserError, one_line, run, sync, within
from datasets import hdf5
from datasets.folder import class_folders, id_of, list_splits, read

TIMEOUT = 60.0  # seconds without a byte after which to give up a mirror
RETRY = Retry(
    2,
    read=0,  # a silent mirror is given up after one timeout
    backoff_factor=0.5,
    status_forcelist=(429, 500, 502, 503, 504),
    raise_on_status=False,
    respect_retry_after_header=False,  # it may be hours
)
TURNS = 10  # rounds over all mirrors, as long as each round makes progress
SLOW_AFTER, SLOW_RATE = 20.0, 100e3  # seconds, bytes/s: after this time a slower mirror is given up
PART, BLOCK, RECEIVED = ".part", 1 << 20, 1 << 16  # suffix; bytes per read of a file, and of a connection
NO_CONNECTION = "no connection"
BAR = {"disable": None, "leave": False}  # of tqdm: only draw on a terminal


class Refused(Exception):
    """A mirror is too slow, or does not have the right file: try the next one."""


def pack_once(folder, make):
    """Call make(), in one process at a time, unless `folder` has a packed dataset; returns whether it was called."""
    if hdf5.is_packed(folder):
        return False
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, ".lock"), "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that uses {folder}")
            fcntl.flock(file, fcntl.LOCK_EX)
        if hdf5.is_packed(folder):  # another process packed it while we waited
            return False
        make()
    return True


def kind_of(text):
    """Return the kind of a hash in hexadecimal: sha256 or md5."""
    return "md5" if len(text) == 32 else "sha256"


def hash_file(path, kind):
    """Return the hash of a file in hexadecimal; kind: sha256 or md5."""
    digest, name = hashlib.new(kind, usedforsecurity=False), os.path.basename(path)
    with (
        open(path, "rb") as raw,
        tqdm.wrapattr(raw, "read", total=os.path.getsize(path), desc=f"verify {name}", **BAR) as file,
    ):
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def verify(dataset, path, expected, checksum):
    """Return the hash of an archive. If it is not the expected one, raise UserError, or without checksum print it."""
    size, right = expected
    kind = kind_of(right)
    found = hash_file(path, kind)
    if found != right:
        mismatch = f"{path} has {size_of(path)} bytes and {kind} {found}, expected {size} bytes and {right}"
        if checksum:
            raise UserError(f"{mismatch}: replace it, or run download.py --dataset {dataset} with --no_checksum")
        print(f"warning: {mismatch}")
    return found


def size_of(path):
    """Return the size of a file in bytes, 0 if it does not exist."""
    return os.path.getsize(path) if os.path.exists(path) else 0


def fetch(dataset, urls, path, expected, checksum, timeout=TIMEOUT):
    """Fetch the expected file from one of the mirrors `urls` to `path`, continue path.part, and return the hash.

    Raises ConnectionError if all mirrors fail.
    """
    part, name, (size, right) = path + PART, os.path.basename(path), expected
    kind = kind_of(right)
    for turn in range(TURNS):
        made_progress = False
        for url in urls:
            have = size_of(part)
            try:
                if have != size:
                    receive(url, part, size, timeout, may_be_slow=turn > 0 or url == urls[-1])
                found = hash_file(part, kind)
                if found != right and checksum:  # a wrong file, or one that began with the bytes of another
                    mismatch = f"got {size_of(part)} bytes with {kind} {found}, expected {size} bytes with {right}"
                    os.remove(part)
                    raise Refused(mismatch)
            except (requests.RequestException, HTTPError, Refused) as error:
                reason = reason_of(error)
                if reason != NO_CONNECTION:  # likely the same for all mirrors, so it is only in the error below
                    print(f"warning: {url}: {reason}")
                made_progress = made_progress or size_of(part) != have  # or the part was wrong, and is removed
                continue
            if found != right:
                print(f"warning: {name} from {url} has {kind} {found}, expected {right}")
            sync(part)
            os.replace(part, path)
            return found
        if not made_progress:
            break
    raise ConnectionError(
        f"cannot download {name} ({one_line(reason, 60)}): check the network, or get the file elsewhere, put it in "
        f"{os.path.dirname(path)}, and run download.py --dataset {dataset} again"
    )


def reason_of(error):
    """Return why a mirror failed, in a few words."""
    cause = error.args[0] if error.args else error
    cause = getattr(cause, "reason", None) or cause  # the error behind urllib3's retries
    cause = getattr(cause, "original_error", None) or cause  # the error behind a proxy's
    if isinstance(cause, NewConnectionError | NameResolutionError | ConnectTimeoutError):
        return NO_CONNECTION
    if isinstance(error, requests.HTTPError):
        return f"status {error.response.status_code} {error.response.reason}"
    return f"{type(error).__name__}: {one_line(cause, 100)}"


def receive(url, part, size, timeout, may_be_slow):
    """Append the rest of the file `url` to the file `part`; size: total bytes, for the progress bar.

    Raises Refused, or an error of requests or urllib3.
    """
    have = size_of(part)
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    with requests.Session() as session:
        for scheme in ("http://", "https://"):
            session.mount(scheme, HTTPAdapter(max_retries=RETRY))
        limits = min(timeout, 10), min(timeout, 86400)  # seconds to connect, and between two bytes
        with session.get(url, headers=headers, stream=True, timeout=limits) as response:
            if response.status_code == 416:  # the mirror's file is shorter than `part`, so it is another file
                os.remove(part)
            response.raise_for_status()
            if response.headers.get("Content-Type", "").startswith("text/html"):
                raise Refused("a web page (text/html) instead of the file")
            start = have if response.status_code == 206 else 0
            bar = {"total": size, "initial": start, "desc": os.path.basename(part).removesuffix(PART), **BAR}
            with open(part, "ab" if start else "wb") as file, tqdm.wrapattr(response.raw, "read", **bar) as raw:
                began, received = time.monotonic(), 0
                while block := raw.read(RECEIVED):
                    file.write(block)
                    received += len(block)
                    seconds = time.monotonic() - began
                    if not may_be_slow and seconds > SLOW_AFTER and received < SLOW_RATE * seconds:
                        raise Refused(f"only {received / seconds / 1e3:.0f} kB/s: trying the next mirror")


def find_archives(name, module, folder, archive_dir, mirror, checksum, timeout):
    """Fetch missing archives of a dataset and verify all of them.

    Returns their folder, the archives that were fetched, and the name and hash of each archive with another hash, which
    --no_checksum accepts.
    """

    def missing_in(folder):
        return [file for file in module.FILES if not os.path.isfile(os.path.join(folder, file))]

    if archive_dir is not None:
        of_name = os.path.join(archive_dir, name.lower())
        folder = archive_dir if missing_in(of_name) else of_name
        if missing_in(folder):
            files = " ".join(missing_in(folder))
            raise UserError(f"{name}: {folder} lacks {files}, and {of_name} does not have all archives")
    missing = missing_in(folder)
    mirrors = ([mirror] if mirror else []) + list(module.MIRRORS)
    if missing and not mirrors:
        raise UserError(
            f"{name} needs {' '.join(missing)}: get them from https://image-net.org, which asks you to log in and "
            f"accept non-commercial research terms, put them in {folder} or give their folder as --archive_dir DIR, "
            f"and run download.py --dataset {name} again"
        )
    others = []
    for file, expected in module.FILES.items():
        path = os.path.join(folder, file)
        if file in missing:
            found = fetch(name, [base.rstrip("/") + "/" + file for base in mirrors], path, expected, checksum, timeout)
        else:
            found = verify(name, path, expected, checksum)
        if found != expected[1]:
            others.append(f"{file} {kind_of(found)} {found[:12]}")
    return folder, missing, others


def prepare(
    name, data_dir=datasets.DATA_DIR, archive_dir=None, mirror=None, checksum=True, keep_archives=False, timeout=TIMEOUT
):
    """Fetch and pack the known dataset `name` unless it is packed, and print a line about it.

    Raises UserError for a mistake of the user, OSError for an error of the network or the disk.
    """
    folder, module = datasets.folder_of(name, data_dir), datasets.module_of(name)

    def fetch_and_pack():
        archives, fetched, others = find_archives(name, module, folder, archive_dir, mirror, checksum, timeout)
        made_from = f"other archives than the original: {', '.join(others)}" if others else "the original archives"
        pack(name, folder, lambda: module.read(archives), {"made_from": made_from})
        done = () if others or keep_archives else fetched  # an archive that was there before is the user's
        for path in [os.path.join(folder, file) for file in (*done, *(file + PART for file in module.FILES))]:
            if os.path.exists(path):
                os.remove(path)

    if not pack_once(folder, fetch_and_pack):
        print(f"{name} is already packed: {folder}/{hdf5.DATA}")


def prepare_folder(
    name, image_dir, test_image_dir=None, image_size=None, skip_broken=False, data_dir=datasets.DATA_DIR
):
    """Pack image_dir/<class>/<image> as the user's own dataset `name`, or check that it was packed from there."""
    folder = datasets.folder_of(name, data_dir)
    origin = {
        "--image_dir": os.path.realpath(image_dir),
        "--test_image_dir": os.path.realpath(test_image_dir) if test_image_dir is not None else None,
        "--image_size": list(image_size) if image_size is not None else None,
    }
    if name in datasets.NAMES:
        raise UserError(f"--image_dir packs a dataset of your own: give it another name than {name}")

    def read_and_pack():
        check_no_data(folder)
        pack(name, folder, lambda: read(image_dir, test_image_dir, image_size, skip_broken), origin)
        print("trainer.py flips and crops these images at random; digits and signs need --augment crop or --no_augment")

    if not hdf5.is_packed(folder) or hdf5.read_origin(folder).get("--image_dir") != origin["--image_dir"]:
        class_folders(image_dir)  # raises UserError for a wrong path, before the dataset's folder is made
    if not pack_once(folder, read_and_pack):
        check_origin(name, folder, origin)
        check_files(name, folder, image_dir, test_image_dir)
        print(f"{name} is already packed: {folder}/{hdf5.DATA}")


def check_no_data(folder):
    """Raise UserError if `folder` has data that download.py did not pack."""
    for file in datasets.own.DATA_FILES:
        path = os.path.join(folder, file)
        if os.path.exists(path):
            raise UserError(f"{path} is damaged or was not packed by download.py: delete it, or choose another name")


def check_files(name, folder, image_dir, test_image_dir):
    """Raise UserError if the images that `folder` was packed from are not those in the folders now."""
    if not (os.path.isdir(image_dir) and os.path.isdir(test_image_dir or image_dir)):  # the images were deleted
        return

    def file_id(id):
        return id if test_image_dir else id.partition("/")[2]  # without the split, which follows from all files

    packed = {file_id(id) for split in hdf5.open_packed(folder, name) for id in split.ids}
    skipped = set(hdf5.read_origin(folder).get("skipped", []))
    packed_at = os.path.getmtime(os.path.join(folder, hdf5.DATA))

    def is_newer(path):
        stat = os.stat(path)  # ctime: a file that was moved here keeps its old time of modification
        return max(stat.st_mtime, stat.st_ctime) > packed_at

    _, *splits = list_splits(image_dir, test_image_dir, lambda p: os.path.realpath(p) not in skipped or is_newer(p))
    tops = image_dir, test_image_dir or image_dir
    now = {file_id(id_of(path, split, tops[split])): path for split in (0, 1) for path, _ in splits[split]}
    changed = {id for id in packed & now.keys() if is_newer(now[id])}
    found = {"more": now.keys() - packed, "fewer": packed - now.keys(), "changed": changed}
    changes = [f"{len(ids)} {word}, such as {min(ids)}" for word, ids in found.items() if ids]
    if changes:
        raise UserError(
            f"{image_dir} has changed since {name} was packed from {len(packed)} images: {' and '.join(changes)}; "
            f"delete {folder}/{hdf5.DATA} to pack it again, or choose another name"
        )


def check_origin(name, folder, origin):
    """Raise UserError if `folder` was packed with other flags."""

    def words(value):
        return " ".join(map(str, value)) if isinstance(value, list) else value or "none"

    packed = hdf5.read_origin(folder)
    for flag, value in origin.items():
        if packed.get(flag) != value:
            raise UserError(
                f"{name} was packed with {flag} {words(packed.get(flag))}, not {words(value)}: delete "
                f"{folder}/{hdf5.DATA} to pack it again, or choose another name"
            )


def load_splits(name, data_dir, validation=None, may_fetch=True):
    """Return (train, test) of a dataset; if it is missing and may be downloaded without asking, prepare it first."""
    if may_fetch and datasets.module_of(name).FETCHED_ON_FIRST_USE and not datasets.is_prepared(name, data_dir):
        print(f"{name} is not in {data_dir}: preparing it first")
        prepare(name, data_dir)
    return datasets.create_default_splits(name, data_dir, validation=validation)


def pack(name, folder, read, origin):
    """Write the Source that read() returns to `folder`, with its `origin`, and print a summary."""
    began = time.monotonic()
    try:
        source = read()
        with tqdm(total=source.num_images, desc=f"pack {name}", unit=" images", **BAR) as bar:
            hdf5.write(folder, source._replace(origin=origin | (source.origin or {})), bar)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    train, test = hdf5.open_packed(folder, name)
    shape = "JPEG files" if train.encoded else "x".join(str(size) for size in train.image_shape)
    print(
        f"{name}: {len(train)} train + {len(test)} test images of {shape} in {train.num_classes} classes, "
        f"{os.path.getsize(os.path.join(folder, hdf5.DATA)) / 1e6:.1f} MB, packed in {time.monotonic() - began:.1f} s: "
        f"{folder}/{hdf5.DATA}"
    )


def parse_args():
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    names = f"{' '.join(datasets.NAMES)}, or with --image_dir a name of your choice"
    add("--dataset", "--datasets", nargs="+", required=True, metavar="NAME", help=names)
    source = parser.add_mutually_exclusive_group()
    archives = "use the archives in DIR or DIR/<name in lower case>; download and delete nothing"
    source.add_argument("--archive_dir", metavar="DIR", help=archives)
    source.add_argument("--mirror", metavar="URL", help="try URL/<file> before the known mirrors")
    source.add_argument("--image_dir", metavar="DIR", help="pack DIR/<class>/<image> as a dataset of your own")
    add("--test_image_dir", metavar="DIR", help="the same for the test split; default: a fifth of --image_dir")
    size = within(int, low=1)
    add("--image_size", nargs="+", type=size, metavar="H W", help="resize the images of --image_dir; one number: H = W")
    add("--skip_broken", action="store_true", help="print and skip images of --image_dir that cannot be read")
    add("--no_checksum", action="store_true", help="accept archives with another hash, with a warning")
    add("--data_dir", default=datasets.DATA_DIR, metavar="DIR", help="folder of the datasets")
    add("--keep_archives", action="store_true", help="do not delete the archives that this run downloads")
    seconds = within(float, above=0)
    add("--timeout", type=seconds, default=TIMEOUT, help="seconds without data after which to give up a mirror")
    args = parser.parse_args()
    if args.image_size is not None and len(args.image_size) > 2:
        parser.error(f"--image_size {' '.join(map(str, args.image_size))}: expected H W or a single number")
    if args.image_size is not None:
        args.image_size = args.image_size[0], args.image_size[-1]
    fetching = ("archive_dir", "mirror", "no_checksum", "keep_archives", "timeout")
    given = [name for name in parser.names_given() if name in fetching]
    if args.image_dir is None and (args.test_image_dir or args.image_size or args.skip_broken):
        parser.error("--test_image_dir, --image_size and --skip_broken need --image_dir")
    if args.image_dir is not None and len(args.dataset) != 1:
        parser.error(f"--image_dir packs one dataset, but --dataset is {' '.join(args.dataset)}: give one name")
    if given and args.image_dir is not None:
        parser.error(f"--{given[0]} has no effect with --image_dir, which downloads nothing: omit it")
    if given and args.dataset == ["Digits"]:
        parser.error(f"--{given[0]} has no effect on Digits, which is included in scikit-learn: omit it")
    if args.archive_dir is not None and "timeout" in given:
        parser.error("--timeout has no effect with --archive_dir, which downloads nothing: omit it")
    if args.mirror is not None and not args.mirror.startswith(("http://", "https://")):
        parser.error(f"--mirror {args.mirror}: expected a URL that starts with http:// or https://")
    return args


def main():
    args = parse_args()
    if args.image_dir is not None:
        folders = args.image_dir, args.test_image_dir
        prepare_folder(args.dataset[0], *folders, args.image_size, args.skip_broken, args.data_dir)
        return
    for name in args.dataset:  # all names before the first download
        if name not in datasets.NAMES:
            datasets.folder_of(name, args.data_dir)  # raises UserError for a name in another case
            known = " ".join(datasets.NAMES)
            raise UserError(f"dataset {name!r} is none of {known}: for your own images add --image_dir")
    options = args.archive_dir, args.mirror, not args.no_checksum, args.keep_archives, args.timeout
    for name in args.dataset:
        prepare(name, args.data_dir, *options)


if __name__ == "__main__":
    run(main)
