"""The Keras layers on the norms: the arguments of Keras, weights, policies, saving; and what ops.py refuses."""

import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf
from norm_oracle import oracle, sets_of

import layers
import ops

PAIRS = [(ops.GroupNorm, keras.layers.GroupNormalization), (ops.BatchNorm, keras.layers.BatchNormalization)]
LAYERS = [ops.GroupNorm, ops.BatchNorm]


@pytest.mark.parametrize("ours, theirs", PAIRS)
def test_layers_take_the_arguments_of_keras(ours, theirs):
    """Every argument of the Keras layer but renorm, with its default but for epsilon, and the first in its order."""
    own, taken = (inspect.getfullargspec(layer.__init__).args for layer in (ours, theirs))
    taken = [name for name in taken if "renorm" not in name]
    assert own == taken[: len(own)]
    reference, default = theirs().get_config(), ours().get_config()
    arguments = {name: reference[name] for name in taken if name != "self"}
    config = ours(**arguments).get_config()
    for name, value in arguments.items():
        assert config[name] == value, name
        assert default[name] == (1e-5 if name == "epsilon" else value), name
    if ours is ops.BatchNorm:
        with pytest.raises(ValueError, match="renorm"):  # refused, not silently without effect
            ours(renorm=True)


SHAPES = [((4, 8), 1), ((4, 5, 8), -1), ((4, 8, 5), 1), ((4, 5, 3, 8), 3), ((4, 8, 5, 3), 1), ((2, 5, 3, 4, 8), -1)]


@pytest.mark.parametrize(
    "layers_of, options, shape, axis",
    [(PAIRS[0], {"groups": 4}, *shape) for shape in SHAPES]
    + [(PAIRS[0], {"groups": groups}, (4, 5, 3, 8), -1) for groups in (-1, 1)]  # -1 is a group for each channel
    + [(PAIRS[1], {}, *shape) for shape in SHAPES],
)
def test_layers_do_with_the_weights_of_keras_what_keras_does(layers_of, options, shape, axis):
    """With the channels first or last, counted from either end, in training and inference."""
    x = np.random.default_rng(0).normal(0.01, 0.01, shape).astype("float32")  # variance 1e-4, the size of epsilon
    ours, theirs = (layer(axis=axis, epsilon=1e-4, **options) for layer in layers_of)
    for layer in (ours, theirs):
        layer.build(shape)
    theirs.set_weights([np.random.default_rng(i).uniform(0.5, 2, 8) for i in range(len(theirs.weights))])
    ours.set_weights(theirs.get_weights())
    for training in [{}] if options else [{"training": False}, {"training": True}]:
        np.testing.assert_allclose(ours(x, **training), theirs(x, **training), rtol=0, atol=1e-5)  # of size 10


@pytest.mark.parametrize("layer_class", LAYERS)
def test_center_and_scale_choose_the_weights(layer_class):
    x = np.random.default_rng(0).normal(0.5, 2, (2, 5, 5, 32)).astype("float32")
    expected = layer_class()(x)
    for center in (True, False):
        for scale in (True, False):
            layer = layer_class(center=center, scale=scale)
            np.testing.assert_array_equal(layer(x), expected)
            names = [weight.name for weight in layer.trainable_weights]
            assert sorted(names) == ["beta"] * center + ["gamma"] * scale
    layer = layer_class(gamma_initializer=keras.initializers.Constant(3.0), beta_initializer="ones")
    np.testing.assert_allclose(layer(x), 3 * expected.numpy() + 1, rtol=0, atol=1e-5)  # of size 10


