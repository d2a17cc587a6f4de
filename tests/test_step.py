"""trainer.py's step: losses, gradients, optimizers and totals against independent formulas."""

import math

import keras
import numpy as np
import pytest
import scripts
import tensorflow as tf

import trainer


def make(data_dir, *flags):
    """The state of a run with these flags before its first step, and the graph of a step."""
    state = scripts.state_of(*scripts.SMALL, "--data_dir", data_dir, *flags)
    return state, trainer.make_train_step(state)


def random_batch(count, seed=0):
    rng = np.random.default_rng(seed)
    return tf.constant(rng.random((count, 8, 8, 1)), tf.float32), tf.constant(rng.integers(0, 10, count), tf.int32)


def gradients_of_mean_loss(model, images, labels):
    with tf.GradientTape() as tape:
        logits = model(images, training=True)
        loss = tf.reduce_mean(keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True))
    weights = [variable.value for variable in model.trainable_variables]
    return [gradient.numpy().astype(np.float64) for gradient in tape.gradient(loss, weights)], float(loss)


def clipped(gradients):
    norm = math.sqrt(sum((gradient**2).sum() for gradient in gradients))
    return [gradient * min(1.0, 20 / norm) for gradient in gradients]


@pytest.mark.parametrize("optimizer", ["adam", "momentum"])
def test_updates_against_the_papers_formulas(data_dir, optimizer):
    """One optimizer, one set of slots. Gradients with L2 decay, in float64 by the definitions, clipped in the end."""
    flags = "--norm_type group --weight_decay 0.01 --max_batch_size 16 --optimizer".split()
    state, step = make(data_dir, *flags, optimizer)
    model, kernel = state.model, state.model.get_layer("logits").kernel
    m, v = ([np.zeros(variable.shape) for variable in model.trainable_variables] for _ in range(2))
    state.optimizer.learning_rate.assign(0.003)
    for t, scale in enumerate((1, 1, 1e4, 1), 1):  # from the third on, gradients exceed the clipping norm of 20
        kernel.assign(kernel * scale)
        weights = [variable.numpy().astype(np.float64) for variable in model.trainable_variables]
        images, labels = random_batch(16, seed=t)
        gradients, loss = gradients_of_mean_loss(model, images, labels)
        gradients = clipped([g + 0.01 * w for g, w in zip(gradients, weights)])
        finite, reported, _ = step(images, labels)
        assert finite and float(reported) == pytest.approx(loss, rel=1e-5)
        for k, g in enumerate(gradients):
            if optimizer == "momentum":
                m[k] = 0.9 * m[k] + g
                weights[k] = weights[k] - 0.003 * m[k]
            else:
                m[k] = 0.9 * m[k] + 0.1 * g
                v[k] = 0.999 * v[k] + 0.001 * g * g
                rate = 0.003 * math.sqrt(1 - 0.999**t) / (1 - 0.9**t)
                weights[k] = weights[k] - rate * m[k] / (np.sqrt(v[k]) + 1e-8)
        for variable, expected in zip(model.trainable_variables, weights):
            # Adam divides by the gradient's own size, so a gradient that is rounding alone may move by the whole rate
            close = np.isclose(variable.numpy(), expected, rtol=1e-4, atol=2e-5)
            assert close.mean() > 0.99, variable.path


def test_totals_are_the_sums_of_losses_right_predictions_and_images(data_dir):
    """Of each step alone, at rate 0, against the logits in float64."""
    state, step = make(data_dir, "--norm_type", "group", "--max_batch_size", 16)
    model, rows = state.model, np.arange(16)
    model.get_layer("logits").kernel.assign(model.get_layer("logits").kernel * 100)  # predictions of all kinds
    for seed in (1, 2):
        images, labels = random_batch(16, seed)
        logits = model(images, training=True).numpy().astype(np.float64)
        labels = np.where(rows % 3 == 0, logits.argmax(axis=1), labels)  # some of them right
        losses = np.log(np.exp(logits).sum(axis=1)) - logits[rows, labels]
        expected = losses.sum(), (logits.argmax(axis=1) == labels).sum(), 16
        step(images, tf.constant(labels, tf.int32))
        assert 6 <= expected[1] < 12
        np.testing.assert_allclose(state.totals.numpy(), expected, rtol=1e-5)


def test_a_step_is_max_batch_size_images_in_equal_updates(data_dir):
    """Four updates of 8 images are what one call does, and equal four steps of 8 images."""
    images, labels = random_batch(32)
    state, step = make(data_dir, "--norm_type", "batch", "--batch_size", 8)
    other, other_step = make(data_dir, "--norm_type", "batch", "--batch_size", 8, "--max_batch_size", 8)
    for norm, other_norm in zip(state.model.layers, other.model.layers):
        if hasattr(norm, "momentum"):
            other_norm.momentum = norm.momentum
    for each in (state, other):
        each.optimizer.learning_rate.assign(1e-3)
    step(images, labels)
    sums = np.zeros(3)
    for i in range(4):
        other_step(images[8 * i : 8 * i + 8], labels[8 * i : 8 * i + 8])
        sums += other.totals.numpy()
    for variable, expected in zip(state.model.variables, other.model.variables):
        np.testing.assert_array_equal(variable.numpy(), expected.numpy(), err_msg=variable.path)
    np.testing.assert_allclose(state.totals.numpy(), sums, rtol=1e-12)


@pytest.mark.parametrize("norm_type, optimizer, alike", [("group", "adam", True), ("batch", "momentum", False)])
def test_accumulated_gradients_are_those_of_the_whole_step(norm_type, optimizer, alike, data_dir):
    """Two steps of one update: of 32 images at once, and of 8 batches of 4, which only batch norm can tell apart."""
    ends = []
    for flags in ((), ("--accumulate", "--batch_size", 4)):
        state, step = make(data_dir, "--norm_type", norm_type, "--optimizer", optimizer, *flags)
        state.optimizer.learning_rate.assign(0.01)
        for seed in (1, 2):
            finite, loss, _ = step(*random_batch(32, seed))
        ends.append([variable.numpy() for variable in state.model.trainable_variables])
        assert finite and state.totals.numpy()[0] / 32 == pytest.approx(float(loss), rel=1e-6)
    apart = max(np.abs(one - other).max() for one, other in zip(*ends))
    assert apart < 1e-5 if alike else apart > 1e-4, apart


@pytest.mark.parametrize(
    "norm_type, flag, tolerance",
    [("batch", ["--dtype", "bfloat16"], 0.05), ("group", ["--jit_compile"], 1e-3)],  # bfloat16 has 3 digits
)
def test_other_ways_to_compute_learn_the_same(norm_type, flag, tolerance, data_dir, digits):
    """Mixed precision and XLA start from the same loss as float32 and TensorFlow's kernels, and move alike."""
    images = tf.constant(digits[0].images()[:32] / np.float32(255))
    labels, losses = tf.constant(digits[0].labels[:32]), []
    try:
        for flags in ([], flag):
            state, step = make(data_dir, "--norm_type", norm_type, "--batch_size", 8, *flags)
            state.optimizer.learning_rate.assign(1e-3)
            losses.append([float(step(images, labels)[1]) for _ in range(6)])
    finally:
        keras.mixed_precision.set_dtype_policy("float32")
    assert losses[0][-1] < losses[0][0]
    np.testing.assert_allclose(losses[1], losses[0], rtol=tolerance)
    compiled = step.get_concrete_function(images, labels).function_def.attr["_XlaMustCompile"].b
    assert compiled == ("--jit_compile" in flag)
