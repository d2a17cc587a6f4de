"""Measure how training scales from one worker to two on one machine, each pinned to a core; and model 8 and 256.

    python figure/scaling.py                # about an hour, with nothing else running
    python figure/scaling.py --quick        # resnet8 at one batch size, one round: a minute
    python figure/scaling.py --resume       # go on with what an interruption left in figure/scaling.json
    python figure/scaling.py --resume --bandwidth 1.25e9 --latency 5e-5     # the model for another network

What trains is `python trainer.py` with group norm, on random images, in three ways that alternate, round after
round: one worker alone; two runs that do not talk, one a core; and two workers that average gradients (TF_CONFIG).
Images per second are those of metrics.jsonl, counted while all processes train and without the first steps. The two
runs are the yardstick: side by side, cores share memory and clock. A ratio is the median of the ratios within a round.

The all-reduce is measured alone, too: replicas.mean of tensors like the gradients, and of one number. From that and the
time of an update follows what more devices would do, as a model: nothing beyond two workers is measured.
"""

import contextlib
import ctypes
import functools
import importlib.metadata
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import numpy as np

import datasets
import model as models
import replicas
import runs
from command import ArgumentParser, Later, UserError, WorldError, one_line, run, within, write_whole
from input_ops import create_input_ops

tf = Later("tensorflow")

LIBC, PR_SET_PDEATHSIG = ctypes.CDLL(None), 1
WAYS = {"1 worker": 1, "2 independent": 2, "2 workers": 2}  # and how many processes
DEVICES = (2, 8, 256)  # of the model; 2 stands beside what was measured
NEVER = "1000000"  # steps
POLL_SECONDS = 0.2
MEET_SECONDS = 300


class Network(NamedTuple):
    """What is trained, on so many random images; a step is `step` images, and log_step steps make a row of the log."""

    model: str
    pixels: int
    classes: int
    images: int
    step: int
    log_step: int
    batch_sizes: tuple  # per replica


NETWORKS = [Network("resnet20", 32, 10, 320, 64, 2, (1, 2, 8, 32)), Network("resnet50", 224, 1000, 40, 16, 1, (2, 8))]
QUICK_NETWORKS = [Network("resnet8", 32, 10, 80, 16, 1, (2,))]


# ------------------------------------------------------------------------------------------------------- processes


def free_addresses(number):
    """Addresses localhost:port at which nothing listens."""
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("localhost", 0))) for _ in range(number)]
        return [f"localhost:{server.getsockname()[1]}" for server in servers]


def pin(core):
    """Keep a new process on a core, and end it when this script ends, however it does."""
    os.sched_setaffinity(0, {core})
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@contextlib.contextmanager
def started(commands, cores, folder, together):
    """The processes of Python commands, one a core, as workers of one run if `together`; none outlives the block.

    Process i writes to folder/i.log.
    """
    cluster, processes = {"worker": free_addresses(len(commands))}, []
    try:
        for i, (command, core) in enumerate(zip(commands, cores)):
            config = json.dumps({"cluster": cluster, "task": {"type": "worker", "index": i}}) if together else ""
            with open(Path(folder) / f"{i}.log", "w") as log:
                process = subprocess.Popen(  # in a session of its own: Ctrl-C reaches it through us
                    [sys.executable, *map(str, command)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env={**os.environ, "TF_CONFIG": config, "CUDA_VISIBLE_DEVICES": "-1"},
                    start_new_session=True,
                    preexec_fn=functools.partial(pin, core),
                )
            processes.append(process)
        yield processes
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def check(processes, folder):
    """Raise WorldError, with the end of its log, if a process failed."""
    for i, process in enumerate(processes):
        if process.poll():
            log = (Path(folder) / f"{i}.log").read_text(errors="replace")
            raise WorldError(f"{' '.join(process.args[1:3])} ended with code {process.returncode}: {log[-400:]}")


# ------------------------------------------------------------------------------------------------------- measuring


def pack(network, data_dir):
    """Pack random images into data_dir/<model>, 10 of them to test."""
    rng, size = np.random.default_rng(0), (network.pixels, network.pixels, 3)
    counts = (network.images - 10, 10)
    parts = (
        (split, rng.integers(256, size=(count, *size), dtype=np.uint8), rng.integers(network.classes, size=count), None)
        for split, count in enumerate(counts)
    )
    names = [str(i) for i in range(network.classes)]
    folder = Path(data_dir) / network.model
    folder.mkdir()
    datasets.hdf5.write(folder, datasets.hdf5.Source(names, size, network.images, parts))


def train(network, batch_size, way, flags, data_dir):
    """Images per second of all processes of a way together."""
    given = {
        "dataset": network.model,
        "model": network.model,
        "norm_type": "group",
        "batch_size": batch_size,
        "max_batch_size": network.step,
        "learning_rate": 1e-4,  # random labels: nothing shall diverge
        "log_step": network.log_step,
        "write_summary_step": NEVER,
        "test_sample_step": NEVER,
        "ckpt_save_step": NEVER,
        "max_training_step": NEVER,
        "data_dir": data_dir,
    }
    command = [HERE.parent / "trainer.py", *(word for name in given for word in (f"--{name}", given[name]))]
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / str(i) for i in range(WAYS[way])]
        commands = [[*command, "--train_dir", place] for place in places]
        with started(commands, flags.cores, folder, way == "2 workers") as processes:
            places = places[:1] if way == "2 workers" else places  # worker 0 writes, of the images of both
            return sum(speeds(processes, folder, places, 2 if flags.quick else 6))