@pytest.mark.parametrize("trainable", [True, False])
def test_batch_norm_layer_is_the_function_and_moves_only_in_training(trainable):
    """training=True normalizes by the batch and moves the statistics, unless the layer is frozen, as in Keras."""
    x = np.random.default_rng(0).normal(0.5, 2, (3, 5, 4, 6)).astype("float32")
    layer = ops.BatchNorm(momentum=0.75, epsilon=1e-4, trainable=trainable)
    layer.build(x.shape)
    layer.set_weights([np.random.default_rng(i).uniform(0.5, 2, 6) for i in range(4)])
    weights = layer.get_weights()  # gamma, beta, moving mean and variance
    assert len(layer.trainable_weights) == 2 * trainable and len(layer.non_trainable_weights) == 4 - 2 * trainable
    for kwargs in ({}, {"training": False}, {"training": True}):
        y, *statistics = ops.batch_norm(x, *weights, trainable and kwargs.get("training", False), 0.75, 1e-4)
        np.testing.assert_array_equal(layer(x, **kwargs), y)
        for now, wanted in zip(layer.get_weights(), [*weights[:2], *statistics]):
            np.testing.assert_array_equal(now, wanted)


@pytest.mark.parametrize("layer_class", LAYERS)
@pytest.mark.parametrize("low, high", [(-1, 1), (66_000, 70_000), (999, 1001)])
@pytest.mark.parametrize(
    "policy, dtype, epsilon",
    [("mixed_float16", "float16", 2**-10), ("mixed_bfloat16", "bfloat16", 2**-7), ("float64", "float64", 2**-52)],
)
def test_policies_of_half_precision_round_only_the_output(layer_class, low, high, policy, dtype, epsilon):
    """Beyond the range of float16 and closer together than its steps; weights are float32 (keras#22586, addons#2550:
    NaN), under the policy float64 float64."""
    x = np.random.default_rng(0).uniform(low, high, (8, 16, 16, 32)).astype("float32")
    layer = layer_class(dtype=policy)
    y = layer(tf.constant(x), training=True) if layer_class is ops.BatchNorm else layer(tf.constant(x))
    assert y.dtype == dtype and layer.compute_output_shape(x.shape) == x.shape == tuple(y.shape)
    assert all(weight.dtype == ("float64" if policy == "float64" else "float32") for weight in layer.weights)
    sets = sets_of("batch" if layer_class is ops.BatchNorm else "group", x.shape, 32)
    exact = oracle(x, np.ones(32), np.zeros(32), x, sets)["y"]
    np.testing.assert_allclose(tf.cast(y, "float64"), exact, rtol=0, atol=2 * epsilon + 1e-13 * high)  # of size 2


def small_model():
    """A functional model with both norms, some of whose settings are not the defaults, and both convolutions."""
    inputs = keras.Input([8, 8, 3])
    x = layers.StandardizedConv2D(8, 3, padding="same", use_bias=False)(inputs)
    x = ops.BatchNorm(momentum=0.8, gamma_regularizer="l1", beta_initializer="ones", name="batch")(x)
    x = keras.layers.ReLU()(x)
    x = layers.Conv2D(12, 3)(x)
    x = ops.GroupNorm(4, epsilon=1e-4, beta_regularizer="l2", gamma_constraint="non_neg", name="group")(x)
    x = keras.layers.ReLU()(x)  # else the next norm subtracts again what the last one adds
    x = ops.GroupNorm(-1, dtype="mixed_bfloat16")(x)
    return keras.Model(inputs, keras.layers.Dense(5)(keras.layers.Flatten()(x)))


def test_saved_models_give_the_same_outputs(tmp_path):
    model = small_model()
    rng = np.random.default_rng(0)
    model.set_weights([rng.uniform(0.5, 1.5, weight.shape) for weight in model.get_weights()])
    x = rng.normal(size=(4, 8, 8, 3)).astype("float32")
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(x), model(x))
    for layer, twin in zip(model.layers, loaded.layers):
        assert twin.get_config() == layer.get_config()


