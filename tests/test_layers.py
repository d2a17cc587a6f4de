"""The Keras layers on the norms: the arguments of Keras, weights, policies, saving.

python -m pytest tests/test_layers.py
"""

import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf
from norm_oracle import batch_sets, from_format, group_sets, oracle, random_case, to_format

import layers
import ops

# Arguments of keras.layers.BatchNormalization that BatchNorm does not take: batch renormalization, and statistics
# over all replicas, where arXiv 1803.08494 has them for each GPU.
NOT_TAKEN = ["renorm", "renorm_clipping", "renorm_momentum"]
PAIRS = [(ops.GroupNorm, keras.layers.GroupNormalization), (ops.BatchNorm, keras.layers.BatchNormalization)]
LAYERS = [ops.GroupNorm, ops.BatchNorm]


def constructor(layer_class):
    """The named constructor arguments of a layer with their defaults."""
    parameters = inspect.signature(layer_class.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.name != "self" and p.kind == p.POSITIONAL_OR_KEYWORD}


@pytest.mark.parametrize("ours, theirs", PAIRS)
def test_layers_take_the_arguments_of_keras(ours, theirs):
    """Every argument of the Keras layer is taken and returned by get_config, and means the same unless given."""
    taken = {name: value for name, value in constructor(theirs).items() if name not in NOT_TAKEN}
    assert set(constructor(theirs)) - set(taken) == (set(NOT_TAKEN) if ours is ops.BatchNorm else set())
    config, default, reference = ours(**taken).get_config(), ours().get_config(), theirs().get_config()
    for name in taken:
        assert config[name] == reference[name], name
        assert default[name] == (1e-5 if name == "epsilon" else reference[name]), name
    if ours is ops.BatchNorm:
        with pytest.raises(ValueError, match="renorm"):  # refused, not silently without effect
            ours(renorm=True)


@pytest.mark.parametrize("ours, theirs", PAIRS)
def test_positional_arguments_are_those_of_keras(ours, theirs):
    """The first positional arguments are in the order of Keras: GroupNorm(groups, axis, epsilon, ...)."""
    count = len(constructor(ours))
    assert list(constructor(ours)) == list(constructor(theirs))[:count]


@pytest.mark.parametrize("layer_class", LAYERS)
def test_config_round_trip(layer_class):
    """from_config(get_config()) is the same layer, whatever was set."""
    kwargs = {
        "axis": 1,
        "epsilon": 3e-4,
        "center": True,
        "scale": True,
        "beta_initializer": "ones",
        "gamma_initializer": keras.initializers.Constant(3.0),
        "beta_regularizer": "l1",
        "gamma_regularizer": keras.regularizers.L2(0.5),
        "beta_constraint": "non_neg",
        "gamma_constraint": keras.constraints.MaxNorm(2.0),
        "name": "some_norm",
        "dtype": "mixed_bfloat16",
    }
    kwargs |= (
        {"groups": 4}
        if layer_class is ops.GroupNorm
        else {
            "momentum": 0.5,
            "moving_mean_initializer": "ones",
            "moving_variance_initializer": keras.initializers.Constant(2.0),
        }
    )
    layer = layer_class(**kwargs)
    config = layer.get_config()
    copy = layer_class.from_config(config)
    assert copy.get_config() == config
    assert keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer)).get_config() == config
    x = np.random.default_rng(0).normal(size=(2, 8, 5, 5)).astype("float32")
    np.testing.assert_array_equal(tf.cast(copy(x), tf.float32), tf.cast(layer(x), tf.float32))
    for ours, theirs in zip(copy.get_weights(), layer.get_weights()):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("layer_class", LAYERS)
@pytest.mark.parametrize("shape", [(4, 8), (4, 5, 8), (4, 5, 3, 8), (2, 5, 3, 4, 8)])
def test_axis_1_is_channels_first(layer_class, shape):
    """axis=1 is the layer on [N, C, ...]; the axis of the channels counted from the end is the same as -1."""
    x = np.random.default_rng(0).normal(0.5, 2, shape).astype("float32")
    options = {"groups": 4} if layer_class is ops.GroupNorm else {}
    last, first, counted = (
        layer_class(**options),
        layer_class(axis=1, **options),
        layer_class(axis=len(shape) - 1, **options),
    )
    weights = None
    for layer, data_format in ((last, "channels_last"), (first, "channels_first"), (counted, "channels_last")):
        layer.build(to_format(x, data_format).shape)
        if weights is None:
            weights = [np.random.default_rng(i).uniform(0.5, 2, 8) for i in range(len(layer.weights))]
        layer.set_weights(weights)
    for training in (False, True):
        expected = last(x, **({"training": training} if layer_class is ops.BatchNorm else {}))
        for layer, data_format in ((first, "channels_first"), (counted, "channels_last")):
            y = layer(to_format(x, data_format), **({"training": training} if layer_class is ops.BatchNorm else {}))
            np.testing.assert_allclose(from_format(y, data_format), expected, rtol=0, atol=1e-5)  # of size 10


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


