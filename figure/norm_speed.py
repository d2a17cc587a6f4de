"""Measure what the norms cost: alone, in a training step, in memory, in bfloat16 and under XLA, as ratios.

    python figure/norm_speed.py             # about 25 minutes, with nothing else running
    python figure/norm_speed.py --quick     # fewer networks and rounds: three minutes

What is compared runs in one process, in turn, round after round; a ratio is the median over the rounds of the ratio
within a round, with the quartiles in brackets. Steps are those of trainer.py, with its settings. PyTorch takes part
where it is installed. Prints tables; writes figure/norm_speed.json and figure/norm_speed.png.
"""

import importlib.util
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import numpy as np
from matplotlib.figure import Figure

import model as models
import runs
import trainer
from command import ArgumentParser, Later, WorldError, run, set_threads, write_whole
from results import COLOURS

tf, keras, ops = Later("tensorflow"), Later("keras"), Later("ops")

SHAPES = [
    (32, 32, 32, 64),
    (32, 16, 16, 128),
    (2, 56, 56, 256),
    (2, 32, 32, 16),
    (32, 32, 32, 16),
    (1, 8, 8, 64),
    (8, 14, 14, 512),
]
GROUPS = 8
STEPS = [("resnet20", 32, batch_size) for batch_size in (1, 2, 8, 32, 64)] + [
    ("convnet", 32, 2),
    ("convnet", 32, 64),
    ("resnet50", 224, 2),
    ("resnet50", 224, 8),
]
QUICK_STEPS = [("resnet20", 32, 2), ("resnet20", 32, 32), ("convnet", 32, 2)]


# ------------------------------------------------------------------------------------------------- measuring


def take_turns(functions, rounds, seconds=0.2):
    """Seconds a call of each function: {name: [of each round]}; a turn lasts about `seconds`."""
    calls = {}
    for name, function in functions.items():
        function()  # traces the graph
        start = time.perf_counter()
        function()
        calls[name] = max(1, round(seconds / (time.perf_counter() - start)))
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                function()
            times[name].append((time.perf_counter() - start) / calls[name])
    return times


def ratios(times, name, base):
    """Quartiles of times[name] / times[base], each ratio within one round."""
    of_rounds = [a / b for a, b in zip(times[name], times[base])]
    return statistics.quantiles(of_rounds, n=4, method="inclusive")


