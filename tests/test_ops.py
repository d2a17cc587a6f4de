"""Every norm against float64 formulas of our own, and what group norm or batch norm alone promise."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from norm_oracle import BATCH_SHAPES, FORMATS, GROUP_CASES, ROUNDINGS, assert_close, assert_second_derivatives
from norm_oracle import batch_sets, group_sets, norm_of, oracle, random_case, run_with_gradients, sets_of, to_format

import ops

NORMS = ["group", "batch"]
CASES = [("group", *case) for case in GROUP_CASES] + [("batch", shape, None) for shape in BATCH_SHAPES]


@pytest.mark.parametrize("sets", [group_sets((2, 3, 6), 2), group_sets((2, 3, 6), 6), batch_sets((2, 3, 6))])
def test_oracle_agrees_with_numerical_differentiation(sets):
    x, gamma, beta, dy = random_case((2, 3, 6), np.float64)
    exact, step = oracle(x, gamma, beta, dy, sets), 1e-5
    for name, array in (("dx", x), ("dgamma", gamma), ("dbeta", beta)):
        for index in np.ndindex(array.shape):
            array[index] += step
            above = (oracle(x, gamma, beta, dy, sets)["y"] * dy).sum()
            array[index] -= 2 * step
            below = (oracle(x, gamma, beta, dy, sets)["y"] * dy).sum()
            array[index] += step
            # a central difference is off by step^2 times a third derivative, here below 10
            assert abs((above - below) / (2 * step) - exact[name][index]) < 1e-8, (name, index)


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("norm_type, shape, groups", CASES)
def test_output_and_gradients_are_the_formula(norm_type, shape, groups, dtype, data_format):
    case = random_case(shape, dtype)
    actual = run_with_gradients(norm_of(norm_type, shape[-1], groups, data_format=data_format), *case, data_format)
    assert_close(actual, oracle(*case, sets_of(norm_type, shape, groups)), dtype)


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("norm_type", NORMS)
@pytest.mark.parametrize("dtype, jit_compile", [("float32", False), ("float64", False), ("float32", True)])
def test_one_graph_serves_every_batch_and_image_size(norm_type, data_format, dtype, jit_compile):
    """Batch, height and width are unknown, compiled or not (the original repo's #1 and #8: it crashed)."""
    shape = [None, None, None, 6] if data_format == "channels_last" else [None, 6, None, None]
    signature = [tf.TensorSpec(sizes, dtype) for sizes in (shape, [6], [6])]
    norm = norm_of(norm_type, 6, 3, data_format=data_format)
    norm = tf.function(norm, input_signature=signature, jit_compile=jit_compile)
    for shape in ((2, 5, 3, 6), (1, 4, 7, 6)):
        case = random_case(shape, dtype)
        assert_close(run_with_gradients(norm, *case, data_format), oracle(*case, sets_of(norm_type, shape, 3)), dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("norm_type", NORMS)
def test_epsilon_counts(norm_type, dtype):
    """It is added to the variance, of 0, too, and is 1e-5 unless given (in the original repo 1e-3 for batch norm)."""
    x, gamma, beta, dy = random_case((3, 4, 4, 6), dtype)
    x *= 1e-3  # variance 4e-6, the size of epsilon
    x[..., :3] = 1e-3
    for options, epsilon in (({}, 1e-5), ({"epsilon": 1e-3}, 1e-3), ({"epsilon": 1e-7}, 1e-7)):
        actual = run_with_gradients(norm_of(norm_type, 6, **options), x, gamma, beta, dy)
        assert_close(actual, oracle(x, gamma, beta, dy, sets_of(norm_type, x.shape), epsilon), dtype)


def test_group_norm_takes_32_groups_unless_told():
    x, gamma, beta, _ = random_case((2, 3, 3, 64), np.float32)
    np.testing.assert_array_equal(ops.group_norm(x, gamma, beta), ops.group_norm(x, gamma, beta, 32))


@pytest.mark.parametrize("norm_type", [*NORMS, "inference"])
def test_gamma_and_beta_may_be_left_out(norm_type):
    x, gamma, beta, _ = random_case((4, 3, 5, 6), np.float32)
    norm, ones, zeros = norm_of(norm_type, 6), np.ones_like(gamma), np.zeros_like(beta)
    for g, b in itertools.product((gamma, None), (beta, None)):
        expected = norm(x, ones if g is None else g, zeros if b is None else b)
        np.testing.assert_array_equal(norm(x, g, b), expected)


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("shape", [(3, 12), (3, 5, 12), (3, 5, 4, 12), (3, 2, 5, 4, 12)])
def test_groups_and_examples_never_mix(shape, data_format):
    """A huge offset on one group of one example changes no bit elsewhere (tensorflow/addons#751: it did)."""
    x, *others = random_case(shape, np.float32)
    norm = norm_of("group", 12, 4, data_format=data_format)
    plain = run_with_gradients(norm, x, *others, data_format)
    for values in group_sets(shape, 4)[4:8]:  # those of example 1
        moved, elsewhere = x.copy(), np.ones(shape, bool)
        moved[values] += 1e6
        elsewhere[values] = False
        changed = run_with_gradients(norm, moved, *others, data_format)
        for name in ("y", "dx"):
            np.testing.assert_array_equal(changed[name][elsewhere], plain[name][elsewhere])


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("norm_type", NORMS)
def test_large_means_keep_their_digits(norm_type, jit_compile):
    """E[x^2] - E[x]^2 loses all (pytorch#54293), as XLA's own batch norm does (tensorflow#118701)."""
    shape = (8, 16, 16, 8)
    x, gamma, beta, dy = random_case(shape, np.float32)
    x += 1000
    inner = tf.function(norm_of(norm_type, 8))
    norm = tf.function(lambda *args: inner(*args), jit_compile=jit_compile)  # a nested function is compiled, too
    actual, exact = run_with_gradients(norm, x, gamma, beta, dy), oracle(x, gamma, beta, dy, sets_of(norm_type, shape))
    for name in ("y", "dx"):
        np.testing.assert_allclose(actual[name], exact[name], rtol=0, atol=3e-4, err_msg=name)


@pytest.mark.parametrize("shape", [[1, 2**19, 4], [None, None, 4]])
@pytest.mark.parametrize("jit_compile", [False, True])
def test_long_sums_keep_their_digits(shape, jit_compile):
    """A row of 2^19 positions, whether the graph knows that or not."""
    x, gamma, beta, dy = random_case((1, 2**19, 4), np.float32)
    norm = tf.function(lambda x: ops.group_norm(x, gamma, beta, 2), [tf.TensorSpec(shape)], jit_compile=jit_compile)
    exact = oracle(x, gamma, beta, dy, group_sets(x.shape, 2))["y"]
    np.testing.assert_allclose(norm(x), exact, rtol=0, atol=5e-6)  # of size 10


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    "shape, groups",
    [
        ((6, 9, 5, 33), 3),  # an instruction that adds 8 columns adds those of two examples
        ((6, 16, 16, 9), 9),  # 16 positions side by side
        ((6, 32, 32, 16), 2),
        ((3, 28, 28, 64), 32),
        ((4, 200, 150, 1), 1),
        ((6, 9, 7, 1), 1),  # the optimizer of graphs moves a division by 63
        ((3, 200, 150, 24), 8),  # tensorflow/addons#2745: large images were off by the batch size
        ((6, 64), 2),
    ],
)
def test_an_example_is_bitwise_the_same_in_every_batch(shape, groups, known, data_format):
    """y and dx of a batch are those of its parts; test_command.py does the same with one thread per operation."""
    x, gamma, beta, dy = random_case(shape, np.float32)
    x, dy = (to_format(value, data_format) for value in (x, dy))
    sizes = [None if i == 0 or size != shape[-1] else size for i, size in enumerate(x.shape)]

    @tf.function(input_signature=None if known else [tf.TensorSpec(sizes)] * 2)
    def results(x, dy):  # with known sizes, another graph for each number of examples
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = ops.group_norm(x, gamma, beta, groups, data_format=data_format)
        return y, tape.gradient(y, x, output_gradients=dy)

    batch = results(tf.constant(x), tf.constant(dy))
    for part in (slice(1, 3), slice(-1, None)):
        for alone, together in zip(results(tf.constant(x[part]), tf.constant(dy[part])), batch):
            np.testing.assert_array_equal(alone, together[part])


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("dtype, digits", [("float16", 11), ("bfloat16", 8)])
@pytest.mark.parametrize("norm_type", NORMS)
def test_half_precision_is_rounded_only_once(norm_type, dtype, digits, data_format):
    """Values near 1e4, whose sums overflow in float16: finite, and right but for the rounding of the output."""
    shape, half = (4, 9, 7, 12), tf.as_dtype(dtype).as_numpy_dtype
    x, gamma, beta, dy = random_case(shape, np.float32)
    case = (5e3 * x).astype(half), gamma, beta, dy.astype(half)
    actual = run_with_gradients(norm_of(norm_type, 12, 4, data_format=data_format), *case, data_format)
    exact = oracle(*case, sets_of(norm_type, shape, 4))
    for name in ("y", "dx", "dgamma", "dbeta"):
        rounded, expected = name in ("y", "dx"), exact[name]
        assert actual[name].dtype == (half if rounded else np.float32), name
        allowed = 1e-5 * max(np.abs(expected).max(), 1e-3)  # of float32 sums of 1,000 terms
        if rounded:
            allowed = allowed + 2.0**-digits * np.abs(expected) + 2.0**-25  # and of subnormal float16
        assert (np.abs(np.float64(actual[name]) - expected) <= allowed).all(), name


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.parametrize("norm_type", [*NORMS, "inference"])
def test_second_derivatives(norm_type, in_graph, dtype):
    arrays = random_case((2, 3, 2, 4), np.float64)[:3]
    assert_second_derivatives(norm_of(norm_type, 4), arrays, dtype, in_graph)


def random_statistics(channels, dtype):
    """A moving mean and a moving variance."""
    rng = np.random.default_rng(1)
    return rng.normal(size=channels).astype(dtype), rng.uniform(0.5, 2, channels).astype(dtype)


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape, epsilon", [*((s, 1e-5) for s in BATCH_SHAPES), ((1, 4), 0.1), ((0, 2, 3), 0.1)])
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
    sums = {"dgamma": (dy * xhat).sum(others), "dbeta": dy.sum(others, dtype="float64")}
    expected = {"y": xhat * gamma + beta, "dx": dx, "terms": np.abs(dx).max(initial=0)}
    assert_close(actual, expected | sums, dtype)


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
