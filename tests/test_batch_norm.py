"""What batch_norm does beside the formula that test_group_norm.py tests: inference, and the moving statistics."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from norm_oracle import BATCH_SHAPES, FORMATS, ROUNDINGS, assert_close, random_case, run_with_gradients, to_format

import ops


def random_statistics(channels, dtype):
    """A moving mean and a moving variance."""
    rng = np.random.default_rng(1)
    return rng.normal(size=channels).astype(dtype), rng.uniform(0.5, 2, channels).astype(dtype)


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "shape, epsilon", [*((shape, 1e-5) for shape in BATCH_SHAPES), ((1, 4), 0.1), ((0, 2, 3), 0.1)]
)
def test_batch_norm_in_inference_is_the_formula(shape, epsilon, dtype, data_format):
    """y = gamma * (x - moving mean) / sqrt(moving variance + epsilon) + beta, for any number of images."""
    x, gamma, beta, dy = random_case(shape, dtype)
    mean, variance = random_statistics(shape[-1], dtype)
    options = {"data_format": data_format} | ({} if epsilon == 1e-5 else {"epsilon": epsilon})
    actual = run_with_gradients(
        lambda *args: ops.batch_norm(*args, mean, variance, False, **options)[0], x, gamma, beta, dy, data_format
    )
    scale, others = 1 / np.sqrt(np.float64(variance) + epsilon), tuple(range(len(shape) - 1))
    xhat, dx = (x - np.float64(mean)) * scale, dy * (gamma * scale)
    expected = {
        "y": xhat * gamma + beta,
        "dx": dx,
        "dgamma": (dy * xhat).sum(others),
        "dbeta": dy.sum(others, dtype="float64"),
        "terms": np.abs(dx).max(initial=0),
    }
    assert_close(actual, expected, dtype)


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape, in_graph", [(shape, False) for shape in BATCH_SHAPES] + [((2, 5, 3, 12), True)])
def test_moving_statistics_learn_the_mean_and_the_unbiased_variance(shape, dtype, data_format, in_graph):
    """new = momentum * old + (1 - momentum) * batch, with the variance of m - 1; only returned, never assigned."""
    x, gamma, beta, _ = random_case(shape, dtype)
    statistics = random_statistics(shape[-1], dtype)
    variables = [tf.Variable(value) for value in statistics]
    arguments = [tf.constant(to_format(x, data_format)), tf.constant(gamma), tf.constant(beta), *variables]
    batch_norm = tf.function(ops.batch_norm) if in_graph else ops.batch_norm
    values = np.float64(x).reshape(-1, shape[-1])
    batch = values.mean(0), values.var(0, ddof=1)
    for kwargs, momentum in (({}, 0.9), ({"momentum": 0.75}, 0.75), ({"momentum": 0.0}, 0.0)):
        _, *moved = batch_norm(*arguments, training=True, data_format=data_format, **kwargs)
        for actual, old, new in zip(moved, statistics, batch):
            assert actual.dtype == dtype
            allowed = ROUNDINGS * np.finfo(dtype).eps * np.abs(new).max()
            np.testing.assert_allclose(actual, momentum * old + (1 - momentum) * new, rtol=0, atol=allowed)
    _, *kept = batch_norm(*arguments, training=False, data_format=data_format)
    for old, variable, same in zip(statistics, variables, kept):
        np.testing.assert_array_equal(variable, old)
        np.testing.assert_array_equal(same, old)


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
