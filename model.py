"""The classifiers: the 2018 repo's convnet, the ResNets of He et al. (arXiv 1512.03385), and their blocks.

python model.py --model resnet50 --image_size 224 224 3         # a table of layers, shapes and parameters
python model.py --model resnet20 --norm_type group --groups 4
python model.py --model resnet50 --image_size 224 --memory      # also the memory of an update by batch size
"""

import functools
import math
import sys
from pathlib import Path

from command import UserError, run, start
from config import parse_network

FLAGS = start(__name__, parse_network)  # flags first: TensorFlow takes seconds to import

import keras

import layers
import ops
from config import LARGE_RESNETS, default_groups

LOGITS_STDDEV = 0.01  # so that the first loss is near log(classes): section 5.1 of arXiv 1706.02677
RENORM_CLIPPING = {"rmin": 1 / 3, "rmax": 3.0, "dmax": 5.0}  # the final values of section 4 of arXiv 1702.03275


def create_model(config, image_shape: tuple, num_classes: int) -> keras.Model:
    """Build a classifier as a Keras model from images to logits.

    Args:
        config: a config.Config; model, norm_type, groups, group_size, weight_standardization, batch_norm_momentum,
            sync_batch_norm, freeze_batch_norm and dtype choose the network.
        image_shape: (height, width, channels); height and width may be None for the ResNets.
        num_classes: number of logits.

    Returns:
        keras.Model from [N, height, width, channels] float32 to [N, num_classes] float32.

    Raises:
        UserError: if the images are too small for the network or its groups.
    """
    keras.config.set_dtype_policy({"float32": "float32", "bfloat16": "mixed_bfloat16"}[config.dtype])
    name, image = config.model, keras.Input(image_shape, name="image")
    conv = functools.partial(conv2d, config=config)
    try:
        if name == "convnet":
            x = convnet(image, conv)
        elif name in LARGE_RESNETS:
            x = large_resnet(image, conv, *LARGE_RESNETS[name])
        else:
            x = small_resnet(image, conv, blocks=(int(name.removeprefix("resnet")) - 2) // 6)
    except ValueError as error:
        raise UserError(f"{name} with --norm_type {config.norm_type} on images of {image_shape}: {error}") from error
    small = keras.initializers.RandomNormal(stddev=LOGITS_STDDEV)
    logits = keras.layers.Dense(num_classes, kernel_initializer=small, dtype="float32", name="logits")(x)
    return keras.Model(image, logits, name=name)


def convnet(x, conv):
    """The 2018 repo's network for small images: four 4×4 convolutions of stride 2, then three dense layers.

    There the norm came after the activation, and the logits had an activation, too.
    """
    for i, filters in enumerate((64, 128, 256, 512), 1):
        x = conv(x, filters, 4, 2, f"layer{i}", "leaky_relu")
        x = layers.Dropout(0.5, name=f"layer{i}_dropout")(x)
    x = keras.layers.Flatten(name="flatten")(x)
    for i, units in enumerate((512, 128, 32), 1):
        x = keras.layers.Dense(units, kernel_initializer="he_normal", name=f"fc{i}")(x)
        x = keras.layers.LeakyReLU(0.2, name=f"fc{i}_relu")(x)
    return x


def small_resnet(x, conv, blocks):
    """Section 4.2 of He et al., with stages of 16, 32 and 64 channels and projection shortcuts where sizes change."""
    x = conv(x, 16, 3, 1, "stem", "relu")
    for stage, filters in enumerate((16, 32, 64), 1):
        for block in range(1, blocks + 1):
            strides = 2 if stage > 1 and block == 1 else 1
            x = residual_block(x, conv, filters, strides, f"stage{stage}_block{block}")
    return keras.layers.GlobalAveragePooling2D(name="pool")(x)


def large_resnet(x, conv, bottleneck, blocks):
    """Table 1 of He et al., with the stride of a bottleneck on its 3×3 convolution, as is now usual."""
    x = conv(x, 64, 7, 2, "stem", "relu")
    x = keras.layers.MaxPooling2D(3, 2, padding="same", name="stem_pool")(x)
    for stage, count in enumerate(blocks, 1):
        for block in range(1, count + 1):
            strides = 2 if stage > 1 and block == 1 else 1
            x = residual_block(x, conv, 32 * 2**stage, strides, f"stage{stage}_block{block}", bottleneck)
    return keras.layers.GlobalAveragePooling2D(name="pool")(x)


def conv2d(x, filters, kernel_size, strides, name, activation=None, gamma="ones", *, config):
    """Convolution → norm → activation, in this order.

    Args:
        x: [N, H, W, C] Keras tensor.
        filters, kernel_size, strides: of the convolution, which has 'same' padding, He initialization (arXiv
            1502.01852), and a bias only if no norm follows.
        name: the layers are called name_conv, name_norm and name_relu.
        activation: None, 'relu' or 'leaky_relu' (slope 0.2).
        gamma: 'ones' or 'zeros', the initial gamma of the norm. Without a norm, 'zeros' adds a SkipInit layer.
        config: a config.Config.

    Returns:
        [N, ceil(H / strides), ceil(W / strides), filters].
    """
    convolution = layers.StandardizedConv2D if config.weight_standardization else layers.Conv2D
    options = {"padding": "same", "use_bias": config.norm_type == "none", "kernel_initializer": "he_normal"}
    x = convolution(filters, kernel_size, strides, name=f"{name}_conv", **options)(x)
    if config.norm_type != "none":
        x = norm(x, config, f"{name}_norm", gamma)
    elif gamma == "zeros":
        x = layers.SkipInit(name=f"{name}_scale")(x)
    if activation is not None:
        slope = {"relu": 0.0, "leaky_relu": 0.2}[activation]
        x = keras.layers.ReLU(negative_slope=slope, name=f"{name}_relu")(x)
    return x


def norm(x, config, name, gamma):
    """Apply the norm of a configuration to x [N, ..., C]; gamma: 'ones' or 'zeros', its initial value."""
    arguments, momentum = {"gamma_initializer": gamma, "name": name}, config.batch_norm_momentum
    if config.norm_type.startswith("batch") and not config.freeze_batch_norm:
        check_batch(x, config, name)
    if config.norm_type == "batch":
        layer = ops.BatchNorm(momentum=momentum, synchronized=config.sync_batch_norm, **arguments)
        layer.freeze_statistics = config.freeze_batch_norm
        return layer(x)
    if config.norm_type == "batch+renorm":
        arguments |= {"renorm": True, "renorm_clipping": RENORM_CLIPPING, "renorm_momentum": momentum}
        return keras.layers.BatchNormalization(momentum=momentum, epsilon=ops.EPSILON, **arguments)(x)
    channels = x.shape[-1]
    groups = {
        "group": channels // config.group_size if config.group_size else config.groups or default_groups(config.model),
        "layer": 1,
        "instance": channels,
    }
    return ops.GroupNorm(groups[config.norm_type], **arguments)(x)


def check_batch(x, config, name):
    """Raise UserError if batch norm would see a single value per channel of x [N, ..., C] in training."""
    positions, images = x.shape[1:-1], config.batch_size
    if images and None not in positions:
        images *= config.num_replicas if config.sync_batch_norm else 1
        if images * math.prod(positions) < 2:
            raise UserError(
                f"--batch_size {config.batch_size} is too small for batch norm in {config.model}: {name} sees one "
                "position of one image, a single value per channel; use a larger batch size or another --norm_type"
            )


def residual_block(x, conv, filters, strides, name, bottleneck=False):
    """A residual block (arXiv 1512.03385, figure 5): conv → norm → relu, ..., conv → norm, add x, relu.

    Args:
        x: [N, H, W, C] Keras tensor.
        conv: conv2d with its config.
        filters: channels of the 3×3 convolutions.
        strides: of the first 3×3 convolution.
        bottleneck: False: 3×3, 3×3. True: 1×1, 3×3, 1×1, the last with 4 * filters channels.

    Returns:
        [N, ceil(H / strides), ceil(W / strides), filters or 4 * filters]. The last gamma of a block starts at 0, so
        that the block starts as its shortcut (arXiv 1803.08494, section 4.1).
    """
    if bottleneck:
        y = conv(x, filters, 1, 1, f"{name}_1", "relu")
        y = conv(y, filters, 3, strides, f"{name}_2", "relu")
        y = conv(y, 4 * filters, 1, 1, f"{name}_3", gamma="zeros")
    else:
        y = conv(x, filters, 3, strides, f"{name}_1", "relu")
        y = conv(y, filters, 3, 1, f"{name}_2", gamma="zeros")
    if strides > 1 or x.shape[-1] != y.shape[-1]:
        x = conv(x, y.shape[-1], 1, strides, f"{name}_shortcut")
    return keras.layers.ReLU(name=f"{name}_relu")(keras.layers.Add(name=f"{name}_add")([x, y]))


def main(flags):
    config, image_shape, num_classes, batch_sizes = flags
    create_model(config, image_shape, num_classes).summary(line_length=110)
    if batch_sizes:
        sys.path.append(str(Path(__file__).resolve().parent / "figure"))
        import speed  # not at the top: it measures a step of trainer.py, which imports this file

        speed.print_memory(config.model, image_shape, num_classes, batch_sizes)


if __name__ == "__main__":
    run(lambda: main(FLAGS))
