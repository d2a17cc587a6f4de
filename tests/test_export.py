"""evaler.py --export: files that load without this repo, compute the same, and can be trained on.

python -m pytest tests/test_export.py
"""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import scripts
import tensorflow as tf

import checkpoints
import command
import export
import layers
import ops
from command import UserError
from config import NORM_TYPES, Config, read_config
from input_ops import to_float
from model import create_model


@pytest.fixture(scope="module")
def run_dir(data_dir, tmp_path_factory):
    """A short run with group norm and weight standardization."""
    train_dir = tmp_path_factory.mktemp("run")
    flags = "--dataset Digits --model resnet8 --norm_type group --weight_standardization --batch_size 4".split()
    flags += "--max_batch_size 32 --max_training_step 12 --learning_rate 0.01".split()
    with pytest.MonkeyPatch.context() as monkeypatch:
        scripts.run_here(monkeypatch, *flags, "--data_dir", data_dir, "--train_dir", train_dir)
    return scripts.only_run(train_dir)


@pytest.fixture(scope="module")
def exported(run_dir, data_dir, tmp_path_factory):
    """The run's export, and what evaler.py printed."""
    place = tmp_path_factory.mktemp("export") / "taken"
    return place, scripts.run("evaler.py", *flags_of(run_dir, data_dir, place))


def flags_of(run_dir, data_dir, place):
    return ["--dataset", "Digits", "--data_dir", data_dir, "--train_dir", str(run_dir), "--export", str(place)]


@pytest.fixture(scope="module")
def network(run_dir):
    """The run's network, with its weights."""
    model = create_model(read_config(run_dir)[0], (8, 8, 1), 10)
    checkpoints.load_weights(model, run_dir)
    return model


def test_the_folder_holds_the_files_and_the_card_says_what_they_are(exported, run_dir):
    place, printed = exported
    assert sorted(path.name for path in place.iterdir()) == ["README.md", "model.keras", "saved_model"]
    assert [path.name for path in place.parent.iterdir()] == ["taken"]  # nothing half-written beside it
    text = (place / "README.md").read_text()
    found = re.findall(r"wrote \S+/(\S+): largest difference of a logit (\S+)", printed)
    assert [name for name, _ in found] == ["saved_model", "model.keras"]
    for name, difference in found:
        assert float(difference) <= 1e-5 and f"## {name}\n\nLargest difference of a logit: {difference}." in text
    config = json.loads((run_dir / "config.json").read_text())
    result = json.loads((run_dir / "evaluation.json").read_text())["splits"]["test"]["accuracy"]
    for row in (
        f"| accuracy | {100 * result['accuracy']:.2f} % of the test images |",
        "| norm | group, 16 groups, weight standardization |",
        "| images | 1437 to train, 360 to test |",
        "| batch size | 4 images per update |",
        f"| versions, training | python {config['versions']['python']}, tensorflow {tf.__version__}",
        f"| commit | {(config['source'] or {'commit': 'unknown'})['commit']}",
        "| classes, in the order of the logits | 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 |",
        "--max_batch_size 32",
        "the original archives |",
        f"| run | {run_dir.name} |",
    ):
        assert row in text, row
    assert str(run_dir.parent) not in text  # no path of this machine


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


def test_the_lines_of_the_readme_run_elsewhere(exported, network, digits, tmp_path):
    """In a process without this repo: logits, class names, gradients through the custom ones, and training on."""
    place = tmp_path / "moved"
    shutil.copytree(exported[0], place)
    images, labels = digits[1].images()[:8], digits[1].labels[:8]
    np.save(place / "images.npy", images)
    np.save(place / "labels.npy", labels)
    blocks = re.findall(r"```python\n(.*?)```", (place / "README.md").read_text(), re.DOTALL)
    code = blocks[0] + ELSEWHERE + blocks[1] + ELSEWHERE_KERAS
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


NETWORKS = [("resnet8", norm, False) for norm in NORM_TYPES] + [
    ("resnet8", "group", True),
    ("resnet8", "none", True),
    ("convnet", "batch", False),
    ("convnet", "group", True),
]


