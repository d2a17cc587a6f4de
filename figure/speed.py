"""Measure speed as ratios: the norms alone, updates of the weights, trainer.py, and ImageNet's input.

    python figure/speed.py alone            # the norms alone
    python figure/speed.py steps            # updates of the weights
    python figure/speed.py trainer          # images per second of trainer.py on CIFAR10, and of the input alone
    python figure/speed.py imagenet         # ImageNet's input, compared with decoding alone
    python figure/speed.py steps --quick    # fewer cases and rounds

The functions to compare take turns, round after round. A ratio is the median over the rounds of the ratio within a
round, with quartiles in brackets. Run nothing else at the same time. Prints tables.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import datasets
from command import ArgumentParser, ExternalError, UserError, one_line, run, set_threads, start

COMPARED = ("group", "group+ws", "batch", "none")
MEMORY_NORMS = ("batch", "group", "group+ws")


def parse_flags(argv=None):
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("alone", "steps", "trainer", "imagenet"), help="the measurement, see above")
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds")
    parser.add_argument("--data_dir", default=datasets.DATA_DIR, help="folder of CIFAR10 or ImageNet")
    parser.add_argument("--case", help="(used by the script itself) measure one case and print it as JSON")
    return parser.parse_args(argv)


FLAGS = start(__name__, parse_flags)  # flags first: TensorFlow takes seconds to import

import keras
import numpy as np
import tensorflow as tf

import input_ops
import ops
import runs
import trainer
from config import Config, spell_out
from model import create_model

GROUPS = 8
SHAPES = [(32, 32, 32, 64), (32, 16, 16, 128), (2, 56, 56, 256), (2, 32, 32, 16), (1, 8, 8, 64), (8, 14, 14, 512)]
STEPS = [("resnet20", 32, batch_size) for batch_size in (1, 2, 8, 32, 64)]
STEPS += [("convnet", 32, 2), ("convnet", 32, 64), ("resnet50", 224, 2), ("resnet50", 224, 8)]
PHOTOGRAPHS, PHOTOGRAPHS_AT_ONCE = 1024, 32


def take_turns(functions, rounds, seconds=0.2):
    """Return the seconds per call of each function, {name: [of each round]}; a turn lasts about `seconds`."""
    calls = {}
    for name, function in functions.items():
        function()  # trace the graph
        begin = time.perf_counter()
        function()
        calls[name] = max(1, round(seconds / (time.perf_counter() - begin)))
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            begin = time.perf_counter()
            for _ in range(calls[name]):
                function()
            times[name].append((time.perf_counter() - begin) / calls[name])
    return times


def ratio(times, name, base):
    """Return 'median [lower quartile upper quartile]' of the ratios times[name] / times[base] within rounds."""
    ratios = [a / b for a, b in zip(times[name], times[base])]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"{median:.2f} [{low:.2f} {high:.2f}]"


def in_own_process(kind, **case):
    """Return measure_<kind>(**case), computed in a new process."""
    command = [sys.executable, __file__, "steps", "--case", json.dumps([kind, case])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 2:
        raise UserError(done.stderr.splitlines()[-1].partition(": error: ")[2])
    if done.returncode:
        reason = one_line(done.stderr[-300:]) or "out of memory"
        raise ExternalError(f"measuring the {kind} of {case} ended with exit code {done.returncode}: {reason}")
    return json.loads(done.stdout.splitlines()[-1])


def machine():
    cpu, versions = runs.machine(), runs.versions()
    processor = f"{cpu['processor']}{' with AVX-512' * cpu['avx512']}, {cpu['processors']} cores"
    return f"{processor}, Python {versions['python']}, TensorFlow {versions['tensorflow']}"


def transpose_formula(x, gamma, beta):
    """Group norm as in the 2018 repo: transpose to [N, C, H, W], split to [N, G, C / G, H, W], and back."""
    n, h, w, c = x.shape
    x = tf.reshape(tf.transpose(x, [0, 3, 1, 2]), [n, GROUPS, c // GROUPS, h, w])
    mean, variance = tf.nn.moments(x, [2, 3, 4], keepdims=True)
    x = tf.reshape((x - mean) / tf.sqrt(variance + ops.EPSILON), [n, c, h, w])
    return tf.transpose(x * tf.reshape(gamma, [1, c, 1, 1]) + tf.reshape(beta, [1, c, 1, 1]), [0, 2, 3, 1])


def contenders(shape):
    """Return the norms to compare, {name: function of (x, gamma, beta)}."""
    layer = keras.layers.GroupNormalization(GROUPS, epsilon=ops.EPSILON)
    layer.build(shape)
    zeros, ones = tf.zeros(shape[-1:]), tf.ones(shape[-1:])

    def of_keras(x, gamma, beta):
        with keras.StatelessScope(state_mapping=[(layer.gamma, gamma), (layer.beta, beta)]):
            return layer(x)

    return {
        "group": lambda x, gamma, beta: ops.group_norm(x, gamma, beta, GROUPS),
        "Keras": of_keras,
        "transpose": transpose_formula,
        "batch": lambda x, gamma, beta: ops.batch_norm(x, gamma, beta, zeros, ones, training=True)[0],
    }


def forward_and_backward(function, shape):
    """Return a function without arguments that computes y and all gradients for random inputs."""
    rng = np.random.default_rng(0)
    shapes = shape, shape[-1:], shape[-1:], shape
    x, gamma, beta, dy = (tf.constant(rng.standard_normal(s), tf.float32) for s in shapes)

    @tf.function(autograph=False)
    def compute(x, gamma, beta, dy):
        with tf.GradientTape() as tape:
            tape.watch([x, gamma, beta])
            y = function(x, gamma, beta)
        return y, *tape.gradient(y, [x, gamma, beta], dy)

    return lambda: compute(x, gamma, beta, dy)[1].numpy()[0, 0, 0, 0]


def print_alone(quick):
    print(f"{machine()}\nThe norm alone, forward and backward, {GROUPS} groups, float32")
    print(f"{'input NHWC':<16}{'group, ms':>10}  {'/ Keras':<18}{'/ transpose':<18}{'/ batch':<18}")
    medians = {base: [] for base in ("Keras", "transpose", "batch")}
    for shape in SHAPES[3:5] if quick else SHAPES:
        functions = {name: forward_and_backward(function, shape) for name, function in contenders(shape).items()}
        times = take_turns(functions, 7 if quick else 21, seconds=0.1)
        shares = "".join(f"{ratio(times, 'group', base):<18}" for base in medians)
        print(f"{'x'.join(map(str, shape)):<16}{1e3 * statistics.median(times['group']):>10.2f}  {shares}")
        for base, of_shapes in medians.items():
            of_shapes.append(statistics.median(a / b for a, b in zip(times["group"], times[base])))
    means = "".join(f"{statistics.geometric_mean(of_shapes):<18.2f}" for of_shapes in medians.values())
    print(f"{'geometric mean':<26}  {means}")


def make_step(model, image_shape, batch_size, variant, updates, num_classes=10):
    """Return a function that runs `updates` updates of trainer.py; variant: a norm, 'group XLA' or 'group bfloat16'."""
    norm_type, _, option = variant.partition(" ")
    flags = Config(
        model=model,
        norm_type=norm_type,
        optimizer="adam",
        batch_size=batch_size,
        max_batch_size=updates * batch_size,
        batch_norm_momentum=0.9,
        jit_compile=option == "XLA",
        dtype="bfloat16" if option == "bfloat16" else "float32",
    )
    config = spell_out(flags)
    keras.utils.set_random_seed(0)
    state = trainer.make_state(create_model(config, image_shape, num_classes), config)
    state.optimizer.learning_rate.assign(1e-5)
    train_step = trainer.make_train_step(state)
    images = tf.random.uniform([updates * batch_size, *image_shape])
    labels = tf.random.uniform([updates * batch_size], maxval=num_classes, dtype=tf.int32)
    return lambda: train_step(images, labels)[1].numpy()


def measure_step(model, size, batch_size, variants, rounds):
    """Return the seconds per update of each variant, {variant: [of each round]}."""
    set_threads(batch_size, (size, size, 3))
    updates = max(1, 16 // batch_size)
    steps = {v: make_step(model, (size, size, 3), batch_size, v, updates) for v in variants}
    times = take_turns(steps, rounds)
    return {name: [seconds / updates for seconds in of_rounds] for name, of_rounds in times.items()}


def measure_memory(model, image_shape, num_classes, batch_size, norm_type):
    """Return the peak bytes of three updates beyond the memory used before."""
    set_threads(batch_size, image_shape)
    tf.random.uniform([1]).numpy()
    before = peak_memory()
    step = make_step(model, image_shape, batch_size, norm_type, 1, num_classes)
    for _ in range(3):
        step()
    return peak_memory() - before


def peak_memory():
    """Return the peak bytes on the GPU, counted by TensorFlow, or else of this process.

    On Linux the peak is read from /proc, because getrusage includes the parent process.
    """
    if tf.config.list_physical_devices("GPU"):
        return tf.config.experimental.get_memory_info("GPU:0")["peak"]
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def print_memory(model, image_shape, num_classes, batch_sizes):
    """Print the peak memory of an update by norm and batch size, for model.py --memory."""
    print(f"peak memory of an update of {model} in GB, without TensorFlow itself, by norm:")
    print(f"{'batch size':>10}" + "".join(f"{norm:>8}" for norm in MEMORY_NORMS))
    network = {"model": model, "image_shape": image_shape, "num_classes": num_classes}
    for batch_size in batch_sizes:
        case = network | {"batch_size": batch_size}
        peaks = [in_own_process("memory", **case, norm_type=norm) / 1e9 for norm in MEMORY_NORMS]
        print(f"{batch_size:>10}" + "".join(f"{peak:>8.2f}" for peak in peaks))


def print_steps(quick):
    columns = [("group", "batch"), ("group+ws", "batch"), ("group", "none")]
    print(f"{machine()}\nAn update with Adam; others: the time divided by that of group norm")
    ratios = "".join(f"{f'{a} / {b}':<18}" for a, b in columns)
    print(f"{'model':<10}{'batch':>6}{'group, images/s':>17}  {ratios}others")
    for model, size, batch_size in [STEPS[1], STEPS[3]] if quick else STEPS:
        more = ["group XLA", "group bfloat16"] if model == "resnet20" and batch_size in (2, 32) and not quick else []
        case = {"model": model, "size": size, "batch_size": batch_size, "variants": [*COMPARED, *more]}
        times = in_own_process("step", **case, rounds=7 if quick or model == "resnet50" else 21)
        print(
            f"{model:<10}{batch_size:>6}{batch_size / statistics.median(times['group']):>17.1f}  "
            + "".join(f"{ratio(times, *pair):<18}" for pair in columns)
            + "; ".join(f"{name} {ratio(times, name, 'group')}" for name in more)
        )


def images_per_second(norm, batch_size, data_dir):
    """Return the median over the rows of a run of trainer.py, whose first row excludes the tracing of the graph."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--dataset CIFAR10 --model convnet --norm_type {norm} --batch_size {batch_size} --max_training_step 31"
        command = [sys.executable, str(ROOT / "trainer.py"), *flags.split(), "--data_dir", data_dir]
        done = subprocess.run([*command, "--train_dir", folder], capture_output=True, text=True)
        if done.returncode:
            raise ExternalError(f"trainer.py ended with code {done.returncode}: {one_line(done.stderr[-300:])}")
        (path,) = Path(folder).glob("*/metrics.jsonl")
        rows = runs.read_rows(path)
    return statistics.median(row["images_per_second"] for row in rows if "images_per_second" in row)


