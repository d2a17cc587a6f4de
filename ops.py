"""Normalization as pure functions, and Keras layers that call them.

    y = ops.group_norm(x, gamma, beta, groups=32)                        # a function of tensors
    x = ops.GroupNorm(groups=8)(x)                                       # a layer for any Keras model

Group Normalization: Wu & He, arXiv 1803.08494. Batch Normalization: Ioffe & Szegedy, arXiv 1502.03167.
"""

import math
import numbers

import keras
import tensorflow as tf
from tensorflow.python.ops import control_flow_util

EPSILON = 1e-5  # of every norm, as in the code of the GN paper's authors
LANES = 8  # float32 values that one CPU instruction adds in TensorFlow's packages


def group_norm(
    x: tf.Tensor,
    gamma: tf.Tensor | None,
    beta: tf.Tensor | None,
    groups: int = 32,
    epsilon: float = EPSILON,
    data_format: str = "channels_last",
) -> tf.Tensor:
    """Normalize each example over groups of channels (arXiv 1803.08494, equations 1, 2, 6 and 7).

    One group makes layer norm (equation 4), and a group for each channel instance norm (equation 5).

        mean[n, g]      = mean of x over the m values of group g of example n: its C / G channels, all positions
        centred         = x - mean
        variance[n, g]  = mean of centred^2 over the same values
        inverse_std     = 1 / sqrt(variance + epsilon)
        scale           = gamma * inverse_std
        y               = centred * scale + beta

    The gradient is in closed form. With dy the gradient of y, and the means over the same m values,

        offset          = mean of scale * dy
        slope           = mean of scale * dy * centred, times inverse_std^2
        dx              = dy * scale - offset - centred * slope
        dgamma[c]       = sum of dy * centred * inverse_std
        dbeta[c]        = sum of dy

    so that the gradient keeps one large tensor, centred. We sum over the positions first, to [N, C], and then over the
    few channels of a group: no large tensor is transposed or split into groups. _fold may pack several positions into a
    row, for speed; these are summed last.

    Args:
        x: [N, ..., C] (or [N, C, ...] with 'channels_first'), rank 2 to 5, any float type. Only C must be static.
        gamma, beta: [C] scale and offset; None means 1 and 0.
        groups: G, a divisor of C; channels g * C / G to (g + 1) * C / G - 1 are group g.
        epsilon: added to the variance.
        data_format: 'channels_last' or 'channels_first'.

    Returns:
        y, with the shape and type of x. Statistics, gamma and beta are float32 (float64 if x is).

    Raises:
        ValueError: if C is unknown, G does not divide C, or a group holds a single value (which would become 0).
    """
    x = tf.convert_to_tensor(x)
    axis = _channel_axis(x, data_format)
    check_groups(x.shape, axis, groups)
    gamma, beta, dtype = _affine(x, axis, gamma, beta)
    shape = _dynamic_shape(x)
    channels, positions = shape[axis], math.prod(shape[1:axis] + shape[axis + 1 :])
    if axis == len(shape) - 1 or channels == 1:
        fold = _fold(positions, channels)
        view, position_axis = [shape[0], positions // fold, fold * channels], 1
    else:
        view, position_axis, fold = [shape[0], channels, positions], 2, 1
    y = _normalize_groups(tf.reshape(tf.cast(x, dtype), view), gamma, beta, groups, epsilon, position_axis, fold)
    return tf.cast(tf.reshape(y, shape), x.dtype)


def _normalize_groups(x, gamma, beta, groups, epsilon, position_axis, fold):
    """group_norm on x of [N, rows, fold * C] (position_axis 1) or [N, C, positions] (position_axis 2, fold 1)."""
    examples, columns = _dynamic_shape(x)[0], _dynamic_shape(x)[3 - position_axis]
    channels = gamma.shape[0]
    size = channels // groups  # channels per group
    rows = tf.cast(tf.shape(x)[position_axis], x.dtype)

    def over_positions(reduce, values):  # a tensor of the shape of x → [N, fold, G, C / G]
        values = _over_rows(reduce, values, x.shape[2] or channels) if position_axis == 1 else reduce(values, axis=2)
        return tf.reshape(values, [examples, fold, groups, size])

    def group_mean(values):  # [N, fold, G, C / G] → [N, 1, G, 1]
        mean = tf.reduce_mean(values, axis=3)  # reducing both axes at once would add in an order that depends on N
        return tf.reshape(_over_rows(tf.reduce_mean, mean, groups), [examples, 1, groups, 1])

    def wide(values, examples=examples):  # broadcasts to [N, fold, G, C / G] → broadcasts to x
        values = tf.broadcast_to(values, [examples, fold, groups, size])
        return tf.reshape(values, [examples, 1, columns] if position_axis == 1 else [examples, columns, 1])

    @tf.custom_gradient
    def normalize(x, gamma, beta):
        mean = group_mean(over_positions(tf.reduce_mean, x))
        centred = x - wide(mean)  # E[x^2] - E[x]^2 would lose all digits at mean >> std
        variance = group_mean(over_positions(tf.reduce_mean, tf.square(centred)))
        variance += epsilon
        inverse_std = tf.sqrt(variance) / variance  # [N, 1, G, 1]; rsqrt's rounding depends on the position in memory
        scale = gamma * inverse_std  # [N, 1, G, C / G]
        wide_scale = wide(scale)
        y = centred * wide_scale + wide(beta, examples=1)

        def gradient(dy):
            sum_dy = over_positions(tf.reduce_sum, dy)
            sum_dy_centred = over_positions(tf.reduce_sum, dy * centred)
            # divide_no_nan: a graph may move the constant of a plain division into the sums, depending on N
            offset = tf.math.divide_no_nan(group_mean(scale * sum_dy), rows)  # [N, 1, G, 1]
            slope = tf.math.divide_no_nan(group_mean(scale * sum_dy_centred) * tf.square(inverse_std), rows)
            with tf.control_dependencies([slope, offset]):  # dy is last used here, so the product can take its memory
                dx = dy * wide_scale - wide(offset)
            dx -= centred * wide(slope)
            dgamma = tf.reduce_sum(sum_dy_centred * inverse_std, axis=[0, 1])
            dbeta = tf.reduce_sum(sum_dy, axis=[0, 1])
            return dx, dgamma, dbeta

        return y, gradient

    return normalize(x, tf.reshape(gamma, [groups, size]), tf.reshape(beta, [groups, size]))


def _over_rows(reduce, values, divisor):
    """Reduce the rows of [N, rows, columns], in an order that does not depend on N; `divisor` divides columns.

    TensorFlow adds up to LANES neighbouring columns at once. If these span two examples, the order in which it adds 16
    or more rows can change with N. Padding the columns with zeros to a multiple of LANES prevents this.
    """
    if values.shape[1] in range(16) or divisor % LANES == 0:
        return reduce(values, axis=1)
    columns = _dynamic_shape(values)[2]
    return reduce(tf.pad(values, [[0, 0], [0, 0], [0, -columns % LANES]]), axis=1)[:, :columns]


def _fold(positions, channels):
    """Return how many positions share a row, so that [N, P, C] becomes [N, P / fold, fold * C].

    fold is a power of 2 that divides P. As far as P allows, rows have more than 64 values (broadcasting over shorter
    rows is slow; at least 128 if C is a power of 2), and columns fewer than 2048 (longer sums lose digits in float32).
    """
    if isinstance(positions, int):
        return math.gcd(positions, 1 << (max(128 // channels, positions // 1024, 1) - 1).bit_length())
    powers = tf.constant([1 << i for i in range(31)])  # the same where P is a tensor
    fits = (powers < 2 * tf.maximum(positions // 1024, max(128 // channels, 1))) & (positions % powers == 0)
    return tf.reduce_max(tf.where(fits, powers, 1))


def batch_norm(
    x: tf.Tensor,
    gamma: tf.Tensor | None,
    beta: tf.Tensor | None,
    moving_mean: tf.Tensor,
    moving_variance: tf.Tensor,
    training: bool,
    momentum: float = 0.9,
    epsilon: float = EPSILON,
    data_format: str = "channels_last",
    synchronized: bool = False,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Normalize each channel over the batch (arXiv 1502.03167, algorithms 1 and 2).

    Training uses the mean and variance of the batch, inference moving_mean and moving_variance. The function is pure:
    it returns the new moving statistics for the caller to store.

    Args:
        x: [N, ..., C] (or [N, C, ...] with 'channels_first'), rank 2 to 5, any float type. Only C must be static.
        gamma, beta: [C] scale and offset; None means 1 and 0.
        moving_mean, moving_variance: [C], float32 (float64 if x is).
        training: Python bool: normalize by the batch, or by the moving statistics.
        momentum: new statistics = momentum * old + (1 - momentum) * batch.
        epsilon: added to the variance.
        data_format: 'channels_last' or 'channels_first'.
        synchronized: in training inside tf.distribute.Strategy.run, take the statistics over the batches of all
            replicas, which must be equally large.

    Returns:
        (y, new_moving_mean, new_moving_variance); without training the statistics are unchanged. x is normalized by
        the biased variance of the batch (over the m values per channel); the moving variance follows the unbiased
        one (over m - 1). An empty batch leaves the moving statistics unchanged.

    Raises:
        ValueError: if C is unknown, or if in training the static shape has a single value per channel.
    """
    x = tf.convert_to_tensor(x)
    axis = _channel_axis(x, data_format)
    count = math.prod(2 if size is None else size for i, size in enumerate(x.shape) if i != axis)
    if training and count == 1 and not synchronized:
        raise ValueError(f"batch_norm: the shape {x.shape} has 1 value per channel; use a larger batch, or group_norm")
    if axis != x.shape.rank - 1:
        x = tf.experimental.numpy.moveaxis(x, axis, -1)
    gamma, beta, dtype = _affine(x, -1, gamma, beta)
    shape = _dynamic_shape(x)
    positions = tf.reshape(x, [shape[0], math.prod(shape[1:-1]), 1, shape[-1]])
    arguments = gamma, beta, tf.cast(moving_mean, dtype), tf.cast(moving_variance, dtype), training, momentum, epsilon
    synchronized = synchronized and training
    if synchronized or dtype == tf.float64 or _compiled_by_xla():
        y, moving_mean, moving_variance = _batch_norm_by_moments(tf.cast(positions, dtype), *arguments, synchronized)
    else:
        y, moving_mean, moving_variance = _batch_norm_fused(positions, *arguments)
    if training and not positions.shape.num_elements():  # unknown, or 0
        moving_mean, moving_variance = (
            tf.where(tf.size(x) > 0, new, old) for new, old in zip((moving_mean, moving_variance), arguments[2:4])
        )
    y = tf.cast(tf.reshape(y, shape), x.dtype)
    if axis != x.shape.rank - 1:
        y = tf.experimental.numpy.moveaxis(y, -1, axis)
    return y, moving_mean, moving_variance


def _compiled_by_xla():
    """Return whether XLA will compile this graph. Its fused kernel computes E[x^2] - E[x]^2, which loses digits.

    The public API cannot tell; TensorFlow's own operations call this function.
    """
    return control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


def _batch_norm_fused(x, gamma, beta, moving_mean, moving_variance, training, momentum, epsilon):
    """batch_norm of x [N, positions, 1, C] by TensorFlow's fused kernel, which also updates the statistics."""
    y, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
        x=x,
        scale=gamma,
        offset=beta,
        mean=moving_mean,
        variance=moving_variance,
        epsilon=epsilon,
        exponential_avg_factor=1.0 - momentum,
        is_training=training,
    )
    return (y, mean, variance) if training else (y, moving_mean, moving_variance)


def _batch_norm_by_moments(x, gamma, beta, moving_mean, moving_variance, training, momentum, epsilon, synchronized):
    """batch_norm by its definition: for float64, for XLA, and over the batches of all replicas."""
    mean, variance = moving_mean, moving_variance
    if training:
        count = tf.cast(tf.size(x) // tf.size(mean), x.dtype)
        mean, variance = moments(x, [0, 1, 2])
        if synchronized:
            mean, variance, replicas = _moments_of_replicas(mean, variance)
            count *= replicas
        unbiased = variance * count / tf.maximum(count - 1, 1)
        moving_mean = momentum * moving_mean + (1 - momentum) * mean
        moving_variance = momentum * moving_variance + (1 - momentum) * unbiased
    return (x - mean) * (gamma * tf.math.rsqrt(variance + epsilon)) + beta, moving_mean, moving_variance


def moments(x, axes):
    """Return mean and variance over `axes`, as tf.nn.moments does, but with correct second derivatives."""
    mean = tf.reduce_mean(x, axes)
    return mean, tf.reduce_mean(tf.square(x - mean), axes)


def _moments_of_replicas(mean, variance):
    """Return mean and variance [C] over all replicas, given those of this replica, and the number of replicas.

    By the law of total variance, the variance is the mean of the variances plus the variance of the means;
    E[x^2] - E[x]^2 would lose all digits at mean >> std. One all-reduce, which has a gradient, shares all moments.
    """
    replica = tf.distribute.get_replica_context()
    number = replica.num_replicas_in_sync
    row = tf.one_hot(replica.replica_id_in_sync_group, number, dtype=mean.dtype)  # all_gather would lose the shape
    mine = row[:, tf.newaxis, tf.newaxis] * tf.stack([mean, variance])
    means, variances = tf.unstack(replica.all_reduce(tf.distribute.ReduceOp.SUM, mine), axis=1)
    mean, between = moments(means, [0])
    return mean, tf.reduce_mean(variances, 0) + between, number


def check_groups(shape: tuple, axis: int, groups: int) -> None:
    """Raise ValueError unless groups divides the static channels shape[axis] and leaves 2 values per group."""
    channels = shape[axis]
    if not isinstance(groups, numbers.Integral) or groups < 1 or channels % groups:
        raise ValueError(f"{channels} channels cannot be split into {groups} groups; use one of {divisors(channels)}")
    sizes = [size for i, size in enumerate(shape) if i not in (0, axis)]
    if None not in sizes and math.prod(sizes) * channels == groups:
        raise ValueError(f"groups of a single value become 0: use fewer than {groups} groups, or more pixels")


def divisors(number: int) -> str:
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)


def _channel_axis(x, data_format):
    if data_format not in ("channels_last", "channels_first"):
        raise ValueError(f"data_format must be 'channels_last' or 'channels_first', not {data_format!r}")
    if x.shape.rank is None or not 2 <= x.shape.rank <= 5:
        raise ValueError(f"x must have rank 2 to 5, [N, ..., C] or [N, C, ...], but its shape is {x.shape}")
    if not x.dtype.is_floating:
        raise ValueError(f"x must be of a float type, not {x.dtype.name}")
    axis = x.shape.rank - 1 if data_format == "channels_last" else 1
    if x.shape[axis] is None:
        raise ValueError(f"the number of channels must be known, but the shape is {x.shape}")
    return axis


def _affine(x, axis, gamma, beta):
    """Return gamma and beta as [C] tensors of the statistics' dtype, and this dtype."""
    dtype = tf.float64 if x.dtype == tf.float64 else tf.float32
    channels = x.shape[axis]
    gamma = tf.ones([channels], dtype) if gamma is None else tf.cast(gamma, dtype)
    beta = tf.zeros([channels], dtype) if beta is None else tf.cast(beta, dtype)
    for name, value in (("gamma", gamma), ("beta", beta)):
        if not value.shape.is_compatible_with([channels]):
            raise ValueError(f"{name} must have the shape ({channels},), one value per channel, not {value.shape}")
    return gamma, beta, dtype


def _dynamic_shape(x):
    """Return the shape as a list of Python numbers, with tensors for unknown sizes."""
    sizes = tf.shape(x) if None in x.shape else None
    return [sizes[i] if size is None else size for i, size in enumerate(x.shape)]


class _Float32Norm:
    """A base class that checks the axis, and keeps weights and statistics in float32 (float64 under that policy)
    whatever the layer's compute dtype; inputs are not rounded to the compute dtype first."""

    def build(self, input_shape):
        last = self.channel_axis(input_shape) == len(input_shape) - 1
        self.data_format = "channels_last" if last else "channels_first"
        super().build(input_shape)

    def channel_axis(self, input_shape):
        """Return the axis of the channels, counted from 0; ValueError if it is not supported or its size unknown."""
        rank = len(input_shape)
        axis = self.axis + rank if self.axis < 0 else self.axis
        if axis not in (1, rank - 1):
            raise ValueError(f"axis must be 1 or -1 (the last), not {self.axis}, for an input of {tuple(input_shape)}")
        if input_shape[axis] is None:
            raise ValueError(f"the number of channels must be known, but the input's shape is {tuple(input_shape)}")
        return axis

    def add_weight(self, **arguments):
        return super().add_weight(**arguments, dtype="float64" if self.compute_dtype == "float64" else "float32")

    def cast_inputs(self, inputs):
        """Cast to float32 (float64 under that policy), but keep float16 and bfloat16: the norms accept these."""
        inputs = tf.convert_to_tensor(inputs)
        half = inputs.dtype in (tf.float16, tf.bfloat16) and self.compute_dtype != "float64"
        return tf.cast(inputs, self.variable_dtype) if inputs.dtype.is_floating and not half else inputs


@keras.saving.register_keras_serializable("group_norm")
class GroupNorm(_Float32Norm, keras.layers.GroupNormalization):
    """group_norm as a layer, with the arguments of keras.layers.GroupNormalization (but epsilon defaults to 1e-5).

    Input and output: [N, ..., C], rank 2 to 5, or [N, C, ...] with axis=1. groups=-1 makes each channel a group.
    """

    def __init__(self, groups=32, axis=-1, epsilon=EPSILON, **arguments):
        super().__init__(groups, axis, epsilon, **arguments)

    def build(self, input_shape):
        axis = self.channel_axis(input_shape)
        check_groups(tuple(input_shape), axis, input_shape[axis] if self.groups == -1 else self.groups)
        super().build(input_shape)

    def call(self, inputs):
        inputs = self.cast_inputs(inputs)
        y = group_norm(inputs, self.gamma, self.beta, self.groups, self.epsilon, self.data_format)
        return tf.cast(y, self.compute_dtype)


@keras.saving.register_keras_serializable("group_norm")
class BatchNorm(_Float32Norm, keras.layers.BatchNormalization):
    """batch_norm as a layer, with the arguments of keras.layers.BatchNormalization (but epsilon defaults to 1e-5).

    Input and output: [N, ..., C], rank 2 to 5, or [N, C, ...] with axis=1. The statistics are taken over the batch of
    this replica, as in arXiv 1803.08494, or with synchronized=True over the batches of all replicas.
    """

    def __init__(self, axis=-1, momentum=0.99, epsilon=EPSILON, **arguments):
        super().__init__(axis, momentum, epsilon, **arguments)
        if self.renorm:
            raise ValueError("renorm=True is not supported: use keras.layers.BatchNormalization")
        self.autocast, self.supports_masking = False, False
        self.freeze_statistics = False  # True: use the moving statistics in training too
        self.use_batch_statistics = False  # True: use the batch, and update the moving statistics, in inference too

    def call(self, inputs, training=False):
        training = bool(training) and self.trainable and not self.freeze_statistics
        training = training or self.use_batch_statistics
        y, moving_mean, moving_variance = batch_norm(
            self.cast_inputs(inputs),
            self.gamma,
            self.beta,
            self.moving_mean,
            self.moving_variance,
            training,
            self.momentum,
            self.epsilon,
            self.data_format,
            self.synchronized and replicas_in_sync() > 1,
        )
        if training:
            self.moving_mean.assign(moving_mean)
            self.moving_variance.assign(moving_variance)
        return tf.cast(y, self.compute_dtype)


def replicas_in_sync():
    """Return the number of replicas; 1 outside tf.distribute.Strategy.run."""
    replica = tf.distribute.get_replica_context()
    return 1 if replica is None else replica.num_replicas_in_sync
