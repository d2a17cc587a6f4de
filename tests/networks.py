"""Networks for tests, built by model.py."""

import math

import keras
import numpy as np

import model as models
from config import Config


def build(name="resnet8", shape=(32, 32, 3), classes=10, **flags):
    """A new network; the policy of Keras stays what it was."""
    before = keras.config.dtype_policy()
    try:
        config = Config(model=name, **{"batch_norm_momentum": 0.9, **flags})
        return models.create_model(config, shape, classes)
    finally:
        keras.config.set_dtype_policy(before)


def randomize(model, seed=0):
    """Draw every weight, also gammas that start at 0 and moving statistics; return the model."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        shape = weight.shape
        kernel = len(shape) > 1
        weight.assign(
            rng.normal(0, math.sqrt(2 / math.prod(shape[:-1])), shape) if kernel else rng.uniform(0.5, 1.5, shape)
        )
    return model


def images(number, shape=(32, 32, 3), seed=0):
    return np.random.default_rng(seed).normal(size=(number, *shape)).astype("float32")