@pytest.mark.parametrize("groups, same_as", [(-1, 12), (1, 1), (3, 3)])
def test_group_norm_layer_is_the_function(groups, same_as):
    """The layer passes its groups, epsilon and weights on; groups=-1 is a group for each channel, as in Keras."""
    x, gamma, beta, _ = random_case((2, 5, 4, 12), np.float32)
    x *= 1e-2
    layer = ops.GroupNorm(groups, epsilon=1e-4)
    layer.build(x.shape)
    layer.gamma.assign(gamma)
    layer.beta.assign(beta)
    np.testing.assert_array_equal(layer(x), ops.group_norm(x, gamma, beta, same_as, 1e-4))


def test_batch_norm_layer_is_the_function_and_moves_only_in_training():
    """training=True normalizes by the batch and moves the statistics; False, and nothing said, do neither."""
    x, gamma, beta, _ = random_case((3, 5, 4, 6), np.float32)
    layer = ops.BatchNorm(
        momentum=0.75,
        epsilon=1e-4,
        moving_mean_initializer=keras.initializers.Constant(0.25),
        moving_variance_initializer=keras.initializers.Constant(2.0),
    )
    layer.build(x.shape)
    layer.gamma.assign(gamma)
    layer.beta.assign(beta)
    mean, variance = np.full(6, 0.25, "float32"), np.full(6, 2.0, "float32")
    for kwargs in ({}, {"training": False}):
        y, *_ = ops.batch_norm(x, gamma, beta, mean, variance, False, 0.75, 1e-4)
        np.testing.assert_array_equal(layer(x, **kwargs), y)
        np.testing.assert_array_equal(layer.moving_mean.numpy(), mean)
        np.testing.assert_array_equal(layer.moving_variance.numpy(), variance)
    y, new_mean, new_variance = ops.batch_norm(x, gamma, beta, mean, variance, True, 0.75, 1e-4)
    np.testing.assert_array_equal(layer(x, training=True), y)
    np.testing.assert_array_equal(layer.moving_mean.numpy(), new_mean)
    np.testing.assert_array_equal(layer.moving_variance.numpy(), new_variance)
    assert (new_mean != mean).numpy().all() and (new_variance != variance).numpy().all()


def test_frozen_batch_norm_uses_and_keeps_its_statistics():
    """trainable=False is inference even under training=True, as in Keras: nothing to train, nothing moves."""
    x = np.random.default_rng(0).normal(3, 2, (3, 5, 4, 6)).astype("float32")
    layer = ops.BatchNorm(trainable=False)
    np.testing.assert_array_equal(layer(x, training=True), layer(x, training=False))
    np.testing.assert_array_equal(layer.moving_mean.numpy(), np.zeros(6))
    np.testing.assert_array_equal(layer.moving_variance.numpy(), np.ones(6))
    assert layer.trainable_weights == [] and len(layer.non_trainable_weights) == 4
    layer.trainable = True
    layer(x, training=True)
    assert (layer.moving_mean.numpy() != 0).all() and len(layer.trainable_weights) == 2


@pytest.mark.parametrize("layer_class", LAYERS)
@pytest.mark.parametrize(
    "policy, dtype",
    [("mixed_float16", "float16"), ("mixed_bfloat16", "bfloat16"), ("float32", "float32"), ("float64", "float64")],
)
def test_weights_are_float32_under_mixed_policies(layer_class, policy, dtype):
    """Half precision computes, float32 learns (keras#22586, addons#2550: NaN); float64 stays float64."""
    x = (1e4 * np.random.default_rng(0).normal(size=(8, 16, 16, 32))).astype("float32")
    layer = layer_class(dtype=policy)
    y = layer(x, training=True) if layer_class is ops.BatchNorm else layer(x)
    assert y.dtype == dtype and layer.compute_output_shape(x.shape) == x.shape == tuple(y.shape)
    assert all(weight.dtype == ("float64" if policy == "float64" else "float32") for weight in layer.weights)
    assert all(np.isfinite(weight).all() for weight in layer.get_weights())
    y = tf.cast(y, tf.float32).numpy()
    assert np.isfinite(y).all() and abs(y.std() - 1) < 0.01  # bfloat16 has 2 to 3 decimal digits


