"""Replace the batch norms of a Keras model with group norms. Needs only ops.py, TensorFlow and Keras.

model = convert.replace_batch_norm(keras.applications.ResNet50(), groups=32, images=X)
"""

import keras
import numpy as np
import tensorflow as tf

from ops import BatchNorm, GroupNorm, divisors

BATCH_NORMS = (BatchNorm, keras.layers.BatchNormalization)


def replace_batch_norm(
    model: keras.Model, groups: int = 32, images: tf.Tensor | None = None, group_size: int | None = None
) -> keras.Model:
    """Copy a Keras model with GroupNorm in place of every BatchNorm or BatchNormalization.

    Args:
        model: functional or Sequential, with any layers and nested models of these kinds. All other weights are copied,
            and frozen layers stay frozen.
        groups: a divisor of the channels of every norm; -1 makes one group per channel.
        images: None to copy the gamma and beta that a norm has, or [N, ...] a few hundred inputs of the model, with
            which match_moments sets gamma and beta, as a trained network needs.
        group_size: channels per group, instead of groups.

    Returns:
        A new model.

    Raises:
        ValueError: naming the layer, if the groups do not divide its channels, if it contains a batch norm (as
            TimeDistributed may), or if it is a batch norm that the model uses twice and `images` are given; if the
            model is of another kind or has no batch norm; if `images` is not an array or is empty.
    """
    if images is not None and not (getattr(images, "shape", None) and images.shape[0]):
        given = "an empty one" if hasattr(images, "shape") else type(images).__name__
        raise ValueError(f"images must be an array [N, ...] of inputs of the model, not {given}: pass about 256 images")

    def clone(layer):
        if isinstance(layer, keras.Model):
            return clone_model(layer)
        if isinstance(layer, BATCH_NORMS):
            return _group_norm_like(layer, groups, group_size, affine=images is not None)
        for inner in layer._flatten_layers(include_self=False) if isinstance(layer, keras.Layer) else ():
            if isinstance(inner, BATCH_NORMS):
                raise ValueError(
                    f"layer {layer.name!r} ({type(layer).__name__}) contains the batch norm {inner.name!r}, which "
                    f"cannot be replaced: build this layer with GroupNorm"
                )
        return layer.__class__.from_config(layer.get_config())

    def call(layer, *inputs, **options):  # GroupNorm does not take batch norm's training and mask
        return layer(*inputs) if isinstance(layer, GroupNorm) else layer(*inputs, **options)

    def clone_model(model):
        sequential = isinstance(model, keras.Sequential)
        if not model.built or not (sequential or hasattr(model, "operations")):
            raise ValueError(
                f"model {model.name!r} must be functional, or Sequential with keras.Input, not {type(model).__name__}"
            )
        return keras.models.clone_model(model, clone_function=clone, call_function=None if sequential else call)

    copy = clone_model(model)
    if not any(isinstance(layer, BATCH_NORMS) for _, layer in _named_layers(model)):
        raise ValueError(f"model {model.name!r} has no batch norm to replace")
    for (_, new), (_, old) in zip(_named_layers(copy), _named_layers(model)):
        if isinstance(old, BATCH_NORMS):
            for variable, value in ((new.gamma, old.gamma), (new.beta, old.beta)):
                if value is not None:
                    variable.assign(value)
        elif not isinstance(old, keras.Model):
            new.set_weights(old.get_weights())
            if isinstance(new, keras.layers.Normalization):
                new.finalize_state()  # copies its weights to the tensors it computes with
            elif hasattr(new, "set_vocabulary"):  # which is no weight
                new.set_vocabulary(old.get_vocabulary())
    if images is not None:
        match_moments(copy, model, images)
    return copy


