"""Fetch the archives of datasets, verify them, and pack each into datasets/<name>/data.hdf5.

    python download.py --dataset MNIST Fashion SVHN CIFAR10 TinyImageNet Digits
    python download.py --dataset ImageNet --archive_dir DIR          # three files that you fetch yourself
    python download.py --dataset NAME --image_dir DIR --image_size 64 64    # DIR/<class>/<image>, as your own dataset

Your images become RGB of 8 bits, with transparent parts on white; images of more bits are refused. A dataset that is
packed already is skipped. A download that was cut off continues where it stopped.
"""

import contextlib
import fcntl
import hashlib
import os
import time

import datasets
from datasets import hdf5
from command import ArgumentParser, UserError, WorldError, one_line, run, sync

TIMEOUT = 60.0  # seconds without a byte before a mirror counts as stalled
TRIES, RETRY_WAIT = 3, 1.0  # tries of a mirror that bring nothing new; seconds between
SLOW_AFTER, SLOW_RATE = 20.0, 100e3  # seconds, bytes/s: slower than that, try the next mirror
PART, BLOCK, RECEIVED = ".part", 1 << 20, 1 << 16  # bytes read of a file, and of a connection: lost if it ends halfway


class Refused(Exception):
    """A mirror does not have the file, or not the right one: go on with the next."""


def progress(total, name, unit="B"):
    """Return a tqdm bar, drawn on a terminal only."""
    from tqdm import tqdm

    return tqdm(total=total, desc=name, unit=unit, unit_scale=unit == "B", disable=None, leave=False)


@contextlib.contextmanager
def locked(folder):
    """Hold the lock of a dataset's folder, which is made if it is missing; say so when another process holds it."""
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, ".lock"), "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that works in {folder}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def hash_file(path, kind):
    """Return the hash of a file as hex digits; kind: sha256 or md5."""
    digest = hashlib.new(kind, usedforsecurity=False)
    with open(path, "rb") as file, progress(os.path.getsize(path), f"verify {os.path.basename(path)}") as bar:
        while block := file.read(BLOCK):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def verify(path, expected, checksum):
    """Raise UserError if a file that the user placed is not the expected one; without `checksum` only warn.

    Returns the hash.
    """
    size, kind, right = expected
    found = hash_file(path, kind)
    if found == right:
        return found
    what = f"{path} has {os.path.getsize(path)} bytes and {kind} {found}, expected {size} bytes and {right}"
    if checksum:
        raise UserError(f"{what}: put the right file in its place, or accept this one with --no_checksum")
    print(f"warning: {what}", flush=True)
    return found


def fetch(urls, path, expected, checksum, timeout=None):
    """Fetch the first of `urls` that gives the expected file to `path`, resuming path.part; returns its hash.

    Raises WorldError with all that was tried, and where to put the file by hand.
    """
    size, kind, right = expected
    failures = []
    for i, url in enumerate(urls):
        try:
            found = fetch_from(url, path + PART, expected, checksum, timeout or TIMEOUT, is_last=i == len(urls) - 1)
            sync(path + PART)
            os.replace(path + PART, path)
            return found
        except Refused as error:
            failures.append(f"{url}: {error}")
            print(f"warning: {failures[-1]}", flush=True)
    raise WorldError(
        f"{os.path.basename(path)} cannot be fetched ({'; '.join(failures)}); expected {size} bytes with {kind} "
        f"{right}; fetch it by hand, put it in {os.path.dirname(path)} and run this again, or put it in a "
        "folder DIR and add --archive_dir DIR"
    )


