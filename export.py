"""Export a network to files that load without this repo, and check that they compute the same logits.

python evaler.py --dataset CIFAR10 --export exported
"""

import os
import tempfile
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import layers
import ops
from command import UserError, ExternalError, one_line, sync
from config import check_path
from runs import changed_flags, read_config, versions
from input_ops import create_input_ops, to_float

# The largest difference of a logit that is allowed, divided by the largest logit if that exceeds 1. It is float32
# rounding; Keras' group norm rounds more, above all on images with large areas of one colour.
TOLERANCES = {"saved_model": 1e-5, "model.keras": 1e-4}
CHECKED_IMAGES = 500  # of the test split
CARD = """\
# {model} for {dataset}

| | |
| --- | --- |
{table}
Each file was loaded again, and its logits were compared with the network's on {images} test images. The largest logit
is {largest:.3g}.

{from_file}## saved_model

Largest difference of a logit: {saved_model:.1e}. It needs only TensorFlow, and further training works as in the run.

```python
import tensorflow as tf

exported = tf.saved_model.load("saved_model")
class_names = [name.decode() for name in exported.class_names.numpy()]


def predict(images):  # {format}; serve also returns "probabilities"
    return exported.serve(images)["logits"].numpy()


def gradients(images, labels):  # of exported.trainable_weights, for further training; labels int [N]
    with tf.GradientTape() as tape:
        logits = exported.serve(images, training=True)["logits"]
        loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
    return tape.gradient(loss, exported.trainable_weights)
```

## model.keras

Largest difference of a logit: {keras:.1e}. It contains only Keras' own layers{folded}. If their packages are installed,
`network.export("model.onnx", format="onnx")` and `format="litert"` write other formats.

```python
import keras

network = keras.models.load_model("model.keras")


def predict(images):  # {format}
    return network.predict({scaled}, verbose=0)


def fit(images, labels):  # for further training; labels int [N]
    network.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    network.fit({scaled}, labels)
```
"""

FROM_FILE = """\
## From an image file to an array

```python
import numpy as np
from PIL import Image, ImageOps

image = ImageOps.exif_transpose(Image.open("a.png")).convert("RGBA")
image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
{lines}
images = np.asarray(image, np.uint8).reshape(1, {shape}){scaled}
```

"""
RESIZE = """\
image = image.resize(({width}, {height}), Image.Resampling.BILINEAR)"""
CENTRE_CROP = """\
scale = 256 / min(image.size)
image = image.resize([round(scale * side) for side in image.size], Image.Resampling.BILINEAR)
left, top = ((side - 224) // 2 for side in image.size)
image = image.crop((left, top, left + 224, top + 224))"""


def check_folder(folder) -> None:
    """Raise UserError unless `folder` is new and can be created."""
    check_path(f"--export {folder}")
    if os.path.lexists(folder):
        raise UserError(f"--export {folder} exists: give a new folder")
    parent = Path(folder).absolute().parent
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise UserError(f"--export {folder}: {parent} is not a writable folder: create it, or give another")


def write(model, test, folder, run_dir, step, accuracy) -> None:
    """Create `folder` with saved_model, model.keras and README.md, completely or not at all.

    Args:
        model: the network, in float32.
        test: the test split, a datasets.hdf5.Dataset, whose first CHECKED_IMAGES images are used for the check.
        folder: a path that passes check_folder.
        run_dir, step: the run and the step of the weights.
        accuracy: of the network on the test split.

    Raises:
        ExternalError: if a file cannot be written, or its logits differ from the network's.
    """
    folder = Path(folder)
    try:
        with tempfile.TemporaryDirectory(prefix=".export-", suffix=".part", dir=folder.parent) as part:
            made = Path(part) / "export"
            made.mkdir()
            write_saved_model(model, test, made / "saved_model")
            to_keras_layers(model).save(made / "model.keras")
            differences, largest = check(model, test, made)
            text = card(model, test, run_dir, step, accuracy, differences, largest)
            (made / "README.md").write_text(text, encoding="utf-8")
            for path in [*made.rglob("*"), made]:
                sync(path)
            os.replace(made, folder)
    except (OSError, tf.errors.OpError) as error:  # a full disk, reported by Python or by TensorFlow
        raise ExternalError(f"--export {folder} could not be written: {error}; nothing was exported") from error
    for name, difference in differences.items():
        print(f"wrote {folder / name}: largest difference of a logit {difference:.1e}")


