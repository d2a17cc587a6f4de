"""The classifiers: the original repo's convnet, the ResNets of He et al. (arXiv 1512.03385), and their blocks.

python model.py --model resnet50 --image_size 224 224 3         # a table of layers, shapes and parameters
python model.py --model resnet20 --norm_type group --groups 4
"""

import dataclasses
import functools

from command import ArgumentParser, Later, UserError, flag, run

keras, ops = Later("keras"), Later("ops")

SMALL_RESNETS = tuple(f"resnet{6 * n + 2}" for n in range(1, 19) if 6 * n + 2 not in (50,))  # section 4.2: 6n + 2
LARGE_RESNETS = {
    "resnet18": (False, [2, 2, 2, 2]),
    "resnet34": (False, [3, 4, 6, 3]),  # table 1
    "resnet50": (True, [3, 4, 6, 3]),
    "resnet101": (True, [3, 4, 23, 3]),
}
MODELS = ("convnet",) + SMALL_RESNETS + tuple(LARGE_RESNETS)
NORM_TYPES = ("batch", "group", "layer", "instance", "none", "batch+renorm")  # the last: arXiv 1702.03275
LOGITS_STDDEV = 0.01  # every network starts near the loss log(classes): section 5.1 of arXiv 1706.02677
RENORM_CLIPPING = {"rmin": 1 / 3, "rmax": 3.0, "dmax": 5.0}  # where the schedule of its section 4 ends


@dataclasses.dataclass(frozen=True)
class Network:
    """The flags that choose a network, of model.py and trainer.py alike."""

    model: str | None = flag(
        None,
        f"{MODELS[0]}, {SMALL_RESNETS[0]}, {SMALL_RESNETS[1]} ... {SMALL_RESNETS[-1]} or "
        f"{', '.join(LARGE_RESNETS)}; by default resnet20 up to 64 pixels, resnet50 above",
        choices=MODELS,
        metavar="MODEL",
    )
    norm_type: str = flag("batch", "the normalization", choices=NORM_TYPES)
    groups: int | None = flag(None, "groups of group norm; by default 32, in the 6n+2 nets 16", low=1)
    group_size: int | None = flag(None, "channels per group, instead of --groups", low=1)
    weight_standardization: bool = flag(False, "standardize the weights of the convolutions (arXiv 1903.10520)")


def default_model(image_shape: tuple) -> str:
    """resnet20 for images of at most 64 pixels a side, resnet50 above or where the side is not known."""
    height, width, _ = image_shape
    return "resnet20" if height and max(height, width) <= 64 else "resnet50"


def default_groups(model: str) -> int:
    """32 as in arXiv 1803.08494, and 16 for the 6n + 2 nets, whose first stage has 16 channels: of 2, 4, 8 and 16 the
    best on held-out images (figure/studies/recipe)."""
    return 16 if model in SMALL_RESNETS else 32


def channels_of(model: str) -> tuple:
    """The numbers of channels that the norms of a network see."""
    if model == "convnet":
        return 64, 128, 256, 512
    if model in SMALL_RESNETS:
        return 16, 32, 64
    bottleneck, _ = LARGE_RESNETS[model]
    return (64, 128, 256, 512, 1024, 2048)[: 6 if bottleneck else 4]


def check_network(flags: Network, model: str | None = None) -> None:
    """Raise UserError for flags that contradict each other, have no effect, or do not suit `model`, once it is known.

    Needs no TensorFlow.
    """
    for name in ("groups", "group_size"):
        value = getattr(flags, name)
        if value is not None and flags.norm_type != "group":
            raise UserError(f"--{name} {value} has no effect with --norm_type {flags.norm_type}: use --norm_type group")
    if flags.groups is not None and flags.group_size is not None:
        raise UserError(
            f"--groups {flags.groups} and --group_size {flags.group_size} say the same in two ways: give one of them"
        )
    for channels in channels_of(model) if model and flags.norm_type == "group" else ():
        divisor = flags.group_size or flags.groups or default_groups(model)
        if channels % divisor:
            what = f"groups of {divisor}" if flags.group_size else f"{divisor} groups"
            fitting = ", ".join(str(d) for d in range(1, 65) if min(channels_of(model)) % d == 0)
            raise UserError(
                f"{model} with --norm_type group: {channels} channels cannot be split into {what}; valid "
                f"here are {fitting}"
            )


# --------------------------------------------------------------------------------------------------------- networks


