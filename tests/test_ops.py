"""ops.py: the norms against float64 formulas of our own, and the layers and building blocks on them.

    python -m pytest tests/test_ops.py

The oracle walks over the sets of values that the papers normalize together, one by one, in float64, and takes the
gradient by the chain rule of arXiv 1502.03167 (section 3), not by the closed form that ops.py uses.
"""
import functools
import inspect
import math

import keras
import numpy as np
import pytest
import tensorflow as tf

import model as models
import ops

# (shape, channels last; groups): every rank, odd sizes, a single group, a group for each channel, a single channel
GROUP_CASES = [((4, 6), 1), ((4, 6), 2), ((5, 7), 1), ((3, 5, 6), 3), ((2, 5, 7), 7), ((3, 4, 1), 1),
               ((2, 5, 3, 12), 4), ((1, 7, 5, 9), 3), ((2, 7, 5, 9), 9), ((2, 7, 5, 9), 1), ((3, 1, 1, 8), 4),
               ((2, 19, 17, 64), 32), ((2, 16, 8, 6), 3), ((2, 4, 16, 16), 8), ((2, 3, 4, 5, 8), 2),
               ((2, 2, 3, 3, 5), 5), ((1, 3, 2, 5, 6), 1)]
BATCH_SHAPES = [(5, 7), (2, 3), (3, 5, 6), (2, 5, 3, 12), (1, 7, 5, 9), (9, 1, 1, 4), (2, 3, 4, 5, 3)]
FORMATS = ["channels_last", "channels_first"]

# A result may be off by this many units in the last place of the largest value that enters its sums: sums of up to
# 10,000 terms, and group sets of as few as 2 values, whose gradient is a difference of equal numbers.
ROUNDINGS = 64


# -------------------------------------------------------------------------------------------------- the oracle


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
    return {"y": xhat * gamma + beta, "dx": dx, "dgamma": (dy * xhat).sum(others), "dbeta": dy.sum(others),
            "terms": terms}


def random_case(shape, dtype, seed=0):
    """x, gamma, beta and dy for [N, ..., C], none of them with mean 0 or size 1, as arrays of dtype."""
    rng = np.random.default_rng(seed)
    channels = shape[-1]
    arrays = (rng.normal(0.5, 2.0, shape), rng.normal(1.0, 0.5, channels), rng.normal(0.3, 0.5, channels),
              rng.normal(0.2, 1.0, shape))
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
    return {"y": from_format(y, data_format), "dx": from_format(dx, data_format), "dgamma": dgamma.numpy(),
            "dbeta": dbeta.numpy()}


def assert_close(actual, expected, dtype):
    """Compare element by element what run_with_gradients and oracle return."""
    scale = {"y": np.abs(expected["y"]).max(), "dx": expected["terms"], "dgamma": np.abs(expected["dgamma"]).max() + 1,
             "dbeta": np.abs(expected["dbeta"]).max() + 1}
    for name, size in scale.items():
        assert actual[name].dtype == dtype, name
        error = np.abs(actual[name] - expected[name])
        assert error.shape == expected[name].shape, name
        assert error.max() <= ROUNDINGS * np.finfo(dtype).eps * size, f"{name} is off by {error.max():.3g}"


@pytest.mark.parametrize("sets", [group_sets((2, 3, 6), 2), group_sets((2, 3, 6), 6), batch_sets((2, 3, 6))])
def test_oracle_agrees_with_numerical_differentiation(sets):
    """The oracle itself is right: every derivative of sum(y * dy) equals a central difference."""
    x, gamma, beta, dy = random_case((2, 3, 6), np.float64)
    exact = oracle(x, gamma, beta, dy, sets)
    for name, array in (("dx", x), ("dgamma", gamma), ("dbeta", beta)):
        for index in np.ndindex(array.shape):
            value, step = array[index], 1e-5
            array[index] = value + step
            above = (oracle(x, gamma, beta, dy, sets)["y"] * dy).sum()
            array[index] = value - step
            below = (oracle(x, gamma, beta, dy, sets)["y"] * dy).sum()
            array[index] = value
            # a central difference is off by step^2 times a third derivative, here below 10
            assert abs((above - below) / (2 * step) - exact[name][index]) < 1e-8, (name, index)


