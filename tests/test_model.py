"""model.py: the networks' structure, sizes and starting weights, their inference mode, and the command line."""

import functools
import math

import keras
import numpy as np
import pytest
import scripts
import tensorflow as tf
from scripts import build, randomize

import config
import layers
import model as models
import ops

NORMS = (ops.GroupNorm, ops.BatchNorm, keras.layers.BatchNormalization)


RESNET8 = [("resnet8", norm_type) for norm_type in config.NORM_TYPES]


@functools.cache
def built(name, shape=(32, 32, 3), classes=10, norm_type="batch", **flags):
    """A network that is built once for all the tests that only look at it."""
    return build(name, shape, classes, norm_type=norm_type, **flags)


def images(number, shape=(32, 32, 3), seed=0):
    return np.random.default_rng(seed).normal(size=(number, *shape)).astype("float32")


def of_type(model, kind):
    return [layer for layer in model.layers if isinstance(layer, kind)]


class ByHand:
    """The networks by their papers, in TensorFlow's own functions, with the weights that a model has by name."""

    def __init__(self, model, norm_type, groups=None):
        self.weights = {variable.path: variable.value for variable in model.variables}
        self.norm_type, self.groups = norm_type, groups

    def get(self, layer, *names):
        return [self.weights[f"{layer}/{name}"] for name in names]

    def norm(self, x, layer):
        if self.norm_type.startswith("batch"):
            gamma, beta, mean, variance = self.get(layer, "gamma", "beta", "moving_mean", "moving_variance")
            return gamma * (x - mean) / tf.sqrt(variance + 1e-5) + beta
        groups = {"group": self.groups, "layer": 1, "instance": x.shape[-1]}[self.norm_type]
        return ops.group_norm(x, *self.get(layer, "gamma", "beta"), groups)

    def conv(self, x, name, strides, slope):
        """Convolution → norm (without one, a bias) → leaky ReLU, of which a slope of 1 is none and of 0 a ReLU."""
        x = tf.nn.conv2d(x, *self.get(f"{name}_conv", "kernel"), strides, "SAME")
        if self.norm_type == "none":
            (scale,) = self.get(f"{name}_scale", "scale") if f"{name}_scale/scale" in self.weights else (1.0,)
            x = scale * (x + self.get(f"{name}_conv", "bias")[0])
        else:
            x = self.norm(x, f"{name}_norm")
        return tf.where(x > 0, x, slope * x)

    def dense(self, x, name, slope=1.0):
        kernel, bias = self.get(name, "kernel", "bias")
        x = x @ kernel + bias
        return tf.where(x > 0, x, slope * x)

    def convnet(self, x):
        for name in ("layer1", "layer2", "layer3", "layer4"):
            x = self.conv(x, name, 2, 0.2)
        x = tf.reshape(x, [len(x), -1])
        for name in ("fc1", "fc2", "fc3"):
            x = self.dense(x, name, 0.2)
        return self.dense(x, "logits")

    def resnet(self, x, blocks, bottleneck, large):
        """arXiv 1512.03385: table 1, with the stride of a bottleneck on its 3x3 convolution; section 4.2."""
        x = self.conv(x, "stem", 2 if large else 1, 0.0)
        if large:
            x = tf.nn.max_pool2d(x, 3, 2, "SAME")
        last = 3 if bottleneck else 2
        for stage, number in enumerate(blocks, 1):
            for block in range(1, number + 1):
                strides = 2 if stage > 1 and block == 1 else 1
                name, y = f"stage{stage}_block{block}", x
                for part in range(1, last + 1):
                    at = strides if part == last - 1 else 1
                    y = self.conv(y, f"{name}_{part}", at, slope=1.0 if part == last else 0.0)
                if x.shape != y.shape:
                    x = self.conv(x, f"{name}_shortcut", strides, slope=1.0)
                x = tf.nn.relu(x + y)
        return self.dense(tf.reduce_mean(x, [1, 2]), "logits")


@pytest.mark.parametrize(
    "name, norm_type, options",
    [("resnet8", norm_type, ([1, 1, 1], False, False)) for norm_type in config.NORM_TYPES]
    + [("convnet", norm_type, ()) for norm_type in ("batch", "group", "none")]
    + [("resnet20", "group", ([3, 3, 3], False, False)), ("resnet18", "batch", ([2, 2, 2, 2], False, True))]
    + [("resnet50", "none", ([3, 4, 6, 3], True, True))],
)
def test_networks_are_those_of_the_papers(name, norm_type, options):
    """The logits are those of the network written by hand; ResNets take images of any size."""
    convnet, groups = name == "convnet", {"groups": 4} if norm_type == "group" else {}
    model = build(name, (32, 32, 3) if convnet else (None, None, 3), norm_type=norm_type, **groups)
    by_hand = ByHand(randomize(model), norm_type, 4)
    assert [layer.rate for layer in of_type(model, keras.layers.Dropout)] == [0.5] * (4 if convnet else 0)
    for shape in [(32, 32, 3)] if convnet else [(40, 24, 3), (33, 47, 3)]:
        x = images(2, shape)
        expected = by_hand.convnet(x) if convnet else by_hand.resnet(x, *options)
        assert model(x).shape == (2, 10) and np.ptp(expected) > 0
        np.testing.assert_allclose(model(x), expected, rtol=0, atol=2e-5 * np.abs(expected).max())


