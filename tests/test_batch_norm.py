"""batch_norm against float64 formulas of our own, and its moving statistics.

python -m pytest tests/test_batch_norm.py
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from norm_oracle import (
    BATCH_SHAPES,
    FORMATS,
    ROUNDINGS,
    assert_close,
    batch_sets,
    oracle,
    random_case,
    run_with_gradients,
    to_format,
)

import ops


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", BATCH_SHAPES)
def test_batch_norm_in_training_is_the_formula(shape, dtype, data_format):
    """Output and gradients, also through the statistics, are those of the batch."""
    case = random_case(shape, dtype)
    mean, variance = np.full(shape[-1], 7.0, dtype), np.full(shape[-1], 3.0, dtype)
    actual = run_with_gradients(
        lambda *args: ops.batch_norm(*args, mean, variance, True, data_format=data_format)[0], *case, data_format
    )
    assert_close(actual, oracle(*case, batch_sets(shape)), dtype)


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", BATCH_SHAPES + [(1, 4), (1, 1, 1, 3)])
def test_batch_norm_in_inference_is_the_formula(shape, dtype, data_format):
    """Inference is y = gamma * (x - moving mean) / sqrt(moving variance + epsilon) + beta, one image or many."""
    x, gamma, beta, dy = random_case(shape, dtype)
    rng = np.random.default_rng(1)
    mean, variance = rng.normal(size=shape[-1]).astype(dtype), rng.uniform(0.5, 2, shape[-1]).astype(dtype)
    actual = run_with_gradients(
        lambda *args: ops.batch_norm(*args, mean, variance, False, data_format=data_format)[0],
        x,
        gamma,
        beta,
        dy,
        data_format,
    )
    scale = 1 / np.sqrt(variance.astype("float64") + 1e-5)
    xhat, others = (x.astype("float64") - mean) * scale, tuple(range(len(shape) - 1))
    expected = {
        "y": xhat * gamma + beta,
        "dx": dy * (gamma * scale),
        "dgamma": (dy * xhat).sum(others),
        "dbeta": dy.sum(others, dtype="float64"),
        "terms": np.abs(dy * (gamma * scale)).max(),
    }
    assert_close(actual, expected, dtype)


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape, in_graph", [(shape, False) for shape in BATCH_SHAPES] + [((2, 5, 3, 12), True)])
def test_moving_statistics_learn_the_mean_and_the_unbiased_variance(shape, dtype, data_format, in_graph):
    """new = momentum * old + (1 - momentum) * batch, with the variance of m - 1; inference returns the old ones."""
    x, gamma, beta, _ = random_case(shape, dtype)
    rng = np.random.default_rng(1)
    mean, variance = rng.normal(size=shape[-1]).astype(dtype), rng.uniform(0.5, 2, shape[-1]).astype(dtype)
    x_in = to_format(x, data_format)
    arguments = [tf.constant(array) for array in (x_in, gamma, beta, mean, variance)]
    batch_norm = tf.function(ops.batch_norm) if in_graph else ops.batch_norm
    others = tuple(range(len(shape) - 1))
    batch_mean, batch_variance = x.astype("float64").mean(others), x.astype("float64").var(others, ddof=1)
    for kwargs, momentum in (({}, 0.9), ({"momentum": 0.75}, 0.75), ({"momentum": 0.0}, 0.0)):
        _, new_mean, new_variance = batch_norm(*arguments, training=True, data_format=data_format, **kwargs)
        for actual, old, new in ((new_mean, mean, batch_mean), (new_variance, variance, batch_variance)):
            assert actual.dtype == dtype
            np.testing.assert_allclose(
                actual,
                momentum * old + (1 - momentum) * new,
                rtol=0,
                atol=ROUNDINGS * np.finfo(dtype).eps * np.abs(new).max(),
            )
    _, same_mean, same_variance = batch_norm(*arguments, training=False, data_format=data_format)
    np.testing.assert_array_equal(same_mean, mean)
    np.testing.assert_array_equal(same_variance, variance)
    for array, tensor in zip((x_in, gamma, beta, mean, variance), arguments):  # a pure function
        np.testing.assert_array_equal(tensor, array)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_batch_norm_leaves_variables_alone(dtype):
    """Given variables, the pure function moves none of them: the caller decides."""
    x, gamma, beta, _ = random_case((3, 4, 4, 5), dtype)
    mean, variance = tf.Variable(tf.zeros(5, dtype)), tf.Variable(tf.ones(5, dtype))
    _, new_mean, new_variance = ops.batch_norm(x, gamma, beta, mean, variance, True)
    assert (new_mean.numpy() != 0).all() and (new_variance.numpy() != 1).all()
    np.testing.assert_array_equal(mean, np.zeros(5))
    np.testing.assert_array_equal(variance, np.ones(5))


def test_batch_norm_epsilon_counts():
    """Epsilon is 1e-5 unless given (in the original repo 1e-3 for BN, 1e-5 for GN), in training and in inference."""
    x, gamma, beta, dy = random_case((4, 3, 3, 4), np.float32)
    x *= 1e-3  # variance 4e-6, the size of epsilon
    mean, variance = np.zeros(4, "float32"), np.full(4, 4e-6, "float32")
    for kwargs, epsilon in (({}, 1e-5), ({"epsilon": 1e-3}, 1e-3), ({"epsilon": 1e-4}, 1e-4)):
        expected = oracle(x, gamma, beta, dy, batch_sets(x.shape), epsilon)["y"]
        y, *_ = ops.batch_norm(x, gamma, beta, mean, variance, True, **kwargs)
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-6)
        y, *_ = ops.batch_norm(x, gamma, beta, mean, variance, False, **kwargs)
        np.testing.assert_allclose(y, x / np.sqrt(4e-6 + epsilon) * gamma + beta, rtol=0, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("axis", [-1, 1])
def test_batch_norm_agrees_with_keras(training, axis):
    """keras.layers.BatchNormalization with epsilon 1e-5 and the same statistics gives the same outputs."""
    rng = np.random.default_rng(0)
    x = rng.normal(0.5, 2.0, (4, 6, 5, 6)).astype("float32")
    theirs = keras.layers.BatchNormalization(axis=axis, epsilon=1e-5)
    theirs.build(x.shape)
    gamma, beta, mean, variance = (rng.uniform(0.5, 2, 6).astype("float32") for _ in range(4))
    theirs.set_weights([gamma, beta, mean, variance])
    y, *_ = ops.batch_norm(
        x, gamma, beta, mean, variance, training, data_format="channels_last" if axis == -1 else "channels_first"
    )
    np.testing.assert_allclose(y, theirs(x, training=training), rtol=0, atol=5e-6)  # outputs of size 10


def test_batch_norm_in_inference_ignores_the_batch():
    """An image's output is its own, whatever else is in the batch (the original repo tested on batch statistics)."""
    x, gamma, beta, _ = random_case((5, 4, 4, 6), np.float32)
    mean, variance = np.linspace(-1, 1, 6, dtype="float32"), np.linspace(0.5, 2, 6, dtype="float32")
    whole, *_ = ops.batch_norm(x, gamma, beta, mean, variance, False)
    alone, *_ = ops.batch_norm(x[3:4], gamma, beta, mean, variance, False)
    np.testing.assert_allclose(alone[0], whole[3], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3)])
def test_a_batch_without_values_teaches_nothing(shape, known, dtype):
    layer = ops.BatchNorm(momentum=0.5, dtype=dtype)
    layer.build((None, None, 3))
    spec = tf.TensorSpec(shape if known else (None, None, 3), dtype)
    step = tf.function(lambda x: layer(x, training=True), input_signature=[spec])
    assert step(tf.zeros(shape, dtype)).shape == shape
    np.testing.assert_array_equal(layer.moving_mean, np.zeros(3))
    np.testing.assert_array_equal(layer.moving_variance, np.ones(3))


def test_moving_statistics_of_large_means_are_right_when_fit_compiles():
    x = (1e5 + np.random.default_rng(0).normal(size=(64, 4, 4, 3))).astype("float32")
    layer = ops.BatchNorm(momentum=0.0)
    model = keras.Sequential([keras.Input((4, 4, 3)), layer])
    model.compile("sgd", "mse", jit_compile=True)
    model.fit(x, x * 0, batch_size=64, verbose=0)
    np.testing.assert_allclose(layer.moving_variance, x.astype("float64").var((0, 1, 2), ddof=1), rtol=1e-2)