# -------------------------------------------------------------------------------------------------- group norm


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape, groups", GROUP_CASES)
def test_group_norm_is_the_formula(shape, groups, dtype, data_format):
    """Output and all three gradients are those of the paper's equations, in either layout, at ranks 2 to 5."""
    case = random_case(shape, dtype)
    actual = run_with_gradients(lambda *args: ops.group_norm(*args, groups, data_format=data_format), *case,
                                data_format)
    assert_close(actual, oracle(*case, group_sets(shape, groups)), dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_group_norm_in_a_graph_is_the_formula(dtype):
    """Inside tf.function, where models run, output and gradients are the same formula."""
    shape, groups = (3, 5, 4, 12), 4
    case = random_case(shape, dtype)
    actual = run_with_gradients(tf.function(lambda *args: ops.group_norm(*args, groups)), *case)
    assert_close(actual, oracle(*case, group_sets(shape, groups)), dtype)


def test_group_norm_epsilon_counts():
    """Epsilon is added to the variance, is 1e-5 unless given, and is not lost where the variance is small."""
    shape, groups = (2, 3, 3, 4), 2
    x, gamma, beta, dy = random_case(shape, np.float64)
    x *= 1e-3                                   # variance 4e-6, the size of epsilon
    for kwargs, epsilon in (({}, 1e-5), ({"epsilon": 1e-3}, 1e-3), ({"epsilon": 1e-7}, 1e-7)):
        actual = run_with_gradients(lambda *args, kwargs=kwargs: ops.group_norm(*args, groups, **kwargs), x, gamma,
                                    beta, dy)
        assert_close(actual, oracle(x, gamma, beta, dy, group_sets(shape, groups), epsilon), "float64")


def test_group_norm_takes_32_groups_unless_told():
    """The paper's G = 32 is the default."""
    x, gamma, beta, _ = random_case((2, 3, 3, 64), np.float32)
    np.testing.assert_array_equal(ops.group_norm(x, gamma, beta), ops.group_norm(x, gamma, beta, 32))


@pytest.mark.parametrize("function", [lambda x, g, b: ops.group_norm(x, g, b, 3),
                                      lambda x, g, b: ops.batch_norm(x, g, b, tf.zeros(6), tf.ones(6), True)[0],
                                      lambda x, g, b: ops.batch_norm(x, g, b, tf.zeros(6), tf.ones(6), False)[0]])
def test_gamma_and_beta_may_be_left_out(function):
    """None for gamma is a scale of 1, None for beta an offset of 0."""
    x, gamma, beta, _ = random_case((4, 3, 5, 6), np.float32)
    ones, zeros = np.ones_like(gamma), np.zeros_like(beta)
    np.testing.assert_array_equal(function(x, None, beta), function(x, ones, beta))
    np.testing.assert_array_equal(function(x, gamma, None), function(x, gamma, zeros))
    np.testing.assert_array_equal(function(x, None, None), function(x, ones, zeros))


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("shape", [(3, 12), (3, 5, 12), (3, 5, 4, 12), (3, 2, 5, 4, 12)])
def test_groups_channels_and_examples_never_mix(shape, data_format):
    """A huge offset on one group of one example changes nothing elsewhere (tensorflow/addons#751: it did)."""
    x, gamma, beta, dy = random_case(shape, np.float32)
    groups, size = 4, 3

    def results(x):
        return run_with_gradients(lambda *args: ops.group_norm(*args, groups, data_format=data_format), x, gamma,
                                  beta, dy, data_format)

    plain = results(x)
    for g in range(groups):
        moved = x.copy()
        moved[1, ..., g * size:(g + 1) * size] += 1e6
        elsewhere = np.ones(shape, bool)
        elsewhere[1, ..., g * size:(g + 1) * size] = False
        changed = results(moved)
        for name in ("y", "dx"):
            np.testing.assert_array_equal(changed[name][elsewhere], plain[name][elsewhere])
            assert (changed[name][~elsewhere] != plain[name][~elsewhere]).any()


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("shape", [(3, 5, 12), (3, 5, 4, 12), (2, 2, 5, 4, 12)])
def test_layer_and_instance_norm_are_the_extremes(shape, data_format):
    """Layer norm is one group, instance norm a group for each channel (arXiv 1803.08494, section 3)."""
    x, gamma, beta, dy = random_case(shape, np.float32)
    for function, groups in ((ops.layer_norm, 1), (ops.instance_norm, 12)):
        case = (x, gamma, beta, dy)
        actual = run_with_gradients(lambda *args, f=function: f(*args, data_format=data_format), *case, data_format)
        assert_close(actual, oracle(*case, group_sets(shape, groups)), "float32")


@pytest.mark.parametrize("function", [ops.layer_norm, ops.instance_norm])
def test_layer_and_instance_norm_pass_epsilon_on(function):
    """Their epsilon is used and is 1e-5 by default."""
    x, gamma, beta, dy = random_case((2, 3, 4, 6), np.float64)
    x *= 1e-3
    sets = group_sets(x.shape, 1 if function is ops.layer_norm else 6)
    for args, epsilon in (((), 1e-5), ((1e-3,), 1e-3)):
        expected = oracle(x, gamma, beta, dy, sets, epsilon)["y"]
        np.testing.assert_allclose(function(x, gamma, beta, *args), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("shape, groups, axis", [((2, 5, 3, 12), 4, -1), ((2, 12, 5, 3), 4, 1), ((3, 7, 8), 8, -1),
                                                 ((4, 6), 2, -1), ((2, 3, 4, 5, 6), 1, -1)])
def test_group_norm_agrees_with_keras(shape, groups, axis):
    """Where keras.layers.GroupNormalization is right, with epsilon 1e-5, the results are the same."""
    rng = np.random.default_rng(0)
    x = rng.normal(0.5, 2.0, shape).astype("float32")
    theirs = keras.layers.GroupNormalization(groups, axis=axis, epsilon=1e-5)
    theirs.build(shape)
    theirs.set_weights([rng.normal(1, 0.5, shape[axis]), rng.normal(0, 0.5, shape[axis])])
    y = ops.group_norm(x, *theirs.get_weights(), groups,
                       data_format="channels_last" if axis == -1 else "channels_first")
    np.testing.assert_allclose(y, theirs(x), rtol=0, atol=5e-6)       # outputs of size 5, about 10 float32 roundings


@pytest.mark.parametrize("shape, groups", [((4, 16, 16, 64), 8), ((2, 32, 32, 32), 32), ((8, 8, 8, 32), 1)])
def test_large_mean_keeps_its_digits(shape, groups):
    """Mean 1000, std 1: E[x^2] - E[x]^2 loses everything (pytorch#54293); the error stays near that of Keras."""
    x = (1000 + np.random.default_rng(0).normal(size=shape)).astype("float32")
    ones, zeros = np.ones(shape[-1], "float32"), np.zeros(shape[-1], "float32")
    exact = oracle(x, ones, zeros, np.zeros(shape), group_sets(shape, groups))["y"]
    ours = np.abs(ops.group_norm(x, ones, zeros, groups) - exact).max()
    keras_layer = keras.layers.GroupNormalization(groups, epsilon=1e-5)
    theirs = np.abs(keras_layer(x) - exact).max()
    assert ours < 1e-3
    assert ours <= 1.5 * theirs, f"{ours:.3g} against {theirs:.3g} of Keras"


@pytest.mark.parametrize("positions, channels, fold", [
    (1024, 16, 8), (256, 32, 4), (64, 64, 2), (49, 64, 1), (28 * 28, 16, 8), (6, 16, 2), (64, 128, 1),   # 128 a row
    (4096, 256, 4), (112 * 112, 64, 16), (65536, 3, 64), (16384, 1, 128), (1, 16, 1), (64, 512, 1)])    # 1024 a column
def test_positions_lie_side_by_side_where_rows_are_short_or_columns_long(positions, channels, fold):
    assert ops._fold(positions, channels) == fold


def test_large_images_do_not_depend_on_the_batch():
    """600x400x24 alone and in a batch of 3: the same output and gradient (tensorflow/addons#2745: they were not)."""
    rng = np.random.default_rng(0)
    x = rng.normal(0.5, 2.0, (3, 600, 400, 24)).astype("float32")
    dy = rng.normal(0.2, 1.0, x.shape).astype("float32")
    gamma, beta = rng.normal(1, 0.5, 24).astype("float32"), rng.normal(0, 0.5, 24).astype("float32")
    batch = run_with_gradients(lambda *args: ops.group_norm(*args, 8), x, gamma, beta, dy)
    alone = [run_with_gradients(lambda *args: ops.group_norm(*args, 8), x[i:i + 1], gamma, beta, dy[i:i + 1])
             for i in (0, 2)]
    for i, single in zip((0, 2), alone):
        for name in ("y", "dx"):
            assert np.abs(batch[name][i] - single[name][0]).max() <= 1e-6, name


@pytest.mark.parametrize("shape, groups", [((3, 32, 32, 16), 8), ((3, 28, 28, 64), 32), ((4, 16, 8, 48), 6)])
def test_an_example_is_the_same_in_every_batch(shape, groups):
    rng = np.random.default_rng(0)
    x, dy = rng.normal(0.5, 2.0, shape).astype("float32"), rng.normal(0.2, 1.0, shape).astype("float32")
    gamma, beta = rng.normal(1, 0.5, (2, shape[-1])).astype("float32")
    batch = run_with_gradients(lambda *args: ops.group_norm(*args, groups), x, gamma, beta, dy)
    alone = run_with_gradients(lambda *args: ops.group_norm(*args, groups), x[1:2], gamma, beta, dy[1:2])
    for name in ("y", "dx"):
        np.testing.assert_allclose(batch[name][1], alone[name][0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm_type, jit_compile", [("group", False), ("group", True), ("batch", False),
                                                    ("batch", True), ("layer", False), ("instance", False)])
@pytest.mark.parametrize("data_format", FORMATS)
def test_batch_height_and_width_may_be_unknown(norm_type, data_format, jit_compile):
    """One graph serves every batch size and image size, compiled or not (the ancestor's #1 and #8: it crashed)."""
    channels, zeros, ones = 6, np.zeros(6, "float32"), np.ones(6, "float32")
    signature = [None, None, None, channels] if data_format == "channels_last" else [None, channels, None, None]

    def function(x, gamma, beta):
        if norm_type == "batch":
            return ops.batch_norm(x, gamma, beta, zeros, ones, True, data_format=data_format)[0]
        if norm_type == "group":
            return ops.group_norm(x, gamma, beta, 3, data_format=data_format)
        return {"layer": ops.layer_norm, "instance": ops.instance_norm}[norm_type](x, gamma, beta,
                                                                                   data_format=data_format)

    @tf.function(input_signature=[tf.TensorSpec(signature), tf.TensorSpec([6]), tf.TensorSpec([6]),
                                  tf.TensorSpec(signature)], jit_compile=jit_compile)
    def step(x, gamma, beta, dy):
        with tf.GradientTape() as tape:
            tape.watch([x, gamma, beta])
            y = function(x, gamma, beta)
        return [y, *tape.gradient(y, [x, gamma, beta], output_gradients=dy)]

    groups = {"group": 3, "layer": 1, "instance": 6}.get(norm_type)
    for shape in ((2, 5, 3, channels), (1, 4, 7, channels), (5, 2, 2, channels)):
        x, gamma, beta, dy = random_case(shape, np.float32)
        y, dx, dgamma, dbeta = step(to_format(x, data_format), gamma, beta, to_format(dy, data_format))
        actual = {"y": from_format(y, data_format), "dx": from_format(dx, data_format), "dgamma": dgamma.numpy(),
                  "dbeta": dbeta.numpy()}
        sets = batch_sets(shape) if norm_type == "batch" else group_sets(shape, groups)
        assert_close(actual, oracle(x, gamma, beta, dy, sets), "float32")


@pytest.mark.parametrize("shape, in_graph", [((0, 12), False), ((0, 5, 12), False), ((0, 5, 3, 12), False),
                                             ((0, 5, 3, 12), True), ((0, 2, 5, 3, 12), False)])
def test_empty_batch_gives_an_empty_result(shape, in_graph):
    """No examples, as in the last shard of a split: no error, an empty output and gradients of 0."""
    x, gamma, beta, dy = random_case(shape, np.float32)
    functions = [lambda *args: ops.group_norm(*args, 4),
                 lambda *args: ops.batch_norm(*args, tf.zeros(12), tf.ones(12), False)[0]]
    for function in functions:
        actual = run_with_gradients(tf.function(function) if in_graph else function, x, gamma, beta, dy)
        assert actual["y"].shape == shape and actual["dx"].shape == shape
        np.testing.assert_array_equal(actual["dgamma"], np.zeros(12))
        np.testing.assert_array_equal(actual["dbeta"], np.zeros(12))


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("dtype, digits", [("float16", 11), ("bfloat16", 8)])
@pytest.mark.parametrize("norm_type", ["group", "batch"])
def test_half_precision_is_rounded_only_once(norm_type, dtype, digits, data_format):
    """Values near 1e4, whose sums overflow in float16: finite, and right but for the rounding of the output."""
    shape, zeros, ones = (4, 9, 7, 12), np.zeros(12, "float32"), np.ones(12, "float32")
    x, gamma, beta, dy = random_case(shape, np.float32)
    x, dy = (tf.cast(to_format(value, data_format), dtype) for value in (5e3 * x, dy))
    gamma, beta = tf.constant(gamma), tf.constant(beta)
    with tf.GradientTape() as tape:
        tape.watch([x, gamma, beta])
        y = (ops.group_norm(x, gamma, beta, 4, data_format=data_format) if norm_type == "group" else
             ops.batch_norm(x, gamma, beta, zeros, ones, True, data_format=data_format)[0])
    dx, dgamma, dbeta = tape.gradient(y, [x, gamma, beta], output_gradients=dy)
    assert y.dtype == dx.dtype == dtype and dgamma.dtype == dbeta.dtype == "float32"

    x, dy, y, dx = (from_format(tf.cast(value, tf.float64), data_format) for value in (x, dy, y, dx))
    exact = oracle(x, gamma, beta, dy, group_sets(shape, 4) if norm_type == "group" else batch_sets(shape))
    for name, actual in (("y", y), ("dx", dx), ("dgamma", dgamma.numpy()), ("dbeta", dbeta.numpy())):
        assert np.isfinite(actual).all(), name
        expected = exact[name]
        allowed = 1e-5 * max(np.abs(expected).max(), 1e-3)              # of float32 sums of 1,000 terms
        if name in ("y", "dx"):
            allowed = allowed + 2.0 ** -digits * np.abs(expected) + 2.0 ** -25      # and of subnormal float16
        assert (np.abs(actual - expected) <= allowed).all(), name


SECOND = {"group": lambda x, gamma, beta: ops.group_norm(x, gamma, beta, 2),
          "batch training": lambda *args: ops.batch_norm(*args, np.linspace(-1, 1, 4), np.full(4, 2.0), True)[0],
          "batch inference": lambda *args: ops.batch_norm(*args, np.linspace(-1, 1, 4), np.full(4, 2.0), False)[0]}


def gradients_of_cube(function, arguments):
    """All first derivatives of sum(function(*arguments)^3) as one vector."""
    with tf.GradientTape() as tape:
        tape.watch(arguments)
        loss = tf.reduce_sum(function(*arguments) ** 3)
    return tf.concat([tf.reshape(gradient, [-1]) for gradient in tape.gradient(loss, arguments)], 0)


@pytest.mark.parametrize("argument", [0, 1, 2])
@pytest.mark.parametrize("norm_type", SECOND)
def test_second_derivatives(norm_type, argument):
    """The gradient can be differentiated again, by x, gamma and beta, as gradient penalties need (float64)."""
    arguments = [tf.constant(array) for array in random_case((2, 2, 4), np.float64)[:3]]

    @tf.function
    def first(value):
        return gradients_of_cube(SECOND[norm_type], arguments[:argument] + [value] + arguments[argument + 1:])

    theoretical, numerical = tf.test.compute_gradient(first, [arguments[argument]], delta=1e-5)
    # derivatives of size 100 by central differences of step 1e-5
    np.testing.assert_allclose(theoretical[0], numerical[0], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("norm_type", ["group", "batch training"])
def test_second_derivatives_in_eager_mode(norm_type, dtype):
    """Nested tapes outside a graph, in the type that models use, give the derivative of the oracle's gradient."""
    x, gamma, beta, direction = random_case((2, 3, 2, 4), np.float64)
    sets = group_sets(x.shape, 2) if norm_type == "group" else batch_sets(x.shape)

    def exact_dx(x):
        y = oracle(x, gamma, beta, x, sets)["y"]
        return oracle(x, gamma, beta, 3 * y ** 2, sets)["dx"]

    expected = (exact_dx(x + 1e-5 * direction) - exact_dx(x - 1e-5 * direction)) / 2e-5
    x, gamma, beta, direction = (tf.constant(array, dtype) for array in (x, gamma, beta, direction))
    with tf.GradientTape() as outer:
        outer.watch(x)
        dx = gradients_of_cube(SECOND[norm_type], [x, gamma, beta])[:tf.size(x)]
        product = tf.reduce_sum(dx * tf.reshape(direction, [-1]))
    # of size 100, in float32 with ROUNDINGS, in float64 with what a central difference leaves
    np.testing.assert_allclose(outer.gradient(product, x), expected, rtol=0,
                               atol=np.abs(expected).max() * (ROUNDINGS * 2 ** -23 if dtype == "float32" else 1e-8))


# -------------------------------------------------------------------------------------------------- batch norm


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", BATCH_SHAPES)
def test_batch_norm_in_training_is_the_formula(shape, dtype, data_format):
    """Output and gradients, also through the statistics, are those of the batch."""
    case = random_case(shape, dtype)
    mean, variance = np.full(shape[-1], 7.0, dtype), np.full(shape[-1], 3.0, dtype)
    actual = run_with_gradients(
        lambda *args: ops.batch_norm(*args, mean, variance, True, data_format=data_format)[0], *case, data_format)
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
        lambda *args: ops.batch_norm(*args, mean, variance, False, data_format=data_format)[0], x, gamma, beta, dy,
        data_format)
    scale = 1 / np.sqrt(variance.astype("float64") + 1e-5)
    xhat, others = (x.astype("float64") - mean) * scale, tuple(range(len(shape) - 1))
    expected = {"y": xhat * gamma + beta, "dx": dy * (gamma * scale), "dgamma": (dy * xhat).sum(others),
                "dbeta": dy.sum(others, dtype="float64"), "terms": np.abs(dy * (gamma * scale)).max()}
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
            np.testing.assert_allclose(actual, momentum * old + (1 - momentum) * new, rtol=0,
                                       atol=ROUNDINGS * np.finfo(dtype).eps * np.abs(new).max())
    _, same_mean, same_variance = batch_norm(*arguments, training=False, data_format=data_format)
    np.testing.assert_array_equal(same_mean, mean)
    np.testing.assert_array_equal(same_variance, variance)
    for array, tensor in zip((x_in, gamma, beta, mean, variance), arguments):       # a pure function
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
    """Epsilon is 1e-5 unless given (fault 7: 1e-3 against 1e-5 for GN), in training and in inference."""
    x, gamma, beta, dy = random_case((4, 3, 3, 4), np.float32)
    x *= 1e-3                                   # variance 4e-6, the size of epsilon
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
    y, *_ = ops.batch_norm(x, gamma, beta, mean, variance, training,
                           data_format="channels_last" if axis == -1 else "channels_first")
    np.testing.assert_allclose(y, theirs(x, training=training), rtol=0, atol=5e-6)    # outputs of size 10


def test_batch_norm_in_inference_ignores_the_batch():
    """An image's output is its own, whatever else is in the batch (fault 1: tests ran on batch statistics)."""
    x, gamma, beta, _ = random_case((5, 4, 4, 6), np.float32)
    mean, variance = np.linspace(-1, 1, 6, dtype="float32"), np.linspace(0.5, 2, 6, dtype="float32")
    whole, *_ = ops.batch_norm(x, gamma, beta, mean, variance, False)
    alone, *_ = ops.batch_norm(x[3:4], gamma, beta, mean, variance, False)
    np.testing.assert_allclose(alone[0], whole[3], rtol=0, atol=1e-6)


# ----------------------------------------------------------------------------------------------- wrong arguments


def image(channels=12):
    return tf.ones([2, 4, 4, channels])


def unknown_channels(function):
    tf.function(function, input_signature=[tf.TensorSpec([None, 4, 4, None])]).get_concrete_function()


def unknown_rank(function):
    tf.function(function, input_signature=[tf.TensorSpec(None)]).get_concrete_function()


def batch(x, training=True, channels=12, gamma=None, beta=None, **kwargs):
    return ops.batch_norm(x, gamma, beta, tf.zeros(channels), tf.ones(channels), training, **kwargs)


@pytest.mark.parametrize("call, words", [
    # groups that do not divide: not clamped, not an error of a reshape (fault 8), but C, G and what would be right
    (lambda: ops.group_norm(image(), None, None, 5), ["12", "5", "1, 2, 3, 4, 6, 12"]),
    (lambda: ops.group_norm(image(), None, None, 24), ["12", "24", "1, 2, 3, 4, 6, 12"]),
    (lambda: ops.group_norm(image(), None, None, 0), ["12", "0", "1, 2, 3, 4, 6, 12"]),
    (lambda: ops.group_norm(image(), None, None, -1), ["12", "-1", "1, 2, 3, 4, 6, 12"]),
    (lambda: ops.check_groups((2, 4, 4, 12), 3, 5), ["12", "5", "1, 2, 3, 4, 6, 12"]),
    (lambda: ops.check_groups((None, 12, None, None), 1, 7), ["12", "7", "1, 2, 3, 4, 6, 12"]),
    (lambda: ops.GroupNorm(5)(image()), ["12", "5", "1, 2, 3, 4, 6, 12"]),
    (lambda: models.make_norm("group", groups=5)(keras.Input([4, 4, 12])), ["12", "5", "1, 2, 3, 4, 6, 12"]),
    (lambda: models.make_norm("group", group_size=5)(keras.Input([4, 4, 12])), ["12", "5", "1, 2, 3, 4, 6, 12"]),
    # a group of one value would always be 0 (pytorch#19250)
    (lambda: ops.group_norm(tf.ones([2, 1, 1, 12]), None, None, 12), ["single value", "12"]),
    (lambda: ops.group_norm(tf.ones([2, 12]), None, None, 12), ["single value", "12"]),
    (lambda: ops.group_norm(tf.ones([2, 12, 1]), None, None, 12, data_format="channels_first"), ["single", "12"]),
    (lambda: ops.instance_norm(tf.ones([2, 12]), None, None), ["single value", "12"]),
    (lambda: ops.layer_norm(tf.ones([2, 1]), None, None), ["single value"]),
    (lambda: ops.check_groups((None, 1, 1, 6), 3, 6), ["single value", "6"]),
    (lambda: ops.GroupNorm(-1)(tf.ones([2, 12])), ["single value", "12"]),
    # one value a channel has no variance
    (lambda: batch(tf.ones([1, 12])), ["1", "(1, 12)", "larger batch"]),
    (lambda: batch(tf.ones([1, 12, 1, 1]), data_format="channels_first"), ["(1, 12, 1, 1)", "larger batch"]),
    # channels must be known
    (lambda: unknown_channels(lambda x: ops.group_norm(x, None, None, 4)), ["channels must be known"]),
    (lambda: unknown_channels(lambda x: ops.layer_norm(x, None, None)), ["channels must be known"]),
    (lambda: unknown_channels(lambda x: ops.instance_norm(x, None, None)), ["channels must be known"]),
    (lambda: unknown_channels(lambda x: batch(x)[0]), ["channels must be known"]),
    (lambda: ops.GroupNorm(4)(keras.Input([4, 4, None])), ["channels must be known"]),
    (lambda: ops.BatchNorm()(keras.Input([4, 4, None])), ["channels must be known"]),
    # layout, rank, type, lengths
    (lambda: ops.group_norm(image(), None, None, 4, data_format="NHWC"), ["NHWC", "channels_last", "channels_first"]),
    (lambda: batch(image(), data_format="NCHW"), ["NCHW", "channels_last", "channels_first"]),
    (lambda: ops.group_norm(tf.ones([12]), None, None, 4), ["rank 2 to 5", "(12,)"]),
    (lambda: ops.group_norm(tf.ones([1, 1, 1, 2, 2, 12]), None, None, 4), ["rank 2 to 5", "(1, 1, 1, 2, 2, 12)"]),
    (lambda: batch(tf.ones([12])), ["rank 2 to 5", "(12,)"]),
    (lambda: batch(tf.ones([1, 1, 1, 2, 2, 12])), ["rank 2 to 5", "(1, 1, 1, 2, 2, 12)"]),
    (lambda: unknown_rank(lambda x: ops.group_norm(x, None, None, 4)), ["rank 2 to 5", "unknown"]),
    (lambda: unknown_rank(lambda x: batch(x)[0]), ["rank 2 to 5", "unknown"]),
    (lambda: ops.group_norm(tf.ones([2, 4, 4, 12], tf.int32), None, None, 4), ["float", "int32"]),
    (lambda: batch(tf.ones([2, 4, 4, 12], tf.uint8)), ["float", "uint8"]),
    (lambda: ops.group_norm(image(), tf.ones(11), None, 4), ["gamma", "12", "11"]),
    (lambda: ops.group_norm(image(), None, tf.ones(1), 4), ["beta", "12", "(1,)"]),
    (lambda: batch(image(), gamma=tf.ones([1, 12])), ["gamma", "12", "(1, 12)"]),
    (lambda: batch(image(), beta=tf.ones(13)), ["beta", "12", "13"]),
    (lambda: ops.GroupNorm(4, axis=2)(image()), ["axis", "2"]),
    (lambda: ops.BatchNorm(axis=2)(image()), ["axis", "2"]),
])
def test_wrong_arguments_are_named(call, words):
    """A wrong argument is a ValueError that names the value and what would be right."""
    with pytest.raises(ValueError) as error:
        call()
    for word in words:
        assert word in str(error.value)


def test_check_groups_accepts_what_can_be_normalized():
    """Divisors pass, also where positions are unknown or a group has one channel on more than one position."""
    for groups in (1, 2, 3, 4, 6, 12):
        ops.check_groups((None, None, None, 12), 3, groups)
        ops.check_groups((None, 12, None, None), 1, groups)
        ops.check_groups((2, 2, 1, 12), 3, groups)
        ops.check_groups(tf.TensorShape([2, None, 1, 12]), 3, groups)
    ops.check_groups((2, 12), 1, 6)


# ------------------------------------------------------------------------------------------------------ layers

# Arguments of keras.layers.BatchNormalization that BatchNorm does not take: batch renormalization, and statistics
# over all replicas, where arXiv 1803.08494 has them for each GPU.
NOT_TAKEN = ["renorm", "renorm_clipping", "renorm_momentum", "synchronized"]
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
    for name in set(constructor(theirs)) - set(taken):
        with pytest.raises(ValueError, match=name):         # refused, not silently without effect
            ours(**{name: constructor(theirs)[name]})


@pytest.mark.parametrize("ours, theirs", PAIRS)
def test_positional_arguments_are_those_of_keras(ours, theirs):
    """The first positional arguments are in the order of Keras: GroupNorm(groups, axis, epsilon, ...)."""
    count = len(constructor(ours))
    assert list(constructor(ours)) == list(constructor(theirs))[:count]


@pytest.mark.parametrize("layer_class", LAYERS)
def test_config_round_trip(layer_class):
    """from_config(get_config()) is the same layer, whatever was set."""
    kwargs = {"axis": 1, "epsilon": 3e-4, "center": True, "scale": True, "beta_initializer": "ones",
              "gamma_initializer": keras.initializers.Constant(3.0), "beta_regularizer": "l1",
              "gamma_regularizer": keras.regularizers.L2(0.5), "beta_constraint": "non_neg",
              "gamma_constraint": keras.constraints.MaxNorm(2.0), "name": "some_norm", "dtype": "mixed_bfloat16"}
    kwargs |= {"groups": 4} if layer_class is ops.GroupNorm else {
        "momentum": 0.5, "moving_mean_initializer": "ones",
        "moving_variance_initializer": keras.initializers.Constant(2.0)}
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
    last, first, counted = layer_class(**options), layer_class(axis=1, **options), layer_class(axis=len(shape) - 1,
                                                                                               **options)
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
            np.testing.assert_allclose(from_format(y, data_format), expected, rtol=0, atol=1e-5)    # of size 10


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
    np.testing.assert_allclose(layer(x), 3 * expected.numpy() + 1, rtol=0, atol=1e-5)           # of size 10


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
    layer = ops.BatchNorm(momentum=0.75, epsilon=1e-4, moving_mean_initializer=keras.initializers.Constant(0.25),
                          moving_variance_initializer=keras.initializers.Constant(2.0))
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
@pytest.mark.parametrize("policy, dtype", [("mixed_float16", "float16"), ("mixed_bfloat16", "bfloat16"),
                                           ("float32", "float32"), ("float64", "float64")])
def test_weights_are_float32_under_mixed_policies(layer_class, policy, dtype):
    """Half precision computes, float32 learns (keras#22586, addons#2550: NaN); float64 stays float64."""
    x = (1e4 * np.random.default_rng(0).normal(size=(8, 16, 16, 32))).astype("float32")
    layer = layer_class(dtype=policy)
    y = layer(x, training=True) if layer_class is ops.BatchNorm else layer(x)
    assert y.dtype == dtype and layer.compute_output_shape(x.shape) == x.shape == tuple(y.shape)
    assert all(weight.dtype == ("float64" if policy == "float64" else "float32") for weight in layer.weights)
    assert all(np.isfinite(weight).all() for weight in layer.get_weights())
    y = tf.cast(y, tf.float32).numpy()
    assert np.isfinite(y).all() and abs(y.std() - 1) < 0.01           # bfloat16 has 2 to 3 decimal digits


@pytest.mark.parametrize("layer_class", LAYERS)
def test_regularizers_and_constraints_have_effect(layer_class):
    """gamma and beta are penalized by their own regularizers, and held by their own constraints as they learn."""
    x = np.random.default_rng(0).normal(size=(4, 3, 3, 32)).astype("float32")
    layer = layer_class(gamma_regularizer=keras.regularizers.L2(0.5), beta_regularizer=keras.regularizers.L1(0.25),
                        beta_initializer=keras.initializers.Constant(2.0), gamma_constraint=keras.constraints.NonNeg(),
                        beta_constraint=keras.constraints.MaxNorm(1.5))
    layer(x)
    assert sorted(float(loss) for loss in layer.losses) == [0.5 * 32, 0.25 * 2 * 32]
    keras.optimizers.SGD(1.0).apply([tf.fill([32], 5.0), tf.zeros([32])], [layer.gamma, layer.beta])
    np.testing.assert_array_equal(layer.gamma.numpy(), np.zeros(32))                        # 1 - 5 is held at 0
    np.testing.assert_allclose(np.linalg.norm(layer.beta.numpy()), 1.5, rtol=1e-5)


def small_model():
    """A functional model with both norms and a standardized convolution."""
    inputs = keras.Input([8, 8, 3])
    x = ops.StandardizedConv2D(8, 3, padding="same", use_bias=False)(inputs)
    x = ops.BatchNorm(momentum=0.8)(x)
    x = keras.layers.ReLU()(x)
    x = ops.Conv2D(12, 3)(x)
    x = ops.GroupNorm(4, beta_regularizer="l2")(x)
    x = keras.layers.ReLU()(x)              # else the next norm subtracts again what the last one adds
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


# --------------------------------------------------------------------------------------------------- convolution


def convolution_oracle(x, kernel, dy, strides):
    """y, dx and dkernel of a convolution with 'SAME' padding, by the definition, one output position at a time."""
    (height, width, _, filters), (_, rows, columns, _) = kernel.shape, x.shape
    outputs = [math.ceil(rows / strides[0]), math.ceil(columns / strides[1])]
    missing = [max((outputs[0] - 1) * strides[0] + height - rows, 0),
               max((outputs[1] - 1) * strides[1] + width - columns, 0)]
    before = [size // 2 for size in missing]
    padded = np.pad(x, [(0, 0), (before[0], missing[0]), (before[1], missing[1]), (0, 0)])
    y, dx, dkernel = np.zeros([len(x), *outputs, filters]), np.zeros_like(padded), np.zeros_like(kernel)
    for i, j in np.ndindex(*outputs):
        window = np.s_[:, i * strides[0]:i * strides[0] + height, j * strides[1]:j * strides[1] + width]
        y[:, i, j] = np.tensordot(padded[window], kernel, 3)
        dx[window] += np.tensordot(dy[:, i, j], kernel, (1, 3))
        dkernel += np.tensordot(padded[window], dy[:, i, j], (0, 0))
    return y, dx[:, before[0]:before[0] + rows, before[1]:before[1] + columns], dkernel


CONVOLUTIONS = [((1, 4, 4, 3), (4, 4, 3, 8), (2, 2), True), ((2, 5, 6, 3), (3, 2, 3, 24), (2, 3), True),
                ((3, 3, 2, 5), (1, 1, 5, 20), (1, 1), True), ((2, 5, 5, 2), (3, 3, 2, 51), (1, 1), True),
                ((2, 3, 3, 2), (3, 3, 2, 18), (1, 1), False), ((2, 7, 7, 3), (3, 3, 3, 4), (2, 2), False)]


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
            y = ops.convolve(x, kernel, strides)
        return y, *tape.gradient(y, [x, kernel], dy)
    arguments = [tf.constant(value) for value in (x, kernel, dy)]
    operations = [operation.type for operation in convolve.get_concrete_function(*arguments).graph.get_operations()]
    assert operations.count("Conv2DBackpropFilter") == (not by_patches)
    assert operations.count("ExtractImagePatches") == by_patches * (1 + (dy.size // dy.shape[3] <= 32))
    for actual, expected in zip(convolve(*arguments), convolution_oracle(x, kernel, dy, strides)):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12)        # float64, sums of up to 50 products


def test_convolve_has_second_derivatives():
    """The gradient by patches can be derived again, as a gradient penalty does."""
    x, kernel = (np.random.default_rng(0).normal(size=size) for size in ((1, 3, 3, 2), (2, 2, 2, 6)))

    def gradients(x, kernel):
        with tf.GradientTape() as tape:
            tape.watch([x, kernel])
            y = tf.reduce_sum(ops.convolve(x, kernel, (2, 2)) ** 3)
        return tf.concat([tf.reshape(gradient, [-1]) for gradient in tape.gradient(y, [x, kernel])], 0)
    for i in (0, 1):
        theoretical, numerical = tf.test.compute_gradient(tf.function(gradients), [x, kernel], delta=1e-5)
        np.testing.assert_allclose(theoretical[i], numerical[i], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 4, 4, 3), (None, 4, 4, 3), (1, None, 4, 3)])
def test_convolve_takes_empty_and_unknown_batches(shape):
    """An empty batch has a gradient of 0; where a size is unknown, TensorFlow's own gradient does it."""
    kernel = tf.Variable(tf.ones([3, 3, 3, 64]))

    @tf.function(input_signature=[tf.TensorSpec(shape)])
    def gradient(x):
        with tf.GradientTape() as tape:
            y = ops.convolve(x, kernel, (2, 2))
        return tape.gradient(y, kernel)
    x = np.ones([1 if size is None and i else size or 0 for i, size in enumerate(shape)], np.float32)
    expected = convolution_oracle(x.astype(np.float64), np.ones([3, 3, 3, 64]),
                                  np.ones([len(x), -(-x.shape[1] // 2), 2, 64]), (2, 2))[2]
    np.testing.assert_array_equal(gradient(x), expected)


@pytest.mark.parametrize("arguments", [{}, {"padding": "same"}, {"padding": "same", "strides": (2, 1)},
                                       {"padding": "valid", "strides": 2}, {"padding": "same", "dilation_rate": 2},
                                       {"padding": "same", "groups": 2}])
def test_conv2d_layer_is_that_of_keras(arguments):
    """Conv2D gives what keras.layers.Conv2D gives, gradients included, for all arguments."""
    x = np.random.default_rng(0).normal(size=(1, 6, 5, 4)).astype("float32")
    results = []
    for layer in (ops.Conv2D(64, 3, **arguments), keras.layers.Conv2D(64, 3, **arguments)):
        layer.build(x.shape)
        layer.set_weights([np.linspace(-1, 1, math.prod(w.shape)).reshape(w.shape) for w in layer.get_weights()])
        with tf.GradientTape() as tape:
            y = layer(x)
        results.append([y, tape.gradient(y, layer.kernel.value)])
    for ours, theirs in zip(*results):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


# ---------------------------------------------------------------------------------------- weight standardization


@pytest.mark.parametrize("shape", [(3, 3, 16, 8), (1, 1, 32, 4), (7, 7, 3, 5), (64, 10), (3, 8, 6)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_standardized_weights_have_mean_0_and_variance_1_by_fan_in(shape, dtype):
    """Each filter alone is centred and scaled over its inputs, and points where it did (arXiv 1903.10520)."""
    kernel = np.random.default_rng(0).normal(0.3, 2, shape)
    kernel[..., 0] *= 10                                                # filters of different sizes
    weights = ops.standardize_weights(tf.constant(kernel, dtype))
    assert weights.dtype == dtype and weights.shape == shape
    weights, fan_in, inputs = weights.numpy().astype("float64"), math.prod(shape[:-1]), tuple(range(len(shape) - 1))
    expected = (kernel - kernel.mean(inputs)) / np.sqrt(fan_in * kernel.var(inputs) + 1e-5)
    tolerance = ROUNDINGS * np.finfo(dtype).eps
    np.testing.assert_allclose(weights, expected, rtol=0, atol=tolerance)
    np.testing.assert_allclose(weights.mean(inputs), 0, rtol=0, atol=tolerance)
    np.testing.assert_allclose(weights.var(inputs) * fan_in, 1, rtol=0, atol=1e-6 + 10 * tolerance)     # epsilon


def test_standardized_weights_of_a_constant_filter_are_0():
    """No variance: epsilon keeps the result finite."""
    np.testing.assert_array_equal(ops.standardize_weights(tf.fill([3, 3, 4, 2], 0.5)), np.zeros((3, 3, 4, 2)))


def test_standardized_weights_gradient():
    """The gradient passes through the mean and variance of each filter, and so does the second one."""
    kernel = tf.constant(np.random.default_rng(0).normal(size=(2, 3, 2, 3)))
    for function in (lambda k: ops.standardize_weights(k) ** 3,
                     lambda k: gradients_of_cube(ops.standardize_weights, [k])):            # and once more
        theoretical, numerical = tf.test.compute_gradient(tf.function(function), [kernel], delta=1e-5)
        np.testing.assert_allclose(theoretical[0], numerical[0], rtol=1e-7, atol=1e-8)      # step^2 of a difference


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_standardized_convolution_is_the_convolution_with_standardized_weights(policy):
    """StandardizedConv2D keeps Conv2D's arguments and stored kernel; only the kernel in use is standardized."""
    x = np.random.default_rng(0).normal(size=(2, 9, 7, 4)).astype("float32")
    layer = ops.StandardizedConv2D(6, (3, 2), strides=2, padding="same", bias_initializer="ones", activation="relu",
                                   dtype=policy)
    y = layer(x)
    kernel = tf.cast(layer.kernel, layer.compute_dtype)
    expected = tf.nn.relu(tf.nn.conv2d(tf.cast(x, kernel.dtype), ops.standardize_weights(kernel), 2, "SAME") + 1)
    assert y.dtype == layer.compute_dtype and layer.kernel.dtype == "float32"
    # outputs of size 4: float32 roundings of another order of summing, one rounding of 8 digits in bfloat16
    np.testing.assert_allclose(tf.cast(y, tf.float32), tf.cast(expected, tf.float32), rtol=0,
                               atol=1e-5 if policy == "float32" else 4 * 2 ** -8)
    plain = keras.layers.Conv2D(6, (3, 2), strides=2, padding="same", activation="relu")
    plain.build(x.shape)
    plain.set_weights(layer.get_weights())
    assert np.abs(plain(x) - tf.cast(y, tf.float32)).max() > 0.1


# ------------------------------------------------------------------------------------------------ building blocks


def test_masked_positions_do_not_enter_the_statistics_of_a_batch():
    """Against float64 numpy over the positions that count: y, and what the moving statistics learn."""
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, (4, 6, 5)).astype("float32")
    mask = rng.random((4, 6)) < 0.6
    x[~mask] = 100                                          # padding
    counted = x[mask].astype(np.float64)
    layer = ops.BatchNorm(momentum=0.8)
    y = layer(x, training=True, mask=tf.constant(mask))
    expected = (x - counted.mean(axis=0)) / np.sqrt(counted.var(axis=0) + 1e-5)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(layer.moving_mean, 0.2 * counted.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(layer.moving_variance, 0.8 + 0.2 * counted.var(axis=0, ddof=1), rtol=1e-5)
    before = layer.moving_mean.numpy()
    layer(x, training=True, mask=tf.zeros([4, 6], tf.bool))     # a batch of padding alone teaches nothing
    np.testing.assert_array_equal(layer.moving_mean, before)


def test_masks_arrive_through_a_keras_model_as_they_do_in_keras():
    """The review's case: the moving mean was 1.36 where Keras has 2.72."""
    x = np.array([[[1.0], [5.0], [0.0], [0.0]], [[2.0], [0.0], [0.0], [0.0]]], np.float32)
    means = []
    for norm in (ops.BatchNorm(momentum=0.0), keras.layers.BatchNormalization(momentum=0.0)):
        inputs = keras.Input((4, 1))
        model = keras.Model(inputs, norm(keras.layers.Masking(0.0)(inputs)))
        model(x, training=True)
        means.append(norm.moving_mean.numpy())
    np.testing.assert_allclose(means[0], [8 / 3], rtol=1e-6)
    np.testing.assert_allclose(means[0], means[1], rtol=1e-4)


def chain(model):
    """Names of the layers of a model after its input, in order."""
    return [layer.name for layer in model.layers[1:]]


@pytest.mark.parametrize("norm_type", models.NORM_TYPES)
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
def test_conv2d_is_convolution_norm_activation(norm_type, activation):
    """Convolution → norm → activation (fault 6), a bias only without a norm, and the values that follow from it."""
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
        y = y / np.sqrt(1 + 1e-5)                                       # inference: moving statistics are 0 and 1
    y = {None: y, "relu": np.maximum(y, 0), "leaky_relu": np.where(y > 0, y, 0.2 * y)}[activation]
    assert model.output.shape == (None, 4, 3, 8)
    np.testing.assert_allclose(model(x), y, rtol=0, atol=1e-5)          # convolutions of size 4


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
    expected = {"batch": lambda: ops.batch_norm(x, None, None, np.zeros(8), np.ones(8), False)[0],
                "batch+renorm": lambda: keras.layers.BatchNormalization(epsilon=1e-5)(x),
                "group": lambda: ops.group_norm(x, None, None, 4), "none": lambda: x,
                "layer": lambda: ops.layer_norm(x, None, None), "instance": lambda: ops.instance_norm(x, None, None)}
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
        np.testing.assert_allclose(model(x), y if activation is None else np.where(y > 0, y, 0.2 * y), rtol=0,
                                   atol=1e-5)


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
    convolutions = [layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D)
                    and "shortcut" not in layer.name]
    assert [layer.kernel_size[0] for layer in convolutions] == ([1, 3, 1] if bottleneck else [3, 3])
    assert [layer.strides[0] for layer in convolutions] == ([1, strides, 1] if bottleneck else [strides, 1])
    x = np.random.default_rng(0).normal(size=(2, 7, 5, channels)).astype("float32")
    shortcut = x
    if projections:
        kernel = tf.convert_to_tensor(projections[0].kernel)
        shortcut = ops.group_norm(tf.nn.conv2d(x, kernel, strides, "SAME"), None, None, 2)
    np.testing.assert_allclose(model(x), np.maximum(shortcut, 0), rtol=0, atol=1e-5)