def random_network(name, norm_type, weight_standardization):
    """A network whose every weight is drawn, so that no gamma or scalar is 0 and no statistic that of the start."""
    config = Config(model=name, norm_type=norm_type, weight_standardization=weight_standardization)
    model = create_model(replace(config, batch_norm_momentum=0.9), (32, 32, 3), 10)
    rng = np.random.default_rng(0)
    for variable in model.weights:
        size = variable.shape
        if variable.name == "kernel":
            variable.assign(rng.normal(0, np.sqrt(2 / np.prod(size[:-1])), size))
        else:
            variable.assign(rng.uniform(0.5, 1.5, size))
    return model


@pytest.mark.parametrize("name, norm_type, weight_standardization", NETWORKS)
def test_a_network_of_keras_layers_computes_the_same(name, norm_type, weight_standardization):
    """The same logits, of Keras' classes alone, and one step of fit changes it."""
    model = random_network(name, norm_type, weight_standardization)
    twin = export.to_keras_layers(model)
    assert all(type(layer).__module__.startswith("keras.") for layer in twin.layers)
    assert [layer.name for layer in twin.layers] == [layer.name for layer in model.layers]
    x = np.random.default_rng(1).uniform(size=(4, 32, 32, 3)).astype("float32")
    expected = model(x).numpy()
    assert np.ptp(expected, axis=0).min() > 1e-3  # logits differ between images: the comparison says something
    np.testing.assert_allclose(twin(x), expected, rtol=0, atol=1e-5 * max(1, abs(expected).max()))
    before = [weight.copy() for weight in twin.get_weights()]
    twin.compile(keras.optimizers.SGD(1e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    twin.fit(x, np.arange(4), verbose=0)
    assert any((old != new).any() for old, new in zip(before, twin.get_weights()))
    np.testing.assert_array_equal(model(x), expected)  # its weights are its own


def test_an_input_needs_no_name():
    inputs = keras.Input([8, 8, 3])
    model = keras.Model(inputs, ops.GroupNorm(1)(layers.SkipInit()(layers.Conv2D(4, 3)(inputs))))
    x = np.random.default_rng(0).uniform(size=(2, 8, 8, 3)).astype("float32")
    np.testing.assert_array_equal(export.to_keras_layers(model)(x), model(x))  # a scalar of 0: beta


def test_dropout_stays():
    twin = export.to_keras_layers(random_network("convnet", "group", False))
    assert [layer.rate for layer in twin.layers if type(layer) is keras.layers.Dropout] == [0.5] * 4


@pytest.mark.parametrize("case", ["activation", "another use", "no convolution"])
def test_a_scalar_that_no_convolution_can_take_is_refused(case):
    inputs = keras.Input([8, 8, 3])
    x = layers.Conv2D(4, 3, activation="relu" if case == "activation" else None)(inputs)
    if case == "no convolution":
        x = keras.layers.ReLU()(x)
    y = layers.SkipInit(name="scale")(x)
    with pytest.raises(ValueError, match="scale follows"):
        export.to_keras_layers(keras.Model(inputs, keras.layers.Add()([x, y]) if case == "another use" else y))


@pytest.mark.parametrize("change, refused", [(1e-3, True), (1e-7, False), (np.nan, True)])
def test_nothing_stays_of_an_export_that_differs(change, refused, run_dir, data_dir, tmp_path, monkeypatch, capsys):
    """Exit code 1, one line, and neither the folder nor a part of it."""

    def other_weights(model):
        twin = keras_layers(model)
        twin.get_layer("logits").bias.assign_add(np.eye(10, dtype="float32")[3] * change)
        return twin

    keras_layers = export.to_keras_layers
    monkeypatch.setattr(export, "to_keras_layers", other_weights)
    monkeypatch.setattr(command.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["evaler.py"])
    flags = flags_of(run_dir, data_dir, tmp_path / "taken")
    if not refused:
        return scripts.evaluate(flags)
    with pytest.raises(SystemExit) as ended:
        command.run(lambda: scripts.evaluate(flags))
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 1 and len(lines) == 1 and "model.keras" in lines[0], lines
    assert list(tmp_path.iterdir()) == []


def test_bad_requests_are_named_before_any_work(run_dir, data_dir, tmp_path, monkeypatch):
    for name in ("full", "unfinished", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    shutil.copy(run_dir / "config.json", tmp_path / "unfinished")
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    monkeypatch.setattr(export, "write", None)
    monkeypatch.chdir(tmp_path / "empty")
    new = tmp_path / "new"
    for train_dir, place, more, said in (
        (run_dir, tmp_path / "full", (), "full' is there"),
        (run_dir, tmp_path / "full" / "file", (), "file' is there"),
        (run_dir, tmp_path / "link", (), "link' is there"),
        (run_dir, ".", (), "'.' is there"),
        (run_dir, "", (), "'' is there"),
        (run_dir, tmp_path / "full" / "file" / "new", (), "file is no folder to write in"),
        (run_dir, tmp_path / "none" / "new", (), "none is no folder to write in"),
        (run_dir, new, ("--split", "test"), "--split has no effect with --export"),
        (run_dir, new, ("--validation", "9"), "--validation has no effect with --export"),
        (run_dir, new, ("--batch_statistics", "moving", "batch"), "--batch_statistics has no effect with --export"),
        (tmp_path / "unfinished", new, (), "have no checkpoint yet"),
    ):
        with pytest.raises(UserError, match=said):
            scripts.evaluate(flags_of(train_dir, data_dir, place) + list(more))
    assert not new.exists() and (tmp_path / "full" / "file").read_text() == "mine"


def test_a_full_disk_ends_in_one_line_and_leaves_nothing(run_dir, data_dir, tmp_path):
    """A limit on the size of files stands for the full disk: the SavedModel does not fit."""
    flags = flags_of(run_dir, data_dir, tmp_path / "taken")
    limited = ["prlimit", "--fsize=200000", *scripts.command("evaler.py", *flags)]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "taken could not be written" in done.stderr and "nothing was exported" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_bfloat16_run_is_exported_in_float32(run_dir, data_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "run")
    config = json.loads((run_dir / "config.json").read_text())
    config["flags"]["dtype"] = "bfloat16"
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    (tmp_path / "taken").mkdir()  # an empty folder is no hindrance
    scripts.evaluate(flags_of(tmp_path / "run", data_dir, tmp_path / "taken"))
    loaded = keras.models.load_model(tmp_path / "taken" / "model.keras")
    assert {layer.compute_dtype for layer in loaded.layers} == {"float32"}
    assert "--dtype bfloat16" in (tmp_path / "taken" / "README.md").read_text()


def test_a_saved_model_trains_as_the_network_does(tmp_path):
    """serve(images, training=True) normalizes by the batch and moves the statistics, as the network does."""
    model = create_model(Config(model="resnet8", batch_norm_momentum=0.5), (8, 8, 1), 10)
    data = SimpleNamespace(network_shape=(8, 8, 1), dtype=np.uint8, class_names=list("abcdefghij"))
    export.write_saved_model(model, data, tmp_path / "saved_model")
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), np.uint8)
    loaded = tf.saved_model.load(str(tmp_path / "saved_model"))
    for training in (True, False):
        expected = model(to_float(tf.constant(images)), training=training)
        np.testing.assert_allclose(loaded.serve(images, training=training)["logits"], expected, rtol=0, atol=1e-5)
    moving = [variable for variable in model.non_trainable_variables if "moving" in variable.path]
    assert len(moving) == len(loaded.state) > 4 and abs(moving[0].numpy()).max() > 0
    for variable, state in zip(moving, loaded.state):
        np.testing.assert_allclose(state, variable, rtol=1e-5, atol=1e-6)


def test_float_images_are_taken_as_they_are(tmp_path):
    """A dataset of float images: the SavedModel takes float32, and nothing is divided by 255."""
    model = create_model(Config(model="resnet8", norm_type="group"), (8, 8, 1), 3)
    data = SimpleNamespace(network_shape=(8, 8, 1), dtype=np.float32, name="MINE", class_names=["a", "b|c", "ü"])
    export.write_saved_model(model, data, tmp_path / "saved_model")
    x = np.random.default_rng(0).uniform(size=(2, 8, 8, 1)).astype("float32")
    loaded = tf.saved_model.load(str(tmp_path / "saved_model"))
    np.testing.assert_allclose(loaded.serve(x)["logits"], model(x), rtol=0, atol=1e-5)
    assert [name.decode() for name in loaded.class_names.numpy()] == data.class_names
