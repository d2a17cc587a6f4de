"""model.py: the networks' structure, sizes and starting weights, their inference mode, and the command line.

python -m pytest tests/test_model.py
"""

import collections
import functools
import math
import runpy
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import model as models
import ops

REPO = Path(models.__file__).parent
NORMS = (ops.GroupNorm, ops.BatchNorm, keras.layers.BatchNormalization)
LAYER_OF = {"batch": ops.BatchNorm, "batch+renorm": keras.layers.BatchNormalization}  # GroupNorm for the others
ACTIVATIONS = (keras.layers.ReLU, keras.layers.LeakyReLU)


@functools.cache
def built(name, shape, classes, norm_type):
    """A new model, built once for all the tests that only look at it."""
    return models.create_model(name, shape, classes, norm_type)


def structure(model):
    """[(layer, the layers it takes from, the layers that take from it)] of a functional model."""
    made_by = {id(layer.output): layer for layer in model.layers}
    sources = {
        layer.name: [
            made_by[id(tensor)] for tensor in keras.tree.flatten(layer.input) if layer.input is not layer.output
        ]
        for layer in model.layers
    }
    takers = collections.defaultdict(list)
    for layer in model.layers:
        for source in sources[layer.name]:
            takers[source.name].append(layer)
    return [(layer, sources[layer.name], takers[layer.name]) for layer in model.layers]


def of_type(model, kind):
    return [layer for layer in model.layers if isinstance(layer, kind)]


def count(weights):
    return sum(math.prod(weight.shape) for weight in weights)


def randomize(model, seed=0):
    """Give every weight, also gammas that start at 0 and moving statistics, a value of its own; return the model."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        value = rng.normal(0, math.sqrt(2 / max(1, math.prod(weight.shape[:-1]))), weight.shape)
        if len(weight.shape) == 1:
            value = rng.uniform(0.5, 1.5, weight.shape)  # gamma, beta, mean, variance, bias
        weight.assign(value)
    return model


def images(number, shape=(32, 32, 3), seed=0):
    return np.random.default_rng(seed).normal(size=(number, *shape)).astype("float32")


# ------------------------------------------------------------------------------------------------------- sizes


def small_resnet_parameters(blocks, classes, gamma_beta=2):
    """Trainable parameters of the 6n + 2 net, from section 4.2 of arXiv 1512.03385 with projection shortcuts."""
    total, channels = 3 * 3 * 3 * 16 + gamma_beta * 16, 16
    for filters in (16, 32, 64):
        for _block in range(blocks):
            total += 3 * 3 * channels * filters + 3 * 3 * filters * filters + 2 * gamma_beta * filters
            if channels != filters:
                total += channels * filters + gamma_beta * filters
            channels = filters
    return total + 64 * classes + classes


def convnet_parameters(classes, gamma_beta=2):
    """Trainable parameters of the original repo's network on 32x32x3."""
    total = 0
    for inputs, filters in ((3, 64), (64, 128), (128, 256), (256, 512)):
        total += 4 * 4 * inputs * filters + gamma_beta * filters
    for inputs, units in ((2 * 2 * 512, 512), (512, 128), (128, 32), (32, classes)):
        total += inputs * units + units
    return total


# The counts of the 224-pixel nets are those published with torchvision's weights. The others are hand-made formulas.
PARAMETERS = [("resnet18", 11_689_512), ("resnet34", 21_797_672), ("resnet50", 25_557_032), ("resnet101", 44_549_160)]
PARAMETERS = [(name, (224, 224, 3), 1000, number) for name, number in PARAMETERS]
PARAMETERS += [(f"resnet{6 * n + 2}", (32, 32, 3), 10, small_resnet_parameters(n, 10)) for n in (1, 3, 18)]
PARAMETERS += [("convnet", (32, 32, 3), 10, convnet_parameters(10))]