def speeds(processes, folder, places, wanted):
    """Images per second of each run, the median of at least `wanted` rows that were written while all runs trained."""
    first = None
    while True:
        check(processes, folder)
        rows = [[row for path in place.glob("*/metrics.jsonl") for row in runs.read_rows(path)] for place in places]
        if first is None and all(rows):
            first = [len(of_run) + 1 for of_run in rows]  # the row under way began before all trained
        counted = [of_run[begin:] for of_run, begin in zip(rows, first or [])]
        if counted and min(map(len, counted)) >= wanted:
            return [statistics.median(row["images_per_second"] for row in of_run) for of_run in counted]
        time.sleep(POLL_SECONDS)


def measure_allreduce(network, flags):
    """Bytes, seconds of an all-reduce of the gradients of two workers, and of one of a single number."""
    command = [__file__, "--allreduce", json.dumps(network), *(["--quick"] if flags.quick else [])]
    with tempfile.TemporaryDirectory() as folder, started([command] * 2, flags.cores, folder, True) as processes:
        while any(process.poll() is None for process in processes):
            check(processes, folder)
            time.sleep(POLL_SECONDS)
        check(processes, folder)
        return json.loads((Path(folder) / "0.log").read_text().splitlines()[-1])


def allreduce_in_worker(network, calls, rounds):
    """One worker's side of measure_allreduce; the medians over `rounds` of so many calls in a graph, as in a step."""
    who = replicas.workers()
    with replicas.met(who, {}, MEET_SECONDS):
        strategy = replicas.start(1, who)
    model = models.create_model(network.model, (network.pixels, network.pixels, 3), network.classes, "group")
    shapes = {"seconds": [weight.shape for weight in model.trainable_variables], "seconds_of_one_number": [()]}

    @tf.function
    def repeat(values):
        for _ in tf.range(calls):
            results = strategy.run(lambda *values: replicas.mean([tf.identity(value) for value in values]), values)
            values = [strategy.experimental_local_results(value)[0] for value in results]
        return values

    values = {name: [tf.fill(shape, float(who.index)) for shape in of_name] for name, of_name in shapes.items()}
    seconds = {name: [] for name in shapes}
    for i in range(rounds + 1):
        for name in shapes:
            start = time.perf_counter()
            means = [value.numpy() for value in repeat(values[name])]
            if i:  # the first call traces the graph
                seconds[name].append((time.perf_counter() - start) / calls)
            if any((mean != 0.5).any() for mean in means):
                raise WorldError("the workers' all-reduce of 0 and 1 is not 0.5")
    size = 4 * sum(shape.num_elements() for shape in shapes["seconds"])
    return {"bytes": size} | {name: statistics.median(of_name) for name, of_name in seconds.items()}


def measure_input(network, data_dir, seconds):
    """Images per second of the input alone, on all cores of this host: packed pixels, not JPEG files."""
    train_split, _ = datasets.create_default_splits(network.model, data_dir)
    batches, count = iter(create_input_ops(train_split, network.step, is_training=True)), 0
    for _ in range(5):
        next(batches)
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        next(batches)
        count += network.step
    return count / (time.perf_counter() - start)


# ------------------------------------------------------------------------------------------------------- the model


def ring_seconds(devices, size, bandwidth, latency):
    """Seconds of a ring all-reduce of `size` bytes: each device sends 2 (devices - 1) times 1 / devices of them."""
    return 2 * (devices - 1) * (size / devices / bandwidth + latency)