def test_fit_trains_every_weight():
    """One step of keras.Model.fit changes every gamma, beta and kernel, and moves the statistics. Regularizers and
    constraints have effect."""
    keras.utils.set_random_seed(0)
    model = small_model()
    rng = np.random.default_rng(0)
    x, target = rng.normal(1, 2, (4, 8, 8, 3)), rng.normal(size=(4, 5))
    group = model.get_layer("group")
    group.gamma.assign(np.full(12, 1e-3))
    before = model.get_weights()
    np.testing.assert_allclose([float(loss) for loss in model.losses], [0.01 * 8, 0], rtol=1e-5)  # |gamma|, beta^2
    model.compile("sgd", "mse")
    model.fit(x, target, batch_size=4, epochs=1, verbose=0)
    for variable, old, new in zip(model.weights, before, model.get_weights()):
        assert np.isfinite(new).all() and (old != new).any(), variable.path
    assert (group.gamma.numpy() == 0).any()  # where the step went below


IMAGE = tf.ones([2, 4, 4, 12])


def trace(function, shape):
    tf.function(function, input_signature=[tf.TensorSpec(shape)]).get_concrete_function()


def batch(x, **kwargs):
    return ops.batch_norm(x, None, None, tf.zeros(12), tf.ones(12), True, **kwargs)


def group(x, groups=4, gamma=None, beta=None, **kwargs):
    return ops.group_norm(x, gamma, beta, groups, **kwargs)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: group(IMAGE, 5), ["12", "5", "1, 2, 3, 4, 6, 12"]),
        (lambda: group(IMAGE, -1), ["12", "-1", "1, 2, 3, 4, 6, 12"]),
        (lambda: ops.GroupNorm(5)(IMAGE), ["12", "5", "1, 2, 3, 4, 6, 12"]),
        # a group of one value would always be 0 (pytorch#19250)
        (lambda: group(tf.ones([2, 1, 1, 12]), 12), ["single value", "12"]),
        (lambda: ops.group_norm(tf.ones([2, 12]), None, None, 12), ["single value", "12"]),
        (lambda: batch(tf.ones([1, 12])), ["1", "(1, 12)", "larger batch"]),
        (lambda: batch(tf.ones([1, 12, 1, 1]), data_format="channels_first"), ["(1, 12, 1, 1)", "larger batch"]),
        (lambda: trace(group, [None, 4, 4, None]), ["channels"]),
        (lambda: ops.GroupNorm(4)(keras.Input([4, 4, None])), ["channels"]),
        (lambda: ops.BatchNorm()(keras.Input([4, 4, None])), ["channels"]),
        (lambda: group(IMAGE, data_format="NHWC"), ["NHWC", "channels_last", "channels_first"]),
        (lambda: group(tf.ones([12])), ["rank 2 to 5", "(12,)"]),
        (lambda: batch(tf.ones([1, 1, 1, 2, 2, 12])), ["rank 2 to 5", "(1, 1, 1, 2, 2, 12)"]),
        (lambda: trace(group, None), ["rank 2 to 5", "unknown"]),
        (lambda: group(tf.ones([2, 4, 4, 12], tf.int32)), ["float", "int32"]),
        (lambda: group(IMAGE, gamma=tf.ones(11)), ["gamma", "12", "11"]),
        (lambda: group(IMAGE, beta=tf.ones(1)), ["beta", "12", "(1,)"]),
        (lambda: ops.GroupNorm(4, axis=2)(IMAGE), ["axis", "2"]),
        (lambda: ops.BatchNorm(axis=2)(IMAGE), ["axis", "2"]),
        (lambda: ops.GroupNorm(4, axis=5)(IMAGE), ["axis", "5"]),
        (lambda: ops.BatchNorm(axis=-5)(IMAGE), ["axis", "-5"]),
    ],
)
def test_wrong_arguments_are_named(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 6, 12])
def test_divisors_pass_also_where_positions_are_unknown_or_a_group_has_one_channel(groups):
    ops.check_groups((None, None, None, 12), 3, groups)
    ops.check_groups((None, 12, None, None), 1, groups)
    ops.check_groups(tf.TensorShape([2, None, 1, 12]), 3, groups)
    ops.check_groups((2, 12), 1, min(groups, 6))