@pytest.mark.parametrize("name, shape, classes, number", PARAMETERS)
def test_parameters_are_those_published(name, shape, classes, number):
    """The architecture is the published one: trainable parameters, the logits' shape, and the number of layers."""
    model = built(name, shape, classes, "batch")
    assert count(model.trainable_weights) == number
    assert count(model.non_trainable_weights) == 2 * sum(layer.channels for layer in of_type(model, ops.BatchNorm))
    assert model.input.shape == (None, *shape) and model.output.shape == (None, classes)
    assert model.output.dtype == "float32" and model.name == name
    if name != "convnet":
        projections = sum(
            convolution.kernel_size == (1, 1) and "shortcut" in convolution.name
            for convolution in of_type(model, keras.layers.Conv2D)
        )
        assert len(of_type(model, keras.layers.Conv2D)) - projections == int(name.removeprefix("resnet")) - 1
        assert projections == {"resnet50": 4, "resnet101": 4, "resnet18": 3, "resnet34": 3}.get(name, 2)


def test_6n_plus_2_counts_are_near_table_6():
    """Table 6 of arXiv 1512.03385 has 0.27, 0.46 and 1.7 million for 20, 32 and 110 layers, without projections."""
    projections = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    for blocks, millions, digits in ((3, 0.27, 2), (5, 0.46, 2), (18, 1.7, 1)):
        assert round((small_resnet_parameters(blocks, 10) - projections) / 1e6, digits) == millions


def test_names():
    """MODELS has the convnet, every 6n + 2 up to 110 that is not a 224-pixel net, and the 224-pixel nets, once."""
    assert len(set(models.MODELS)) == len(models.MODELS)
    expected = {"convnet"} | {f"resnet{layers}" for layers in [*range(8, 111, 6), 18, 34, 50, 101]}
    assert set(models.MODELS) == expected