def print_trainer(quick, data_dir):
    train, _ = datasets.create_default_splits("CIFAR10", data_dir)
    batches = iter(input_ops.create_input_ops(train, 64, True, "crop"))
    speed = 64 / statistics.median(take_turns({"input": lambda: next(batches)}, 21)["input"])
    print(f"{machine()}\nCIFAR10, convnet, with trainer.py; the input alone: {speed:.0f} images per second")
    print(f"{'batch size':>10}{'group, images/s':>17}{'batch, images/s':>17}  group / batch, as images/s")
    for batch_size in (2,) if quick else (1, 2, 8, 32, 64):
        speeds = {norm: [] for norm in ("group", "batch")}
        for _ in range(2 if quick else 3):
            for norm, of_rounds in speeds.items():
                of_rounds.append(images_per_second(norm, batch_size, data_dir))
        group, batch = (statistics.median(of_rounds) for of_rounds in speeds.values())
        print(f"{batch_size:>10}{group:>17.1f}{batch:>17.1f}  {ratio(speeds, 'group', 'batch')}")


@tf.autograph.experimental.do_not_convert  # which takes seconds
def decoded_alone(photographs, is_training):
    """Return batches that read and decode what create_input_ops does, on all cores, and skip the rest of it."""

    def decode(jpeg, label, number):
        if is_training:
            seed = tf.random.split(input_ops.key(input_ops.AUGMENTATION, 0, number), 2)[0]
            window = input_ops.random_window(tf.io.extract_jpeg_shape(jpeg), seed)
            return tf.io.decode_and_crop_jpeg(jpeg, window, channels=3)[0, 0, 0]
        return tf.io.decode_jpeg(jpeg, channels=3)[0, 0, 0]

    steps = len(photographs) // PHOTOGRAPHS_AT_ONCE
    positions = input_ops.shuffled(len(photographs), PHOTOGRAPHS_AT_ONCE, 0, 0).take(steps)
    numbered = tf.data.Dataset.zip(tf.data.Dataset.range(steps), positions)
    files = input_ops.jpeg_files(numbered, photographs, PHOTOGRAPHS_AT_ONCE)
    options = tf.data.Options()
    options.experimental_optimization.apply_default_optimizations = False
    batches = files.map(decode, num_parallel_calls=os.cpu_count()).batch(PHOTOGRAPHS_AT_ONCE)
    return batches.prefetch(tf.data.AUTOTUNE).with_options(options)


