"""From trained weights to another norm, other classes, or batch norm that keeps its statistics."""

import json
import re
import shutil

import h5py
import keras
import numpy as np
import pytest
import scripts
import tensorflow as tf

import checkpoints
import convert
import ops
from model import create_model

FLAGS = ("--max_training_step", 60, "--log_step", 20)
CONVERSION = ("--norm_type", "group", "--max_training_step", 1)
IMAGES = np.random.default_rng(1).random((70, 8, 8, 3)).astype("float32")  # two batches, not alike
IMAGES[64:] *= 3


@pytest.fixture(scope="module", autouse=True)
def one_batch():
    """Norms are converted with 64 images, which takes a quarter of the time of 256."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "CONVERSION_IMAGES", 64)
        yield


@pytest.fixture(scope="module")
def batch_run(data_dir, tmp_path_factory):
    """A network trained with batch norm for a moment."""
    return scripts.train(data_dir, tmp_path_factory.mktemp("batch"), *FLAGS, "--norm_type", "batch")


@pytest.fixture(scope="module")
def group_run(batch_run, data_dir, tmp_path_factory):
    """That network, converted to group norm and trained for a step, and what this printed."""
    flags = *CONVERSION, "--checkpoint", batch_run
    return scripts.recorded(scripts.train, data_dir, tmp_path_factory.mktemp("group"), *flags)


def network_of(kind):
    """8x8x3 inputs through batch norms: a plain network, nested or Sequential models, or what cannot be replaced."""
    inputs = keras.Input((8, 8, 3))
    layers = [keras.layers.Conv2D(8, 3, name="conv"), keras.layers.BatchNormalization(name="norm")]
    if kind == "resnet8":
        return scripts.build(shape=(8, 8, 3))
    if kind == "sequential":
        return keras.Sequential([inputs, *layers])
    if kind == "unbuilt":
        return keras.Sequential(layers, name="mine")
    if kind == "without batch norm":
        return keras.Sequential([inputs, layers[0]], name="mine")
    if kind == "subclassed":
        return type("Own", (keras.Model,), {"call": lambda self, x: x})(name="mine")
    if kind in ("nested", "nested twice"):
        inner = keras.Model(inputs, block(inputs, "norm"), name="inner")
        x = keras.Sequential([keras.Input((8, 8, 8)), *layers], name="head")(inner(inputs, training=False))
        x = keras.layers.Add()([x, x * 2])
        return keras.Model(inputs, [x, inner(inputs * 3.0)] if kind == "nested twice" else x)
    x = layers[1](layers[0](inputs))
    if kind == "shared":
        x = layers[1](x * 2)
    if kind == "no gamma":
        x = block(x, "second", scale=False)
    if kind == "time distributed":
        x = keras.layers.TimeDistributed(keras.layers.BatchNormalization(name="inside"), name="wrapper")(x)
    return keras.Model(inputs, x)


def block(x, name, **settings):
    x = keras.layers.Conv2D(8, 3, padding="same", name=f"{name}_conv")(x)
    return keras.layers.BatchNormalization(name=name, **settings)(x)


def norms_of(network, kind):
    return [layer for layer in network._flatten_layers() if isinstance(layer, kind)]


def moments_of(network):
    """Mean and deviation per channel, over IMAGES, of all norms that do not lie in a nested model, or of the output."""
    norms = (ops.GroupNorm, *convert.BATCH_NORMS)
    outputs = [layer.output for layer in network.layers if isinstance(layer, norms)] or [network.output]
    values = map(np.float64, keras.tree.flatten(keras.Model(network.inputs, outputs)([IMAGES])))
    return [(y.mean((0, 1, 2)), y.std((0, 1, 2))) for y in values]


@pytest.mark.parametrize(
    "kind, number, sized, groups",
    [
        ("resnet8", 9, {"groups": 4}, 4),
        ("no gamma", 2, {"groups": -1}, 8),
        ("sequential", 1, {"groups": 2}, 2),
        ("nested", 2, {"group_size": 2}, 4),
    ],
)
def test_every_channel_has_the_moments_that_batch_norm_gave_it(kind, number, sized, groups):
    network, rng = network_of(kind), np.random.default_rng(0)
    for variable in network.variables:
        if "variance" in variable.path:
            variable.assign(rng.uniform(0.5, 2, variable.shape))
        elif "kernel" not in variable.path:  # half of the gammas are negative
            variable.assign(rng.normal(0, 1, variable.shape))
    copy = convert.replace_batch_norm(network, images=IMAGES, **sized)
    ours, theirs = norms_of(copy, ops.GroupNorm), norms_of(network, convert.BATCH_NORMS)
    assert len(ours) == len(theirs) == number and not norms_of(copy, convert.BATCH_NORMS)
    for layer, twin in zip(ours, theirs):
        assert layer.groups == groups
        np.testing.assert_array_equal(np.sign(layer.gamma), 1 if twin.gamma is None else np.sign(twin.gamma))
    for (mean, deviation), (wanted_mean, wanted_deviation) in zip(moments_of(copy), moments_of(network)):
        np.testing.assert_allclose(mean, wanted_mean, rtol=0, atol=1e-3 * np.abs(wanted_deviation).max())
        np.testing.assert_allclose(deviation, wanted_deviation, rtol=1e-3, atol=1e-6)


def test_vocabularies_are_kept():
    lookup = keras.layers.StringLookup(vocabulary=["a", "b", "c"])
    inputs = keras.Input((2,), dtype="string")
    x = keras.layers.Flatten()(keras.layers.Embedding(5, 8)(lookup(inputs)))
    network = keras.Model(inputs, keras.layers.BatchNormalization(name="norm")(x))
    network.get_layer("norm").moving_mean.assign(np.arange(16.0))
    copy = convert.replace_batch_norm(network, groups=2)
    (found,) = [layer for layer in copy.layers if isinstance(layer, keras.layers.StringLookup)]
    assert found.get_vocabulary() == ["[UNK]", "a", "b", "c"]
    assert copy(tf.constant([["a", "d"]])).shape == (1, 16)


def test_settings_and_weights_are_kept():
    """Without images; gamma and beta, too, frozen layers, and what a Normalization layer has adapted to."""
    inputs = keras.Input((8, 8, 3))
    adapted = keras.layers.Normalization(name="adapted")
    adapted.adapt(np.random.default_rng(0).normal(5, 3, (20, 8, 8, 3)))
    settings = {"center": False, "gamma_regularizer": keras.regularizers.L2(0.5), "gamma_constraint": "non_neg"}
    inner = keras.Model(inputs, block(inputs, "norm", **settings), name="inner")
    inner.trainable = False
    network = keras.Model(inputs, block(inner(adapted(inputs)), "last", scale=False))
    inner.get_layer("norm").gamma.assign(np.arange(8.0))
    network.get_layer("last").beta.assign(np.arange(8.0))
    copy = convert.replace_batch_norm(network, groups=2)
    np.testing.assert_array_equal(copy.get_layer("adapted")(IMAGES), adapted(IMAGES))
    frozen, last = copy.get_layer("inner").get_layer("norm"), copy.get_layer("last")
    assert frozen.beta is None and frozen.gamma_regularizer.l2 == 0.5 and last.gamma is None and last.trainable
    assert isinstance(frozen.gamma_constraint, keras.constraints.NonNeg)
    trained = ["last_conv/kernel", "last_conv/bias", "last/beta"]
    assert [variable.path for variable in copy.trainable_variables] == trained
    weights = {variable.path: variable.numpy() for variable in network.variables}
    for variable in (*last.variables, *frozen.variables, *copy.get_layer("last_conv").variables):
        np.testing.assert_array_equal(variable, weights[variable.path])


@pytest.mark.parametrize(
    "kind, arguments, words",
    [
        ("plain", {"groups": 3}, ["'norm'", "8 channels", "3 groups", "1, 2, 4, 8"]),
        ("nested", {"group_size": 16}, ["'norm'", "8 channels", "groups of 16", "1, 2, 4, 8"]),
        ("time distributed", {}, ["'wrapper'", "TimeDistributed", "'inside'", "GroupNorm"]),
        ("shared", {"images": IMAGES[:2]}, ["'norm'", "2 times", "images"]),
        ("nested twice", {"images": IMAGES[:2]}, ["'norm'", "2 times", "images"]),
        ("plain", {"images": IMAGES[:0]}, ["empty", "256 images"]),
        ("plain", {"images": tf.data.Dataset.from_tensors(IMAGES)}, ["Dataset", "256 images"]),
        ("subclassed", {}, ["'mine'", "Own", "functional"]),
        ("unbuilt", {}, ["'mine'", "keras.Input"]),
        ("without batch norm", {}, ["'mine'", "batch norm"]),
    ],
)
def test_what_cannot_be_replaced_is_refused_by_name(kind, arguments, words):
    with scripts.refused(*words, kind=ValueError):
        convert.replace_batch_norm(network_of(kind), **{"groups": 2, **arguments})


@pytest.mark.parametrize("kind", ["shared", "nested twice"])
def test_a_norm_that_is_used_twice_stays_one(kind):
    network = network_of(kind)
    copy = convert.replace_batch_norm(network, groups=2)
    assert len(copy.trainable_variables) == len(network.trainable_variables)


def test_a_converted_network_trains_on_from_what_it_knew(batch_run, group_run, data_dir, tmp_path):
    """The accuracy before training is far above a guess, and printed. With other test images it has bitwise the same
    weights."""
    assert float(re.search(r"group.* ([\d.]+) %", group_run[1])[1]) > 50
    assert f"{batch_run}/model-60\n" in group_run[1]
    with h5py.File(shutil.copytree(data_dir, tmp_path / "data") / "digits" / "data.hdf5", "r+") as file:
        file["image"][1437:] = 255 - file["image"][1437:]
    other = scripts.train(tmp_path / "data", tmp_path / "runs", *CONVERSION, "--checkpoint", batch_run)
    found = scripts.checkpoint(other)
    for name, value in scripts.checkpoint(group_run[0]).items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_a_run_killed_before_its_first_checkpoint_starts_from_the_same_weights_again(group_run, tmp_path):
    lost = shutil.ignore_patterns("checkpoint", "model-*", "metrics.jsonl")
    run_dir = shutil.copytree(group_run[0], tmp_path / "run", ignore=lost)
    scripts.run_here("--resume", run_dir)
    scripts.assert_same_runs(run_dir, group_run[0])


def start_from(run_dir, data_dir, *flags, classes=10):
    """(what copy_weights returns, the names of the variables that it set to what the run has, those of the others)."""
    _, configuration, train, test = scripts.configure(*scripts.SMALL, "--data_dir", data_dir, *flags)
    network = create_model(configuration, train.network_shape, classes)
    kind = checkpoints.copy_weights(run_dir, network, configuration, train, test)
    stored, found = (checkpoints.weights_of(model) for model in (scripts.network_of(run_dir), network))
    same = {name for name, value in found.items() if np.array_equal(value, stored[name])}
    return kind, same, found.keys() - same


@pytest.mark.parametrize("flags, converted", [((), False), (("--group_size", 8), True)])
def test_other_groups_are_converted_and_the_same_are_taken_as_they_are(flags, converted, group_run, data_dir):
    kind, same, changed = start_from(group_run[0], data_dir, "--norm_type", "group", *flags)
    assert kind == ("group" if converted else None)
    assert changed == {path for path in same | changed if "_norm" in path and converted}


def test_held_out_images_must_be_new_to_the_checkpoint(group_run, data_dir):
    with scripts.refused("--validation", "100"):
        start_from(group_run[0], data_dir, "--norm_type", "group", "--validation", 100)


def test_a_checkpoint_of_another_split_is_named(batch_run, data_dir, tmp_path, capsys):
    """Its training images may be test images now, as after photos were added."""
    start_from(batch_run, data_dir)
    assert "warning" not in capsys.readouterr().out
    run_dir = shutil.copytree(batch_run, tmp_path / "run")
    stored = json.loads((run_dir / "config.json").read_text())
    stored["data"]["split"] = "0123456789abcdef"
    (run_dir / "config.json").write_text(json.dumps(stored))
    start_from(run_dir, data_dir)
    assert f"warning: Digits has changed since {run_dir} was trained" in capsys.readouterr().out


def test_other_classes_get_a_new_last_layer(batch_run, data_dir, capsys):
    kind, same, changed = start_from(batch_run, data_dir, classes=3)
    assert kind is None and changed == {"logits/kernel", "logits/bias"} and "stem_conv/kernel" in same
    assert "logits/kernel, logits/bias" in capsys.readouterr().out


def test_frozen_batch_norm_keeps_its_statistics_and_trains_the_rest(batch_run, data_dir, tmp_path):
    flags = ("--norm_type", "batch", "--checkpoint", batch_run, "--freeze_batch_norm", "--max_training_step", 2)
    before, after = scripts.checkpoint(batch_run), scripts.checkpoint(scripts.train(data_dir, tmp_path, *flags))
    for name, value in before.items():
        if name.startswith("model/"):
            assert np.array_equal(after[name], value) == ("moving" in name), name


def test_dropout_keeps_the_states_that_the_seed_of_the_new_run_gave_it(data_dir, tmp_path):
    """Keras numbers them through a process, in which this network is the second, and that of the old run the third."""
    flags = "--model", "convnet", "--norm_type", "group"
    old = scripts.untrained_run(tmp_path / "run", *scripts.SMALL, "--data_dir", data_dir, *flags)
    _, _, changed = start_from(old, data_dir, *flags)
    assert changed == {f"seed_generator{number}/seed_generator_state" for number in ("", "_1", "_2", "_3")}
