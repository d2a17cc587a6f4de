"""group_norm, layer_norm and instance_norm against float64 formulas of our own.

python -m pytest tests/test_group_norm.py
"""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from norm_oracle import (
    FORMATS,
    GROUP_CASES,
    ROUNDINGS,
    assert_close,
    batch_sets,
    from_format,
    gradients_of_cube,
    group_sets,
    oracle,
    random_case,
    run_with_gradients,
    to_format,
)

import ops


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


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape, groups", GROUP_CASES)
def test_group_norm_is_the_formula(shape, groups, dtype, data_format):
    """Output and all three gradients are those of the paper's equations, in either layout, at ranks 2 to 5."""
    case = random_case(shape, dtype)
    actual = run_with_gradients(
        lambda *args: ops.group_norm(*args, groups, data_format=data_format), *case, data_format
    )
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
    x *= 1e-3  # variance 4e-6, the size of epsilon
    for kwargs, epsilon in (({}, 1e-5), ({"epsilon": 1e-3}, 1e-3), ({"epsilon": 1e-7}, 1e-7)):
        actual = run_with_gradients(
            lambda *args, kwargs=kwargs: ops.group_norm(*args, groups, **kwargs), x, gamma, beta, dy
        )
        assert_close(actual, oracle(x, gamma, beta, dy, group_sets(shape, groups), epsilon), "float64")


def test_group_norm_takes_32_groups_unless_told():
    """The paper's G = 32 is the default."""
    x, gamma, beta, _ = random_case((2, 3, 3, 64), np.float32)
    np.testing.assert_array_equal(ops.group_norm(x, gamma, beta), ops.group_norm(x, gamma, beta, 32))


@pytest.mark.parametrize(
    "function",
    [
        lambda x, g, b: ops.group_norm(x, g, b, 3),
        lambda x, g, b: ops.batch_norm(x, g, b, tf.zeros(6), tf.ones(6), True)[0],
        lambda x, g, b: ops.batch_norm(x, g, b, tf.zeros(6), tf.ones(6), False)[0],
    ],
)
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
        return run_with_gradients(
            lambda *args: ops.group_norm(*args, groups, data_format=data_format), x, gamma, beta, dy, data_format
        )

    plain = results(x)
    for g in range(groups):
        moved = x.copy()
        moved[1, ..., g * size : (g + 1) * size] += 1e6
        elsewhere = np.ones(shape, bool)
        elsewhere[1, ..., g * size : (g + 1) * size] = False
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


@pytest.mark.parametrize(
    "shape, groups, axis",
    [((2, 5, 3, 12), 4, -1), ((2, 12, 5, 3), 4, 1), ((3, 7, 8), 8, -1), ((4, 6), 2, -1), ((2, 3, 4, 5, 6), 1, -1)],
)
def test_group_norm_agrees_with_keras(shape, groups, axis):
    """Where keras.layers.GroupNormalization is right, with epsilon 1e-5, the results are the same."""
    rng = np.random.default_rng(0)
    x = rng.normal(0.5, 2.0, shape).astype("float32")
    theirs = keras.layers.GroupNormalization(groups, axis=axis, epsilon=1e-5)
    theirs.build(shape)
    theirs.set_weights([rng.normal(1, 0.5, shape[axis]), rng.normal(0, 0.5, shape[axis])])
    y = ops.group_norm(
        x, *theirs.get_weights(), groups, data_format="channels_last" if axis == -1 else "channels_first"
    )
    np.testing.assert_allclose(y, theirs(x), rtol=0, atol=5e-6)  # outputs of size 5, about 10 float32 roundings


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


@pytest.mark.parametrize("norm_type", ["batch", "group", "layer", "instance"])
def test_large_mean_keeps_its_digits_when_xla_compiles(norm_type):
    """XLA's own batch norm computes E[x^2] - E[x]^2 (tensorflow#118701); a nested function, too."""
    shape = (8, 16, 16, 8)
    x, gamma, beta, dy = random_case(shape, np.float32)
    x += 1000
    functions = {
        "batch": lambda *args: ops.batch_norm(*args, tf.zeros(8), tf.ones(8), True)[0],
        "group": lambda *args: ops.group_norm(*args, 2),
        "layer": ops.layer_norm,
        "instance": ops.instance_norm,
    }
    inner = tf.function(functions[norm_type])
    sets = {"batch": batch_sets(shape), "group": group_sets(shape, 2), "layer": group_sets(shape, 1)}
    exact = oracle(x, gamma, beta, dy, sets.get(norm_type, group_sets(shape, 8)))
    actual = run_with_gradients(tf.function(lambda *args: inner(*args), jit_compile=True), x, gamma, beta, dy)
    for name in ("y", "dx"):
        np.testing.assert_allclose(actual[name], exact[name], rtol=0, atol=1e-3, err_msg=name)


