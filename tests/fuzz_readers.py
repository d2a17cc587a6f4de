"""Mutate tiny valid files and read them: only UserError may come out, in time and within 1 GB of memory.

    python tests/fuzz_readers.py --files 2000
    python tests/fuzz_readers.py --files 200 --readers own mat --seed 7

Each reader runs in a child process of limited memory that reads file after file; a child that dies or hangs counts, and
the file it was reading is kept.
"""

import argparse
import collections
import contextlib
import gzip
import importlib
import io
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SECONDS, MEMORY = 10, 1 << 30
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]


def make_own(folder):
    """An own dataset with contiguous, chunked and compressed arrays."""
    import archives
    import h5py

    ids, images, _ = archives.make_own(os.path.join(folder, "Mine"), num=6)
    with h5py.File(os.path.join(folder, "Mine", "data.hy"), "r+") as file:
        for id, image, filters in (
            (ids[0], images[0], {"chunks": (4, 4, 3)}),
            (ids[1], images[1], {"compression": "gzip"}),
        ):
            del file[id]["image"]
            file[id].create_dataset("image", data=image, **filters)


def read_own(folder):
    import datasets

    return [split.images() for split in datasets.create_default_splits("Mine", folder)]


def make_folder(folder):
    """Class folders of images, a TIFF file of 12 bits and a PNG file of 16 among them."""
    import archives
    from PIL import Image

    values = np.arange(48).reshape(6, 8)
    for i, name in enumerate(("cat", "dog")):
        os.makedirs(os.path.join(folder, "images", name))
        for j in range(2):
            Image.fromarray((values + i + j).astype(np.uint16)).save(os.path.join(folder, f"images/{name}/{j}.png"))
    with open(os.path.join(folder, "images/cat/0.tif"), "wb") as file:
        file.write(archives.tiff_12(values * 80))


def read_folder(folder):
    from datasets.folder import read

    with contextlib.redirect_stdout(io.StringIO()):
        return list(read(os.path.join(folder, "images")).parts)


def make_packed(folder):
    """A packed dataset of JPEG files, in a file that anybody may have written."""
    import archives
    import download

    archives.make("ImageNet", os.path.join(folder, "archives"), per_class=1)
    with contextlib.redirect_stdout(io.StringIO()):
        download.prepare("ImageNet", folder, os.path.join(folder, "archives"), checksum=False)


def read_packed(folder):
    import datasets

    return [split.read(range(len(split))) for split in datasets.create_default_splits("ImageNet", folder)]


def read_known(name):
    """Return a function that reads all parts of a known dataset's archives in a folder."""

    def read(folder):
        module = importlib.import_module(f"datasets.{name.lower()}")
        return list(module.read(folder).parts)

    return read


def make_known(name):
    """Return a function that writes tiny archives of a known dataset into a folder."""

    def make(folder):
        import archives

        archives.make(name, folder, per_class=1)

    return make


# reader: (make the valid files, read them, the file to mutate, whether to mutate what gzip holds)
READERS = {
    "own": (make_own, read_own, "Mine/data.hy", False),
    "packed": (make_packed, read_packed, "imagenet/data.hdf5", False),
    "png": (make_folder, read_folder, "images/dog/0.png", False),
    "tiff": (make_folder, read_folder, "images/cat/0.tif", False),
    "idx": (make_known("MNIST"), read_known("MNIST"), "train-images-idx3-ubyte.gz", True),
    "idx.gz": (make_known("MNIST"), read_known("MNIST"), "t10k-labels-idx1-ubyte.gz", False),
    "cifar": (make_known("CIFAR10"), read_known("CIFAR10"), "cifar-10-python.tar.gz", True),
    "cifar.gz": (make_known("CIFAR10"), read_known("CIFAR10"), "cifar-10-python.tar.gz", False),
    "mat": (make_known("SVHN"), read_known("SVHN"), "train_32x32.mat", False),
    "meta.mat": (make_known("ImageNet"), read_known("ImageNet"), "ILSVRC2012_devkit_t12.tar.gz", True),
    "tars": (make_known("ImageNet"), read_known("ImageNet"), "ILSVRC2012_img_train.tar", False),
    "zip": (make_known("TinyImageNet"), read_known("TinyImageNet"), "tiny-imagenet-200.zip", False),
}


