"""Write a network into files that load without this repo, and show that they compute what it computes.

    python evaler.py --dataset CIFAR10 --export exported
    python evaler.py --dataset CIFAR10 --export exported --export_format onnx litert

Each file is loaded by the lines that its README.md shows, in a process that does not see this repo, and its logits over
the whole test split are compared with the network's.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

import runs
from command import Later, UserError, WorldError, one_line, sync
from input_ops import create_input_ops, network_image_shape, to_float

tf, keras, ops = Later("tensorflow"), Later("keras"), Later("ops")

TOLERANCE = 1e-5  # largest difference of a logit, times the largest logit where that is above 1: 24 bits round so
HERE = Path(__file__).resolve().parent


class Format(NamedTuple):
    """A file that an export has, the packages that it takes, and the lines that load it and define predict."""

    file: str
    packages: tuple
    lines: str  # {images}: what predict takes, {scaled}: what makes of it the network's input


FORMATS = {
    "saved_model": Format(
        "saved_model",
        (),
        """\
import tensorflow as tf

exported = tf.saved_model.load("saved_model")
class_names = [name.decode() for name in exported.class_names.numpy()]


def predict(images):  # {images}; there are "probabilities" too
    return exported.serve(images)["logits"].numpy()


def gradients(images, labels):  # to train on: those of exported.trainable_weights; labels int [N]
    with tf.GradientTape() as tape:
        logits = exported.serve(images, training=True)["logits"]
        loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
    return tape.gradient(loss, exported.trainable_weights)
""",
    ),
    "keras": Format(
        "model.keras",
        (),
        """\
import keras

network = keras.models.load_model("model.keras")


def predict(images):  # {images}
    return network.predict({scaled}, verbose=0)


def fit(images, labels):  # to train on; labels int [N]
    network.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    network.fit({scaled}, labels)
""",
    ),
    "onnx": Format(
        "model.onnx",
        ("tf2onnx", "onnxruntime"),
        """\
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")


def predict(images):  # {images}
    return session.run(None, {session.get_inputs()[0].name: {scaled}})[0]
""",
    ),
    "litert": Format(
        "model.tflite",
        ("ai-edge-litert",),
        """\
from ai_edge_litert.interpreter import Interpreter

interpreter = Interpreter("model.tflite")