@pytest.mark.parametrize(
    "positions, channels, fold",
    [
        (1024, 16, 8),
        (256, 32, 4),
        (64, 64, 2),
        (49, 64, 1),
        (28 * 28, 16, 8),
        (6, 16, 2),
        (64, 128, 1),  # 128 a row
        (4096, 256, 4),
        (112 * 112, 64, 16),
        (65536, 3, 64),
        (16384, 1, 128),
        (1, 16, 1),
        (64, 512, 1),
    ],
)  # 1024 a column
def test_positions_lie_side_by_side_where_rows_are_short_or_columns_long(positions, channels, fold):
    assert ops._fold(positions, channels) == ops._fold(tf.constant(positions), channels) == fold


@pytest.mark.parametrize("jit_compile", [False, True])
def test_unknown_sizes_keep_the_digits_of_long_sums(jit_compile):
    """A row of 2^19 positions."""
    x, gamma, beta, dy = random_case((1, 2**19, 4), np.float32)
    function = tf.function(
        lambda x: ops.group_norm(x, gamma, beta, 2),
        input_signature=[tf.TensorSpec([None, None, 4])],
        jit_compile=jit_compile,
    )
    exact = oracle(x, gamma, beta, dy, group_sets(x.shape, 2))["y"]
    np.testing.assert_allclose(function(x), exact, rtol=0, atol=5e-6)  # of size 10


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    "shape, groups",
    [
        ((6, 32, 32, 16), 2),
        ((3, 28, 28, 64), 32),
        ((6, 9, 5, 33), 3),  # an instruction that adds 8 columns adds those of two examples
        ((6, 16, 16, 9), 9),  # 16 positions side by side
        ((4, 200, 150, 1), 1),
        ((3, 200, 150, 24), 8),  # tensorflow/addons#2745: large images were off by the batch size
        ((6, 64), 2),
    ],
)
def test_an_example_is_bitwise_the_same_in_every_batch(shape, groups, known, data_format):
    """y and dx of a batch are those of its parts, in a graph of known sizes and in one of unknown sizes."""
    x, gamma, beta, dy = random_case(shape, np.float32)
    x, dy = (to_format(value, data_format) for value in (x, dy))
    sizes = [None if i == 0 or not known and size != shape[-1] else size for i, size in enumerate(x.shape)]

    def function(x, dy):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = ops.group_norm(x, gamma, beta, groups, data_format=data_format)
        return y, tape.gradient(y, x, output_gradients=dy)

    def results(first, last):  # with known sizes, another graph for each number of examples
        signature = None if known else [tf.TensorSpec(sizes)] * 2
        return tf.function(function, input_signature=signature)(*(tf.constant(value[first:last]) for value in (x, dy)))

    batch = results(0, len(x))
    for first, last in ((1, 3), (len(x) - 1, len(x))):
        for alone, together in zip(results(first, last), batch):
            np.testing.assert_array_equal(alone, together[first:last])