def fetch_from(url, part, expected, checksum, timeout, is_last):
    """Fetch url to the file `part`, going on where that ends, until it is the expected file, whose hash it
    returns. Raises Refused."""
    import requests
    from urllib3.exceptions import HTTPError

    size, kind, right = expected
    best, tries = have_bytes(part), 0
    while True:
        resumed = have_bytes(part) > 0
        try:
            whole = have_bytes(part) == size or receive(url, part, size if checksum else None, timeout, is_last)
            reason = f"the connection ended after {have_bytes(part)} of {size} bytes"
        except (requests.RequestException, HTTPError) as error:
            whole = False
            reason = f"{type(error).__name__} after {have_bytes(part)} of {size} bytes ({one_line(error, 300)})"
        if whole:
            found = hash_file(part, kind)
            if found == right:
                return found
            what = f"got {have_bytes(part)} bytes with {kind} {found}, expected {size} bytes with {right}"
            if not checksum and whole:
                print(f"warning: {url}: {what}", flush=True)
                return found
            os.remove(part)
            if not resumed:
                raise Refused(what)
            reason, best = what, 0  # the beginning may be another mirror's: once more
        tries = 0 if have_bytes(part) > best else tries + 1
        best = max(best, have_bytes(part))
        if tries >= TRIES:
            raise Refused(reason)
        time.sleep(RETRY_WAIT)


def have_bytes(path):
    """Return the size of a file, 0 if it is not there."""
    return os.path.getsize(path) if os.path.exists(path) else 0


def receive(url, part, size, timeout, is_last):
    """Append what the server sends to the file `part`; return whether that is all the server has.

    size: the bytes that are expected, None if any will do. Raises Refused, or what requests and urllib3 raise.
    """
    import requests

    have = have_bytes(part)
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    with requests.get(url, headers=headers, stream=True, timeout=(min(timeout, 10), timeout)) as response:
        if response.status_code == 416 and have:  # nothing after our end: whole, or another file
            if response.headers.get("Content-Range") == f"bytes */{have}":
                return True
            os.remove(part)
            return False
        if response.status_code not in (200, 206):
            raise Refused(f"status {response.status_code} {response.reason}")
        if response.headers.get("Content-Type", "").startswith("text/html"):
            raise Refused("a web page (text/html) instead of the file")
        if response.status_code == 206 and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            raise Refused(f"asked for bytes from {have}, got {response.headers.get('Content-Range')}")
        start = have if response.status_code == 206 else 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length and length.isdigit() else None
        if size is not None and total is not None and total != size:
            raise Refused(f"the server has {total} bytes, expected {size}")
        with (
            open(part, "ab" if start else "wb") as file,
            progress(total or size, os.path.basename(part)[: -len(PART)]) as bar,
        ):
            bar.update(start)
            began, received = time.monotonic(), 0
            for block in response.raw.stream(RECEIVED, decode_content=False):
                file.write(block)
                bar.update(len(block))
                received += len(block)
                if size is not None and start + received > size:
                    file.truncate(0)
                    raise Refused(f"more than the expected {size} bytes")
                seconds = time.monotonic() - began
                if not is_last and seconds > SLOW_AFTER and received < SLOW_RATE * seconds:
                    raise Refused(f"only {received / seconds / 1e3:.0f} kB/s, trying another mirror")
    return total is None or have_bytes(part) == total


def find_archives(name, module, folder, archive_dir, mirror, checksum, timeout):
    """Return the folder where all archives of a dataset lie, verified, after fetching those that are missing; and those
    of them, in words, that have other hashes than the original, which --no_checksum takes."""
    if archive_dir is not None:
        places = [os.path.join(archive_dir, name.lower()), archive_dir]
        folder = next((p for p in places if all(os.path.isfile(os.path.join(p, f)) for f in module.FILES)), None)
        if folder is None:
            missing = [f for f in module.FILES if not any(os.path.isfile(os.path.join(p, f)) for p in places)]
            raise UserError(
                f"{name}: {' '.join(missing or module.FILES)} not found together in {archive_dir} or {places[0]}"
            )
    missing = [f for f in module.FILES if not os.path.isfile(os.path.join(folder, f))]
    mirrors = ([mirror] if mirror else []) + list(module.MIRRORS)
    if missing and not mirrors:
        raise UserError(
            f"{name} needs {' '.join(missing)}: https://image-net.org gives them only to those who log in and "
            f"accept its non-commercial research terms, so get them there, put them in {folder} or in a "
            f"folder DIR with --archive_dir DIR, and run download.py --dataset {name} again"
        )
    others = []
    for file, expected in module.FILES.items():
        path = os.path.join(folder, file)
        if file in missing:
            found = fetch([base.rstrip("/") + "/" + file for base in mirrors], path, expected, checksum, timeout)
        else:
            found = verify(path, expected, checksum)
        others += [f"{file} {expected[1]} {found[:12]}"] * (found != expected[2])
    return folder, others


