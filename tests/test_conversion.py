"""From trained weights to another norm, other classes, or batch norm that keeps its statistics.

python -m pytest tests/test_conversion.py
"""

import contextlib
import io
import re

import keras
import numpy as np
import pytest
import scripts
import tensorflow as tf

from config import derive, parse_training
import convert
import networks
import ops
import checkpoints
from command import UserError

FLAGS = "--dataset Digits --model resnet8 --max_batch_size 32 --max_training_step 60 --log_step 20".split()
CONVERSION = (*FLAGS, "--norm_type", "group", "--max_training_step", 1)


@pytest.fixture(scope="module")
def batch_run(data_dir, tmp_path_factory):
    """A network trained with batch norm for a moment."""
    train_dir = tmp_path_factory.mktemp("batch")
    with pytest.MonkeyPatch.context() as monkeypatch:
        flags = (*FLAGS, "--norm_type", "batch", "--data_dir", data_dir, "--train_dir", train_dir)
        scripts.run_here(monkeypatch, *flags)
    return scripts.only_run(train_dir)


@pytest.fixture(scope="module")
def group_run(batch_run, data_dir, tmp_path_factory):
    """That network, converted to group norm and trained for a step, and what this printed."""
    train_dir = tmp_path_factory.mktemp("group")
    flags = (*CONVERSION, "--checkpoint", batch_run, "--data_dir", data_dir, "--train_dir", train_dir)
    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.redirect_stdout(io.StringIO()) as printed:
        scripts.run_here(monkeypatch, *flags)
    return scripts.only_run(train_dir), printed.getvalue()


def random_network(norm_type, seed=0):
    """resnet8 with every variable drawn at random, as if trained; half of the gammas are negative."""
    network, rng = networks.build(shape=(8, 8, 1), norm_type=norm_type, groups=4), np.random.default_rng(seed)
    for variable in network.variables:
        scale = 0.1 if "kernel" in variable.path else 1.0
        variable.assign(
            rng.normal(0, scale, variable.shape)
            if "variance" not in variable.path
            else rng.uniform(0.5, 2, variable.shape)
        )
    return network


def channel_moments(network, name, images):
    """Mean and standard deviation of a layer's output per channel, at once, in float64."""
    y = np.float64(keras.Model(network.input, network.get_layer(name).output)(images))
    return y.mean((0, 1, 2)), y.std((0, 1, 2))


def test_every_channel_has_the_moments_that_batch_norm_gave_it():
    source = random_network("batch")
    network = networks.build(shape=(8, 8, 1), norm_type="group", groups=4)
    for layer in network.layers:
        if layer.name.endswith("conv"):
            layer.set_weights(source.get_layer(layer.name).get_weights())
    images = tf.constant(np.random.default_rng(1).random((100, 8, 8, 1)), tf.float32)  # two batches, not alike
    images = tf.concat([images[:64], 3 * images[64:]], 0)
    convert.match_moments(network, source, images)
    for layer in network.layers:
        if isinstance(layer, ops.GroupNorm):
            mean, deviation = channel_moments(network, layer.name, images)
            wanted_mean, wanted_deviation = channel_moments(source, layer.name, images)
            np.testing.assert_allclose(mean, wanted_mean, atol=2e-4 * np.abs(wanted_deviation).max())
            np.testing.assert_allclose(deviation, wanted_deviation, rtol=1e-3, atol=1e-6)
            np.testing.assert_array_equal(np.sign(layer.gamma), np.sign(source.get_layer(layer.name).gamma))


def test_batch_norm_of_any_keras_model_can_be_replaced():
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(8, 3, padding="same", name="conv")(inputs)
    x = keras.layers.BatchNormalization(name="first")(x)
    x = keras.layers.ReLU()(x)
    x = keras.layers.Conv2D(4, 3, name="conv2")(x)
    x = keras.layers.BatchNormalization(scale=False, name="second")(keras.layers.Add()([x, x]))
    network = keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(x))
    images = tf.constant(np.random.default_rng(0).random((50, 8, 8, 3)), tf.float32)
    network.get_layer("first").moving_mean.assign(np.arange(8.0))
    network.get_layer("second").beta.assign([1.0, -2.0, 3.0, 0.5])
    copy = convert.replace_batch_norm(network, groups=2, images=images)
    for name in ("first", "second"):
        for found, wanted in zip(channel_moments(copy, name, images), channel_moments(network, name, images)):
            np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3)
    copy = convert.replace_batch_norm(network, groups=2)
    np.testing.assert_array_equal(copy.get_layer("second").beta, [1.0, -2.0, 3.0, 0.5])
    assert [type(copy.get_layer(name)) for name in ("first", "second")] == [ops.GroupNorm] * 2
    for name in ("conv", "conv2"):
        for ours, theirs in zip(copy.get_layer(name).get_weights(), network.get_layer(name).get_weights()):
            np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(ValueError, match="8 channels cannot be split into 3 groups"):
        convert.replace_batch_norm(network, groups=3)