@pytest.mark.parametrize("name", ["resnet14", "resnet32"])
def test_inner_names_build(name):
    """Names between the ends build what they say too."""
    model = models.create_model(name, (32, 32, 3), 10)
    assert count(model.trainable_weights) == small_resnet_parameters((int(name.removeprefix("resnet")) - 2) // 6, 10)


@pytest.mark.parametrize(
    "shape, name",
    [
        ((32, 32, 3), "resnet20"),
        ((28, 28, 1), "resnet20"),
        ((64, 64, 3), "resnet20"),
        ((65, 64, 3), "resnet50"),
        ((64, 65, 3), "resnet50"),
        ((224, 224, 3), "resnet50"),
        ((None, None, 3), "resnet50"),
    ],
)
def test_default_model_is_chosen_by_the_image(shape, name):
    """Images of up to 64 pixels a side get the net for small images, others, and unknown sizes, the large one."""
    assert models.default_model(shape) == name


def test_default_groups():
    """16 in the nets that start with 16 channels, 32 (arXiv 1803.08494) in the others."""
    for name in models.MODELS:
        small = name.startswith("resnet") and name not in ("resnet18", "resnet34", "resnet50", "resnet101")
        assert models.default_groups(name) == (16 if small else 32), name


# --------------------------------------------------------------------------------------------------- structure


# name, image shape, classes and norm_type of the nets to walk through; several are those of PARAMETERS
WALKED = [("resnet8", (32, 32, 3), 10, norm_type) for norm_type in models.NORM_TYPES]
WALKED += [("convnet", (32, 32, 3), 10, norm_type) for norm_type in ("batch", "group", "none")]
WALKED += [
    ("resnet18", (224, 224, 3), 1000, "batch"),
    ("resnet50", (224, 224, 3), 1000, "batch"),
    ("resnet50", (None, None, 1), 10, "group"),
]


@pytest.mark.parametrize("name, shape, classes, norm_type", WALKED)
def test_convolution_norm_activation_each_once(name, shape, classes, norm_type):
    """conv → norm → activation everywhere, each norm once, and a bias just where no norm follows."""
    model = built(name, shape, classes, norm_type)
    assert len(of_type(model, NORMS)) == (0 if norm_type == "none" else len(of_type(model, keras.layers.Conv2D)))
    assert len(of_type(model, LAYER_OF.get(norm_type, ops.GroupNorm))) == len(of_type(model, NORMS))
    for layer, sources, takers in structure(model):
        if isinstance(layer, keras.layers.Conv2D):
            assert layer.use_bias == (norm_type == "none"), layer.name
            after = keras.layers.Add if name != "convnet" else ops.SkipInit
            next_kinds = NORMS if norm_type != "none" else ACTIVATIONS + (ops.SkipInit, after)
            assert len(takers) == 1 and isinstance(takers[0], next_kinds)
        if isinstance(layer, NORMS):
            assert isinstance(sources[0], keras.layers.Conv2D), layer.name
            assert len(takers) == 1 and isinstance(takers[0], ACTIVATIONS + (keras.layers.Add,)), layer.name
            assert layer.epsilon == 1e-5, layer.name  # the same for BN and GN, unlike in the original repo
        if isinstance(layer, keras.layers.Add):  # ... plus the shortcut, then relu
            assert len(sources) == 2 and len(takers) == 1 and isinstance(takers[0], keras.layers.ReLU)
        if isinstance(layer, keras.layers.Dense):
            assert layer.use_bias
    activations, norms = of_type(model, ACTIVATIONS), of_type(model, keras.layers.Conv2D)
    slopes = {layer.get_config()["negative_slope"] for layer in activations}
    assert slopes == ({0.2} if name == "convnet" else {0.0}) and len(activations) <= len(norms) + 3


@pytest.mark.parametrize(
    "name, shape, classes, sizes",
    [
        ("resnet8", (32, 32, 3), 10, [(32, 16), (16, 32), (8, 64)]),
        ("resnet18", (224, 224, 3), 1000, [(56, 64), (28, 128), (14, 256), (7, 512)]),
        ("resnet50", (224, 224, 3), 1000, [(56, 256), (28, 512), (14, 1024), (7, 2048)]),
    ],
)
def test_sizes_of_the_stages(name, shape, classes, sizes):
    """The stages have the sides and channels of table 1 and section 4.2 of arXiv 1512.03385, 3x3 pooling of stride 2
    included, which no count of parameters shows."""
    model = built(name, shape, classes, "batch")
    shapes = [layer.output.shape for layer in of_type(model, keras.layers.Add)]
    assert list(dict.fromkeys(shapes)) == [(None, side, side, channels) for side, channels in sizes]
    pools = of_type(model, keras.layers.MaxPooling2D)
    assert [(pool.pool_size, pool.strides) for pool in pools] == [((3, 3), (2, 2))] * (name != "resnet8")


@pytest.mark.parametrize(
    "name, shape, classes, norm_type", [case for case in WALKED if case[0] != "convnet" and case[3] != "none"]
)
def test_the_last_gamma_of_each_block_starts_at_0(name, shape, classes, norm_type):
    """arXiv 1803.08494, section 4.1: gamma is 0 in the last norm of each residual block and 1 elsewhere, beta 0."""
    model = built(name, shape, classes, norm_type)
    graph, blocks = structure(model), {"resnet8": 3, "resnet18": 8, "resnet50": 16}[name]
    takers_of = {layer.name: takers for layer, _, takers in graph}
    sources_of = {layer.name: sources for layer, sources, _ in graph}
    zeros = 0
    for layer, sources, takers in graph:
        if isinstance(layer, NORMS):
            into_block = sources_of[sources[0].name][0]  # what the convolution before the norm takes
            # a projection shortcut also ends at the Add, but takes the block's input, which the block takes too
            last = isinstance(takers[0], keras.layers.Add) and len(takers_of[into_block.name]) == 1
            start = np.full(layer.gamma.shape, 0.0 if last else 1.0)
            np.testing.assert_array_equal(layer.gamma.numpy(), start, layer.name)
            np.testing.assert_array_equal(layer.beta.numpy(), np.zeros(layer.beta.shape), layer.name)
            zeros += last
    assert zeros == blocks == len(of_type(model, keras.layers.Add))


@pytest.mark.parametrize("norm_type", models.NORM_TYPES)
@pytest.mark.parametrize("name", ["convnet", "resnet8", "resnet20", "resnet110", "resnet50"])
def test_every_network_starts_near_the_loss_of_a_guess(name, norm_type):
    """log(10), with norms and without: resnet50 without a norm started at 308, resnet110 at 1.4e9."""
    if name == "resnet110" and norm_type not in ("none", "group"):
        return  # as deep as it gets: the two that differ most will do
    keras.utils.set_random_seed(0)
    side = 64 if name == "resnet50" else 32
    model = models.create_model(name, (side, side, 3), 10, norm_type)
    x = np.random.default_rng(0).random((16, side, side, 3), np.float32)
    loss = keras.losses.sparse_categorical_crossentropy(np.arange(16) % 10, model(x, training=True), from_logits=True)
    assert abs(float(np.mean(loss)) - math.log(10)) < 0.25


def test_without_norms_each_block_ends_in_a_scalar_at_0():
    """SkipInit (arXiv 2002.10444): the block is its shortcut at first, and the scalar is learned."""
    model = models.create_model("resnet20", (32, 32, 3), 10, "none")
    scalars = of_type(model, ops.SkipInit)
    assert len(scalars) == 9 == len(of_type(model, keras.layers.Add))
    assert all(layer.scale.trainable and layer.scale.numpy() == 0 and layer.scale.shape == () for layer in scalars)
    scalars[0].scale.assign(2.5)
    x = images(2, scalars[0].input.shape[1:])
    np.testing.assert_array_equal(scalars[0](x), np.float32(2.5) * x)
    assert not of_type(models.create_model("resnet8", (32, 32, 3), 10, "group"), ops.SkipInit)


def test_batch_renorm_is_keras_own_with_the_papers_bounds():
    """arXiv 1702.03275, section 4: r up to 3, d up to 5; in training the moving statistics take part."""
    model = models.create_model("resnet8", (32, 32, 3), 10, "batch+renorm", momentum=0.7)
    for layer in of_type(model, keras.layers.BatchNormalization):
        config = layer.get_config()
        assert config["renorm"] and config["renorm_clipping"] == {"rmin": 1 / 3, "rmax": 3.0, "dmax": 5.0}
        assert (config["momentum"], config["renorm_momentum"], config["epsilon"]) == (0.7, 0.7, 1e-5)


def test_he_initialisation():
    """Kernels start with mean 0 and variance 2 / fan_in (arXiv 1502.01852), also of the dense layers but the last,
    whose standard deviation is 0.01 (arXiv 1706.02677, section 5.1)."""
    keras.utils.set_random_seed(0)
    checked = 0
    for name in ("convnet", "resnet18"):
        model = models.create_model(name, (32, 32, 3), 10)
        for layer in of_type(model, (keras.layers.Conv2D, keras.layers.Dense)):
            kernel = layer.kernel.numpy()
            if layer.name == "logits":
                assert abs(kernel.std() / 0.01 - 1) < 0.2
            elif kernel.size >= 30_000:  # the variance of so many draws is within 5 %, at 6 sigma
                fan_in = math.prod(kernel.shape[:-1])
                assert abs(kernel.var() * fan_in / 2 - 1) < 0.05, layer.name
                assert abs(kernel.mean()) < 6 * math.sqrt(2 / fan_in / kernel.size), layer.name
                checked += 1
            if layer.use_bias:
                np.testing.assert_array_equal(layer.bias.numpy(), np.zeros(layer.bias.shape))
    assert checked >= 20


@pytest.mark.parametrize("name", ["convnet", "resnet8", "resnet18", "resnet50"])
def test_channels_of_a_network_are_those_of_its_norms(name):
    """What --groups is checked against before TensorFlow starts."""
    norms = of_type(built(name, (32, 32, 3), 10, "group"), ops.GroupNorm)
    assert sorted(models.channels_of(name)) == sorted({layer.channels for layer in norms})


@pytest.mark.parametrize(
    "name, options, groups",
    [
        ("resnet8", {}, lambda channels: 16),
        ("resnet18", {}, lambda channels: 32),
        ("convnet", {}, lambda channels: 32),
        ("resnet8", {"groups": 4}, lambda channels: 4),
        ("resnet18", {"groups": 16}, lambda channels: 16),
        ("resnet8", {"groups": 1}, lambda channels: 1),
        ("resnet8", {"group_size": 4}, lambda channels: channels // 4),
        ("resnet18", {"group_size": 64}, lambda channels: channels // 64),
        ("resnet8", {"groups": 4, "group_size": 16}, lambda channels: channels // 16),
        ("resnet8", {"norm_type": "layer"}, lambda channels: 1),
        ("resnet8", {"norm_type": "instance"}, lambda channels: channels),
    ],
)
def test_groups_of_every_norm(name, options, groups):
    """groups, group_size or the default reach every norm of the model, never clamped to the channels."""
    norms = of_type(models.create_model(name, (32, 32, 3), 10, **{"norm_type": "group", **options}), NORMS)
    assert norms
    for layer in norms:
        given = layer.get_config()["groups"]
        assert (layer.channels if given == -1 else given) == groups(layer.channels), layer.name


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("resnet20", {"groups": 7}, ["16 channels", "7 groups", "1, 2, 4, 8, 16"]),
        ("resnet20", {"groups": 32}, ["16 channels", "32 groups", "1, 2, 4, 8, 16"]),
        ("resnet18", {"groups": 128}, ["64 channels", "128 groups", "1, 2, 4, 8, 16, 32, 64"]),
        ("resnet20", {"group_size": 5}, ["16 channels", "5", "1, 2, 4, 8, 16"]),
        ("resnet20", {"group_size": 32}, ["16 channels", "32", "1, 2, 4, 8, 16"]),
        ("convnet", {"norm_type": "instance", "shape": (16, 16, 3)}, ["512", "single value"]),
    ],
)
def test_groups_that_do_not_fit_are_refused(name, options, words):
    """One norm that cannot be split stops the model with the numbers that are wrong and those that are right."""
    shape = options.pop("shape", (32, 32, 3))
    with pytest.raises(ValueError) as error:
        models.create_model(name, shape, 10, **{"norm_type": "group", **options})
    for word in words:
        assert word in str(error.value)


def test_weight_standardization_and_momentum_reach_every_layer():
    """weight_standardization is that of every convolution, momentum that of every batch norm."""
    for standardized in (False, True):
        model = models.create_model(
            "resnet8", (32, 32, 3), 10, "batch", weight_standardization=standardized, momentum=0.7
        )
        kinds = {isinstance(layer, ops.StandardizedConv2D) for layer in of_type(model, keras.layers.Conv2D)}
        assert kinds == {standardized}
        assert {layer.momentum for layer in of_type(model, ops.BatchNorm)} == {0.7}


def test_dropout_of_the_convnet():
    """The ancestor's dropout of one half is behind each of the four convolutions, and in no ResNet."""
    model = models.create_model("convnet", (32, 32, 3), 10)
    assert [layer.rate for layer in of_type(model, keras.layers.Dropout)] == [0.5] * 4
    assert not of_type(models.create_model("resnet8", (32, 32, 3), 10), keras.layers.Dropout)


# --------------------------------------------------------------------------------------------------- behaviour


@pytest.mark.parametrize("norm_type", models.NORM_TYPES)
@pytest.mark.parametrize("name", ["convnet", "resnet8"])
def test_predictions_in_inference_are_each_images_own(name, norm_type):
    """In inference an image's logits do not depend on the batch, its size or the last call, and nothing moves
    (the original repo tested in training mode, at a batch size that was part of the graph)."""
    model = randomize(models.create_model(name, (32, 32, 3), 10, norm_type))
    x, before = images(5), model.get_weights()
    together = model(x, training=False).numpy()
    assert together.shape == (5, 10) and np.isfinite(together).all()
    scale = np.abs(together).max()
    np.testing.assert_array_equal(model(x, training=False), together)  # and dropout is off
    np.testing.assert_array_equal(model(x), together)  # inference unless asked
    for i in (0, 4):
        alone = model(x[i : i + 1], training=False).numpy()
        # float32 sums of convolutions over another number of images, through up to 8 layers
        np.testing.assert_allclose(alone[0], together[i], rtol=0, atol=1e-5 * scale)
    other = model(np.concatenate([x[:1], 100 * images(4, seed=1)]), training=False).numpy()
    np.testing.assert_allclose(other[0], together[0], rtol=0, atol=1e-5 * scale)
    for old, new in zip(before, model.get_weights()):
        np.testing.assert_array_equal(new, old)


def test_training_mode_differs_where_it_should():
    """In training batch norm mixes images and moves its statistics, dropout drops, group norm does as in inference."""
    keras.utils.set_random_seed(0)
    x = images(5)
    group = randomize(models.create_model("resnet8", (32, 32, 3), 10, "group"))
    np.testing.assert_array_equal(group(x, training=True), group(x, training=False))
    batch = randomize(models.create_model("resnet8", (32, 32, 3), 10, "batch"))
    statistics = [weight.numpy() for weight in batch.non_trainable_weights]
    together, some = batch(x, training=True).numpy(), batch(x[:2], training=True).numpy()
    assert np.abs(together[:2] - some).max() > 1e-2 * np.abs(together).max()
    for old, weight in zip(statistics, batch.non_trainable_weights):
        assert (weight.numpy() != old).all(), weight.path
    convnet = randomize(models.create_model("convnet", (32, 32, 3), 10, "none"))
    assert (convnet(x, training=True).numpy() != convnet(x, training=True).numpy()).any()


@pytest.mark.parametrize("name", ["convnet", "resnet8"])
def test_logits_are_linear(name):
    """No activation on the logits: other signs of the last layer give other signs of the logits."""
    model = randomize(models.create_model(name, (32, 32, 3), 10))
    x, logits = images(2), of_type(model, keras.layers.Dense)[-1]
    plain = model(x).numpy()
    logits.set_weights([-3 * value for value in logits.get_weights()])
    np.testing.assert_allclose(model(x), -3 * plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm_type", ["group", "batch"])
def test_logits_and_weights_are_float32_in_bfloat16(norm_type):
    """Under a mixed policy the network computes in bfloat16, its weights and logits stay float32."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = models.create_model("resnet8", (32, 32, 3), 10, norm_type)
    finally:
        keras.config.set_dtype_policy(before)
    assert {layer.compute_dtype for layer in of_type(model, NORMS + (keras.layers.Conv2D,))} == {"bfloat16"}
    assert {weight.dtype for weight in model.weights} == {"float32"}
    logits = model(images(2), training=True)
    assert logits.dtype == "float32" and np.isfinite(logits).all()
    rounded = keras.ops.cast(keras.ops.cast(logits, "bfloat16"), "float32")
    assert (np.asarray(rounded) != np.asarray(logits)).any()  # computed in float32, not only cast to it


@pytest.mark.parametrize("name, norm_type", [("resnet8", "group"), ("resnet8", "batch"), ("resnet18", "group")])
def test_resnets_take_images_of_any_size(name, norm_type):
    """Height and width may be None: the same weights serve every size."""
    model = randomize(models.create_model(name, (None, None, 1), 3, norm_type))
    fixed = randomize(models.create_model(name, (40, 24, 1), 3, norm_type))
    for shape in ((40, 24, 1), (33, 47, 1)):
        logits = model(images(2, shape))
        assert logits.shape == (2, 3) and np.isfinite(logits).all()
    x = images(2, (40, 24, 1))
    np.testing.assert_allclose(model(x), fixed(x), rtol=1e-5, atol=1e-5)


def test_a_new_resnet_starts_from_its_shortcuts():
    """With the last gamma of each block at 0, the logits of a new net pass through no block's convolutions."""
    model = models.create_model("resnet8", (32, 32, 3), 10)
    x = images(2)
    before = model(x).numpy()
    for layer in of_type(model, keras.layers.Conv2D):
        if layer.kernel_size == (3, 3) and "stem" not in layer.name:
            layer.kernel.assign(5 * layer.kernel + 1)
    np.testing.assert_allclose(model(x), before, rtol=0, atol=1e-6)


def test_saved_classifier_gives_the_same_logits(tmp_path):
    """A classifier with every kind of layer goes to a .keras file and back."""
    model = randomize(models.create_model("resnet8", (32, 32, 3), 10, "batch", weight_standardization=True))
    model.save(tmp_path / "model.keras")
    np.testing.assert_array_equal(keras.saving.load_model(tmp_path / "model.keras")(images(2)), model(images(2)))


# ------------------------------------------------------------------------------------------------ command line


TABLE = ("--model", "resnet50", "--image_size", "224", "224", "3", "--classes", "1000")
REFUSED = ("--groups", "7", "--norm_type", "group")


@pytest.fixture(scope="module", autouse=True)
def processes():
    """`python model.py` with TABLE and with REFUSED, both at work while the other tests run."""
    running = {
        arguments: subprocess.Popen(
            [sys.executable, str(REPO / "model.py"), *arguments],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for arguments in (TABLE, REFUSED)
    }
    yield running
    for process in running.values():
        process.kill()
        process.communicate()


def test_command_prints_the_table(processes):
    """The command of model.py's first lines prints every layer and the total, exits 0, and nothing on stderr."""
    stdout, stderr = processes[TABLE].communicate(timeout=300)
    assert processes[TABLE].returncode == 0 and stderr == ""
    # 25,557,032 that are trained, and 2 statistics for each of 26,560 channels
    for words in (
        "Total params: 25,610,152",
        "25,557,032",
        "53,120",
        "(None, 112, 112, 64)",
        "(None, 7, 7, 2048)",
        "(None, 1000)",
        "Conv2D",
        "BatchNorm",
        "logits",
    ):
        assert words in stdout, words


def test_command_refuses_in_one_line(processes):
    """In a process of its own too: exit code 2, nothing on stdout, one line on stderr with the values."""
    stdout, stderr = processes[REFUSED].communicate(timeout=300)
    assert processes[REFUSED].returncode == 2 and stdout == ""
    assert stderr.count("\n") == 1 and "7 groups" in stderr and "1, 2, 4, 8, 16" in stderr


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("--groups 7 --norm_type group", ["16 channels", "7 groups", "1, 2, 4, 8, 16"]),
        ("--group_size 5 --norm_type group", ["16 channels", "groups of 5", "1, 2, 4, 8, 16"]),
        ("--groups 4 --norm_type batch", ["--groups 4", "--norm_type batch", "--norm_type group"]),
        ("--groups 4", ["--groups 4", "--norm_type batch", "--norm_type group"]),
        ("--group_size 4 --norm_type none", ["--group_size 4", "--norm_type none"]),
        ("--groups 4 --group_size 4 --norm_type group", ["--groups 4", "--group_size 4"]),
        ("--groups 0 --norm_type group", ["--groups", "0"]),
        ("--group_size -3 --norm_type group", ["--group_size", "-3"]),
        ("--image_size 0 0 3", ["--image_size", "[0, 0, 3]"]),
        ("--classes 1", ["--classes", "1"]),
        ("--model resnet9", ["resnet9", "resnet8", "resnet50"]),
        ("--norm_type weight", ["weight", "batch", "group"]),
        ("--groups four --norm_type group", ["--groups", "four"]),
        ("--model convnet --norm_type instance --image_size 16 16 3", ["512 channels", "single value"]),
    ],
)
def test_wrong_flags_end_in_one_line(arguments, words, monkeypatch, capfd):
    """A wrong flag ends `python model.py` with exit code 2 and one line with the value; a flag has an effect."""
    monkeypatch.setattr(sys, "argv", ["model.py", *arguments.split()])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(REPO / "model.py"), run_name="__main__")
    stdout, stderr = capfd.readouterr()
    assert ended.value.code == 2 and stdout == ""
    assert stderr.count("\n") == 1 and stderr.endswith("\n") and "Traceback" not in stderr
    for word in words:
        assert word in stderr


def test_flags_reach_the_model(monkeypatch, capfd):
    """--model, --norm_type, --group_size, --classes, --image_size and --weight_standardization are used."""
    flags = "--model resnet8 --norm_type group --group_size 4 --classes 7 --image_size 20 24 1 --weight_standardization"
    monkeypatch.setattr(sys, "argv", ["model.py", *flags.split()])
    runpy.run_path(str(REPO / "model.py"), run_name="__main__")
    stdout, stderr = capfd.readouterr()
    assert stderr == ""
    for words in ("resnet8", "GroupNorm", "(None, 20, 24, 1)", "(None, 7)", "StandardizedConv2D"):
        assert words in stdout, words
