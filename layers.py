"""Layers other than norms: convolutions, with and without standardized weights, dropout, and SkipInit.

Weight Standardization: Qiao et al., arXiv 1903.10520. SkipInit: De & Smith, arXiv 2002.10444.
"""

import math

import keras
import tensorflow as tf

from ops import EPSILON, moments, replicas_in_sync

FEW_OUTPUTS = 32  # up to this many outputs a matrix product was measured to be faster than a convolution


def standardize_weights(kernel: tf.Tensor, epsilon: float = EPSILON) -> tf.Tensor:
    """Centre and scale each filter over its inputs (arXiv 1903.10520, equations 8 to 10).

    Args:
        kernel: [..., inputs, filters] convolution or dense weights, any float type.
        epsilon: added to the variance.

    Returns:
        Weights of the same shape and type, each filter with mean 0 and variance 1 / fan_in: the scale of LeCun's
        initialization, so that the outputs keep the variance of the inputs whether or not a norm follows. In the
        paper the variance is 1; if a norm follows, this makes no difference, except for its epsilon.
    """
    kernel = tf.convert_to_tensor(kernel)
    weights = tf.cast(kernel, tf.float64 if kernel.dtype == tf.float64 else tf.float32)
    axes = list(range(kernel.shape.rank - 1))
    mean, variance = moments(weights, axes)
    fan_in = math.prod(kernel.shape[:-1])
    return tf.cast((weights - mean) * tf.math.rsqrt(fan_in * (variance + epsilon / fan_in)), kernel.dtype)


def convolve(x: tf.Tensor, kernel: tf.Tensor, strides: tuple[int, int]) -> tf.Tensor:
    """tf.nn.conv2d with 'SAME' padding; on a CPU and with few outputs (N H' W'), partly by matrix products.

    With fewer outputs than filters, the patches of the images take less memory than the kernel. The gradient of the
    kernel is then the product of patches and dy, for which oneDNN takes up to three times as long: for the last layer
    of convnet 10.9 ms against 3.9 at batch size 8, and 40.8 ms against 17.2 at 64 (one thread of an AMD EPYC with
    AVX2). With at most FEW_OUTPUTS outputs the convolution is a product, too. The gradient of x is faster as conv2d.

    Args:
        x: [N, H, W, C], any float type.
        kernel: [height, width, C, filters].
        strides: (vertical, horizontal).

    Returns:
        [N, H', W', filters], with H' = ceil(H / strides[0]), W' = ceil(W / strides[1]).
    """
    height, width, channels, filters = kernel.shape
    sizes = [x.shape[0]] + [size and -(-size // stride) for size, stride in zip(x.shape[1:3], strides)]
    outputs = None if None in sizes else math.prod(sizes)
    if outputs is None or outputs >= filters or tf.config.list_physical_devices("GPU"):  # only measured on CPUs
        return tf.nn.conv2d(x, kernel, strides, "SAME")

    def patches(x):  # [N, H, W, C] → [outputs, inputs of a filter]
        cut = tf.image.extract_patches(x, [1, height, width, 1], [1, *strides, 1], [1, 1, 1, 1], "SAME")
        return tf.reshape(cut, [outputs, height * width * channels])

    @tf.custom_gradient
    def convolution(x, kernel):
        def gradient(dy):
            dx = tf.nn.conv2d_transpose(dy, kernel, tf.shape(x), strides, "SAME")
            dkernel = tf.matmul(patches(x), tf.reshape(dy, [outputs, filters]), transpose_a=True)
            return dx, tf.reshape(dkernel, kernel.shape)

        if outputs > FEW_OUTPUTS:
            return tf.nn.conv2d(x, kernel, strides, "SAME"), gradient
        product = tf.matmul(patches(x), tf.reshape(kernel, [height * width * channels, filters]))
        return tf.reshape(product, [*sizes, filters]), gradient

    return convolution(x, kernel)


@keras.saving.register_keras_serializable("group_norm")
class Dropout(keras.layers.Dropout):
    """keras.layers.Dropout with a different mask in each replica: Keras draws the same mask in all replicas."""

    def call(self, inputs, training=False):
        if not training or self.rate == 0 or replicas_in_sync() == 1:
            return super().call(inputs, training=training)
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        seed = tf.random.fold_in(tf.cast(self.seed_generator.next(), tf.int64), replica)
        return tf.nn.experimental.stateless_dropout(inputs, self.rate, seed)


@keras.saving.register_keras_serializable("group_norm")
class Conv2D(keras.layers.Conv2D):
    """keras.layers.Conv2D, computed by convolve() if that supports the layer's arguments."""

    def convolution_op(self, inputs, kernel):
        arguments = self.padding, self.dilation_rate, self.groups, self.data_format
        if arguments != ("same", (1, 1), 1, "channels_last"):
            return super().convolution_op(inputs, kernel)
        return convolve(inputs, tf.convert_to_tensor(kernel), self.strides)


@keras.saving.register_keras_serializable("group_norm")
class StandardizedConv2D(Conv2D):
    """Conv2D that applies standardize_weights to its kernel before each use."""

    def convolution_op(self, inputs, kernel):
        return super().convolution_op(inputs, standardize_weights(kernel))


@keras.saving.register_keras_serializable("group_norm")
class SkipInit(keras.layers.Layer):
    """x times a learned scalar that starts at 0: lets a ResNet train without norms (De & Smith, arXiv 2002.10444).

    At the end of a residual branch it acts like a norm whose gamma starts at 0: each block starts as its shortcut.
    """

    def build(self, input_shape):
        self.scale = self.add_weight(name="scale", shape=(), initializer="zeros", autocast=False, dtype="float32")

    def call(self, inputs):
        return inputs * tf.cast(self.scale, inputs.dtype)
