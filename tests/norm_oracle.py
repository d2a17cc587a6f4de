"""What tests of the norms compare with: the definitions in float64, over one set after another of the values that the
papers normalize together, and gradients by the chain rule of arXiv 1502.03167 (section 3), not by a closed form."""

import numpy as np
import tensorflow as tf

import ops

# (shape, channels last; groups): ranks 2 to 5, odd sizes, one group, a group for each channel, one channel, no example
GROUP_CASES = [((4, 6), 1), ((4, 6), 2), ((5, 7), 1), ((3, 5, 6), 3), ((2, 5, 7), 7), ((3, 4, 1), 1)]
GROUP_CASES += [((2, 5, 3, 12), 4), ((1, 7, 5, 9), 3), ((2, 7, 5, 9), 9), ((2, 7, 5, 9), 1), ((3, 1, 1, 8), 4)]
GROUP_CASES += [((2, 19, 17, 64), 32), ((2, 16, 8, 6), 3), ((2, 4, 16, 16), 8), ((2, 3, 4, 5, 8), 2)]
GROUP_CASES += [((2, 2, 3, 3, 5), 5), ((1, 3, 2, 5, 6), 1), ((0, 12), 4), ((0, 5, 3, 12), 4)]
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


def sets_of(norm_type, shape, groups=2):
    """Index tuples of the values of [N, ..., C] that a norm normalizes together."""
    return batch_sets(shape) if norm_type == "batch" else group_sets(shape, groups)


def norm_of(norm_type, channels, groups=2, **options):
    """A norm as a function of x, gamma and beta: "group", "batch" in training, or "inference", batch norm without."""
    if norm_type in ("batch", "inference"):
        moving = np.linspace(-1, 1, channels), np.linspace(0.5, 3, channels)
        return lambda *args: ops.batch_norm(*args, *moving, norm_type == "batch", **options)[0]
    return lambda *args: ops.group_norm(*args, groups, **options)


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
    rest = tuple(range(x.ndim - 1))
    sums = {"dgamma": (dy * xhat).sum(rest), "dbeta": dy.sum(rest)}
    return {"y": xhat * gamma + beta, "dx": dx, "terms": terms} | sums


def random_case(shape, dtype):
    """x, gamma, beta and dy for [N, ..., C], none of them with mean 0 or size 1, as arrays of dtype."""
    rng, channels = np.random.default_rng(0), shape[-1]
    moments = (0.5, 2.0, shape), (1.0, 0.5, channels), (0.3, 0.5, channels), (0.2, 1.0, shape)
    return [rng.normal(*each).astype(dtype) for each in moments]


def to_format(array, data_format):
    return np.moveaxis(array, -1, 1) if data_format == "channels_first" else array


def from_format(array, data_format):
    return np.moveaxis(np.asarray(array), 1, -1) if data_format == "channels_first" else np.asarray(array)


def run_with_gradients(function, x, gamma, beta, dy, data_format="channels_last"):
    """The results of function(x, gamma, beta), with channels last again, as the oracle returns them."""
    arguments = [tf.constant(value) for value in (to_format(x, data_format), gamma, beta)]
    with tf.GradientTape() as tape:
        tape.watch(arguments)
        y = function(*arguments)
    assert y.dtype == arguments[0].dtype and y.shape == arguments[0].shape
    dx, dgamma, dbeta = tape.gradient(y, arguments, output_gradients=tf.constant(to_format(dy, data_format)))
    y, dx = (from_format(value, data_format) for value in (y, dx))
    return {"y": y, "dx": dx, "dgamma": dgamma.numpy(), "dbeta": dbeta.numpy()}


def assert_close(actual, expected, dtype):
    """Compare element by element what run_with_gradients and oracle return."""
    scale = {"y": np.abs(expected["y"]).max(initial=0), "dx": expected["terms"]}
    scale |= {name: np.abs(expected[name]).max() + 1 for name in ("dgamma", "dbeta")}
    for name, size in scale.items():
        assert actual[name].dtype == dtype, name
        allowed = ROUNDINGS * np.finfo(dtype).eps * size
        np.testing.assert_allclose(actual[name], expected[name], rtol=0, atol=allowed, err_msg=name)


def gradients_of_cube(function, arguments):
    """All first derivatives of sum(function(*arguments)^3) as one vector."""
    with tf.GradientTape() as tape:
        tape.watch(arguments)
        loss = tf.reduce_sum(function(*arguments) ** 3)
    return tf.concat([tf.reshape(gradient, [-1]) for gradient in tape.gradient(loss, arguments)], 0)


def assert_second_derivatives(function, arrays, dtype="float64", in_graph=False):
    """The gradient can be derived again by every argument: the product of all second derivatives with a direction is
    the gradient's central difference along it, in float64."""
    rng = np.random.default_rng(1)
    directions = [rng.normal(size=array.shape) for array in arrays]
    above, below = (
        gradients_of_cube(function, [tf.constant(array + step * d) for array, d in zip(arrays, directions)])
        for step in (1e-5, -1e-5)
    )
    expected = (above - below) / 2e-5

    def product(*arguments):
        with tf.GradientTape() as tape:
            tape.watch(arguments)
            first = gradients_of_cube(function, list(arguments))
            along = tf.reduce_sum(first * tf.concat([tf.constant(d.ravel(), dtype) for d in directions], 0))
        return tf.concat([tf.reshape(gradient, [-1]) for gradient in tape.gradient(along, arguments)], 0)

    actual = (tf.function(product) if in_graph else product)(*(tf.constant(array, dtype) for array in arrays))
    roundings = 1e-8 if dtype == "float64" else ROUNDINGS * 2.0**-23  # 1e-8 is what a central difference leaves
    np.testing.assert_allclose(actual, expected, rtol=0, atol=roundings * np.abs(expected).max())
