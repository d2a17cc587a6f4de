"""Wrong arguments of ops.py are named, with the value and what would be right."""

import keras
import pytest
import tensorflow as tf

import ops


def image(channels=12):
    return tf.ones([2, 4, 4, channels])


def trace(function, shape):
    tf.function(function, input_signature=[tf.TensorSpec(shape)]).get_concrete_function()


def batch(x, training=True, channels=12, gamma=None, beta=None, **kwargs):
    return ops.batch_norm(x, gamma, beta, tf.zeros(channels), tf.ones(channels), training, **kwargs)


def group(x, groups=4, gamma=None, beta=None, **kwargs):
    return ops.group_norm(x, gamma, beta, groups, **kwargs)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: group(image(), 5), ["12", "5", "1, 2, 3, 4, 6, 12"]),
        (lambda: group(image(), -1), ["12", "-1", "1, 2, 3, 4, 6, 12"]),
        (lambda: ops.GroupNorm(5)(image()), ["12", "5", "1, 2, 3, 4, 6, 12"]),
        # a group of one value would always be 0 (pytorch#19250)
        (lambda: group(tf.ones([2, 1, 1, 12]), 12), ["single value", "12"]),
        (lambda: ops.group_norm(tf.ones([2, 12]), None, None, 12), ["single value", "12"]),
        (lambda: ops.group_norm(tf.ones([2, 1]), None, None, 1), ["single value"]),
        (lambda: batch(tf.ones([1, 12])), ["1", "(1, 12)", "larger batch"]),
        (lambda: batch(tf.ones([1, 12, 1, 1]), data_format="channels_first"), ["(1, 12, 1, 1)", "larger batch"]),
        (lambda: trace(group, [None, 4, 4, None]), ["channels"]),
        (lambda: trace(batch, [None, 4, 4, None]), ["channels"]),
        (lambda: ops.GroupNorm(4)(keras.Input([4, 4, None])), ["channels"]),
        (lambda: ops.BatchNorm()(keras.Input([4, 4, None])), ["channels"]),
        (lambda: group(image(), data_format="NHWC"), ["NHWC", "channels_last", "channels_first"]),
        (lambda: batch(image(), data_format="NCHW"), ["NCHW", "channels_last", "channels_first"]),
        (lambda: group(tf.ones([12])), ["rank 2 to 5", "(12,)"]),
        (lambda: batch(tf.ones([1, 1, 1, 2, 2, 12])), ["rank 2 to 5", "(1, 1, 1, 2, 2, 12)"]),
        (lambda: trace(group, None), ["rank 2 to 5", "unknown"]),
        (lambda: trace(batch, None), ["rank 2 to 5", "unknown"]),
        (lambda: group(tf.ones([2, 4, 4, 12], tf.int32)), ["float", "int32"]),
        (lambda: batch(tf.ones([2, 4, 4, 12], tf.uint8)), ["float", "uint8"]),
        (lambda: group(image(), gamma=tf.ones(11)), ["gamma", "12", "11"]),
        (lambda: group(image(), beta=tf.ones(1)), ["beta", "12", "(1,)"]),
        (lambda: batch(image(), gamma=tf.ones([1, 12])), ["gamma", "12", "(1, 12)"]),
        (lambda: ops.GroupNorm(4, axis=2)(image()), ["axis", "2"]),
        (lambda: ops.BatchNorm(axis=2)(image()), ["axis", "2"]),
    ],
)
def test_wrong_arguments_are_named(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 6, 12])
def test_divisors_pass_also_where_positions_are_unknown_or_a_group_has_one_channel(groups):
    ops.check_groups((None, None, None, 12), 3, groups)
    ops.check_groups((None, 12, None, None), 1, groups)
    ops.check_groups(tf.TensorShape([2, None, 1, 12]), 3, groups)
    ops.check_groups((2, 12), 1, min(groups, 6))
