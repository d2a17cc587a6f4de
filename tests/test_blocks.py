"""The building blocks of model.py: convolution, norm and activation in this order, residual blocks.

python -m pytest tests/test_blocks.py
"""

import functools
import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from networks import images, settings

import config
import model as models
import ops

GROUPS = {"group": 4, "layer": 1, "instance": 8}


def block(function, shape, *arguments, **flags):
    """The model of one of model.py's functions on images of a shape, with the configuration of flags."""
    inputs = keras.Input(shape)
    return keras.Model(inputs, function(inputs, *arguments, config=settings(**{"groups": 4, **flags})))


@pytest.mark.parametrize("norm_type", config.NORM_TYPES)
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
def test_conv2d_is_convolution_norm_activation(norm_type, activation):
    """Convolution → norm → activation, a bias only without a norm, and the values that follow from it."""
    model = block(models.conv2d, [7, 6, 3], 8, 3, 2, "block", activation, norm_type=norm_type)
    names = ["block_conv"] + ["block_norm"] * (norm_type != "none") + ["block_relu"] * bool(activation)
    assert [layer.name for layer in model.layers[1:]] == names
    convolution, x = model.get_layer("block_conv"), images(2, (7, 6, 3))
    assert convolution.use_bias == (norm_type == "none")
    y = tf.nn.conv2d(x, tf.convert_to_tensor(convolution.kernel), 2, "SAME").numpy()
    if norm_type in GROUPS:
        y = ops.group_norm(y, None, None, GROUPS[norm_type]).numpy()
    elif norm_type.startswith("batch"):
        y = y / np.sqrt(1 + 1e-5)  # inference: moving statistics are 0 and 1
    y = {None: y, "relu": np.maximum(y, 0), "leaky_relu": np.where(y > 0, y, 0.2 * y)}[activation]
    assert model.output.shape == (None, 4, 3, 8)
    np.testing.assert_allclose(model(x), y, rtol=0, atol=1e-5)  # convolutions of size 4


@pytest.mark.parametrize("norm_type", ["batch", "batch+renorm", "group", "none"])
def test_gamma_of_conv2d_can_start_at_0(norm_type):
    """Then a norm gives beta, and without a norm a learned scalar gives 0."""
    model = block(models.conv2d, [7, 6, 3], 8, 3, 2, "block", None, "zeros", norm_type=norm_type)
    np.testing.assert_array_equal(model(images(2, (7, 6, 3))), np.zeros((2, 4, 3, 8)))


def test_fc_is_a_dense_layer_with_bias():
    """fc is x · kernel + bias, and a leaky ReLU of slope 0.2 only where asked for."""
    inputs, x = keras.Input([5]), images(3, (5,))
    for activation in (None, "leaky_relu"):
        model = keras.Model(inputs, models.fc(inputs, 4, "dense", activation))
        kernel, bias = model.get_weights()
        model.set_weights([kernel, bias + 0.5])
        y = x @ kernel + 0.5
        y = y if activation is None else np.where(y > 0, y, 0.2 * y)
        np.testing.assert_allclose(model(x), y, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bottleneck", [False, True])
@pytest.mark.parametrize("strides, filters", [(1, 4), (2, 4), (1, 8)])
def test_residual_block_starts_as_its_shortcut(bottleneck, strides, filters):
    """The last gamma is 0, so that a new block is relu(shortcut); a projection only where the size changes."""
    channels = 16 if bottleneck else 4
    out = 4 * filters if bottleneck else filters
    inputs = keras.Input([7, 5, channels])
    conv = functools.partial(models.conv2d, config=settings(norm_type="group", groups=2))
    model = keras.Model(inputs, models.residual_block(inputs, conv, filters, strides, "block", bottleneck))
    assert model.output.shape == (None, math.ceil(7 / strides), math.ceil(5 / strides), out)
    convolutions = [layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
    projections = [layer for layer in convolutions if "shortcut" in layer.name]
    assert bool(projections) == (strides > 1 or out != channels)
    sizes = [(layer.kernel_size[0], layer.strides[0]) for layer in convolutions if layer not in projections]
    assert sizes == ([(1, 1), (3, strides), (1, 1)] if bottleneck else [(3, strides), (3, 1)])
    shortcut = x = images(2, (7, 5, channels))
    if projections:
        kernel = tf.convert_to_tensor(projections[0].kernel)
        shortcut = ops.group_norm(tf.nn.conv2d(x, kernel, strides, "SAME"), None, None, 2)
    np.testing.assert_allclose(model(x), np.maximum(shortcut, 0), rtol=0, atol=1e-5)
