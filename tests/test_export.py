"""evaler.py --export: files that load without this repo, compute the same, and can be trained on."""

import dataclasses
import functools
import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import scripts
import tensorflow as tf
from PIL import Image
from scripts import build, randomize

import checkpoints
import export
import layers
import ops
from command import ExternalError
from config import NORM_TYPES
from input_ops import to_float


@pytest.fixture(scope="module")
def run_dir(group_run, tmp_path_factory):
    return shutil.copytree(group_run[0], tmp_path_factory.mktemp("run") / group_run[0].name)


@pytest.fixture(scope="module")
def exported(run_dir, data_dir, tmp_path_factory):
    """The run's export, and what evaler.py printed."""
    place = tmp_path_factory.mktemp("export") / "taken"
    return place, scripts.recorded(scripts.evaluate, flags_of(run_dir, data_dir, place))[1]


def flags_of(run_dir, data_dir, place):
    return ["--dataset", "Digits", "--data_dir", data_dir, "--train_dir", str(run_dir), "--export", str(place)]


def test_the_folder_holds_the_files_and_the_card_says_what_they_are(exported, run_dir):
    place, printed = exported
    assert sorted(path.name for path in place.iterdir()) == ["README.md", "model.keras", "saved_model"]
    assert [path.name for path in place.parent.iterdir()] == ["taken"]  # nothing half-written beside it
    assert "model-9: resnet8, group+ws norm, step 9" in printed
    text = (place / "README.md").read_text()
    found = re.findall(r"wrote \S+/(\S+): largest difference of a logit (\S+)", printed)
    assert [name for name, _ in found] == ["saved_model", "model.keras"]
    for name, difference in found:
        assert float(difference) <= 1e-5 and f"## {name}\n\nLargest difference of a logit: {difference}." in text
    config = json.loads((run_dir / "config.json").read_text())
    result = scripts.results_of(run_dir)["accuracy"]
    for row in (
        f"| accuracy | {100 * result['accuracy']:.2f} % of the test images |",
        "| norm | group, 16 groups, weight standardization |",
        "| images | 1437 to train, 360 to test |",
        "| batch size | 8 images |",
        f"| versions, training | python {config['versions']['python']}, tensorflow {tf.__version__}",
        f"| commit | {(config['source'] or {'commit': 'unknown'})['commit']}",
        "| classes, in the order of the logits | 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 |",
        "--max_batch_size 32",
        "the original archives |",
        f"| run | {run_dir.name} |",
    ):
        assert row in text, row
    assert str(run_dir.parent) not in text  # no path of this machine


def test_the_card_counts_the_images_held_out(run_dir, digits, tmp_path):
    stored = json.loads((run_dir / "config.json").read_text())
    stored["flags"]["validation"], stored["data"]["train"], stored["data"]["test"] = 300, 1137, 300
    (tmp_path / "config.json").write_text(json.dumps(stored))
    differences = {"saved_model": 0.0, "model.keras": 0.0}
    text = export.card(scripts.network_of(run_dir), digits[1], tmp_path, 9, 0.5, differences, 1.0)
    assert "| images | 1137 to train, 360 to test, 300 held out of the training images |" in text
    assert "From an image file" in text and "| image files |" in text
    centred = dataclasses.replace(digits[1], image=digits[1].images() / np.float32(128) - 1, rows=np.arange(360))
    text = export.card(scripts.network_of(run_dir), centred, tmp_path, 9, 0.5, differences, 1.0)
    assert "From an image file" not in text and "| image files |" not in text  # it would not know the scale


ELSEWHERE = """
import importlib.util
import numpy as np

assert importlib.util.find_spec("ops") is None and importlib.util.find_spec("export") is None
images, labels = np.load("images.npy"), np.load("labels.npy")
np.save("saved_model.npy", predict(images))
np.save("probabilities.npy", exported.serve(images)["probabilities"])
np.save("one.npy", predict(images[:1]))
np.savez("gradients.npz", *gradients(images, labels))
"""
ELSEWHERE_KERAS = """
np.save("keras.npy", predict(images))
before = network.get_weights()
fit(images, labels)
assert all(np.isfinite(weight).all() for weight in network.get_weights())
assert any((old != new).any() for old, new in zip(before, network.get_weights()))
print(class_names)
"""