@pytest.mark.parametrize("layer_class", LAYERS)
@pytest.mark.parametrize("low, high", [(66_000, 70_000), (999, 1001)])
def test_float32_inputs_reach_the_statistics_of_mixed_float16(layer_class, low, high):
    """Beyond the range of float16, and closer together than its steps (keras#22586)."""
    x = np.random.default_rng(0).uniform(low, high, (8, 16, 16, 32)).astype("float32")
    y = layer_class(dtype="mixed_float16")(tf.constant(x), training=True)
    sets = batch_sets(x.shape) if layer_class is ops.BatchNorm else group_sets(x.shape, 32)
    exact = oracle(x, np.ones(32), np.zeros(32), x, sets)["y"]
    assert y.dtype == "float16"
    np.testing.assert_allclose(tf.cast(y, "float32"), exact, rtol=0, atol=4e-3)  # of size 2


@pytest.mark.parametrize("layer_class", LAYERS)
def test_regularizers_and_constraints_have_effect(layer_class):
    """gamma and beta are penalized by their own regularizers, and held by their own constraints as they learn."""
    x = np.random.default_rng(0).normal(size=(4, 3, 3, 32)).astype("float32")
    layer = layer_class(
        gamma_regularizer=keras.regularizers.L2(0.5),
        beta_regularizer=keras.regularizers.L1(0.25),
        beta_initializer=keras.initializers.Constant(2.0),
        gamma_constraint=keras.constraints.NonNeg(),
        beta_constraint=keras.constraints.MaxNorm(1.5),
    )
    layer(x)
    assert sorted(float(loss) for loss in layer.losses) == [0.5 * 32, 0.25 * 2 * 32]
    keras.optimizers.SGD(1.0).apply([tf.fill([32], 5.0), tf.zeros([32])], [layer.gamma, layer.beta])
    np.testing.assert_array_equal(layer.gamma.numpy(), np.zeros(32))  # 1 - 5 is held at 0
    np.testing.assert_allclose(np.linalg.norm(layer.beta.numpy()), 1.5, rtol=1e-5)


def small_model():
    """A functional model with both norms and a standardized convolution."""
    inputs = keras.Input([8, 8, 3])
    x = layers.StandardizedConv2D(8, 3, padding="same", use_bias=False)(inputs)
    x = ops.BatchNorm(momentum=0.8)(x)
    x = keras.layers.ReLU()(x)
    x = layers.Conv2D(12, 3)(x)
    x = ops.GroupNorm(4, beta_regularizer="l2")(x)
    x = keras.layers.ReLU()(x)  # else the next norm subtracts again what the last one adds
    x = ops.GroupNorm(-1)(x)
    return keras.Model(inputs, keras.layers.Dense(5)(keras.layers.Flatten()(x)))


def test_saved_models_give_the_same_outputs(tmp_path):
    """A model goes to a .keras file and back, no custom_objects needed, and gives identical outputs."""
    model = small_model()
    rng = np.random.default_rng(0)
    model.set_weights([rng.uniform(0.5, 1.5, weight.shape) for weight in model.get_weights()])
    x = rng.normal(size=(4, 8, 8, 3)).astype("float32")
    expected = model(x)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(x), expected)


def test_fit_trains_every_weight():
    """One step of keras.Model.fit changes every gamma, beta and kernel, and moves the statistics."""
    keras.utils.set_random_seed(0)
    model = small_model()
    rng = np.random.default_rng(0)
    x, target = rng.normal(1, 2, (4, 8, 8, 3)), rng.normal(size=(4, 5))
    before = model.get_weights()
    model.compile("sgd", "mse")
    history = model.fit(x, target, batch_size=4, epochs=1, verbose=0)
    assert np.isfinite(history.history["loss"]).all()
    for variable, old, new in zip(model.weights, before, model.get_weights()):
        assert np.isfinite(new).all() and (old != new).any(), variable.path
    before = model.get_weights()
    model.predict(x, verbose=0)
    model.evaluate(x, target, verbose=0)
    for old, new in zip(before, model.get_weights()):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("layer_class", LAYERS)
def test_layers_take_unknown_sizes(layer_class):
    """A model without a fixed image size runs at any size and batch."""
    inputs = keras.Input([None, None, 32])
    model = keras.Model(inputs, layer_class()(inputs))
    assert model.output.shape == (None, None, None, 32)
    for shape in ((1, 4, 6, 32), (3, 2, 2, 32)):
        assert model(np.ones(shape, "float32"), training=True).shape == shape
