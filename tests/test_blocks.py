"""The building blocks of model.py: convolution, norm and activation in this order, residual blocks.

python -m pytest tests/test_blocks.py
"""

import functools
import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from norm_oracle import random_case

import model as models
import ops


def chain(model):
    """Names of the layers of a model after its input, in order."""
    return [layer.name for layer in model.layers[1:]]


@pytest.mark.parametrize("norm_type", models.NORM_TYPES)
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
def test_conv2d_is_convolution_norm_activation(norm_type, activation):
    """Convolution → norm → activation, a bias only without a norm, and the values that follow from it."""
    inputs = keras.Input([7, 6, 3])
    norm = models.make_norm(norm_type, groups=4)
    model = keras.Model(inputs, models.conv2d(inputs, 8, 3, 2, "block", activation, norm=norm))
    assert chain(model) == ["block_conv"] + ["block_norm"] * (norm_type != "none") + ["block_relu"] * bool(activation)
    convolution = model.get_layer("block_conv")
    assert convolution.use_bias == (norm_type == "none")
    x = np.random.default_rng(0).normal(size=(2, 7, 6, 3)).astype("float32")
    y = tf.nn.conv2d(x, tf.convert_to_tensor(convolution.kernel), 2, "SAME").numpy()
    if norm_type in ("group", "layer", "instance"):
        y = ops.group_norm(y, None, None, {"group": 4, "layer": 1, "instance": 8}[norm_type]).numpy()
    elif norm_type.startswith("batch"):
        y = y / np.sqrt(1 + 1e-5)  # inference: moving statistics are 0 and 1
    y = {None: y, "relu": np.maximum(y, 0), "leaky_relu": np.where(y > 0, y, 0.2 * y)}[activation]
    assert model.output.shape == (None, 4, 3, 8)
    np.testing.assert_allclose(model(x), y, rtol=0, atol=1e-5)  # convolutions of size 4


def test_conv2d_options_reach_the_norm():
    """groups, group_size, momentum and gamma are those of the norm that conv2d makes."""
    inputs = keras.Input([7, 6, 3])
    model = keras.Model(inputs, models.conv2d(inputs, 8, 3, 1, "a", norm=models.make_norm("batch", momentum=0.7)))
    layer = model.get_layer("a_norm")
    assert isinstance(layer, ops.BatchNorm) and layer.momentum == 0.7
    for options, groups in (({"groups": 2}, 2), ({"group_size": 2}, 4), ({"groups": 1, "group_size": 8}, 1)):
        norm = models.make_norm("group", **options)
        model = keras.Model(inputs, models.conv2d(inputs, 8, 3, 1, "a", gamma="zeros", norm=norm))
        layer = model.get_layer("a_norm")
        assert isinstance(layer, ops.GroupNorm) and layer.get_config()["groups"] == groups
        np.testing.assert_array_equal(layer.gamma.numpy(), np.zeros(8))
    model = keras.Model(inputs, models.conv2d(inputs, 8, 3, 1, "a", weight_standardization=True))
    assert isinstance(model.get_layer("a_conv"), ops.StandardizedConv2D)
    model = keras.Model(inputs, models.conv2d(inputs, 8, 3, 1, "a"))
    assert not isinstance(model.get_layer("a_conv"), ops.StandardizedConv2D)


@pytest.mark.parametrize("norm_type", models.NORM_TYPES)
def test_norm_is_the_function_of_its_type(norm_type):
    """norm makes one layer of the named type, or none."""
    inputs = keras.Input([4, 4, 8])
    norm = models.make_norm(norm_type, groups=4)
    model = keras.Model(inputs, inputs if norm is None else norm(inputs, "some"))
    assert chain(model) == ["some"] * (norm_type != "none")
    x, gamma, beta, _ = random_case((2, 4, 4, 8), np.float32)
    expected = {
        "batch": lambda: ops.batch_norm(x, None, None, np.zeros(8), np.ones(8), False)[0],
        "batch+renorm": lambda: keras.layers.BatchNormalization(epsilon=1e-5)(x),
        "group": lambda: ops.group_norm(x, None, None, 4),
        "none": lambda: x,
        "layer": lambda: ops.layer_norm(x, None, None),
        "instance": lambda: ops.instance_norm(x, None, None),
    }
    np.testing.assert_array_equal(model(x), expected[norm_type]())


def test_fc_is_a_dense_layer_with_bias():
    """fc is x · kernel + bias, and a leaky ReLU of slope 0.2 only where asked for."""
    inputs = keras.Input([5])
    x = np.random.default_rng(0).normal(size=(3, 5)).astype("float32")
    for activation in (None, "leaky_relu"):
        model = keras.Model(inputs, models.fc(inputs, 4, "dense", activation))
        kernel, bias = model.get_weights()
        model.set_weights([kernel, bias + 0.5])
        y = x @ kernel + 0.5
        np.testing.assert_allclose(
            model(x), y if activation is None else np.where(y > 0, y, 0.2 * y), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("bottleneck", [False, True])
@pytest.mark.parametrize("strides, filters", [(1, 4), (2, 4), (1, 8)])
def test_residual_block_starts_as_its_shortcut(bottleneck, strides, filters):
    """The last gamma is 0, so that a new block is relu(shortcut); a projection only where the size changes."""
    channels = 16 if bottleneck else 4
    out = 4 * filters if bottleneck else filters
    inputs = keras.Input([7, 5, channels])
    conv = functools.partial(models.conv2d, norm=models.make_norm("group", groups=2))
    model = keras.Model(inputs, models.residual_block(inputs, conv, filters, strides, "block", bottleneck))
    assert model.output.shape == (None, math.ceil(7 / strides), math.ceil(5 / strides), out)
    projections = [layer for layer in model.layers if "shortcut" in layer.name]
    assert bool(projections) == (strides > 1 or out != channels)
    convolutions = [
        layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D) and "shortcut" not in layer.name
    ]
    assert [layer.kernel_size[0] for layer in convolutions] == ([1, 3, 1] if bottleneck else [3, 3])
    assert [layer.strides[0] for layer in convolutions] == ([1, strides, 1] if bottleneck else [strides, 1])
    x = np.random.default_rng(0).normal(size=(2, 7, 5, channels)).astype("float32")
    shortcut = x
    if projections:
        kernel = tf.convert_to_tensor(projections[0].kernel)
        shortcut = ops.group_norm(tf.nn.conv2d(x, kernel, strides, "SAME"), None, None, 2)
    np.testing.assert_allclose(model(x), np.maximum(shortcut, 0), rtol=0, atol=1e-5)