# The counts of the 224-pixel nets are those published with torchvision's weights. The others were worked out by hand
# from section 4.2 of arXiv 1512.03385, with projection shortcuts, and from the layers of the original repo.
PARAMETERS = [("resnet18", 11_689_512), ("resnet34", 21_797_672), ("resnet50", 25_557_032), ("resnet101", 44_549_160)]
PARAMETERS = [(name, (224, 224, 3), 1000, number) for name, number in PARAMETERS]
OF_SMALL_IMAGES = [("resnet8", 78_042), ("resnet110", 1_730_714), ("convnet", 3_876_714)]
PARAMETERS += [(name, (32, 32, 3), 10, number) for name, number in OF_SMALL_IMAGES]


@pytest.mark.parametrize("name, shape, classes, number", PARAMETERS)
def test_parameters_are_those_published(name, shape, classes, number):
    model = built(name, shape, classes)
    assert sum(math.prod(weight.shape) for weight in model.trainable_weights) == number
    assert model.count_params() - number == 2 * sum(layer.gamma.shape[0] for layer in of_type(model, ops.BatchNorm))
    assert model.input.shape == (None, *shape) and model.output.shape == (None, classes)
    assert model.output.dtype == "float32" and model.name == name


@pytest.mark.parametrize("sides, name", [((64, 64), 20), ((65, 64), 50), ((64, 65), 50), ((224, 224), 50)])
def test_default_model_is_chosen_by_the_image(sides, name):
    assert config.default_model((*sides, 3)) == f"resnet{name}"


@pytest.mark.parametrize(
    "name, norm_type, last, number",
    [("resnet8", norm_type, "_2_norm", 9) for norm_type in config.NORM_TYPES if norm_type != "none"]
    + [("resnet50", "group", "_3_norm", 53), ("convnet", "group", None, 4)],
)
def test_the_last_gamma_of_each_block_starts_at_0(name, norm_type, last, number):
    """arXiv 1803.08494, section 4.1: gamma is 0 in the last norm of each residual block and 1 elsewhere, beta 0."""
    norms = of_type(built(name, norm_type=norm_type), NORMS)
    assert len(norms) == number
    for layer in norms:
        start = 0.0 if last and layer.name.endswith(last) else 1.0
        np.testing.assert_array_equal(layer.gamma, np.full(layer.gamma.shape, start), layer.name)
        np.testing.assert_array_equal(layer.beta, np.zeros(layer.beta.shape), layer.name)


OTHERS = [("convnet", "batch"), ("convnet", "none"), ("resnet50", "none"), ("resnet110", "none")]


@pytest.mark.parametrize("name, norm_type", RESNET8 + OTHERS)
def test_networks_start_near_the_loss_of_a_guess(name, norm_type):
    """log(10), with norms and without: resnet50 without a norm started at 308, resnet110 at 1.4e9."""
    keras.utils.set_random_seed(0)
    model = build(name, norm_type=norm_type)
    x = np.random.default_rng(0).random((16, 32, 32, 3), np.float32)
    loss = keras.losses.sparse_categorical_crossentropy(np.arange(16) % 10, model(x, training=True), from_logits=True)
    assert abs(float(np.mean(loss)) - math.log(10)) < 0.25


def test_without_norms_each_block_ends_in_a_scalar_at_0():
    """SkipInit (arXiv 2002.10444): the block is its shortcut at first, and the scalar is learned."""
    scalars = of_type(built("resnet8", norm_type="none"), layers.SkipInit)
    assert len(scalars) == 3
    assert all(layer.scale.trainable and layer.scale.numpy() == 0 and layer.scale.shape == () for layer in scalars)


def test_he_initialisation():
    """Kernels start with mean 0 and variance 2 / fan_in (arXiv 1502.01852), also of the dense layers but the last,
    whose standard deviation is 0.01 (arXiv 1706.02677, section 5.1)."""
    keras.utils.set_random_seed(0)
    checked = 0
    for name in ("convnet", "resnet18"):
        for layer in of_type(build(name), (keras.layers.Conv2D, keras.layers.Dense)):
            kernel = layer.kernel.numpy()
            if layer.name == "logits":
                assert abs(kernel.std() / 0.01 - 1) < 0.2
            elif kernel.size >= 30_000:  # the variance of so many draws is within 5 %, at 6 sigma
                fan_in = math.prod(kernel.shape[:-1])
                assert abs(kernel.var() * fan_in / 2 - 1) < 0.05, layer.name
                assert abs(kernel.mean()) < 6 * math.sqrt(2 / fan_in / kernel.size), layer.name
                checked += 1
            if layer.use_bias:
                np.testing.assert_array_equal(layer.bias, np.zeros(layer.bias.shape))
    assert checked >= 20


