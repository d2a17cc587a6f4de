"""convolve, Conv2D and weight standardization against their definitions."""

import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from norm_oracle import ROUNDINGS, assert_second_derivatives

import layers


def convolution_oracle(x, kernel, dy, strides):
    """y, dx and dkernel of a convolution with 'SAME' padding, by the definition, one output position at a time."""
    (height, width, _, filters), (_, rows, columns, _) = kernel.shape, x.shape
    sides = list(zip(strides, (height, width), (rows, columns)))
    outputs = [math.ceil(size / stride) for stride, _, size in sides]
    missing = [max((n - 1) * stride + k - size, 0) for n, (stride, k, size) in zip(outputs, sides)]
    before = [size // 2 for size in missing]
    padded = np.pad(x, [(0, 0), (before[0], missing[0]), (before[1], missing[1]), (0, 0)])
    y, dx, dkernel = np.zeros([len(x), *outputs, filters]), np.zeros_like(padded), np.zeros_like(kernel)
    for i, j in np.ndindex(*outputs):
        window = np.s_[:, i * strides[0] : i * strides[0] + height, j * strides[1] : j * strides[1] + width]
        y[:, i, j] = np.tensordot(padded[window], kernel, 3)
        dx[window] += np.tensordot(dy[:, i, j], kernel, (1, 3))
        dkernel += np.tensordot(padded[window], dy[:, i, j], (0, 0))
    return y, dx[:, before[0] : before[0] + rows, before[1] : before[1] + columns], dkernel


CONVOLUTIONS = [
    ((1, 4, 4, 3), (4, 4, 3, 8), (2, 2), True),
    ((2, 5, 6, 3), (3, 2, 3, 24), (2, 3), True),
    ((3, 3, 2, 5), (1, 1, 5, 20), (1, 1), True),
    ((2, 5, 5, 2), (3, 3, 2, 51), (1, 1), True),
    ((2, 3, 3, 2), (3, 3, 2, 18), (1, 1), False),
    ((2, 7, 7, 3), (3, 3, 3, 4), (2, 2), False),
]


@pytest.mark.parametrize("shape, kernel, strides, by_patches", CONVOLUTIONS)
@pytest.mark.parametrize("jit_compile", [None, True])
def test_convolve_and_its_gradients_are_the_definition(shape, kernel, strides, by_patches, jit_compile):
    """By patches where there are fewer outputs than filters, up to 32 of them y too, and else by TensorFlow's own."""
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=shape), rng.normal(size=kernel)
    dy = rng.normal(size=[shape[0], -(-shape[1] // strides[0]), -(-shape[2] // strides[1]), kernel.shape[3]])

    @tf.function(jit_compile=jit_compile)
    def convolve(x, kernel, dy):
        with tf.GradientTape() as tape:
            tape.watch([x, kernel])
            y = layers.convolve(x, kernel, strides)
        return y, *tape.gradient(y, [x, kernel], dy)

    arguments = [tf.constant(value) for value in (x, kernel, dy)]
    operations = [operation.type for operation in convolve.get_concrete_function(*arguments).graph.get_operations()]
    assert operations.count("Conv2DBackpropFilter") == (not by_patches)
    assert operations.count("ExtractImagePatches") == by_patches * (1 + (dy.size // dy.shape[3] <= 32))
    for actual, expected in zip(convolve(*arguments), convolution_oracle(x, kernel, dy, strides)):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12)  # float64, sums of up to 50 products


def test_convolve_has_second_derivatives():
    x, kernel = (np.random.default_rng(0).normal(size=size) for size in ((1, 3, 3, 2), (2, 2, 2, 6)))
    assert_second_derivatives(lambda x, kernel: layers.convolve(x, kernel, (2, 2)), [x, kernel])


@pytest.mark.parametrize("shape", [(0, 4, 4, 3), (None, 4, 4, 3), (1, None, 4, 3)])
def test_convolve_takes_empty_and_unknown_batches(shape):
    """An empty batch has a gradient of 0; where a size is unknown, TensorFlow's own gradient does it."""
    kernel = tf.Variable(tf.ones([3, 3, 3, 64]))

    @tf.function(input_signature=[tf.TensorSpec(shape)])
    def gradient(x):
        with tf.GradientTape() as tape:
            y = layers.convolve(x, kernel, (2, 2))
        return tape.gradient(y, kernel)

    x = np.ones([1 if size is None and i else size or 0 for i, size in enumerate(shape)], np.float32)
    dy = np.ones([len(x), -(-x.shape[1] // 2), 2, 64])
    _, _, expected = convolution_oracle(x.astype(np.float64), kernel.numpy().astype(np.float64), dy, (2, 2))
    np.testing.assert_array_equal(gradient(x), expected)


SAME = {"padding": "same"}


@pytest.mark.parametrize("given", [{}, SAME | {"strides": (2, 1)}, SAME | {"dilation_rate": 2}, SAME | {"groups": 2}])
def test_conv2d_layer_is_that_of_keras(given):
    x = np.random.default_rng(0).normal(size=(1, 6, 5, 4)).astype("float32")
    results = []
    for layer in (layers.Conv2D(64, 3, **given), keras.layers.Conv2D(64, 3, **given)):
        layer.build(x.shape)
        layer.set_weights([np.linspace(-1, 1, math.prod(w.shape)).reshape(w.shape) for w in layer.get_weights()])
        with tf.GradientTape() as tape:
            y = layer(x)
        results.append([y, tape.gradient(y, layer.kernel.value)])
    for ours, theirs in zip(*results):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("shape", [(3, 3, 16, 8), (1, 1, 32, 4), (7, 7, 3, 5), (64, 10), (3, 8, 6)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_standardized_weights_have_mean_0_and_variance_1_by_fan_in(shape, dtype):
    """Each filter alone is centred and scaled over its inputs (arXiv 1903.10520); a constant one becomes 0."""
    kernel = np.random.default_rng(0).normal(0.3, 2, shape)
    kernel[..., 0] *= 10  # filters of different sizes
    kernel[..., 1] = 0.5
    weights = layers.standardize_weights(tf.constant(kernel, dtype))
    assert weights.dtype == dtype and weights.shape == shape
    fan_in, inputs = math.prod(shape[:-1]), tuple(range(len(shape) - 1))
    expected = (kernel - kernel.mean(inputs)) / np.sqrt(fan_in * kernel.var(inputs) + 1e-5)
    np.testing.assert_allclose(weights, expected, rtol=0, atol=ROUNDINGS * np.finfo(dtype).eps)


def test_standardized_weights_pass_gradients_on():
    kernel = np.random.default_rng(0).normal(size=(2, 3, 2, 3))
    cube = tf.function(lambda kernel: layers.standardize_weights(kernel) ** 3)
    theoretical, numerical = tf.test.compute_gradient(cube, [tf.constant(kernel)], delta=1e-5)
    np.testing.assert_allclose(theoretical[0], numerical[0], rtol=1e-7, atol=1e-8)  # step^2 of a difference
    assert_second_derivatives(layers.standardize_weights, [kernel])


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_standardized_convolution_is_the_convolution_with_standardized_weights(policy):
    x = np.random.default_rng(0).normal(size=(2, 9, 7, 4)).astype("float32")
    settings = {"strides": 2, "padding": "same", "bias_initializer": "ones", "activation": "relu", "dtype": policy}
    layer = layers.StandardizedConv2D(6, (3, 2), **settings)
    y = layer(x)
    kernel = tf.cast(layer.kernel, layer.compute_dtype)
    expected = tf.nn.relu(tf.nn.conv2d(tf.cast(x, kernel.dtype), layers.standardize_weights(kernel), 2, "SAME") + 1)
    assert y.dtype == layer.compute_dtype and layer.kernel.dtype == "float32"
    # outputs of size 4: float32 roundings of another order of summing, one rounding of 8 digits in bfloat16
    atol = 1e-5 if policy == "float32" else 4 * 2**-8
    np.testing.assert_allclose(tf.cast(y, tf.float32), tf.cast(expected, tf.float32), rtol=0, atol=atol)