def write_saved_model(model, test, path) -> None:
    """Write a SavedModel of the network for images [N, h, w, c] as `test` stores them.

    It has serve(images, training=False), which returns a dict of logits and probabilities, [N, K] each, class_names [K]
    strings, and trainable_weights, for which serve has gradients.
    """
    module = tf.Module()
    module.class_names = tf.Variable(test.class_names, trainable=False)
    module.trainable_weights = [variable.value for variable in model.trainable_variables]
    module.state = [variable.value for variable in model.non_trainable_variables]

    @tf.function(autograph=False)
    def serve(images, training=False):
        logits = model(to_float(images), training=training)
        return {"logits": logits, "probabilities": tf.nn.softmax(logits)}

    images = tf.TensorSpec([None, *test.network_shape], test.dtype, name="images")
    serve.get_concrete_function(images, training=True)
    module.serve = serve
    options = tf.saved_model.SaveOptions(experimental_custom_gradients=True)
    tf.saved_model.save(module, str(path), signatures=serve.get_concrete_function(images), options=options)


def to_keras_layers(model):
    """Copy a network with Keras' own layers only, so that its file loads and trains without this repo.

    Standardized weights become the kernels, and the scalar of SkipInit is multiplied into the kernel and bias of the
    convolution before it. Further training therefore uses neither. It also differs in the moving variance of
    batch norm: Keras averages the biased variance of the batch, ops.BatchNorm the unbiased one.

    Args:
        model: a functional Keras model of any layers; those of ops.py and layers.py are replaced.

    Returns:
        A new model with its own weights and the same outputs in inference, except for rounding.

    Raises:
        ValueError: if a SkipInit does not follow a linear convolution whose output nothing else uses.
    """
    keras_layers = {
        ops.GroupNorm: keras.layers.GroupNormalization,
        ops.BatchNorm: keras.layers.BatchNormalization,
        layers.Dropout: keras.layers.Dropout,
        layers.Conv2D: keras.layers.Conv2D,
        layers.StandardizedConv2D: keras.layers.Conv2D,
    }
    twins = {}

    def replace(layer):
        if isinstance(layer, layers.SkipInit):
            twins[layer] = keras.layers.Activation("linear", name=layer.name, dtype=layer.dtype_policy)
        else:
            twins[layer] = keras_layers.get(type(layer), type(layer)).from_config(layer.get_config())
        return twins[layer]

    network = keras.models.clone_model(model, clone_function=replace)
    for layer, twin in twins.items():  # in the order of the graph: a convolution before its SkipInit
        weights = layer.get_weights()
        if isinstance(layer, layers.SkipInit):
            twin, (scale,) = twins[convolution_before(layer)], weights
            weights = [scale * weight for weight in twin.get_weights()]
        elif isinstance(layer, layers.StandardizedConv2D):
            weights[0] = layers.standardize_weights(tf.cast(weights[0], layer.compute_dtype)).numpy()
        twin.set_weights(weights)
    return network


def convolution_before(layer):
    """The convolution before a SkipInit; ValueError if the scalar cannot be multiplied into its kernel and bias."""
    before = layer.input._keras_history.operation
    linear = isinstance(before, keras.layers.Conv2D) and before.activation is keras.activations.linear
    if not linear or len(before._outbound_nodes) != 1:
        raise ValueError(f"{layer.name} follows {before.name}: it needs a linear convolution that nothing else uses")
    return before