def link(allreduces):
    """(bytes per second, seconds of latency) with which ring_seconds gives what the largest all-reduce took."""
    largest = max(allreduces.values(), key=lambda allreduce: allreduce["bytes"])
    seconds, latency = largest["seconds"], min(a["seconds_of_one_number"] for a in allreduces.values()) / 2
    rest = seconds - 2 * latency
    return largest["bytes"] / (rest if rest > 0 else seconds), latency


def predict(compute, communicate, images_on_host, images_per_second):
    """The model's (efficiency, images per second that a host needs), of seconds of an update's compute and all-reduce.

    They follow one another; an update takes longer if a host's input delivers too few images_per_second.
    """
    update = max(compute + communicate, images_on_host / images_per_second)
    return compute / update, images_on_host / (compute + communicate)


# ------------------------------------------------------------------------------------------------------ the tables


def print_row(*cells):
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def print_header(*names):
    print_row(*names)
    print_row(*["---"] * len(names))


def scaling(speed):
    """Median over the rounds of images per second of two workers / those of two independent runs."""
    return statistics.median(a / b for a, b in zip(speed["2 workers"], speed["2 independent"]))


def update_seconds(batch_size, speed, way):
    """Seconds of an update, of batch_size images in each process."""
    return WAYS[way] * batch_size / statistics.median(speed[way])


def print_speed(network, batch_size, speed):
    medians = (f"{statistics.median(speed[way]):.1f}" for way in WAYS)
    print_row(network.model, network.pixels, batch_size, *medians, f"{scaling(speed):.2f}")


def print_allreduce(results, cases):
    print("\nThe all-reduce of two workers' gradients, measured alone, and its share of an update of two workers\n")
    names = ("update, 2 independent, ms", "update, 2 workers, ms", "all-reduce, ms", "of one number, ms", "share")
    print_header("network", "batch size per replica", "MB", *names)
    for network, batch_size, key in cases:
        allreduce, speed = results["allreduce"][network.model], results["speed"][key]
        apart, joined = (update_seconds(batch_size, speed, way) for way in ("2 independent", "2 workers"))
        seconds, least = allreduce["seconds"], allreduce["seconds_of_one_number"]
        times = (f"{1e3 * value:.1f}" for value in (apart, joined, seconds))
        megabytes = f"{allreduce['bytes'] / 1e6:.2f}"
        print_row(network.model, batch_size, megabytes, *times, f"{1e3 * least:.2f}", f"{100 * seconds / joined:.0f} %")


def model_rows(results, cases, flags):
    """The model of every case and number of devices, with what went into it."""
    bandwidth, latency = link(results["allreduce"])
    bandwidth, latency = flags.bandwidth or bandwidth, flags.latency or latency
    for network, batch_size, key in cases:
        there = flags.input or results["input"][network.model]
        compute = update_seconds(batch_size, results["speed"][key], "2 independent")
        for devices in DEVICES:
            communicate = ring_seconds(devices, results["allreduce"][network.model]["bytes"], bandwidth, latency)
            on_host = min(devices, flags.devices_per_host) * batch_size
            efficiency, needed = predict(compute, communicate, on_host, there)
            yield {
                "network": network.model,
                "batch_size": batch_size,
                "devices": devices,
                "bandwidth": bandwidth,
                "latency": latency,
                "compute": compute,
                "allreduce": communicate,
                "images_per_second": devices * batch_size * efficiency / compute,
                "input_needed": needed,
                "input_there": there,
                "efficiency": efficiency,
                "measured": scaling(results["speed"][key]) if devices == 2 else None,
            }


def print_model(rows, devices_per_host):
    print(
        f"\n**Model, not measured**: devices like one core of this machine, in hosts of {devices_per_host}; efficiency "
        "= compute / (compute + all-reduce), less where the input is slower; compute: an update of 2 independent runs; "
        "all-reduce: 2 (n - 1) / n bytes / bandwidth + 2 (n - 1) latency, at "
        f"{rows[0]['bandwidth'] / 1e6:.0f} MB per second and {1e3 * rows[0]['latency']:.3f} ms. "
        "Measured is workers / independent.\n"
    )
    names = ("compute, ms", "all-reduce, ms", "images per second", "a host's input: needed", "there")
    print_header("network", "batch size per device", "devices", *names, "efficiency, model", "measured")
    for row in rows:
        numbers = (1e3 * row["compute"], 1e3 * row["allreduce"], row["images_per_second"])
        numbers = (f"{number:.1f}" for number in (*numbers, row["input_needed"], row["input_there"]))
        measured = f"{row['measured']:.2f}" if row["measured"] else ""
        where = row["network"], row["batch_size"], row["devices"]
        print_row(*where, *numbers, f"{row['efficiency']:.2g}", measured)