def test_the_lines_of_the_readme_run_elsewhere(exported, run_dir, digits, tmp_path):
    """In a process without this repo: logits, class names, gradients through the custom ones, and training on."""
    place, network = tmp_path / "moved", scripts.network_of(run_dir)
    shutil.copytree(exported[0], place)
    images, labels = digits[1].images()[:8].copy(), digits[1].labels[:8]
    images[0, 0] = 255  # of a transparent row in the file
    np.save(place / "images.npy", images)
    np.save(place / "labels.npy", labels)
    blocks = re.findall(r"```python\n(.*?)```", (place / "README.md").read_text(), re.DOTALL)
    pixels, opacity = images[0, ..., 0].copy(), np.full((8, 8), 255, np.uint8)
    pixels[0] = opacity[0] = 0
    Image.merge("LA", [Image.fromarray(pixels), Image.fromarray(opacity)]).save(place / "a.png")
    of_file = blocks[0] + '\nassert np.array_equal(images, np.load("images.npy")[:1]) and images.dtype == np.uint8\n'
    code = of_file + blocks[1] + ELSEWHERE + blocks[2] + ELSEWHERE_KERAS
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(digits[1].class_names)

    logits = network(to_float(tf.constant(images))).numpy()
    for file in ("saved_model.npy", "keras.npy"):
        np.testing.assert_allclose(np.load(place / file), logits, rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.load(place / "one.npy"), logits[:1], rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.load(place / "probabilities.npy"), tf.nn.softmax(logits), rtol=0, atol=1e-5)
    with tf.GradientTape() as tape:
        out = network(to_float(tf.constant(images)), training=True)
        loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, out))
    expected = tape.gradient(loss, [variable.value for variable in network.trainable_variables])
    found = np.load(place / "gradients.npz")
    assert len(found.files) == len(expected) > 10
    for i, gradient in enumerate(expected):
        np.testing.assert_allclose(found[f"arr_{i}"], gradient, rtol=1e-3, atol=1e-5 * abs(gradient.numpy()).max())


def test_a_serving_signature_takes_any_number_of_images(exported):
    loaded = tf.saved_model.load(str(exported[0] / "saved_model"))
    serving = loaded.signatures["serving_default"]
    (spec,) = serving.structured_input_signature[1].values()
    assert (spec.dtype, spec.shape.as_list(), spec.name) == (tf.uint8, [None, 8, 8, 1], "images")
    out = serving(images=tf.zeros([3, 8, 8, 1], tf.uint8))
    assert {name: value.shape.as_list() for name, value in out.items()} == {"logits": [3, 10], "probabilities": [3, 10]}


NETWORKS = [("resnet8", norm, False) for norm in NORM_TYPES] + [("resnet8", "none", True), ("convnet", "group", True)]


@pytest.mark.parametrize("name, norm_type, weight_standardization", NETWORKS)
def test_a_network_of_keras_layers_computes_the_same(name, norm_type, weight_standardization):
    """The same logits, of Keras' classes alone. Its weights are its own."""
    model = randomize(build(name, norm_type=norm_type, weight_standardization=weight_standardization))
    twin = export.to_keras_layers(model)
    assert all(type(layer).__module__.startswith("keras.") for layer in twin.layers)
    assert [layer.name for layer in twin.layers] == [layer.name for layer in model.layers]
    rates = [layer.rate for layer in twin.layers if type(layer) is keras.layers.Dropout]
    assert rates == [0.5] * 4 * (name == "convnet")
    x = np.random.default_rng(1).uniform(size=(4, 32, 32, 3)).astype("float32")
    expected = model(x).numpy()
    assert np.ptp(expected, axis=0).min() > 1e-3  # logits differ between images: the comparison says something
    np.testing.assert_allclose(twin(x), expected, rtol=0, atol=1e-5 * max(1, abs(expected).max()))
    twin.set_weights([0 * weight for weight in twin.get_weights()])
    np.testing.assert_array_equal(model(x), expected)


def test_an_input_needs_no_name():
    inputs = keras.Input([8, 8, 3])
    model = keras.Model(inputs, ops.GroupNorm(1)(layers.SkipInit()(layers.Conv2D(4, 3)(inputs))))
    x = np.random.default_rng(0).uniform(size=(2, 8, 8, 3)).astype("float32")
    np.testing.assert_array_equal(export.to_keras_layers(model)(x), model(x))  # a scalar of 0: beta


