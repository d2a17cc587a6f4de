"""Measure ImageNet's input beside decoding alone: images per second, in turn, in one process.

    python figure/input_speed.py                                    # ImageNet as download.py packed it
    python figure/input_speed.py --photos FOLDER                    # the JPEG files of a folder
    python figure/input_speed.py --photos FOLDER --store 4          # and random reads of 4 GB that are not in memory

"decoded alone" reads and decodes the same parts of the same files, a window for training and the whole for testing, and
does no more; the input is that of trainer.py, up to the batch. A turn is all photographs once; a ratio is the median
over the rounds of the ratio within a round, with the quartiles in brackets. That of CPU time, which counts all threads
of the process, is steadier on a machine that has other work. Prints a table; writes figure/input_speed.json.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import h5py
import numpy as np

import datasets
import input_ops
from command import ArgumentParser, Later, UserError, run, within, write_whole
from datasets import hdf5
from norm_speed import describe_machine, ratios, show

tf = Later("tensorflow")

BATCH_SIZE = 32
MOST = 1024  # photographs in a turn
READS = 1000


def pack(files, path):
    """A Dataset of JPEG files as bytes, written to an HDF5 file at `path`."""
    with h5py.File(path, "w") as file:
        size = sum(map(len, files))
        stored = file.create_dataset("jpeg", (size,), np.uint8, maxshape=(None,), chunks=(hdf5.JPEG_CHUNK,))
        offset = np.concatenate([[0], np.cumsum([len(data) for data in files])])
        for data, start in zip(files, offset):
            stored[start : start + len(data)] = np.frombuffer(data, np.uint8)
    return hdf5.Dataset(
        [str(i) for i in range(len(files))],
        "photos",
        labels=np.arange(len(files)) % 2,
        class_names=["a", "b"],
        image=h5py.File(path, "r", rdcc_nbytes=0)["jpeg"],
        rows=np.arange(len(files)),
        offset=offset,
    )


def decoded_alone(dataset, is_training):
    """What create_input_ops reads and decodes, on all cores, without what it does then."""

    def decode(jpeg, label, place):
        if is_training:
            seed = tf.random.split(input_ops.key(input_ops.AUGMENTATION, 0, place), 2)[0]
            window = input_ops.random_window(tf.io.extract_jpeg_shape(jpeg), seed)
            return tf.io.decode_and_crop_jpeg(jpeg, window, channels=3)[0, 0, 0]
        return tf.io.decode_jpeg(jpeg, channels=3)[0, 0, 0]

    steps = len(dataset) // BATCH_SIZE
    positions = input_ops.shuffled(len(dataset), BATCH_SIZE, 0, 0).take(steps)
    if not is_training:
        steps, positions = steps + 1, tf.data.Dataset.range(len(dataset)).batch(BATCH_SIZE)
    files = input_ops.jpeg_files(tf.data.Dataset.zip(tf.data.Dataset.range(steps), positions), dataset, BATCH_SIZE)
    batches = files.map(decode, num_parallel_calls=os.cpu_count()).batch(BATCH_SIZE)
    options = tf.data.Options()
    options.experimental_optimization.apply_default_optimizations = False
    return batches.prefetch(tf.data.AUTOTUNE).with_options(options)


def measure(pipelines, rounds):
    """{name: ([seconds of each round], [seconds of CPU time of each round])} of going through all batches once: up to
    the last batch, for an iterator takes 0 or 0.2 seconds to end, by chance."""
    times = {name: ([], []) for name in pipelines}
    for number in range(rounds + 1):  # one to warm up
        for name, batches in pipelines.items():
            clocks = time.perf_counter(), time.process_time()
            iterator = iter(batches)
            for _ in iterator:
                continue
            spent = time.perf_counter() - clocks[0], time.process_time() - clocks[1]
            del iterator  # outside of the clock, and before the next starts
            for of_rounds, seconds in zip(times[name], spent):
                of_rounds += [seconds] * (number > 0)
    return times


def cold_reads(photos, gigabytes, folder):
    """Images per second of random reads of a file, a batch at a time as in training: not in memory, and once more."""
    copies = -(-int(gigabytes * 1e9) // photos.nbytes)
    files = photos.read(np.arange(len(photos)))
    path = os.path.join(folder, "store.hdf5")
    store = pack(files * copies, path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    positions = np.random.default_rng(0).permutation(len(store))[:READS]
    found = []
    for _ in ("cold", "warm"):
        start = time.perf_counter()
        for i in range(0, len(positions), BATCH_SIZE):
            store.read(positions[i : i + BATCH_SIZE])
        found.append(len(positions) / (time.perf_counter() - start))
    return found


def main():
    parser = ArgumentParser(description="Measure ImageNet's input beside decoding alone.")
    parser.add_argument("--photos", metavar="FOLDER", help="a folder of JPEG files; by default ImageNet's test split")
    parser.add_argument("--data_dir", default=datasets.DATA_DIR, help="where the datasets are")
    parser.add_argument("--rounds", type=within(int, low=2), default=20, help="turns of each")
    parser.add_argument("--store", type=within(float, above=0), metavar="GB", help="measure random reads of a store")
    parser.add_argument("--output", default=str(HERE / "input_speed.json"), help="where to write the numbers")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if flags.photos is None:
            _, photos = datasets.create_default_splits("ImageNet", flags.data_dir, MOST)
        else:
            paths = sorted(p for p in Path(flags.photos).glob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
            if len(paths) < BATCH_SIZE:
                raise UserError(
                    f"--photos {flags.photos} has {len(paths)} JPEG files: at least {BATCH_SIZE} are needed"
                )
            photos = pack([path.read_bytes() for path in paths[:MOST]], os.path.join(folder, "photos.hdf5"))
        size = photos.nbytes / len(photos)
        print(f"{describe_machine()}\n{len(photos)} photographs of {size / 1e3:.0f} kB on average")
        found = {"machine": describe_machine(), "photographs": len(photos), "bytes": size, "seconds": {}}
        print(f"{'':<10}{'decoded alone':>16}{'input':>8}  images per second   {'ratio':<20}of CPU time")
        for name, is_training in (("training", True), ("testing", False)):
            whole = input_ops.create_input_ops(
                photos, BATCH_SIZE, is_training, "flip+crop", last_step=len(photos) // BATCH_SIZE
            )
            times = measure({"alone": decoded_alone(photos, is_training), "input": whole}, flags.rounds)
            wall, cpu = ({key: value[i] for key, value in times.items()} for i in (0, 1))
            found["seconds"][name] = {"wall": wall, "cpu": cpu}
            alone, whole = (len(photos) / statistics.median(wall[key]) for key in ("alone", "input"))
            shares = [show(ratios(clock, "alone", "input")) for clock in (wall, cpu)]
            print(f"{name:<10}{alone:>16.0f}{whole:>8.0f}{'':<21}{shares[0]:<20}{shares[1]}", flush=True)
        if flags.store:
            found["reads"] = cold, warm = cold_reads(photos, flags.store, folder)
            print(f"random reads of {flags.store:g} GB: {cold:.0f} images per second, once more {warm:.0f}")
    write_whole(flags.output, json.dumps(found) + "\n")


if __name__ == "__main__":
    run(main)