def block(x, name, **settings):
    x = keras.layers.Conv2D(8, 3, padding="same", name=f"{name}_conv")(x)
    return keras.layers.BatchNormalization(name=name, **settings)(x)


def network_of(kind):
    """8x8x3 inputs through batch norms: a plain network, nested or Sequential models, or what cannot be replaced."""
    inputs = keras.Input((8, 8, 3))
    layers = [keras.layers.Conv2D(8, 3, name="conv"), keras.layers.BatchNormalization(name="norm")]
    if kind == "sequential":
        return keras.Sequential([inputs, *layers])
    if kind in ("nested", "nested twice"):
        inner = keras.Model(inputs, block(inputs, "norm"), name="inner")
        x = keras.Sequential([keras.Input((8, 8, 8)), *layers], name="head")(inner(inputs, training=False))
        x = keras.layers.Add()([x, x * 2])
        return keras.Model(inputs, [x, inner(inputs * 3.0)] if kind == "nested twice" else x)
    x = layers[1](layers[0](inputs))
    if kind == "shared":
        x = layers[1](x * 2)
    if kind == "time distributed":
        x = keras.layers.TimeDistributed(keras.layers.BatchNormalization(name="inside"), name="wrapper")(x)
    return keras.Model(inputs, x)


def randomize(network, seed=0):
    rng = np.random.default_rng(seed)
    for variable in network.variables:
        variable.assign(rng.uniform(0.5, 2, variable.shape) if "kernel" not in variable.path else variable)
    return network


@pytest.mark.parametrize("kind, norms", [("sequential", 1), ("nested", 2)])
@pytest.mark.parametrize("sized", [{"groups": 2}, {"group_size": 4}])
def test_nested_and_sequential_models_keep_the_moments_of_every_channel(kind, norms, sized):
    network = randomize(network_of(kind))
    images = np.random.default_rng(1).random((70, 8, 8, 3)).astype("float32")
    copy = convert.replace_batch_norm(network, images=images, **sized)
    assert not any(isinstance(layer, keras.layers.BatchNormalization) for layer in copy._flatten_layers())
    assert [layer.groups for layer in copy._flatten_layers() if isinstance(layer, ops.GroupNorm)] == [2] * norms
    found, wanted = (np.float64(model(images)) for model in (copy, network))
    np.testing.assert_allclose(found.mean((0, 1, 2)), wanted.mean((0, 1, 2)), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(found.std((0, 1, 2)), wanted.std((0, 1, 2)), rtol=1e-3)


def test_settings_and_adapted_means_are_kept():
    inputs = keras.Input((8, 8, 3))
    adapted = keras.layers.Normalization(name="adapted")
    adapted.adapt(np.random.default_rng(0).normal(5, 3, (20, 8, 8, 3)))
    settings = {"center": False, "gamma_regularizer": keras.regularizers.L2(0.5), "gamma_constraint": "non_neg"}
    inner = keras.Model(inputs, block(inputs, "norm", **settings), name="inner")
    inner.trainable = False
    x = block(inner(adapted(inputs)), "last", scale=False)
    copy = convert.replace_batch_norm(keras.Model(inputs, x), groups=2)
    x = np.ones((1, 8, 8, 3), "float32")
    np.testing.assert_array_equal(copy.get_layer("adapted")(x), adapted(x))
    frozen, last = copy.get_layer("inner").get_layer("norm"), copy.get_layer("last")
    assert frozen.beta is None and frozen.gamma_regularizer.l2 == 0.5 and last.gamma is None and last.trainable
    assert isinstance(frozen.gamma_constraint, keras.constraints.NonNeg)
    assert [variable.path for variable in copy.trainable_variables] == [
        "last_conv/kernel",
        "last_conv/bias",
        "last/beta",
    ]


IMAGES = np.ones((2, 8, 8, 3), "float32")


@pytest.mark.parametrize(
    "kind, arguments, said",
    [
        ("plain", {"groups": 3}, "'norm': 8 channels cannot be split into 3 groups.*1, 2, 4, 8"),
        ("nested", {"group_size": 16}, "'norm': 8 channels cannot be split into groups of 16.*1, 2, 4, 8"),
        ("time distributed", {}, "'wrapper'.*TimeDistributed.*'inside'.*GroupNorm"),
        ("shared", {"images": IMAGES}, "'norm' is used 2 times.*leave images out"),
        ("nested twice", {"images": IMAGES}, "'norm' is used 2 times.*leave images out"),
        ("plain", {"images": IMAGES[:0]}, "empty.*256 images"),
        ("plain", {"images": tf.data.Dataset.from_tensors(IMAGES)}, "Dataset.*256 images"),
    ],
)
def test_what_cannot_be_replaced_is_refused_by_name(kind, arguments, said):
    with pytest.raises(ValueError, match=said):
        convert.replace_batch_norm(network_of(kind), **{"groups": 2, **arguments})


@pytest.mark.parametrize("kind", ["shared", "nested twice"])
def test_a_norm_that_is_used_twice_stays_one(kind):
    network = network_of(kind)
    copy = convert.replace_batch_norm(network, groups=2)
    assert len(copy.trainable_variables) == len(network.trainable_variables)


@pytest.mark.parametrize("kind", ["subclassed", "unbuilt", "without batch norm"])
def test_models_of_another_kind_are_refused(kind):
    class Own(keras.Model):
        def call(self, x):
            return x

    models_of = {
        "subclassed": Own(name="mine"),
        "unbuilt": keras.Sequential([keras.layers.BatchNormalization()], name="mine"),
        "without batch norm": keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)], name="mine"),
    }
    with pytest.raises(ValueError, match="'mine'.*(functional|no batch norm)"):
        convert.replace_batch_norm(models_of[kind])


