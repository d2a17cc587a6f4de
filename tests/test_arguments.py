"""Wrong arguments of ops.py are named, with the value and what would be right.

python -m pytest tests/test_arguments.py
"""

import keras
import pytest
import tensorflow as tf

import ops


def image(channels=12):
    return tf.ones([2, 4, 4, channels])


def unknown_channels(function):
    tf.function(function, input_signature=[tf.TensorSpec([None, 4, 4, None])]).get_concrete_function()


def unknown_rank(function):
    tf.function(function, input_signature=[tf.TensorSpec(None)]).get_concrete_function()


def batch(x, training=True, channels=12, gamma=None, beta=None, **kwargs):
    return ops.batch_norm(x, gamma, beta, tf.zeros(channels), tf.ones(channels), training, **kwargs)


@pytest.mark.parametrize(
    "call, words",
    [
        # groups that do not divide: not clamped, not an error of a reshape, but C, G and what would be right
        (lambda: ops.group_norm(image(), None, None, 5), ["12", "5", "1, 2, 3, 4, 6, 12"]),
        (lambda: ops.group_norm(image(), None, None, 24), ["12", "24", "1, 2, 3, 4, 6, 12"]),
        (lambda: ops.group_norm(image(), None, None, 0), ["12", "0", "1, 2, 3, 4, 6, 12"]),
        (lambda: ops.group_norm(image(), None, None, -1), ["12", "-1", "1, 2, 3, 4, 6, 12"]),
        (lambda: ops.check_groups((2, 4, 4, 12), 3, 5), ["12", "5", "1, 2, 3, 4, 6, 12"]),
        (lambda: ops.check_groups((None, 12, None, None), 1, 7), ["12", "7", "1, 2, 3, 4, 6, 12"]),
        (lambda: ops.GroupNorm(5)(image()), ["12", "5", "1, 2, 3, 4, 6, 12"]),
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
        (
            lambda: ops.group_norm(image(), None, None, 4, data_format="NHWC"),
            ["NHWC", "channels_last", "channels_first"],
        ),
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
    ],
)
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
