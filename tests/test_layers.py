"""The Keras layers on the norms: the arguments of Keras, weights, policies, saving."""

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
    own, taken = (
        [p.name for p in inspect.signature(layer.__init__).parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
        for layer in (ours, theirs)
    )
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
    """center=False has no beta, scale=False no gamma, and the outputs are those of beta 0 and gamma 1."""
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


def test_batch_norm_layer_is_the_function_and_moves_only_in_training():
    """training=True normalizes by the batch and moves the statistics; False, and nothing said, do neither."""
    x = np.random.default_rng(0).normal(0.5, 2, (3, 5, 4, 6)).astype("float32")
    layer = ops.BatchNorm(momentum=0.75, epsilon=1e-4)
    layer.build(x.shape)
    layer.set_weights([np.random.default_rng(i).uniform(0.5, 2, 6) for i in range(4)])
    weights = layer.get_weights()  # gamma, beta, moving mean and variance
    for kwargs in ({}, {"training": False}, {"training": True}):
        y, *statistics = ops.batch_norm(x, *weights, "training" in kwargs and kwargs["training"], 0.75, 1e-4)
        np.testing.assert_array_equal(layer(x, **kwargs), y)
        for now, wanted in zip(layer.get_weights(), [*weights[:2], *statistics]):
            np.testing.assert_array_equal(now, wanted)


def test_frozen_batch_norm_uses_and_keeps_its_statistics():
    """trainable=False is inference even under training=True, as in Keras: nothing to train, nothing moves."""
    x = np.random.default_rng(0).normal(3, 2, (3, 5, 4, 6)).astype("float32")
    layer = ops.BatchNorm(trainable=False)
    np.testing.assert_array_equal(layer(x, training=True), layer(x, training=False))
    np.testing.assert_array_equal(layer.moving_mean.numpy(), np.zeros(6))
    np.testing.assert_array_equal(layer.moving_variance.numpy(), np.ones(6))
    assert layer.trainable_weights == [] and len(layer.non_trainable_weights) == 4


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
    """A model goes to a .keras file and back, no custom_objects needed, with its settings and identical outputs."""
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