def _group_norm_like(layer, groups, group_size, affine):
    """GroupNorm with the name and settings of a batch norm; `affine`: with gamma and beta in any case."""
    channels = layer.moving_mean.shape[0]
    if group_size is None:
        valid, wanted = groups == -1 or (groups > 0 and channels % groups == 0), f"{groups} groups"
    else:
        valid, wanted = group_size > 0 and channels % group_size == 0, f"groups of {group_size}"
        groups = channels // max(group_size, 1)
    if not valid:
        raise ValueError(
            f"layer {layer.name!r}: {channels} channels cannot be split into {wanted}; use {divisors(channels)}"
        )
    config = layer.get_config()
    names = ["name", "trainable", "dtype", "axis", "center", "scale"]
    names += [name for name in config if name.startswith(("beta_", "gamma_"))]
    settings = {name: config[name] for name in names} | ({"center": True, "scale": True} if affine else {})
    return GroupNorm(groups, **settings)


def _named_layers(model, path=""):
    """Yield (path, layer) for all layers of a model and of its nested models, from input to output."""
    for layer in model.layers:
        yield path + layer.name, layer
        if isinstance(layer, keras.Model):
            yield from _named_layers(layer, f"{path}{layer.name}/")


def match_moments(model: keras.Model, source: keras.Model, images: tf.Tensor) -> None:
    """Set gamma and beta of every GroupNorm so that, over `images`, the mean and standard deviation of each channel are
    those of the layer with the same name in `source`.

    Let xhat be the output of GroupNorm with gamma = 1 and beta = 0, with mean a and standard deviation d over all
    images and positions, and let m and s be the mean and standard deviation in `source`. Then y = gamma * xhat + beta
    has the mean gamma * a + beta and the standard deviation |gamma| * d, so

        gamma = s / d, with the sign of the source's gamma      (0 where d is 0)
        beta  = m - gamma * a

    Layers are set in order from the input, because each changes the input of the next.

    Args:
        model, source: functional or Sequential models with the same inputs and layer names.
        images: [N, ...], at least a hundred for accurate moments.

    Raises:
        ValueError: naming the layer, if source uses it more than once, because one gamma and beta cannot match several
            means.
    """
    sources = dict(_named_layers(source))
    pairs = [(layer, sources[path]) for path, layer in _named_layers(model) if isinstance(layer, GroupNorm)]
    wanted = _channel_moments(source, [twin for _, twin in pairs], images)
    for (layer, twin), (wanted_mean, wanted_deviation) in zip(pairs, wanted):
        layer.gamma.assign(tf.ones_like(layer.gamma))
        layer.beta.assign(tf.zeros_like(layer.beta))
        ((mean, deviation),) = _channel_moments(model, [layer], images)
        sign = 1 if twin.gamma is None else np.where(np.asarray(twin.gamma) < 0, -1, 1)
        gamma = sign * np.divide(wanted_deviation, deviation, out=np.zeros_like(mean), where=deviation > 0)
        layer.gamma.assign(gamma)
        layer.beta.assign(wanted_mean - gamma * mean)


def _channel_moments(model, layers, images, batch_size=64):
    """Mean and standard deviation [C] in float64 of each layer's output over all images and positions, in inference.

    Each layer's call is wrapped to record its output, because the outer model cannot return layers of nested models.
    """
    records = [[] for _ in layers]

    def recorded(layer, record, call):
        def call_and_record(*args, **kwargs):
            y = call(*args, **kwargs)
            values = np.moveaxis(np.float64(y), layer.axis, -1).reshape(-1, y.shape[layer.axis])
            record.append((len(values), values.mean(axis=0), values.var(axis=0)))
            return y

        return call_and_record

    for layer, record in zip(layers, records):
        layer.call = recorded(layer, record, layer.call)
    try:
        starts = range(0, len(images), batch_size)
        for start in starts:
            model(images[start : start + batch_size], training=False)
    finally:
        for layer in layers:
            del layer.call  # restores the method of its class
    moments = []
    for layer, record in zip(layers, records):
        if len(record) != len(starts):
            times = len(record) // len(starts)
            raise ValueError(f"layer {layer.name!r} is used {times} times: use a layer for each, or pass no images")
        sizes, means, variances = zip(*record)
        mean = np.average(means, axis=0, weights=sizes)
        between = np.average(np.square(np.array(means) - mean), axis=0, weights=sizes)
        moments.append((mean, np.sqrt(np.average(variances, axis=0, weights=sizes) + between)))
    return moments