def check(model, test, folder) -> tuple[dict, float]:
    """({file: largest difference of a logit}, the largest logit) on test images; ExternalError above TOLERANCES."""
    chosen = test.subset(np.arange(min(len(test), CHECKED_IMAGES)))
    exported = tf.saved_model.load(str(folder / "saved_model"))
    network = keras.models.load_model(folder / "model.keras")
    differences, largest = {"saved_model": 0.0, "model.keras": 0.0}, 0.0
    for images, _ in create_input_ops(chosen, 100, is_training=False):
        if test.dtype == np.uint8:  # exports take uint8; resized images are rounded
            images = tf.cast(tf.round(images * 255), tf.uint8)
        expected = model(to_float(images), training=False)
        found = {"saved_model": exported.serve(images)["logits"], "model.keras": network(to_float(images))}
        largest = max(largest, float(tf.reduce_max(tf.abs(expected))))
        for name, logits in found.items():
            difference = float(tf.reduce_max(tf.abs(logits - expected)))
            differences[name] = float(np.maximum(differences[name], difference))  # keeps NaN
    for name, difference in differences.items():
        if not difference <= TOLERANCES[name] * max(1.0, largest):  # also if it is NaN
            raise ExternalError(f"a logit of {name} differs by {difference:.1e}: nothing was exported")
    return differences, largest


def card(model, test, run_dir, step, accuracy, differences, largest) -> str:
    """The README.md of an export: the network, its accuracy and origin, and how to load each file."""
    config, stored = read_config(run_dir)
    data = stored["data"]
    shape = ", ".join(map(str, test.network_shape))
    given = changed_flags(stored).items()
    source = stored.get("source") or {}
    rows = {
        "data": f"{test.name}, images of {shape}; {test.made_from or 'made from: unknown'}",
        "images": f"{data['train']} to train, {len(test)} to test"
        + (f", {config.validation} held out of the training images" if config.validation else ""),
        "network": f"{config.model}, {model.count_params():,} parameters",
        "norm": describe_norm(config),
        "batch size": f"{config.batch_size} images" + ", gradients accumulated" * config.accumulate,
        "accuracy": f"{100 * accuracy:.2f} % of the test images",
        "trained": f"`trainer.py {' '.join(f'--{n}' if v is True else f'--{n} {v}' for n, v in given)}`, {step} steps",
        "run": Path(run_dir).resolve().name,
        "commit": source.get("commit", "unknown") + ", changed" * bool(source.get("changed")),
        "versions, training": format_versions(stored.get("versions", {})),
        "versions, export": format_versions(versions()),
        "classes, in the order of the logits": ", ".join(test.class_names),
    }
    height, width, channels = test.network_shape
    is_uint8 = test.dtype == np.uint8
    low, high = (0, 1) if is_uint8 else (test.images().min(), test.images().max())
    has_files = channels in (1, 3) and 0 <= low and high <= 1  # image files can be converted to such images
    if has_files:
        how = "to 256 pixels on the shorter side, cropped to the centre" if test.encoded else "bilinearly"
        colours = "RGB" if channels == 3 else "luminance"
        rows["image files"] = f"turned upright, {colours}, transparent parts on white, resized {how}"
    folded = ["the kernels are already standardized"] * config.weight_standardization
    folded += ["the scalars of SkipInit are multiplied into the kernels"] * (config.norm_type == "none")
    lines = CENTRE_CROP if test.encoded else RESIZE.format(width=width, height=height)
    lines += '\nimage = image.convert("L")' if channels == 1 else ""
    scaled = "" if is_uint8 else " / np.float32(255)"
    from_file = FROM_FILE.format(lines=lines, shape=shape, scaled=scaled) if has_files else ""
    return CARD.format(
        from_file=from_file,
        model=config.model,
        dataset=test.name,
        table="".join(f"| {name} | {cell(value)} |\n" for name, value in rows.items()),
        images=min(len(test), CHECKED_IMAGES),
        largest=largest,
        format=f"uint8 [N, {shape}], any N" if is_uint8 else f"float32 [N, {shape}], any N, as {test.name} stores them",
        scaled='(images / 255).astype("float32")' if is_uint8 else "images",
        saved_model=differences["saved_model"],
        keras=differences["model.keras"],
        folded=f": {' and '.join(folded)}, which further training does not repeat" if folded else "",
    )


def describe_norm(config) -> str:
    """The norm of a network with its groups and weight standardization."""
    parts = [config.norm_type]
    if config.norm_type == "group":
        parts.append(f"{config.group_size} channels per group" if config.group_size else f"{config.groups} groups")
    return ", ".join(parts + ["weight standardization"] * config.weight_standardization)


def format_versions(versions) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items()) or "unknown"


def cell(text) -> str:
    """`text` in a cell of a Markdown table."""
    return one_line(text, 100_000).replace("|", "\\|")