# ------------------------------------------------------------------------------------------------------ the script


def parse_flags():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=within(int, low=1), default=3, help="turns of each way")
    parser.add_argument("--quick", action="store_true", help="resnet8 at batch size 2, one round, few steps")
    parser.add_argument("--resume", action="store_true", help="keep what OUTPUT.json has, and measure what it lacks")
    parser.add_argument("--output", default=str(HERE / "scaling"), help="where to write OUTPUT.json")
    parser.add_argument("--cores", type=int, nargs=2, metavar="CORE", help="by default the first two")
    positive = within(float, above=0)
    parser.add_argument(
        "--bandwidth", type=positive, help="of the model, bytes per second; by default as measured here"
    )
    parser.add_argument("--latency", type=positive, help="of the model, seconds a message; by default as measured here")
    parser.add_argument(
        "--input", type=positive, help="of the model, images per second of a host; by default as measured"
    )
    parser.add_argument("--devices_per_host", type=within(int, low=1), default=8, help="of the model")
    parser.add_argument("--allreduce", help="(used by the script itself) take part in an all-reduce of this network")
    flags = parser.parse_args()
    if not hasattr(os, "sched_setaffinity"):
        raise UserError("this system cannot pin a process to a core: run it on Linux")
    there = sorted(os.sched_getaffinity(0))
    flags.cores = flags.cores or there[:2]
    if not flags.allreduce and (len(set(flags.cores)) < 2 or not set(flags.cores) <= set(there)):
        raise UserError(f"two cores are needed, not {flags.cores}: this process may use {there}")
    if not Path(flags.output).resolve().parent.is_dir():
        raise UserError(f"--output {flags.output}: its folder is not there")
    flags.rounds = 1 if flags.quick else flags.rounds
    return flags


def open_results(path, flags, cases):
    """What --resume keeps, or nothing yet."""
    machine = (
        f"{runs.processor()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"TensorFlow {importlib.metadata.version('tensorflow')}"
    )
    if not flags.resume:
        return {"machine": machine, "speed": {}, "allreduce": {}, "input": {}}
    try:
        results = json.loads(path.read_text())
        [results[name] for name in ("machine", "speed", "allreduce", "input")]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({one_line(error)}): measure anew, without --resume") from None
    if results["machine"] != machine and any(key not in results["speed"] for _, _, key in cases):
        raise UserError(f"{path} is of another machine ({results['machine']}): measure anew, without --resume")
    return results


def measure_all(cases, results, flags, save):
    """Fill in what the results lack, and print the first table on the way."""
    print(f"{results['machine']}\n\nImages per second\n")
    print_header("network", "pixels", "batch size per replica", *WAYS, "workers / independent")
    networks = list(dict.fromkeys(network for network, _, _ in cases))
    with tempfile.TemporaryDirectory() as data_dir:
        for network in networks:
            pack(network, data_dir)
        for network, batch_size, key in cases:
            speed = {way: [] for way in WAYS}
            for _ in range(0 if key in results["speed"] else flags.rounds):
                for way in WAYS:
                    speed[way].append(train(network, batch_size, way, flags, data_dir))
            save("speed", key, speed)
            print_speed(network, batch_size, results["speed"][key])
        for network in networks:
            if network.model not in results["allreduce"]:
                save("allreduce", network.model, measure_allreduce(network, flags))
        for network in networks:  # last: from here on this process runs TensorFlow, too
            if network.model not in results["input"]:
                save("input", network.model, measure_input(network, data_dir, 1 if flags.quick else 10))


def main():
    flags = parse_flags()
    if flags.allreduce:
        network = Network(*json.loads(flags.allreduce))
        print(json.dumps(allreduce_in_worker(network, *((3, 1) if flags.quick else (10, 7)))))
        return
    path = Path(flags.output + ".json")
    networks = QUICK_NETWORKS if flags.quick else NETWORKS
    cases = [(net, size, f"{net.model}, {net.pixels} pixels, {size}") for net in networks for size in net.batch_sizes]
    results = open_results(path, flags, cases)

    def save(kind, key, value):
        results[kind].setdefault(key, value)
        write_whole(path, json.dumps(results, indent=1) + "\n")

    measure_all(cases, results, flags, save)
    print_allreduce(results, cases)
    results["model"] = list(model_rows(results, cases, flags))
    print_model(results["model"], flags.devices_per_host)
    write_whole(path, json.dumps(results, indent=1) + "\n")
    print(f"\nwrote {path}")


if __name__ == "__main__":
    run(main)