def in_own_process(case):
    """The result of measure_<kind>(**arguments), for case = {"kind": ..., arguments}, in a new process."""
    done = subprocess.run([sys.executable, __file__, "--case", json.dumps(case)], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise WorldError(f"measuring {case} failed with exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------------------------------------- the norms alone


def transpose_formula(x, gamma, beta, groups):
    """Group norm as the original repo has it: to [N, C, H, W] and [N, G, C / G, H, W], moments there, and back."""
    n, h, w, c = x.shape
    x = tf.reshape(tf.transpose(x, [0, 3, 1, 2]), [n, groups, c // groups, h, w])
    mean, variance = tf.nn.moments(x, [2, 3, 4], keepdims=True)
    x = tf.reshape((x - mean) / tf.sqrt(variance + ops.EPSILON), [n, c, h, w])
    return tf.transpose(x * tf.reshape(gamma, [1, c, 1, 1]) + tf.reshape(beta, [1, c, 1, 1]), [0, 2, 3, 1])


def contenders(shape):
    """{name: function of (x, gamma, beta)}."""
    layer = keras.layers.GroupNormalization(GROUPS, epsilon=ops.EPSILON)
    layer.build(shape)

    def library(x, gamma, beta):
        with keras.StatelessScope(state_mapping=[(layer.gamma, gamma), (layer.beta, beta)]):
            return layer(x)

    return {
        "group": lambda x, gamma, beta: ops.group_norm(x, gamma, beta, GROUPS),
        "Keras": library,
        "transpose": lambda x, gamma, beta: transpose_formula(x, gamma, beta, GROUPS),
        "batch": lambda x, gamma, beta: ops.batch_norm(
            x, gamma, beta, tf.zeros_like(gamma), tf.ones_like(beta), training=True
        )[0],
    }


def with_gradients(function):
    @tf.function
    def forward_and_backward(x, gamma, beta, dy):
        with tf.GradientTape() as tape:
            tape.watch([x, gamma, beta])
            y = function(x, gamma, beta)
        return y, *tape.gradient(y, [x, gamma, beta], dy)

    return forward_and_backward


def draw_inputs(shape, mean):
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal(shape) + mean, rng.standard_normal(shape)
    gamma, beta = rng.standard_normal(shape[-1:]) + 1, rng.standard_normal(shape[-1:])
    return [tf.constant(value, tf.float32) for value in (x, gamma, beta, dy)]


def measure_alone(shape, rounds):
    inputs = draw_inputs(shape, 0)
    functions = {name: with_gradients(function) for name, function in contenders(shape).items()}

    def caller(function):
        return lambda: function(*inputs)[1].numpy()[0, 0, 0, 0]

    return take_turns({name: caller(function) for name, function in functions.items()}, rounds, seconds=0.1)


def measure_error(shape, mean):
    """Largest absolute errors of y and dx against the definition in float64: {name: [y, dx]}."""
    inputs = draw_inputs(shape, mean)
    x, gamma, beta, dy = (value.numpy().astype(np.float64) for value in inputs)
    grouped = x.reshape(shape[0], -1, GROUPS, shape[-1] // GROUPS)
    mu, var = grouped.mean((1, 3), keepdims=True), grouped.var((1, 3), keepdims=True)
    xhat = (grouped - mu) / np.sqrt(var + ops.EPSILON)
    dxhat = (dy * gamma).reshape(grouped.shape)
    dx = (dxhat - dxhat.mean((1, 3), keepdims=True) - xhat * (dxhat * xhat).mean((1, 3), keepdims=True)) / np.sqrt(
        var + ops.EPSILON
    )
    exact = xhat.reshape(shape) * gamma + beta, dx.reshape(shape)
    functions = contenders(shape)
    del functions["batch"]
    return {
        name: [float(np.abs(got.numpy() - want).max()) for got, want in zip(with_gradients(f)(*inputs), exact)]
        for name, f in functions.items()
    }


# ----------------------------------------------------------------------------------------------- training steps


def make_step(model, size, batch_size, norm_type, updates, dtype="float32", jit_compile=False):
    """A function that does `updates` updates of trainer.py on one batch, in one call."""
    keras.utils.set_random_seed(0)
    keras.mixed_precision.set_dtype_policy({"float32": "float32", "bfloat16": "mixed_bfloat16"}[dtype])
    network = models.create_model(model, (size, size, 3), 10, norm_type)
    optimizer = trainer.Optimizer("adam", [variable.value for variable in network.trainable_variables])
    optimizer.learning_rate.assign(1e-5)
    totals = tf.Variable(tf.zeros([3], tf.float64))
    config = runs.Config(batch_size=batch_size, max_batch_size=updates * batch_size, jit_compile=jit_compile)
    train_step = trainer.make_train_step(network, optimizer, totals, config)
    images = tf.random.uniform([updates * batch_size, size, size, 3])
    labels = tf.random.uniform([updates * batch_size], maxval=10, dtype=tf.int32)
    return lambda: train_step(images, labels)[1].numpy()


def measure_step(model, size, batch_size, rounds, variants):
    """Seconds a call for each variant 'NORM', 'NORM bfloat16', 'NORM XLA' or 'NORM PyTorch' of the step."""
    set_threads(batch_size, (size, size, 3))
    updates = max(1, 16 // batch_size)
    functions = {}
    for variant in variants:
        norm_type, _, how = variant.partition(" ")
        if how == "PyTorch":
            functions[variant] = make_torch_step(size, batch_size, norm_type, updates)
        else:
            functions[variant] = make_step(
                model,
                size,
                batch_size,
                norm_type,
                updates,
                "bfloat16" if how == "bfloat16" else "float32",
                how == "XLA",
            )
    times = take_turns(functions, rounds)
    return {name: [seconds / updates for seconds in of_rounds] for name, of_rounds in times.items()}


def measure_memory(model, size, batch_size, norm_type):
    """Peak bytes that three steps take beyond what the process had before."""
    set_threads(batch_size, (size, size, 3))
    tf.random.uniform([1]).numpy()
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = make_step(model, size, batch_size, norm_type, updates=1)
    for _ in range(3):
        step()
    return unit * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def make_torch_step(size, batch_size, norm_type, updates):
    """The same for PyTorch, eager: resnet20 as in model.py, Adam, gradients clipped to the same norm."""
    import torch
    from torch import nn

    def normalization(channels):
        return (
            nn.GroupNorm(models.default_groups("resnet20"), channels)
            if norm_type == "group"
            else nn.BatchNorm2d(channels)
        )

    class Block(nn.Module):
        def __init__(self, inputs, filters, stride):
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(inputs, filters, 3, stride, 1, bias=False),
                normalization(filters),
                nn.ReLU(),
                nn.Conv2d(filters, filters, 3, 1, 1, bias=False),
                normalization(filters),
            )
            self.shortcut = (
                nn.Identity()
                if inputs == filters
                else nn.Sequential(nn.Conv2d(inputs, filters, 1, stride, bias=False), normalization(filters))
            )

        def forward(self, x):
            return torch.relu(self.body(x) + self.shortcut(x))

    torch.manual_seed(0)
    blocks = [
        Block(
            16 if stage == 0 else 8 * 2**stage if block == 0 else 16 * 2**stage,
            16 * 2**stage,
            2 if stage and block == 0 else 1,
        )
        for stage in range(3)
        for block in range(3)
    ]
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1, bias=False),
        normalization(16),
        nn.ReLU(),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-5)
    images, labels = torch.rand(batch_size, 3, size, size), torch.randint(10, (batch_size,))

    def update():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(images), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), runs.CLIP_NORM)
        optimizer.step()
        return loss.item()

    return lambda: [update() for _ in range(updates)]


# -------------------------------------------------------------------------------------------------- the script


def measure_all(quick):
    rounds, shapes, steps = (7, SHAPES[3:5], QUICK_STEPS) if quick else (21, SHAPES, STEPS)
    torch = importlib.util.find_spec("torch") is not None
    results = {"machine": describe_machine(), "alone": {}, "error": {}, "step": {}}
    for shape in shapes:
        results["alone"][" ".join(map(str, shape))] = in_own_process(
            {"kind": "alone", "shape": shape, "rounds": rounds}
        )
        for mean in (0, 1000):
            results["error"][f"{mean} {shape}"] = in_own_process({"kind": "error", "shape": shape, "mean": mean})
    results["geometric means"] = geometric_means(results["alone"])
    print_alone(results)
    print_step_header()
    for model, size, batch_size in steps:
        variants = ["batch", "group", "none"]
        if model == "resnet20":
            variants += ["group PyTorch"] if torch else []
            variants += ["group XLA"] if batch_size in (2, 32) else []
        if (model, batch_size) == ("resnet20", 64) or (model, batch_size) == ("resnet50", 8) and has_bfloat16():
            variants += ["group bfloat16"]
        results["step"][f"{model} {batch_size}"] = times = in_own_process(
            {
                "kind": "step",
                "model": model,
                "size": size,
                "batch_size": batch_size,
                "variants": variants,
                "rounds": 7 if model == "resnet50" else rounds,
            }
        )
        print_step(model, batch_size, times)
    model, size, batch_size = ("resnet20", 32, 32) if quick else ("resnet50", 224, 8)
    results["memory"] = {"none": [], "batch": [], "group": []}
    for norm_type in list(results["memory"]) * (1 if quick else 5):  # a process' peak differs by a few percent
        results["memory"][norm_type].append(
            in_own_process(
                {"kind": "memory", "model": model, "size": size, "batch_size": batch_size, "norm_type": norm_type}
            )
        )
    print_memory(model, size, batch_size, results["memory"])
    return results


def instructions():
    """Which instructions the processor has of those that matter here."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    words = {word for line in lines if line.startswith("flags") for word in line.split()}
    return [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in words]


def has_bfloat16():
    """Without such instructions a step of resnet50 takes minutes."""
    return any("bf16" in name for name in instructions()) or bool(tf.config.list_physical_devices("GPU"))


def describe_machine():
    gpus = len(tf.config.list_physical_devices("GPU"))
    return (
        f"{runs.processor()} ({', '.join(instructions())}), {os.cpu_count()} cores, {gpus} GPUs, Python "
        f"{platform.python_version()}, TensorFlow {tf.__version__}, Keras {keras.__version__}"
    )


def show(quartiles):
    low, median, high = quartiles
    return f"{median:.2f} [{low:.2f} {high:.2f}]"


def geometric_means(alone):
    """{base: geometric mean over the shapes of group's time / base's}."""
    return {
        base: math.exp(np.mean([math.log(ratios(times, "group", base)[1]) for times in alone.values()]))
        for base in ("Keras", "transpose", "batch")
    }


def print_alone(results):
    print(f"{results['machine']}\n\nThe norm alone, forward and backward, {GROUPS} groups, float32")
    print(f"{'input NHWC':<16}{'group, ms':>10}  {'/ Keras':<18}{'/ transposes':<18}{'/ batch':<18}")
    for shape, times in results["alone"].items():
        print(
            f"{shape.replace(' ', 'x'):<16}{1e3 * statistics.median(times['group']):>10.2f}  "
            + "".join(f"{show(ratios(times, 'group', base)):<18}" for base in results["geometric means"])
        )
    print(f"{'geometric mean':<28}" + "".join(f"{mean:<18.2f}" for mean in results["geometric means"].values()))
    print("\nLargest error against float64 over these inputs, of y and of dx")
    for mean in (0, 1000):
        errors = [of_names for key, of_names in results["error"].items() if key.startswith(f"{mean} ")]
        print(
            f"  mean {mean:>4}, std 1:  "
            + ";  ".join(
                f"{name} {max(e[name][0] for e in errors):.1e}, {max(e[name][1] for e in errors):.1e}"
                for name in errors[0]
            )
        )


def print_step_header():
    print(
        f"\nA training step (Adam)\n{'model':<10}{'batch':>6}{'group, images/s':>17}  {'group / batch':<18}"
        f"{'group / none':<18}others, as time / group's"
    )


def print_step(model, batch_size, times):
    others = [f"{name} {show(ratios(times, name, 'group'))}" for name in times if " " in name]
    print(
        f"{model:<10}{batch_size:>6}{batch_size / statistics.median(times['group']):>17.1f}  "
        f"{show(ratios(times, 'group', 'batch')):<18}{show(ratios(times, 'group', 'none')):<18}{'; '.join(others)}",
        flush=True,
    )


def print_memory(model, size, batch_size, peaks):
    memory = {name: statistics.median(of_processes) for name, of_processes in peaks.items()}
    print(
        f"\nPeak memory of a step, {model}, {size} px, batch size {batch_size}: "
        + ", ".join(
            f"{name} {memory[name] / 1e9:.2f} [{min(peaks[name]) / 1e9:.2f} {max(peaks[name]) / 1e9:.2f}] GB"
            for name in peaks
        )
        + f"; group / batch {memory['group'] / memory['batch']:.2f}"
    )


def draw(results, path):
    """Steps with group norm and without any, as share of the step with batch norm."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.add_subplot()
    for i, times in enumerate(results["step"].values()):
        for j, norm_type in enumerate(("group", "none")):
            low, median, high = ratios(times, norm_type, "batch")
            axes.bar(
                i + 0.4 * j, median, 0.38, color=COLOURS[norm_type], label=None if i else ("group norm", "no norm")[j]
            )
            axes.plot([i + 0.4 * j] * 2, [low, high], color="black", linewidth=1)
    axes.axhline(1, color=COLOURS["batch"], label="batch norm")
    axes.set_xticks(
        [i + 0.2 for i in range(len(results["step"]))],
        [f"{name.split()[0]}\nbatch {name.split()[1]}" for name in results["step"]],
        fontsize=8,
    )
    axes.set(ylabel="time of a training step\n(batch norm = 1)", title=results["machine"])
    axes.title.set_fontsize(8)
    axes.set_ylim(0, 1.4)
    axes.legend(fontsize=8, loc="upper right", ncols=3)
    figure.savefig(path, dpi=120)


def main():
    parser = ArgumentParser(description="Measure what the norms cost, as ratios.")
    parser.add_argument("--quick", action="store_true", help="fewer shapes, networks and rounds")
    parser.add_argument("--output", default=str(HERE / "norm_speed"), help="where to write OUTPUT.json and OUTPUT.png")
    parser.add_argument("--case", help="(used by the script itself) measure one case and print it as JSON")
    flags = parser.parse_args()
    if flags.case:
        tf.get_logger().setLevel("ERROR")  # many graphs are traced here, which it would warn of
        case = json.loads(flags.case)
        measure = {"alone": measure_alone, "error": measure_error, "step": measure_step, "memory": measure_memory}
        print(json.dumps(measure[case.pop("kind")](**case)))
        return
    results = measure_all(flags.quick)
    write_whole(Path(flags.output + ".json"), json.dumps(results) + "\n")
    draw(results, flags.output + ".png")
    print(f"wrote {flags.output}.json and {flags.output}.png")


if __name__ == "__main__":
    run(main)