def test_an_example_is_bitwise_the_same_in_every_batch_with_one_thread():
    test = f"{__file__}::test_an_example_is_bitwise_the_same_in_every_batch"
    options = ["-q", "-p", "no:xdist", "-o", "addopts=", "-k", "False and channels_last"]
    command = [sys.executable, "-m", "pytest", *options, test]
    done = subprocess.run(command, env={**os.environ, "TF_NUM_INTRAOP_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "norm_type, jit_compile",
    [("group", False), ("group", True), ("batch", False), ("batch", True), ("layer", False), ("instance", False)],
)
@pytest.mark.parametrize("data_format", FORMATS)
def test_batch_height_and_width_may_be_unknown(norm_type, data_format, jit_compile):
    """One graph serves every batch size and image size, compiled or not (the original repo's #1 and #8: it crashed)."""
    channels, zeros, ones = 6, np.zeros(6, "float32"), np.ones(6, "float32")
    signature = [None, None, None, channels] if data_format == "channels_last" else [None, channels, None, None]

    def function(x, gamma, beta):
        if norm_type == "batch":
            return ops.batch_norm(x, gamma, beta, zeros, ones, True, data_format=data_format)[0]
        if norm_type == "group":
            return ops.group_norm(x, gamma, beta, 3, data_format=data_format)
        return {"layer": ops.layer_norm, "instance": ops.instance_norm}[norm_type](
            x, gamma, beta, data_format=data_format
        )

    @tf.function(
        input_signature=[tf.TensorSpec(signature), tf.TensorSpec([6]), tf.TensorSpec([6]), tf.TensorSpec(signature)],
        jit_compile=jit_compile,
    )
    def step(x, gamma, beta, dy):
        with tf.GradientTape() as tape:
            tape.watch([x, gamma, beta])
            y = function(x, gamma, beta)
        return [y, *tape.gradient(y, [x, gamma, beta], output_gradients=dy)]

    groups = {"group": 3, "layer": 1, "instance": 6}.get(norm_type)
    for shape in ((2, 5, 3, channels), (1, 4, 7, channels), (5, 2, 2, channels)):
        x, gamma, beta, dy = random_case(shape, np.float32)
        y, dx, dgamma, dbeta = step(to_format(x, data_format), gamma, beta, to_format(dy, data_format))
        actual = {
            "y": from_format(y, data_format),
            "dx": from_format(dx, data_format),
            "dgamma": dgamma.numpy(),
            "dbeta": dbeta.numpy(),
        }
        sets = batch_sets(shape) if norm_type == "batch" else group_sets(shape, groups)
        assert_close(actual, oracle(x, gamma, beta, dy, sets), "float32")


@pytest.mark.parametrize(
    "shape, in_graph",
    [((0, 12), False), ((0, 5, 12), False), ((0, 5, 3, 12), False), ((0, 5, 3, 12), True), ((0, 2, 5, 3, 12), False)],
)
def test_empty_batch_gives_an_empty_result(shape, in_graph):
    """No examples, as in the last shard of a split: no error, an empty output and gradients of 0."""
    x, gamma, beta, dy = random_case(shape, np.float32)
    functions = [
        lambda *args: ops.group_norm(*args, 4),
        lambda *args: ops.batch_norm(*args, tf.zeros(12), tf.ones(12), False)[0],
    ]
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
        y = (
            ops.group_norm(x, gamma, beta, 4, data_format=data_format)
            if norm_type == "group"
            else ops.batch_norm(x, gamma, beta, zeros, ones, True, data_format=data_format)[0]
        )
    dx, dgamma, dbeta = tape.gradient(y, [x, gamma, beta], output_gradients=dy)
    assert y.dtype == dx.dtype == dtype and dgamma.dtype == dbeta.dtype == "float32"

    x, dy, y, dx = (from_format(tf.cast(value, tf.float64), data_format) for value in (x, dy, y, dx))
    exact = oracle(x, gamma, beta, dy, group_sets(shape, 4) if norm_type == "group" else batch_sets(shape))
    for name, actual in (("y", y), ("dx", dx), ("dgamma", dgamma.numpy()), ("dbeta", dbeta.numpy())):
        assert np.isfinite(actual).all(), name
        expected = exact[name]
        allowed = 1e-5 * max(np.abs(expected).max(), 1e-3)  # of float32 sums of 1,000 terms
        if name in ("y", "dx"):
            allowed = allowed + 2.0**-digits * np.abs(expected) + 2.0**-25  # and of subnormal float16
        assert (np.abs(actual - expected) <= allowed).all(), name


SECOND = {
    "group": lambda x, gamma, beta: ops.group_norm(x, gamma, beta, 2),
    "batch training": lambda *args: ops.batch_norm(*args, np.linspace(-1, 1, 4), np.full(4, 2.0), True)[0],
    "batch inference": lambda *args: ops.batch_norm(*args, np.linspace(-1, 1, 4), np.full(4, 2.0), False)[0],
}


@pytest.mark.parametrize("argument", [0, 1, 2])
@pytest.mark.parametrize("norm_type", SECOND)
def test_second_derivatives(norm_type, argument):
    """The gradient can be differentiated again, by x, gamma and beta, as gradient penalties need (float64)."""
    arguments = [tf.constant(array) for array in random_case((2, 2, 4), np.float64)[:3]]

    @tf.function
    def first(value):
        return gradients_of_cube(SECOND[norm_type], arguments[:argument] + [value] + arguments[argument + 1 :])

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
        return oracle(x, gamma, beta, 3 * y**2, sets)["dx"]

    expected = (exact_dx(x + 1e-5 * direction) - exact_dx(x - 1e-5 * direction)) / 2e-5
    x, gamma, beta, direction = (tf.constant(array, dtype) for array in (x, gamma, beta, direction))
    with tf.GradientTape() as outer:
        outer.watch(x)
        dx = gradients_of_cube(SECOND[norm_type], [x, gamma, beta])[: tf.size(x)]
        product = tf.reduce_sum(dx * tf.reshape(direction, [-1]))
    # of size 100, in float32 with ROUNDINGS, in float64 with what a central difference leaves
    np.testing.assert_allclose(
        outer.gradient(product, x),
        expected,
        rtol=0,
        atol=np.abs(expected).max() * (ROUNDINGS * 2**-23 if dtype == "float32" else 1e-8),
    )