def prepare(
    name, data_dir=datasets.DATA_DIR, archive_dir=None, mirror=None, checksum=True, keep_archives=False, timeout=None
):
    """Make the known dataset `name` ready to be read, and print a line that says what was made.

    Raises UserError for what the user must provide or put right, WorldError or OSError for the network or the disk.
    """
    if name not in datasets.NAMES:
        datasets.folder_of(name, data_dir)  # raises for a name in another case
        raise UserError(f"dataset {name!r} is not one of {' '.join(datasets.NAMES)}; your own needs --image_dir")
    folder = datasets.folder_of(name, data_dir)
    if datasets.is_prepared(name, data_dir):
        print(f"{name} is packed already: {folder}/{hdf5.DATA}", flush=True)
        return
    with locked(folder):
        if datasets.is_prepared(name, data_dir):  # by the process that we waited for
            print(f"{name} is packed already: {folder}/{hdf5.DATA}", flush=True)
            return
        hdf5.remove_unfinished(folder)
        module = datasets.module_of(name)
        archives, others = find_archives(name, module, folder, archive_dir, mirror, checksum, timeout)
        made_from = f"other archives than the original: {', '.join(others)}" if others else "the original archives"
        pack(name, folder, lambda: module.read(archives)._replace(recipe={"made_from": made_from}))
        # What --archive_dir names stays, and so does what no mirror gives again.
        done = module.FILES if archives == folder and module.MIRRORS and not keep_archives else ()
        for path in [os.path.join(folder, file) for file in (*done, *(file + PART for file in module.FILES))]:
            if os.path.exists(path):
                os.remove(path)


def prepare_folder(name, image_dir, test_image_dir=None, image_size=None, data_dir=datasets.DATA_DIR):
    """Pack image_dir/<class>/<image> as the user's own dataset `name`. Raises UserError, OSError."""
    from datasets.folder import read

    folder = datasets.folder_of(name, data_dir)
    recipe = {
        "made_from": f"images in {image_dir}",
        "--image_dir": os.path.realpath(image_dir),
        "--test_image_dir": os.path.realpath(test_image_dir) if test_image_dir is not None else None,
        "--image_size": list(image_size) if image_size is not None else None,
    }
    if name in datasets.NAMES:
        raise UserError(f"--image_dir packs a dataset of your own: give it another name than {name}")
    with locked(folder):
        if hdf5.is_packed(folder):
            check_recipe(name, folder, recipe)
            print(f"{name} is packed already: {folder}/{hdf5.DATA}", flush=True)
            return
        for file in datasets.own.FILES:
            if os.path.exists(os.path.join(folder, file)):
                raise UserError(f"{folder}/{file} is there and was not packed by download.py: choose another name")
        pack(name, folder, lambda: read(image_dir, test_image_dir, image_size)._replace(recipe=recipe))


def check_recipe(name, folder, recipe):
    """Raise UserError if `folder` was packed by another recipe; a file that does not say which is taken as it is."""

    def words(value):
        return "none" if value is None else " ".join(map(str, value)) if isinstance(value, list) else value

    packed = hdf5.read_recipe(folder)
    for flag, value in recipe.items():
        if flag.startswith("--") and flag in packed and packed[flag] != value:
            raise UserError(
                f"{name} was packed with {flag} {words(packed[flag])}, not {words(value)}: delete "
                f"{folder}/{hdf5.DATA} to pack it anew, or choose another name"
            )


def load_splits(name, data_dir, validation=None, fetch=True):
    """Return (train, test) of a dataset, fetched and packed first if it is missing and may be fetched unasked."""
    if fetch and datasets.module_of(name).FETCHED_ON_FIRST_USE and not datasets.is_prepared(name, data_dir):
        print(f"{name} is not in {data_dir} yet: preparing it first", flush=True)
        prepare(name, data_dir)
    return datasets.create_default_splits(name, data_dir, validation=validation)