def print_imagenet(quick, data_dir):
    _, test = datasets.create_default_splits("ImageNet", data_dir)
    count = min(len(test), 64 if quick else PHOTOGRAPHS) // PHOTOGRAPHS_AT_ONCE * PHOTOGRAPHS_AT_ONCE
    photographs = test.subset(np.arange(count))
    print(f"{machine()}\n{count} photographs, images per second")
    print(f"{'':<10}{'decoded alone':>16}{'input':>8}  ratio")
    for name, is_training in (("training", True), ("testing", False)):
        last = count // PHOTOGRAPHS_AT_ONCE if is_training else None
        made = input_ops.create_input_ops(photographs, PHOTOGRAPHS_AT_ONCE, is_training, "flip+crop", last_step=last)
        batches = {"decoding": decoded_alone(photographs, is_training), "input": made}
        functions = {key: lambda batches=value: [None for _ in batches] for key, value in batches.items()}
        times = take_turns(functions, 3 if quick else 20)
        alone, both = (count / statistics.median(times[key]) for key in ("decoding", "input"))
        print(f"{name:<10}{alone:>16.0f}{both:>8.0f}  {ratio(times, 'decoding', 'input')}")


def main(flags):
    if flags.case:
        tf.get_logger().setLevel("ERROR")  # no warnings about tracing many graphs
        kind, case = json.loads(flags.case)
        print(json.dumps({"step": measure_step, "memory": measure_memory}[kind](**case)))
    elif flags.what in ("alone", "steps"):
        {"alone": print_alone, "steps": print_steps}[flags.what](flags.quick)
    else:
        {"trainer": print_trainer, "imagenet": print_imagenet}[flags.what](flags.quick, flags.data_dir)


if __name__ == "__main__":
    run(lambda: main(FLAGS))