def mutate(data, rng):
    """Return `data` with a few bytes changed, a piece cut out, doubled or overwritten, or the end cut off."""
    data = bytearray(data)
    # Half of the changes hit the bytes that steer a reader: those at the start, and those that are not pixels.
    steering = np.flatnonzero(np.frombuffer(bytes(data[: 1 << 16]), np.uint8) < 40)
    for _ in range(int(rng.integers(1, 6))):
        place = int(rng.choice(steering)) if len(steering) and rng.random() < 0.5 else int(rng.integers(0, len(data)))
        place, length, kind = min(place, len(data) - 1), int(rng.integers(1, 64)), rng.integers(0, 8)
        if kind < 3:
            data[place] = int(rng.integers(0, 256))
        elif kind == 3:
            data[place] ^= 1 << int(rng.integers(0, 8))
        elif kind == 4:
            number = int(rng.choice([0, 1, -1, 2**31 - 1, -(2**31), 2**16, 2**24])) & 0xFFFFFFFF
            data[place : place + 4] = number.to_bytes(4, "little" if rng.random() < 0.5 else "big")
        elif kind == 5:
            del data[place : place + length]
        elif kind == 6:
            data[place:place] = data[place : place + length]
        elif rng.random() < 0.3:
            del data[max(place, 1) :]
        data = data or bytearray(1)
    return bytes(data)


def child(name, folder, first, count, seed, report):
    """Read `count` mutated files, and report (number, outcome) of each."""
    make, read, target, unpack = READERS[name]
    path = os.path.join(folder, target)
    valid = gzip.open(path + ".valid").read() if unpack else open(path + ".valid", "rb").read()
    read_valid = os.path.join(folder, "..", "valid")
    read(read_valid)  # loads the libraries before memory is limited
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    for number in range(first, first + count):
        data = mutate(valid, np.random.default_rng([seed, number]))
        with open(path, "wb") as file:
            file.write(gzip.compress(data, 1, mtime=0) if unpack else data)
        report.send((number, None))
        try:
            read(folder)
            outcome = "read"
        except Exception as error:  # the outcome is counted, whatever it is
            outcome = type(error).__name__
            if outcome != "UserError" or "\n" in str(error):
                import traceback

                traceback.print_exc()
        report.send((number, outcome))


def next_outcome(receiver, process):
    """Wait for what becomes of the next file that a child reads."""
    try:
        if not receiver.poll(60):  # it loads its libraries before the first file
            return "child hangs"
        receiver.recv()
        return receiver.recv()[1] if receiver.poll(SECONDS) else "hang"
    except EOFError:
        process.join()
        code = process.exitcode
        return f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"


def fuzz(name, files, seed, keep):
    """Return the outcomes of `files` mutated files of one reader."""
    outcomes, number = collections.Counter(), 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = os.path.join(temporary, "mutated")
        for place in (folder, os.path.join(temporary, "valid")):
            os.makedirs(place)
            READERS[name][0](place)
        shutil.copy(os.path.join(folder, READERS[name][2]), os.path.join(folder, READERS[name][2] + ".valid"))
        while number < files:
            receiver, sender = multiprocessing.Pipe(False)
            process = multiprocessing.Process(target=child, args=(name, folder, number, files - number, seed, sender))
            process.start()
            sender.close()
            outcome = "read"
            while outcome in ("read", "UserError") and number < files:
                outcome = next_outcome(receiver, process)
                outcomes[outcome] += 1
                if outcome not in ("read", "UserError"):  # keep the file, and go on in a new child
                    os.makedirs(keep, exist_ok=True)
                    shutil.copy(os.path.join(folder, READERS[name][2]), os.path.join(keep, f"{name}-{number}"))
                number += 1
            process.kill()
            process.join()
    return outcomes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=2000, help="mutated files in all")
    parser.add_argument("--readers", nargs="+", default=list(READERS), choices=list(READERS), help="which to try")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--keep", default=os.path.join(tempfile.gettempdir(), "fuzz_failures"), help="where bad files go"
    )
    args = parser.parse_args()
    bad = 0
    for i, name in enumerate(args.readers):
        files = args.files // len(args.readers) + (i < args.files % len(args.readers))
        outcomes = fuzz(name, files, args.seed, args.keep)
        bad += files - outcomes["read"] - outcomes["UserError"]
        print(
            f"{name:10} {files:6} files: "
            + ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common()),
            flush=True,
        )
    sys.exit(f"{bad} files ended in something else than UserError: they are in {args.keep}" if bad else 0)


if __name__ == "__main__":
    main()