def pack(name, folder, read):
    """Write the Source that read() returns into `folder`, and print what was made."""
    began = time.monotonic()
    try:
        source = read()
        with progress(source.num_images, f"pack {name}", " images") as bar:
            hdf5.write(folder, source, bar)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    train, test = hdf5.open_packed(folder, name)
    shape = "JPEG files" if train.encoded else "x".join(str(size) for size in train.image_shape)
    print(
        f"{name}: {len(train)} train + {len(test)} test images of {shape} in {train.num_classes} classes, "
        f"{os.path.getsize(os.path.join(folder, hdf5.DATA)) / 1e6:.1f} MB, packed in {time.monotonic() - began:.1f} s: "
        f"{folder}/{hdf5.DATA}",
        flush=True,
    )


def parse_args():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--dataset",
        "--datasets",
        nargs="+",
        required=True,
        metavar="NAME",
        help=f"{' '.join(datasets.NAMES)}, or a name of your own with --image_dir",
    )
    parser.add_argument(
        "--archive_dir",
        metavar="DIR",
        help="use the archives in DIR or DIR/<name in lower case>; fetch and delete nothing",
    )
    parser.add_argument("--mirror", metavar="URL", help="try URL/<file> before the known mirrors")
    parser.add_argument("--no_checksum", action="store_true", help="accept archives with another hash, with a warning")
    parser.add_argument("--data_dir", default=datasets.DATA_DIR, metavar="DIR", help="where datasets are kept")
    parser.add_argument("--keep_archives", action="store_true", help="do not delete fetched archives after packing")
    parser.add_argument(
        "--timeout",
        type=float,
        default=TIMEOUT,
        metavar="SECONDS",
        help="without a byte for so long, a server counts as stalled",
    )
    parser.add_argument("--image_dir", metavar="DIR", help="pack DIR/<class>/<image> as a dataset of your own")
    parser.add_argument("--test_image_dir", metavar="DIR", help="the test split, likewise; else a fifth of --image_dir")
    parser.add_argument("--image_size", nargs=2, type=int, metavar=("H", "W"), help="resize the images of --image_dir")
    args = parser.parse_args()
    fetching = {
        "--archive_dir": args.archive_dir,
        "--mirror": args.mirror,
        "--no_checksum": args.no_checksum,
        "--keep_archives": args.keep_archives,
    }
    given = [flag for flag, value in fetching.items() if value]
    if args.image_dir is None and (args.test_image_dir or args.image_size):
        parser.error("--test_image_dir and --image_size go with --image_dir")
    if args.image_dir is not None and len(args.dataset) != 1:
        parser.error(
            f"--image_dir makes one dataset, but --dataset names {len(args.dataset)}: {' '.join(args.dataset)}"
        )
    if args.image_dir is not None and given:
        parser.error(f"{given[0]} has no effect with --image_dir: it packs images that are there")
    if args.dataset == ["Digits"] and given:
        parser.error(f"{given[0]} has no effect on Digits, which comes with scikit-learn")
    if args.archive_dir is not None and args.mirror is not None:
        parser.error("--mirror has no effect with --archive_dir, which fetches nothing")
    if args.archive_dir is not None and not os.path.isdir(args.archive_dir):
        parser.error(f"--archive_dir {args.archive_dir} is not a folder")
    if args.mirror is not None and not args.mirror.startswith(("http://", "https://")):
        parser.error(f"--mirror {args.mirror}: expected a URL that starts with http:// or https://")
    if args.image_size is not None and not all(1 <= size <= 4096 for size in args.image_size):
        parser.error(f"--image_size {args.image_size[0]} {args.image_size[1]}: expected two sizes from 1 to 4096")
    if not 0 < args.timeout < 1e6:
        parser.error(f"--timeout {args.timeout}: expected a positive number of seconds")
    return args


def main():
    args = parse_args()
    if args.image_dir is not None:
        prepare_folder(args.dataset[0], args.image_dir, args.test_image_dir, args.image_size, args.data_dir)
        return
    for name in args.dataset:  # all names before the first hour of fetching
        if name not in datasets.NAMES:
            datasets.folder_of(name, args.data_dir)
            raise UserError(f"dataset {name!r} is not one of {' '.join(datasets.NAMES)}; your own needs --image_dir")
    for name in args.dataset:
        prepare(
            name, args.data_dir, args.archive_dir, args.mirror, not args.no_checksum, args.keep_archives, args.timeout
        )


if __name__ == "__main__":
    run(main)
