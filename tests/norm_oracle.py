"""What tests of the norms compare with: the definitions, in float64, with gradients by the chain rule.

The oracle walks over the sets of values that the papers normalize together, one by one, and takes the gradient by the
chain rule of arXiv 1502.03167 (section 3), not by the closed form that ops.py uses.
"""

import numpy as np
import tensorflow as tf

# (shape, channels last; groups): every rank, odd sizes, a single group, a group for each channel, a single channel
GROUP_CASES = [
    ((4, 6), 1),
    ((4, 6), 2),
    ((5, 7), 1),
    ((3, 5, 6), 3),
    ((2, 5, 7), 7),
    ((3, 4, 1), 1),
    ((2, 5, 3, 12), 4),
    ((1, 7, 5, 9), 3),
    ((2, 7, 5, 9), 9),
    ((2, 7, 5, 9), 1),
    ((3, 1, 1, 8), 4),
    ((2, 19, 17, 64), 32),
    ((2, 16, 8, 6), 3),
    ((2, 4, 16, 16), 8),
    ((2, 3, 4, 5, 8), 2),
    ((2, 2, 3, 3, 5), 5),
    ((1, 3, 2, 5, 6), 1),
]
BATCH_SHAPES = [(5, 7), (2, 3), (3, 5, 6), (2, 5, 3, 12), (1, 7, 5, 9), (9, 1, 1, 4), (2, 3, 4, 5, 3)]
FORMATS = ["channels_last", "channels_first"]

# A result may be off by this many units in the last place of the largest value that enters its sums: sums of up to
# 10,000 terms, and group sets of as few as 2 values, whose gradient is a difference of equal numbers.
ROUNDINGS = 64


def group_sets(shape, groups):
    """Index tuples of the values of [N, ..., C] that group norm normalizes together: arXiv 1803.08494, equation 7."""
    size = shape[-1] // groups
    return [(n, ..., slice(g * size, (g + 1) * size)) for n in range(shape[0]) for g in range(groups)]


def batch_sets(shape):
    """Index tuples of the values of [N, ..., C] that batch norm normalizes together: one set for each channel."""
    return [(..., slice(c, c + 1)) for c in range(shape[-1])]


def oracle(x, gamma, beta, dy, sets, epsilon=1e-5):
    """y, dx, dgamma and dbeta in float64 for x [N, ..., C], and how large the terms are of which dx is the sum."""
    x, gamma, beta, dy = (np.asarray(value, np.float64) for value in (x, gamma, beta, dy))
    xhat, dx, terms = np.zeros_like(x), np.zeros_like(x), 0.0
    for values in sets:
        m = x[values].size
        mu = x[values].sum() / m
        var = ((x[values] - mu) ** 2).sum() / m
        std = np.sqrt(var + epsilon)
        xhat[values] = (x[values] - mu) / std
        dxhat = (dy * gamma)[values]
        dvar = (dxhat * (x[values] - mu)).sum() * -0.5 * (var + epsilon) ** -1.5
        dmu = -dxhat.sum() / std - dvar * 2 * (x[values] - mu).sum() / m
        dx[values] = dxhat / std + dvar * 2 * (x[values] - mu) / m + dmu / m
        terms = max(terms, np.abs(dxhat).max() / std)
    others = tuple(range(x.ndim - 1))
    return {
        "y": xhat * gamma + beta,
        "dx": dx,
        "dgamma": (dy * xhat).sum(others),
        "dbeta": dy.sum(others),
        "terms": terms,
    }


def random_case(shape, dtype, seed=0):
    """x, gamma, beta and dy for [N, ..., C], none of them with mean 0 or size 1, as arrays of dtype."""
    rng = np.random.default_rng(seed)
    channels = shape[-1]
    arrays = (
        rng.normal(0.5, 2.0, shape),
        rng.normal(1.0, 0.5, channels),
        rng.normal(0.3, 0.5, channels),
        rng.normal(0.2, 1.0, shape),
    )
    return [array.astype(dtype) for array in arrays]


def to_format(array, data_format):
    """[N, ..., C] → data_format."""
    return np.moveaxis(array, -1, 1) if data_format == "channels_first" else array


def from_format(array, data_format):
    """data_format → [N, ..., C]."""
    return np.moveaxis(np.asarray(array), 1, -1) if data_format == "channels_first" else np.asarray(array)


def run_with_gradients(function, x, gamma, beta, dy, data_format="channels_last"):
    """The results of function(x, gamma, beta), with channels last again, as the oracle returns them."""
    x, gamma, beta = tf.constant(to_format(x, data_format)), tf.constant(gamma), tf.constant(beta)
    with tf.GradientTape() as tape:
        tape.watch([x, gamma, beta])
        y = function(x, gamma, beta)
    dx, dgamma, dbeta = tape.gradient(y, [x, gamma, beta], output_gradients=tf.constant(to_format(dy, data_format)))
    assert y.dtype == x.dtype and y.shape == x.shape
    return {
        "y": from_format(y, data_format),
        "dx": from_format(dx, data_format),
        "dgamma": dgamma.numpy(),
        "dbeta": dbeta.numpy(),
    }


def assert_close(actual, expected, dtype):
    """Compare element by element what run_with_gradients and oracle return."""
    scale = {
        "y": np.abs(expected["y"]).max(),
        "dx": expected["terms"],
        "dgamma": np.abs(expected["dgamma"]).max() + 1,
        "dbeta": np.abs(expected["dbeta"]).max() + 1,
    }
    for name, size in scale.items():
        assert actual[name].dtype == dtype, name
        error = np.abs(actual[name] - expected[name])
        assert error.shape == expected[name].shape, name
        assert error.max() <= ROUNDINGS * np.finfo(dtype).eps * size, f"{name} is off by {error.max():.3g}"


def gradients_of_cube(function, arguments):
    """All first derivatives of sum(function(*arguments)^3) as one vector."""
    with tf.GradientTape() as tape:
        tape.watch(arguments)
        loss = tf.reduce_sum(function(*arguments) ** 3)
    return tf.concat([tf.reshape(gradient, [-1]) for gradient in tape.gradient(loss, arguments)], 0)