def create_model(
    model: str,
    image_shape: tuple,
    num_classes: int,
    norm_type: str = "group",
    groups: int | None = None,
    group_size: int | None = None,
    weight_standardization: bool = False,
    momentum: float = 0.9,
    sync_batch_norm: bool = False,
):
    """Build a classifier as a Keras model from images to logits.

    Args:
        model: one of MODELS.
        image_shape: (height, width, channels); height and width may be None for the ResNets.
        num_classes: number of logits.
        norm_type: one of NORM_TYPES.
        groups: of group norm; None is default_groups(model). group_size, channels per group, overrides it.
        weight_standardization: standardize the weights of the convolutions (arXiv 1903.10520).
        momentum: of the moving statistics of batch norm, each update.
        sync_batch_norm: take the statistics of batch norm over all replicas.

    Returns:
        keras.Model from [N, height, width, channels] float32 to [N, num_classes] float32.

    Raises:
        ValueError: if a name is unknown, or the groups do not divide the channels of every norm, or hold one value.
    """
    if model not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, not {model!r}")
    norm = make_norm(
        norm_type, default_groups(model) if groups is None else groups, group_size, momentum, sync_batch_norm
    )
    conv = functools.partial(conv2d, norm=norm, weight_standardization=weight_standardization)
    image = keras.Input(image_shape, name="image")
    if model == "convnet":
        x = convnet(image, conv)
    elif model in LARGE_RESNETS:
        x = large_resnet(image, conv, *LARGE_RESNETS[model])
    else:
        x = small_resnet(image, conv, blocks=(int(model.removeprefix("resnet")) - 2) // 6)
    small = keras.initializers.RandomNormal(stddev=LOGITS_STDDEV)
    logits = fc(x, num_classes, name="logits", initializer=small, dtype="float32")
    return keras.Model(image, logits, name=model)


def convnet(x, conv):
    """The original repo's classifier of small images: four 4×4 convolutions of stride 2, then three dense layers."""
    for i, filters in enumerate((64, 128, 256, 512), 1):
        x = conv(x, filters, 4, 2, f"layer{i}", "leaky_relu")
        x = ops.Dropout(0.5, name=f"layer{i}_dropout")(x)
    x = keras.layers.Flatten(name="flatten")(x)
    for i, units in enumerate((512, 128, 32), 1):
        x = fc(x, units, f"fc{i}", "leaky_relu")
    return x


def small_resnet(x, conv, blocks):
    """Section 4.2 of He et al.: stages of 16, 32 and 64 channels; shortcuts are projections where sizes change."""
    x = conv(x, 16, 3, 1, "stem", "relu")
    for stage, filters in enumerate((16, 32, 64), 1):
        for block in range(1, blocks + 1):
            strides = 2 if stage > 1 and block == 1 else 1
            x = residual_block(x, conv, filters, strides, f"stage{stage}_block{block}")
    return keras.layers.GlobalAveragePooling2D(name="pool")(x)


def large_resnet(x, conv, bottleneck, blocks):
    """Table 1 of He et al.; the stride of a bottleneck is on its 3×3 convolution, as has become the custom."""
    x = conv(x, 64, 7, 2, "stem", "relu")
    x = keras.layers.MaxPooling2D(3, 2, padding="same", name="stem_pool")(x)
    for stage, count in enumerate(blocks, 1):
        for block in range(1, count + 1):
            strides = 2 if stage > 1 and block == 1 else 1
            x = residual_block(x, conv, 32 * 2**stage, strides, f"stage{stage}_block{block}", bottleneck)
    return keras.layers.GlobalAveragePooling2D(name="pool")(x)


# ----------------------------------------------------------------------------------------------------------- blocks


def make_norm(
    norm_type: str,
    groups: int = 32,
    group_size: int | None = None,
    momentum: float = 0.9,
    sync_batch_norm: bool = False,
):
    """The norm of a network: a function norm(x, name, gamma="ones") that puts it on x [N, ..., C], or None for 'none'.

    Args:
        norm_type: one of NORM_TYPES.
        groups: of group norm; group_size, channels per group, overrides it.
        momentum: of batch norm's moving statistics.
        sync_batch_norm: take its statistics over all replicas.
    """
    if norm_type not in NORM_TYPES:
        raise ValueError(f"norm_type must be one of {', '.join(NORM_TYPES)}, not {norm_type!r}")

    def norm(x, name=None, gamma="ones"):
        channels = x.shape[-1]
        if norm_type == "batch":
            layer = ops.BatchNorm(momentum=momentum, gamma_initializer=gamma, synchronized=sync_batch_norm, name=name)
            return layer(x)
        if norm_type == "batch+renorm":
            return keras.layers.BatchNormalization(
                momentum=momentum,
                epsilon=ops.EPSILON,
                gamma_initializer=gamma,
                renorm=True,
                renorm_clipping=RENORM_CLIPPING,
                renorm_momentum=momentum,
                name=name,
            )(x)
        number = {"group": groups, "layer": 1, "instance": channels}[norm_type]
        if norm_type == "group" and group_size is not None:
            if group_size < 1 or channels % group_size:
                raise ValueError(
                    f"group_size must divide the channels of every norm: {channels} channels cannot be "
                    f"split into groups of {group_size}; valid here are {ops.divisors(channels)}"
                )
            number = channels // group_size
        return ops.GroupNorm(number, gamma_initializer=gamma, name=name)(x)

    return None if norm_type == "none" else norm


def conv2d(
    x, filters, kernel_size, strides, name, activation=None, gamma="ones", norm=None, weight_standardization=False
):
    """Convolution → norm → activation, in this order.

    Args:
        x: [N, H, W, C] Keras tensor.
        filters, kernel_size, strides: of the convolution, which pads to H / strides, W / strides and has a bias only
            where no norm with its beta follows. He initialisation (arXiv 1502.01852).
        name: the layers are called name_conv, name_norm and name_relu.
        activation: None, 'relu' or 'leaky_relu' (slope 0.2).
        gamma: 'ones' or 'zeros', what the norm's gamma starts at. Without a norm, 'zeros' is a learned scalar at 0.
        norm: of make_norm.
        weight_standardization: standardize the weights before each use.

    Returns:
        [N, ceil(H / strides), ceil(W / strides), filters].
    """
    convolution = ops.StandardizedConv2D if weight_standardization else ops.Conv2D
    x = convolution(
        filters,
        kernel_size,
        strides,
        padding="same",
        use_bias=norm is None,
        kernel_initializer="he_normal",
        name=f"{name}_conv",
    )(x)
    if norm is not None:
        x = norm(x, f"{name}_norm", gamma)
    elif gamma == "zeros":
        x = ops.SkipInit(name=f"{name}_scale")(x)
    if activation is not None:
        slope = {"relu": 0.0, "leaky_relu": 0.2}[activation]
        x = keras.layers.ReLU(negative_slope=slope, name=f"{name}_relu")(x)
    return x


def fc(x, units, name, activation=None, initializer="he_normal", dtype=None):
    """A dense layer with bias on x [N, inputs], then None or 'leaky_relu' (slope 0.2); dtype: None is Keras' policy."""
    x = keras.layers.Dense(units, kernel_initializer=initializer, dtype=dtype, name=name)(x)
    return x if activation is None else keras.layers.LeakyReLU(0.2, name=f"{name}_relu")(x)


def residual_block(x, conv, filters, strides, name, bottleneck=False):
    """A residual block (arXiv 1512.03385, figure 5): conv → norm → relu, ..., conv → norm, plus x, relu.

    Args:
        x: [N, H, W, C] Keras tensor.
        conv: conv2d with a norm.
        filters: channels of the 3×3 convolutions.
        strides: of the first 3×3 convolution; H and W shrink by it.
        bottleneck: False: 3×3, 3×3. True: 1×1, 3×3, 1×1 with 4 * filters channels out.

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


def main():
    parser = ArgumentParser(description="Print the layers, shapes and parameter counts of a model.")
    parser.add_flags(Network)
    parser.add_argument(
        "--image_size",
        type=int,
        nargs=3,
        default=[32, 32, 3],
        metavar=("H", "W", "C"),
        help="height, width and channels of the images",
    )
    parser.add_argument("--classes", type=int, default=10, help="number of classes")
    flags = parser.parse_args()
    name = flags.model or default_model(flags.image_size)
    check_network(flags, name)
    if min(flags.image_size) < 1 or flags.classes < 2:
        raise UserError(
            f"--image_size needs three positive numbers and --classes at least 2, "
            f"not {flags.image_size} and {flags.classes}"
        )
    try:
        model = create_model(
            name,
            flags.image_size,
            flags.classes,
            flags.norm_type,
            flags.groups,
            flags.group_size,
            flags.weight_standardization,
        )
    except ValueError as error:
        raise UserError(f"{name} with --norm_type {flags.norm_type}: {error}") from error
    model.summary(line_length=110)


if __name__ == "__main__":
    run(main)
