"""evaler.py --export: files that load without this repo, compute the same, and can be trained on.

python -m pytest tests/test_export.py
"""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import archives
import h5py
import keras
import numpy as np
import pytest
import scripts
import tensorflow as tf

import command
import evaler
import export
import model as models
import ops
import runs
from command import UserError, WorldError
from datasets.hdf5 import Dataset
from input_ops import create_input_ops, to_float


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
    model = evaler.build_model(runs.read_config(run_dir)[0], (8, 8, 1), 10)
    runs.load_weights(model, run_dir)
    return model


# -------------------------------------------------------------------------------------------------------- the folder


def test_the_folder_holds_the_files_and_says_how_they_differ(exported):
    place, printed = exported
    assert sorted(path.name for path in place.iterdir()) == ["README.md", "model.keras", "saved_model"]
    assert [path.name for path in place.parent.iterdir()] == ["taken"]  # nothing half-written beside it
    said = re.findall(r"wrote \S+/(\S+): largest difference of a logit (\S+), 360 images", printed)
    assert [name for name, _ in said] == ["saved_model", "model.keras"]
    text = (place / "README.md").read_text()
    for name, difference in said:
        assert float(difference) <= 1e-5 and f"## {name}\n\nLargest difference of a logit: {difference}." in text


def test_the_model_card_says_what_it_is(exported, run_dir):
    text = (exported[0] / "README.md").read_text()
    config = json.loads((run_dir / "config.json").read_text())
    accuracy = json.loads((run_dir / "evaluation.json").read_text())["accuracy"]
    for row in (
        f"| accuracy | {100 * accuracy:.2f} % of the 360 test images |",
        "| norm | group, 16 groups, weight standardization |",
        "| images | 1437 to train, 360 to test |",
        "| batch size | 4 images per update |",
        f"| versions, training | python {config['versions']['python']}, tensorflow {tf.__version__}",
        f"| commit | {(config['source'] or {'commit': 'unknown'})['commit']}",
        "| classes, in the order of the logits | 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 |",
        "--max_batch_size 32",
        "--weight_standardization",
        "| data | Digits, 8 × 8 × 1; the original archives |",
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


# ------------------------------------------------------------------------------------------------- Keras' own layers

NETWORKS = [("resnet8", norm, False) for norm in models.NORM_TYPES] + [
    ("resnet8", "group", True),
    ("resnet8", "none", True),
    ("convnet", "batch", False),
    ("convnet", "group", True),
]


def random_network(name, norm_type, weight_standardization):
    """A network whose every weight is drawn, so that no gamma or scalar is 0 and no statistic that of the start."""
    model = models.create_model(name, (32, 32, 3), 10, norm_type, weight_standardization=weight_standardization)
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
    model = keras.Model(inputs, ops.GroupNorm(1)(ops.SkipInit()(ops.Conv2D(4, 3)(inputs))))
    x = np.random.default_rng(0).uniform(size=(2, 8, 8, 3)).astype("float32")
    np.testing.assert_array_equal(export.to_keras_layers(model)(x), model(x))  # a scalar of 0: beta


def test_dropout_stays():
    twin = export.to_keras_layers(random_network("convnet", "group", False))
    assert [layer.rate for layer in twin.layers if type(layer) is keras.layers.Dropout] == [0.5] * 4


@pytest.mark.parametrize("case", ["activation", "another use", "no convolution"])
def test_a_scalar_that_no_convolution_can_take_is_refused(case):
    inputs = keras.Input([8, 8, 3])
    x = ops.Conv2D(4, 3, activation="relu" if case == "activation" else None)(inputs)
    if case == "no convolution":
        x = keras.layers.ReLU()(x)
    y = ops.SkipInit(name="scale")(x)
    with pytest.raises(ValueError, match="scale follows"):
        export.to_keras_layers(keras.Model(inputs, keras.layers.Add()([x, y]) if case == "another use" else y))


# ------------------------------------------------------------------------------------------------------ what is refused


def test_a_file_with_another_weight_is_refused(exported, network, digits, tmp_path):
    folder, images = tmp_path / "folder", tmp_path / "images.npy"
    folder.mkdir()
    logits = export.write_images(network, digits[1], 250, images)
    np.testing.assert_array_equal(np.load(images), digits[1].images())
    changed = keras.models.load_model(exported[0] / "model.keras")
    changed.get_layer("logits").bias.assign_add(np.eye(10, dtype="float32")[3] * 1e-3)
    changed.save(folder / "model.keras")
    found = export.logits_elsewhere("keras", digits[1], folder, images)
    with pytest.raises(WorldError, match=r"a logit of model.keras differs by 1.0e-03 .* 1.0e-05 is allowed"):
        export.check_difference("model.keras", found, logits)


@pytest.mark.parametrize(
    "size, difference, passes",
    [(1, 0.9e-5, True), (1, 1.1e-5, False), (20, 1.9e-4, True), (20, 2.1e-4, False), (1, np.nan, False)],
)
def test_the_difference_allowed_grows_with_the_logits(size, difference, passes):
    """1e-5, or 1e-5 of the largest logit; what is no number is not allowed."""
    expected = np.array([[-size, 0.1], [0.2, 0.3]])
    found = expected + np.array([[0, 0], [-difference, 0]])
    if passes:
        assert export.check_difference("file", found, expected) == pytest.approx(difference)
        return
    with pytest.raises(WorldError, match="a logit of file differs by"):
        export.check_difference("file", found, expected)


def test_a_file_that_needs_this_repo_is_refused(digits, tmp_path, monkeypatch):
    """Even where PYTHONPATH leads to it."""
    monkeypatch.setenv("PYTHONPATH", str(scripts.REPO))
    monkeypatch.setitem(export.FORMATS, "own", export.Format("model.own", (), "import ops\n"))
    with pytest.raises(WorldError, match="model.own does not run without this repo: .*No module named 'ops'"):
        export.logits_elsewhere("own", digits[1], tmp_path, tmp_path / "images.npy")


def test_nothing_stays_of_an_export_that_differs(run_dir, data_dir, tmp_path, monkeypatch, capsys):
    """Exit code 1, one line, and neither the folder nor a part of it."""

    def other_weights(model):
        twin = keras_layers(model)
        twin.get_layer("logits").bias.assign_add(np.ones(10))
        return twin

    keras_layers = export.to_keras_layers
    monkeypatch.setattr(export, "to_keras_layers", other_weights)
    monkeypatch.setattr(command.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["evaler.py"])
    with pytest.raises(SystemExit) as ended:
        command.run(lambda: evaler.main(flags_of(run_dir, data_dir, tmp_path / "taken")))
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 1 and len(lines) == 1, lines
    assert lines[0].startswith("evaler.py: error: a logit of model.keras") and "nothing was exported" in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_bad_requests_are_named_before_any_work(run_dir, data_dir, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    (tmp_path / "unfinished").mkdir()
    shutil.copy(run_dir / "config.json", tmp_path / "unfinished")
    new = tmp_path / "new"
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("tf2onnx", "ai_edge_litert") else find_spec(name)
    )
    monkeypatch.setattr(export, "write", None)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    monkeypatch.chdir(tmp_path / "empty")
    for train_dir, place, more, said in (
        (run_dir, tmp_path / "full", (), "full' is there, and not an empty folder"),
        (run_dir, tmp_path / "full" / "file", (), "file' is there, and not an empty folder"),
        (run_dir, tmp_path / "link", (), "link' is there, and not an empty folder that can be replaced"),
        (run_dir, ".", (), "'.' is there, and not an empty folder that can be replaced"),
        (run_dir, "", (), "'' is there, and not an empty folder that can be replaced"),
        (run_dir, tmp_path / "full" / "file" / "new", (), "file is no folder to write in"),
        (run_dir, tmp_path / "none" / "new", (), "none is no folder to write in"),
        (run_dir, new, ("--split", "test"), "--split has no effect with --export"),
        (run_dir, new, ("--validation", "9"), "--validation has no effect with --export"),
        (run_dir, new, ("--batch_statistics", "moving", "batch"), "--batch_statistics has no effect with --export"),
        (run_dir, new, ("--export_format", "onnx"), "onnx needs packages: pip install tf2onnx onnxruntime"),
        (run_dir, new, ("--export_format", "litert"), "litert needs packages: pip install ai-edge-litert"),
        (tmp_path / "unfinished", new, (), "have no checkpoint yet"),
    ):
        with pytest.raises(UserError, match=said):
            evaler.main(flags_of(train_dir, data_dir, place) + list(more))
    with pytest.raises(UserError, match="--export_format has no effect without --predict and without --export"):
        evaler.parse_flags(["--dataset", "Digits", "--export_format", "onnx"])
    assert not new.exists() and (tmp_path / "full" / "file").read_text() == "mine"
    said = scripts.run("evaler.py", *flags_of(run_dir, data_dir, tmp_path / "full"), code=2)
    assert "not an empty folder that can be replaced: name one that is not there yet" in said


def test_a_full_disk_ends_in_one_line_and_leaves_nothing(run_dir, data_dir, tmp_path):
    """A limit on the size of files stands for the full disk: the SavedModel does not fit."""
    flags = flags_of(run_dir, data_dir, tmp_path / "taken")
    limited = ["prlimit", "--fsize=200000", *scripts.command("evaler.py", *flags)]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "taken could not be written" in done.stderr and "nothing was exported" in done.stderr
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------------------------- kinds of data


def test_a_bfloat16_run_is_exported_in_float32(run_dir, data_dir, tmp_path, monkeypatch):
    shutil.copytree(run_dir, tmp_path / "run")
    config = json.loads((run_dir / "config.json").read_text())
    config["flags"]["dtype"] = "bfloat16"
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(export, "logits_elsewhere", lambda *_: np.zeros([360, 10]))
    monkeypatch.setattr(export, "check_difference", lambda *_: 0.0)
    (tmp_path / "taken").mkdir()  # an empty folder is no hindrance
    evaler.main(flags_of(tmp_path / "run", data_dir, tmp_path / "taken"))
    loaded = keras.models.load_model(tmp_path / "taken" / "model.keras")
    assert {layer.compute_dtype for layer in loaded.layers} == {"float32"}
    assert "12 steps, in bfloat16 |" in (tmp_path / "taken" / "README.md").read_text()


def test_a_saved_model_trains_as_the_network_does(tmp_path):
    """serve(images, training=True) normalizes by the batch and moves the statistics, as the network does."""
    model = models.create_model("resnet8", (8, 8, 1), 10, "batch", momentum=0.5)
    data = SimpleNamespace(encoded=False, image_shape=(8, 8, 1), dtype=np.uint8, class_names=list("abcdefghij"))
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
    model = models.create_model("resnet8", (8, 8, 1), 3, "group")
    data = SimpleNamespace(
        encoded=False, image_shape=(8, 8, 1), dtype=np.float32, name="MINE", class_names=["a", "b|c", "ü"]
    )
    export.write_saved_model(model, data, tmp_path / "saved_model")
    x = np.random.default_rng(0).uniform(size=(2, 8, 8, 1)).astype("float32")
    loaded = tf.saved_model.load(str(tmp_path / "saved_model"))
    np.testing.assert_allclose(loaded.serve(x)["logits"], model(x), rtol=0, atol=1e-5)
    assert [name.decode() for name in loaded.class_names.numpy()] == data.class_names
    lines = export.lines_of("keras", data)
    assert "255" not in lines and "float32 [N, 8, 8, 1], any N, as MINE stores them" in lines
    assert export.served(x, np.float32) is x


def test_stored_pixels_are_served_and_photographs_cut():
    values = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(export.served(to_float(tf.constant(values)), np.uint8), values)
    assert export.served(tf.constant([0.4999, 0.5001]) / 255 + 7 / 255, np.uint8).numpy().tolist() == [7, 8]
    photographs = SimpleNamespace(encoded=True, image_shape=(None, None, 3), dtype=np.uint8)
    assert "uint8 [N, 224, 224, 3], any N" in export.lines_of("saved_model", photographs)
    assert '(images / 255).astype("float32")' in export.lines_of("onnx", photographs)


def test_photographs_are_compared_as_they_are_served(tmp_path):
    """JPEG files of any size: uint8 [N, 224, 224, 3] on the disk, and the logits of just these, remainder included."""
    rng = np.random.default_rng(0)
    jpegs = [archives.picture_file(rng.integers(0, 256, (230 + i, 300, 3), dtype=np.uint8)) for i in range(3)]
    model = models.create_model("resnet8", (224, 224, 3), 3, "group")
    with h5py.File(tmp_path / "data.hdf5", "w") as file:
        file["jpeg"] = np.frombuffer(b"".join(jpegs), np.uint8)
        data = Dataset(
            ["a", "b", "c"],
            "Photographs",
            is_train=False,
            labels=np.arange(3),
            class_names=["x", "y", "z"],
            image=file["jpeg"],
            rows=np.arange(3),
            offset=np.cumsum([0, *map(len, jpegs)]),
        )
        logits = export.write_images(model, data, 2, tmp_path / "images.npy")
        cut = np.concatenate([batch.numpy() for batch, _ in create_input_ops(data, 2, is_training=False)])
    images = np.load(tmp_path / "images.npy")
    assert (images.dtype, images.shape) == (np.uint8, (3, 224, 224, 3))
    np.testing.assert_allclose(images / 255, cut, rtol=0, atol=0.501 / 255)
    np.testing.assert_allclose(logits, model(images.astype("float32") / 255), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", export.FURTHER)
def test_further_formats_agree_or_name_what_they_need(name, run_dir, data_dir, tmp_path):
    """The packages are no requirement of this repo: without them one line says how to get them."""
    flags = (*flags_of(run_dir, data_dir, tmp_path / "taken"), "--export_format", name)
    packages = export.FORMATS[name].packages
    there = all(importlib.util.find_spec(package.replace("-", "_")) for package in packages)
    printed = scripts.run("evaler.py", *flags, code=0 if there else 2)
    if there:
        assert export.FORMATS[name].file in printed and (tmp_path / "taken" / export.FORMATS[name].file).exists()
    else:
        assert f"pip install {' '.join(packages)}" in printed and not (tmp_path / "taken").exists()