@pytest.mark.parametrize("name", ["convnet", "resnet8", "resnet18", "resnet50"])
def test_channels_of_a_network_are_those_of_its_norms(name):
    """What --groups is checked against before TensorFlow starts."""
    norms = of_type(built(name, norm_type="group"), ops.GroupNorm)
    assert sorted(config.channels_of(name)) == sorted({layer.gamma.shape[0] for layer in norms})


@pytest.mark.parametrize(
    "name, flags, groups",
    [
        ("resnet8", {}, lambda channels: 16),
        ("resnet18", {}, lambda channels: 32),  # the paper's
        ("convnet", {}, lambda channels: 32),
        ("resnet8", {"groups": 1}, lambda channels: 1),
        ("resnet8", {"groups": 4, "group_size": 16}, lambda channels: channels // 16),
    ],
)
def test_groups_of_every_norm(name, flags, groups):
    norms = of_type(built(name, norm_type="group", **flags), NORMS)
    assert norms and all(layer.groups == groups(layer.gamma.shape[0]) for layer in norms)


@pytest.mark.parametrize("standardized", [False, True])
@pytest.mark.parametrize("norm_type", ["batch", "batch+renorm"])
def test_weight_standardization_and_momentum_reach_every_layer(norm_type, standardized):
    """And Keras' batch renormalization has the bounds of arXiv 1702.03275, section 4: r up to 3, d up to 5."""
    flags = {"norm_type": norm_type, "weight_standardization": standardized, "batch_norm_momentum": 0.7}
    model = build("resnet8", **flags)
    convolutions = of_type(model, keras.layers.Conv2D)
    assert {isinstance(layer, layers.StandardizedConv2D) for layer in convolutions} == {standardized}
    wanted = {"momentum": 0.7, "epsilon": 1e-5, "synchronized": False}
    if norm_type == "batch+renorm":
        wanted |= {"renorm": True, "renorm_momentum": 0.7, "renorm_clipping": {"rmin": 1 / 3, "rmax": 3.0, "dmax": 5.0}}
    for layer in of_type(model, NORMS):
        assert wanted.items() <= layer.get_config().items()


@pytest.mark.parametrize("name, norm_type", RESNET8 + [("convnet", "batch")])
def test_predictions_in_inference_are_each_images_own(name, norm_type):
    """In inference an image's logits do not depend on the batch, its size or the last call, and nothing moves
    (the original repo tested in training mode, at a batch size that was part of the graph)."""
    model = randomize(build(name, norm_type=norm_type))
    x, before = images(5), model.get_weights()
    together = model(x, training=False).numpy()
    assert together.shape == (5, 10) and np.isfinite(together).all()
    np.testing.assert_array_equal(model(x, training=False), together)  # and dropout is off
    np.testing.assert_array_equal(model(x), together)  # inference unless asked
    others = np.concatenate([x[:1], 100 * images(4, seed=1)])
    for i, batch in ((0, x[:1]), (4, x[4:]), (0, others)):
        # float32 sums of convolutions over another number of images, through up to 8 layers
        atol = 1e-5 * np.abs(together).max()
        np.testing.assert_allclose(model(batch, training=False)[0], together[i], rtol=0, atol=atol)
    for old, new in zip(before, model.get_weights()):
        np.testing.assert_array_equal(new, old)


def test_dropout_drops_in_training():
    model, x = randomize(build("convnet", norm_type="none")), images(5)
    assert (model(x, training=True).numpy() != model(x, training=True).numpy()).any()


@pytest.mark.parametrize("norm_type", ["group", "batch"])
def test_logits_and_weights_are_float32_in_bfloat16(norm_type):
    model = build("resnet8", norm_type=norm_type, dtype="bfloat16")
    assert {layer.compute_dtype for layer in of_type(model, NORMS + (keras.layers.Conv2D,))} == {"bfloat16"}
    assert {weight.dtype for weight in model.weights} == {"float32"}
    logits = model(images(2), training=True)
    assert logits.dtype == "float32" and np.isfinite(logits).all()
    rounded = keras.ops.cast(keras.ops.cast(logits, "bfloat16"), "float32")
    assert (np.asarray(rounded) != np.asarray(logits)).any()  # computed in float32, not only cast to it


def test_the_table_has_every_layer_and_the_totals(capsys):
    """25,557,032 parameters that are trained, and 2 statistics for each of 26,560 channels."""
    flags = "--model resnet50 --image_size 224 224 3 --classes 1000 --weight_standardization"
    models.main(config.parse_network(flags.split()))
    printed = capsys.readouterr().out
    words = ["25,610,152", "25,557,032", "53,120", "(None, 112, 112, 64)", "(None, 7, 7, 2048)", "(None, 1000)"]
    for word in [*words, "resnet50", "BatchNorm", "StandardizedConv2D", "logits"]:
        assert word in printed, word


def test_images_that_leave_a_norm_a_single_value_are_refused():
    with scripts.refused("convnet", "--norm_type instance", "(16, 16, 3)", "512"):
        build("convnet", (16, 16, 3), norm_type="instance")
    with scripts.refused("--batch_size 1", "resnet18"):
        build("resnet18", batch_size=1)
    build("resnet18", batch_size=1, freeze_batch_norm=True)  # its batches have no statistics