def predict(images):  # {images}
    network_input, logits = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]
    interpreter.resize_tensor_input(network_input, images.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(network_input, {scaled})
    interpreter.invoke()
    return interpreter.get_tensor(logits)
""",
    ),
}
ALWAYS, FURTHER = ("saved_model", "keras"), ("onnx", "litert")

CHECK = """
import sys
import numpy as np

images = np.load(sys.argv[1], mmap_mode="r")
parts = [predict(np.array(images[i : i + 250])) for i in range(0, len(images), 250)]
np.save(sys.argv[2], np.concatenate(parts))
"""


def check_request(place, formats) -> None:
    """Raise UserError where `place` cannot become the export's folder, or a format's packages are missing."""
    given, place = place, Path(os.path.abspath(place))
    fixed = place.is_symlink() or os.path.ismount(place) or place == Path.cwd()  # an empty folder is replaced
    if os.path.lexists(place) and (fixed or not place.is_dir() or any(place.iterdir())):
        raise UserError(
            f"--export {str(given)!r} is there, and not an empty folder that can be replaced: name one that is not "
            "there yet"
        )
    if not (place.parent.is_dir() and os.access(place.parent, os.W_OK)):
        raise UserError(f"--export {place}: {place.parent} is no folder to write in: make it, or name another")
    for name in formats:
        packages = FORMATS[name].packages
        if any(importlib.util.find_spec(package.replace("-", "_")) is None for package in packages):
            raise UserError(f"--export_format {name} needs packages: pip install {' '.join(packages)}")


def write(model, test, place, formats, batch_size, run_dir, step) -> None:
    """Make the folder `place` with the network in every format and README.md; as a whole or not at all.

    Args:
        model: the network, in float32.
        test: the test split, a datasets.hdf5.Dataset, all of which is compared.
        place: a folder that check_request lets pass.
        formats: of FURTHER, beside those that are ALWAYS written.
        batch_size: images at a time.
        run_dir, step: where the weights are from.

    Raises:
        WorldError: if a file cannot be written, or loaded without this repo, or its logits differ.
    """
    place, differences = Path(os.path.abspath(place)), {}
    names = [*ALWAYS, *(name for name in FURTHER if name in formats)]
    try:
        with tempfile.TemporaryDirectory(prefix=".export-", suffix=".part", dir=place.parent) as part:
            folder, images = Path(part) / "export", Path(part) / "images.npy"
            folder.mkdir()
            write_files(model, test, folder, names)
            logits = write_images(model, test, batch_size, images)
            for name in names:
                found = logits_elsewhere(name, test, folder, images)
                differences[name] = check_difference(FORMATS[name].file, found, logits)
            text = card(model, test, run_dir, step, logits, differences)
            (folder / "README.md").write_text(text, encoding="utf-8")
            for path in [*folder.rglob("*"), folder]:
                sync(path)
            os.replace(folder, place)
    except (OSError, tf.errors.OpError) as error:  # the disk is full, in Python's and in TensorFlow's words
        raise WorldError(f"--export {place} could not be written: {error}; nothing was exported") from error
    for name, difference in differences.items():
        print(f"wrote {place / FORMATS[name].file}: largest difference of a logit {difference:.1e}, {len(test)} images")


# ------------------------------------------------------------------------------------------------------ the files


def write_files(model, test, folder, names) -> None:
    """The network in each of the formats `names`, in `folder`."""
    write_saved_model(model, test, folder / FORMATS["saved_model"].file)
    twin = to_keras_layers(model)
    twin.save(folder / FORMATS["keras"].file)
    twin(tf.zeros([1, *network_image_shape(test)]))  # Keras makes ONNX only of a model that was called
    for name in names[len(ALWAYS) :]:
        twin.export(str(folder / FORMATS[name].file), format=name, verbose=False)


def write_saved_model(model, test, path) -> None:
    """A SavedModel of the network for images as test stores them, [N, h, w, c]: serve(images, training=False) gives a
    dict of logits and probabilities, [N, K]; class_names [K] strings, and trainable_weights, which serve has gradients
    of."""
    module = tf.Module()
    module.class_names = tf.Variable(test.class_names, trainable=False)
    module.trainable_weights = [variable.value for variable in model.trainable_variables]
    module.state = [variable.value for variable in model.non_trainable_variables]

    @tf.function
    def serve(images, training=False):
        logits = model(to_float(images), training=training)
        return {"logits": logits, "probabilities": tf.nn.softmax(logits)}

    images = tf.TensorSpec([None, *network_image_shape(test)], test.dtype, name="images")
    serve.get_concrete_function(images, training=True)
    module.serve = serve
    tf.saved_model.save(
        module,
        str(path),
        signatures=serve.get_concrete_function(images),
        options=tf.saved_model.SaveOptions(experimental_custom_gradients=True),
    )


def lines_of(name, test) -> str:
    """The lines that load a format, for the images of this dataset."""
    shape = ", ".join(map(str, network_image_shape(test)))
    if test.dtype == np.uint8:
        images, scaled = f"uint8 [N, {shape}], any N", '(images / 255).astype("float32")'
    else:
        images, scaled = f"float32 [N, {shape}], any N, as {test.name} stores them", "images"
    return FORMATS[name].lines.replace("{images}", images).replace("{scaled}", scaled)


# ------------------------------------------------------------------------------------------------ Keras' own layers


def to_keras_layers(model):
    """The same network of Keras' own layers alone: a file of it is loaded, and trained on, without this repo.

    Weights that are standardized before each use become the kernels, and the scalar of SkipInit goes into the kernel
    and bias of the convolution before it. Training on is therefore without both, and Keras' batch norm moves the
    batch's own variance where ops.BatchNorm moves the unbiased one.

    Args:
        model: a functional Keras model of any layers; those of ops.py are replaced.

    Returns:
        A model with weights of its own, from the same inputs to the same outputs in inference but for rounding.

    Raises:
        ValueError: if a SkipInit does not follow a linear convolution whose output nothing else uses.
    """
    keras_layers = {
        ops.GroupNorm: keras.layers.GroupNormalization,
        ops.BatchNorm: keras.layers.BatchNormalization,
        ops.Dropout: keras.layers.Dropout,
        ops.Conv2D: keras.layers.Conv2D,
        ops.StandardizedConv2D: keras.layers.Conv2D,
    }
    twins = {}

    def replace(layer):
        if isinstance(layer, ops.SkipInit):
            twins[layer] = keras.layers.Activation("linear", name=layer.name, dtype=layer.dtype_policy)
        else:
            twins[layer] = keras_layers.get(type(layer), type(layer)).from_config(layer.get_config())
        return twins[layer]

    network = keras.models.clone_model(model, clone_function=replace)
    for layer, twin in twins.items():  # in the order of the graph: a convolution before its SkipInit
        weights = layer.get_weights()
        if isinstance(layer, ops.SkipInit):
            twin, (scale,) = twins[convolution_before(layer)], weights
            weights = [scale * weight for weight in twin.get_weights()]
        elif isinstance(layer, ops.StandardizedConv2D):
            weights[0] = ops.standardize_weights(tf.cast(weights[0], layer.compute_dtype)).numpy()
        twin.set_weights(weights)
    return network


def convolution_before(layer):
    """The convolution that a SkipInit scales; ValueError if the scalar cannot go into its kernel and bias."""
    before = layer.input._keras_history.operation
    linear = isinstance(before, keras.layers.Conv2D) and before.activation is keras.activations.linear
    if not linear or len(before._outbound_nodes) != 1:
        raise ValueError(
            f"{layer.name} follows {before.name}: its scalar can go into a convolution without activation whose "
            "output nothing else uses"
        )
    return before


# ------------------------------------------------------------------------------------------------- the comparison


def served(images, dtype):
    """Images [B, h, w, c] of create_input_ops as an export takes them: uint8 again (rounded, where they were resized),
    or float32 as they are."""
    return tf.cast(tf.round(images * 255), tf.uint8) if dtype == np.uint8 else images


def write_images(model, test, batch_size, path) -> np.ndarray:
    """Write the test split as an export takes it, [N, h, w, c], to a .npy file; returns the network's logits [N, K]."""
    predict = tf.function(lambda images: model(to_float(images), training=False), reduce_retracing=True)
    header = {"shape": (len(test), *network_image_shape(test)), "fortran_order": False}
    logits = []
    with open(path, "wb") as file:  # written as it comes, not mapped: a full disk is an error then, not a crash
        np.lib.format.write_array_header_1_0(
            file, header | {"descr": np.lib.format.dtype_to_descr(np.dtype(test.dtype))}
        )
        for images, _ in create_input_ops(test, batch_size, is_training=False):
            images = served(images, test.dtype)
            file.write(images.numpy().tobytes())
            logits.append(predict(images).numpy())
    return np.concatenate(logits)


def logits_elsewhere(name, test, folder, images) -> np.ndarray:
    """The logits [N, K] that a file in `folder` gives, in a process without this repo.

    Args:
        name: of the format.
        test: the split, for the lines that load it.
        folder: where the file is.
        images: .npy file of what it takes, [N, h, w, c].

    Raises:
        WorldError: if the lines fail.
    """
    found = images.with_name(f"{name}.npy")
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    done = subprocess.run(
        [sys.executable, "-P", "-c", lines_of(name, test) + CHECK, str(images), str(found)],  # -P: not cwd either
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if Path(path).resolve() != HERE)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        why = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise WorldError(
            f"{FORMATS[name].file} does not run without this repo: {one_line(why, 300)}; nothing was exported"
        )
    return np.load(found)


def check_difference(file, found, expected) -> float:
    """The largest difference of two arrays of logits [N, K]; WorldError if it is above TOLERANCE."""
    difference = float(np.abs(found - expected).max())
    allowed = TOLERANCE * max(1.0, float(np.abs(expected).max()))
    if not difference <= allowed:  # nor NaN
        raise WorldError(
            f"a logit of {file} differs by {difference:.1e} from the network's, where {allowed:.1e} is allowed: "
            "nothing was exported"
        )
    return difference


# -------------------------------------------------------------------------------------------------- the model card


def card(model, test, run_dir, step, logits, differences) -> str:
    """README.md of an export: what it is, how good, where from, and how each file is loaded."""
    config, data = runs.read_config(run_dir)
    stored = json.loads((Path(run_dir) / "config.json").read_text())
    right = int((logits.argmax(axis=1) == test.labels).sum())
    shape = " × ".join(map(str, network_image_shape(test)))
    norm = f"{config.norm_type}, {describe_norm(config)}" if describe_norm(config) else config.norm_type
    flags = " ".join(
        f"--{name}" if value is True else f"--{name} {value}" for name, value in runs.flags_given(run_dir).items()
    )
    source = stored.get("source") or {}
    rows = {
        "data": f"{test.name}, {shape}; {test.made_from or 'made from: unknown'}",
        "images": f"{data['train']} to train, {len(test)} to test",
        "network": f"{config.model}, {model.count_params():,} parameters",
        "norm": norm,
        "batch size": f"{config.batch_size} images per update",
        "accuracy": f"{100 * right / len(test):.2f} % of the {len(test)} test images",
        "trained": f"`trainer.py {flags}`, {step} steps" + ", in bfloat16" * (config.dtype == "bfloat16"),
        "run": Path(run_dir).resolve().name,
        "commit": source.get("commit", "unknown") + ", changed" * bool(source.get("changed")),
        "versions, training": in_words(stored.get("versions", {})),
        "versions, export": in_words(runs.versions()),
        "classes, in the order of the logits": ", ".join(test.class_names),
    }
    if test.image_shape[2] in (1, 3):
        how = "the shorter side to 256 pixels, of which the centre" if test.encoded else "bilinearly to that size"
        colours = "RGB" if test.image_shape[2] == 3 else "luminance"
        rows["an image file becomes one"] = f"turned upright, {colours}, transparent parts on white, resized: {how}"
    table = "".join(f"| {name} | {cell(value)} |\n" for name, value in rows.items())
    text = (
        f"# {config.model} for {test.name}\n\n| | |\n| --- | --- |\n{table}\n"
        f"Each file was loaded by the lines below, in a process without the code that trained it, and its logits were "
        f"compared with the network's in float32 over the {len(test)} test images. The largest logit is "
        f"{np.abs(logits).max():.3g}.\n"
    )
    for name, difference in differences.items():
        words = f"Largest difference of a logit: {difference:.1e}. {remark(name, config)}".rstrip()
        text += f"\n## {FORMATS[name].file}\n\n{words}\n\n```python\n{lines_of(name, test)}```\n"
    return text


def remark(name, config) -> str:
    """What there is to say of a format of a run's network."""
    if name == "saved_model":
        return "TensorFlow alone loads it; it trains on as the run did."
    if name != "keras":
        return ""
    folded = ["the kernels are the standardized ones"] * config.weight_standardization
    folded += ["the scalars of SkipInit were multiplied into the kernels"] * (config.norm_type == "none")
    return "Of Keras' own layers" + (f": {', and '.join(folded)}; it trains on without that." if folded else ".")


def describe_norm(config) -> str:
    """What norm_type does not say of a network's norms."""
    words = []
    if config.norm_type == "group":
        words.append(f"{config.group_size} channels per group" if config.group_size else f"{config.groups} groups")
    if config.weight_standardization:
        words.append("weight standardization")
    return ", ".join(words)


def in_words(versions) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items()) or "unknown"


def cell(text) -> str:
    """`text` in a cell of a Markdown table."""
    return one_line(text, 100_000).replace("|", "\\|")