def test_a_converted_network_trains_on_from_what_it_knew(batch_run, group_run):
    """The accuracy before training is far above a guess, and said."""
    printed = group_run[1]
    (accuracy,) = re.findall(r"batch norm became group norm: accuracy ([\d.]+) % before training", printed)
    assert float(accuracy) > 50
    assert f"starting from the weights of {batch_run}/model-60\n" in printed


def test_no_test_image_reaches_the_weights(batch_run, group_run, main_of, data_dir, tmp_path):
    """Converted and trained with the same training images and other test images: bitwise the same weights."""
    other = scripts.with_negatives(data_dir, tmp_path / "data", split=1)
    main_of(*CONVERSION, "--checkpoint", batch_run, "--data_dir", other, "--train_dir", tmp_path / "runs")
    found = scripts.checkpoint(scripts.only_run(tmp_path / "runs"))
    for name, value in scripts.checkpoint(group_run[0]).items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize("flags, converted", [((), False), (("--groups", 4), True), (("--group_size", 8), True)])
def test_other_groups_are_converted_and_the_same_are_taken_as_they_are(
    flags, converted, group_run, main_of, data_dir, tmp_path
):
    """At a rate of next to nothing: another number of groups changes every norm and nothing else."""
    start = (*CONVERSION, *flags, "--checkpoint", group_run[0], "--learning_rate", 1e-30)
    main_of(*start, "--data_dir", data_dir, "--train_dir", tmp_path)
    run_dir = scripts.only_run(tmp_path)
    before, after = (scripts.checkpoint(place) for place in (group_run[0], run_dir))
    of_model = {name for name in before if name.startswith("model/")}
    changed = {name for name in of_model if not np.array_equal(before[name], after[name])}
    assert changed == {name for name in of_model if "_norm" in name and converted}
    assert scripts.metrics(run_dir)[-1]["test_loss/accuracy"] > 0.5


def test_other_classes_get_a_new_last_layer(batch_run, data_dir, digits, capsys):
    flags = (*FLAGS, "--norm_type", "batch", "--data_dir", data_dir, "--checkpoint", batch_run)
    config = derive(parse_training(list(map(str, flags)))[0], digits[0])
    network = networks.build(shape=(8, 8, 1), classes=3)
    before = [variable.numpy() for variable in network.get_layer("logits").variables]
    checkpoints.start_from(batch_run, network, config, digits[0])
    assert "; new: logits/kernel, logits/bias" in capsys.readouterr().out
    for now, then in zip(network.get_layer("logits").variables, before):
        np.testing.assert_array_equal(now.numpy(), then)
    stored = scripts.checkpoint(batch_run)
    for name in ("kernel",):
        np.testing.assert_array_equal(
            network.get_layer("stem_conv").kernel, stored[f"model/stem_conv.S{name}/.ATTRIBUTES/VARIABLE_VALUE"]
        )


def test_frozen_batch_norm_keeps_its_statistics_and_trains_the_rest(batch_run, main_of, data_dir, tmp_path):
    flags = (*FLAGS, "--norm_type", "batch", "--data_dir", data_dir, "--train_dir", tmp_path)
    main_of(*flags, "--checkpoint", batch_run, "--freeze_batch_norm", "--max_training_step", 2)
    before, after = scripts.checkpoint(batch_run), scripts.checkpoint(scripts.only_run(tmp_path))
    for name, value in before.items():
        if name.startswith("model/"):
            assert np.array_equal(after[name], value) == ("moving" in name), name


@pytest.mark.parametrize("flags", [["--norm_type", "batch"], ["--norm_type", "group", "--checkpoint", "RUN"]])
def test_freezing_needs_batch_norm_and_its_weights(flags):
    with pytest.raises(UserError, match="--freeze_batch_norm is for"):
        parse_training(["--dataset", "Digits", "--freeze_batch_norm", *flags])