@pytest.mark.parametrize("case", ["activation", "another use", "no convolution"])
def test_a_scalar_that_no_convolution_can_take_is_refused(case):
    inputs = keras.Input([8, 8, 3])
    x = layers.Conv2D(4, 3, activation="relu" if case == "activation" else None)(inputs)
    if case == "no convolution":
        x = keras.layers.ReLU()(x)
    y = layers.SkipInit(name="scale")(x)
    with pytest.raises(ValueError, match="scale follows"):
        export.to_keras_layers(keras.Model(inputs, keras.layers.Add()([x, y]) if case == "another use" else y))


def test_an_export_that_differs_is_refused(exported, run_dir, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(tf.saved_model, "load", functools.cache(tf.saved_model.load))  # it stays the same
    place, network = shutil.copytree(exported[0], tmp_path / "changed"), scripts.network_of(run_dir)
    twin = keras.models.load_model(place / "model.keras")
    for change, said in ((1e-3, "1.0e-03"), (np.nan, "nan")):
        twin.get_layer("logits").bias.assign_add(np.eye(10, dtype="float32")[3] * change)
        twin.save(place / "model.keras")
        with scripts.refused("model.keras", said, kind=ExternalError):
            export.check(network, digits[1].subset(np.arange(10)), place)


def test_a_folder_that_cannot_be_made_is_refused_before_any_work(run_dir, data_dir, tmp_path, monkeypatch):
    for name in ("old", "unfinished"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    shutil.copy(run_dir / "config.json", tmp_path / "unfinished")
    monkeypatch.setattr(export, "write", None)
    for place in (tmp_path / "old", tmp_path / "link", ".", tmp_path / "none" / "new", tmp_path / "a[1]"):
        with scripts.refused("--export", place):
            scripts.evaluate(flags_of(run_dir, data_dir, place))
    with scripts.refused(tmp_path / "unfinished", "checkpoint"):
        scripts.evaluate(flags_of(tmp_path / "unfinished", data_dir, tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_a_full_disk_ends_in_one_line_and_leaves_nothing(run_dir, digits, tmp_path):
    with scripts.full_disk(200_000), scripts.refused(tmp_path / "taken", "too large", kind=ExternalError):
        export.write(scripts.network_of(run_dir), digits[1], tmp_path / "taken", run_dir, 9, 0.5)
    assert list(tmp_path.iterdir()) == []


def test_a_bfloat16_run_is_exported_in_float32(exported, run_dir, data_dir, figures, tmp_path, monkeypatch):
    shutil.copytree(run_dir, tmp_path / "run")
    config = json.loads((run_dir / "config.json").read_text())
    config["flags"]["dtype"] = "bfloat16"
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    written = []
    monkeypatch.setattr(export, "write", lambda *arguments: written.append(arguments))
    scripts.evaluate(flags_of(tmp_path / "run", data_dir, tmp_path / "taken"))
    ((network, *_, accuracy),) = written
    assert accuracy == scripts.results_of(run_dir)["accuracy"]["accuracy"]  # that of the network in float32
    assert {layer.compute_dtype for layer in network.layers} == {"float32"}
    stored = checkpoints.weights_of(scripts.network_of(run_dir))
    for name, value in checkpoints.weights_of(network).items():
        np.testing.assert_array_equal(value, stored[name], err_msg=name)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_saved_model_trains_as_the_network_does(dtype, tmp_path):
    """serve(images, training=True) normalizes by the batch and moves the statistics, as the network does. Float images
    are taken as they are: nothing is divided by 255."""
    norms = [ops.BatchNorm(momentum=0.5) for _ in range(2)]
    first = [keras.Input((8, 8, 1)), layers.Conv2D(4, 3), norms[0]]
    model = keras.Sequential([*first, keras.layers.Flatten(), norms[1], keras.layers.Dense(3)])
    data = SimpleNamespace(network_shape=(8, 8, 1), dtype=dtype, class_names=["a", "b|c", "ü"])
    export.write_saved_model(model, data, tmp_path / "saved_model")
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1)).astype(dtype)
    loaded = tf.saved_model.load(str(tmp_path / "saved_model"))
    for training in (True, False):
        expected = model(images / np.float32(255 if dtype == np.uint8 else 1), training=training)
        np.testing.assert_allclose(loaded.serve(images, training=training)["logits"], expected, rtol=0, atol=1e-5)
    moving = [variable for variable in model.non_trainable_variables if "moving" in variable.path]
    assert len(moving) == len(loaded.state) == 4 and abs(moving[0].numpy()).max() > 0
    for variable, state in zip(moving, loaded.state):
        np.testing.assert_allclose(state, variable, rtol=1e-5, atol=1e-6)
    assert [name.decode() for name in loaded.class_names.numpy()] == data.class_names
