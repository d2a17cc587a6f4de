"""model.py: the networks' structure, sizes and starting weights, their inference mode, and the command line.

python -m pytest tests/test_model.py
"""

import collections
import functools
import math
import subprocess

import keras
import numpy as np
import pytest
import scripts
from networks import build, images, randomize

import config
import layers
import ops

NORMS = (ops.GroupNorm, ops.BatchNorm, keras.layers.BatchNormalization)
LAYER_OF = {"batch": ops.BatchNorm, "batch+renorm": keras.layers.BatchNormalization}  # GroupNorm for the others
ACTIVATIONS = (keras.layers.ReLU, keras.layers.LeakyReLU)


@functools.cache
def built(name, shape=(32, 32, 3), classes=10, norm_type="batch"):
    """A network that is built once for all the tests that only look at it."""
    return build(name, shape, classes, norm_type=norm_type)


def structure(model):
    """[(layer, the layers it takes from, the layers that take from it)] of a functional model."""
    made_by = {id(layer.output): layer for layer in model.layers}
    sources, takers = {}, collections.defaultdict(list)
    for layer in model.layers:
        tensors = [tensor for tensor in keras.tree.flatten(layer.input) if tensor is not layer.output]
        sources[layer.name] = [made_by[id(tensor)] for tensor in tensors]
        for source in sources[layer.name]:
            takers[source.name].append(layer)
    return [(layer, sources[layer.name], takers[layer.name]) for layer in model.layers]


def of_type(model, kind):
    return [layer for layer in model.layers if isinstance(layer, kind)]


def count(weights):
    return sum(math.prod(weight.shape) for weight in weights)


def small_resnet_parameters(blocks, classes=10):
    """Trainable parameters of the 6n + 2 net, from section 4.2 of arXiv 1512.03385 with projection shortcuts."""
    total, channels = 3 * 3 * 3 * 16 + 2 * 16, 16
    for filters in (16, 32, 64):
        for _block in range(blocks):
            total += 3 * 3 * channels * filters + 3 * 3 * filters * filters + 4 * filters
            if channels != filters:
                total += channels * filters + 2 * filters
            channels = filters
    return total + 64 * classes + classes


def convnet_parameters(classes):
    """Trainable parameters of the original repo's network on 32x32x3."""
    convolutions = [(3, 64), (64, 128), (128, 256), (256, 512)]
    dense = [(2 * 2 * 512, 512), (512, 128), (128, 32), (32, classes)]
    return sum(16 * a * b + 2 * b for a, b in convolutions) + sum(a * b + b for a, b in dense)


# The counts of the 224-pixel nets are those published with torchvision's weights. The others are hand-made formulas.
PARAMETERS = [("resnet18", 11_689_512), ("resnet34", 21_797_672), ("resnet50", 25_557_032), ("resnet101", 44_549_160)]
PARAMETERS = [(name, (224, 224, 3), 1000, number) for name, number in PARAMETERS]
PARAMETERS += [(f"resnet{6 * n + 2}", (32, 32, 3), 10, small_resnet_parameters(n)) for n in (1, 2, 3, 5, 18)]
PARAMETERS += [("convnet", (32, 32, 3), 10, convnet_parameters(10))]


@pytest.mark.parametrize("name, shape, classes, number", PARAMETERS)
def test_parameters_are_those_published(name, shape, classes, number):
    """The architecture is the published one: trainable parameters, the logits' shape, and the number of layers."""
    model = built(name, shape, classes)
    assert count(model.trainable_weights) == number
    assert count(model.non_trainable_weights) == 2 * sum(
        layer.gamma.shape[0] for layer in of_type(model, ops.BatchNorm)
    )
    assert model.input.shape == (None, *shape) and model.output.shape == (None, classes)
    assert model.output.dtype == "float32" and model.name == name
    if name != "convnet":
        convolutions = of_type(model, keras.layers.Conv2D)
        projections = sum(layer.kernel_size == (1, 1) and "shortcut" in layer.name for layer in convolutions)
        assert len(convolutions) - projections == int(name.removeprefix("resnet")) - 1
        assert projections == {"resnet50": 4, "resnet101": 4, "resnet18": 3, "resnet34": 3}.get(name, 2)


def test_6n_plus_2_counts_are_near_table_6():
    """Table 6 of arXiv 1512.03385 has 0.27, 0.46 and 1.7 million for 20, 32 and 110 layers, without projections."""
    projections = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    for blocks, millions, digits in ((3, 0.27, 2), (5, 0.46, 2), (18, 1.7, 1)):
        assert round((small_resnet_parameters(blocks) - projections) / 1e6, digits) == millions


def test_names():
    """MODELS has the convnet, every 6n + 2 up to 110 that is not a 224-pixel net, and the 224-pixel nets, once."""
    expected = {"convnet"} | {f"resnet{layers}" for layers in [*range(8, 111, 6), 18, 34, 50, 101]}
    assert set(config.MODELS) == expected and len(config.MODELS) == len(expected)


@pytest.mark.parametrize(
    "sides, name",
    [((32, 32), 20), ((64, 64), 20), ((65, 64), 50), ((64, 65), 50), ((224, 224), 50), ((None, None), 50)],
)
def test_default_model_is_chosen_by_the_image(sides, name):
    """Images of up to 64 pixels a side get the net for small images, others, and unknown sizes, the large one."""
    assert config.default_model((*sides, 3)) == f"resnet{name}"


# name, image shape, classes and norm_type of the nets to walk through; several are those of PARAMETERS
WALKED = [("resnet8", (32, 32, 3), 10, norm_type) for norm_type in config.NORM_TYPES]
WALKED += [("convnet", (32, 32, 3), 10, norm_type) for norm_type in ("batch", "group", "none")]
WALKED += [(name, (224, 224, 3), 1000, "batch") for name in ("resnet18", "resnet50")]
WALKED += [("resnet50", (None, None, 1), 10, "group")]


@pytest.mark.parametrize("name, shape, classes, norm_type", WALKED)
def test_convolution_norm_activation_each_once(name, shape, classes, norm_type):
    """conv → norm → activation everywhere, each norm once, and a bias just where no norm follows."""
    model = built(name, shape, classes, norm_type)
    convolutions, norms = of_type(model, keras.layers.Conv2D), of_type(model, NORMS)
    assert len(norms) == (0 if norm_type == "none" else len(convolutions))
    assert len(of_type(model, LAYER_OF.get(norm_type, ops.GroupNorm))) == len(norms)
    after_norm = ACTIVATIONS + (keras.layers.Add,)
    for layer, sources, takers in structure(model):
        if isinstance(layer, keras.layers.Conv2D):
            assert layer.use_bias == (norm_type == "none"), layer.name
            after = NORMS if norm_type != "none" else (*after_norm, layers.SkipInit)
            assert len(takers) == 1 and isinstance(takers[0], after), layer.name
        if isinstance(layer, NORMS):
            assert isinstance(sources[0], keras.layers.Conv2D), layer.name
            assert len(takers) == 1 and isinstance(takers[0], after_norm), layer.name
            assert layer.epsilon == 1e-5, layer.name  # the same for BN and GN, unlike in the original repo
        if isinstance(layer, keras.layers.Add):  # ... plus the shortcut, then relu
            assert len(sources) == 2 and len(takers) == 1 and isinstance(takers[0], keras.layers.ReLU)
        if isinstance(layer, keras.layers.Dense):
            assert layer.use_bias
    activations = of_type(model, ACTIVATIONS)
    slopes = {layer.get_config()["negative_slope"] for layer in activations}
    assert slopes == ({0.2} if name == "convnet" else {0.0}) and len(activations) <= len(convolutions) + 3
    dropouts = [layer.rate for layer in of_type(model, keras.layers.Dropout)]
    assert dropouts == [0.5] * (4 if name == "convnet" else 0)  # as in the original repo


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
    model = built(name, shape, classes)
    shapes = [layer.output.shape for layer in of_type(model, keras.layers.Add)]
    assert list(dict.fromkeys(shapes)) == [(None, side, side, channels) for side, channels in sizes]
    pools = of_type(model, keras.layers.MaxPooling2D)
    assert [(pool.pool_size, pool.strides) for pool in pools] == [((3, 3), (2, 2))] * (name != "resnet8")


@pytest.mark.parametrize("case", [case for case in WALKED if case[0] != "convnet" and case[3] != "none"])
def test_the_last_gamma_of_each_block_starts_at_0(case):
    """arXiv 1803.08494, section 4.1: gamma is 0 in the last norm of each residual block and 1 elsewhere, beta 0."""
    model = built(*case)
    graph = {layer.name: (layer, sources, takers) for layer, sources, takers in structure(model)}
    zeros = 0
    for layer, sources, takers in graph.values():
        if isinstance(layer, NORMS):
            into_block = graph[sources[0].name][1][0]  # what the convolution before the norm takes
            # a projection shortcut also ends at the Add, but takes the block's input, which the block takes too
            last = isinstance(takers[0], keras.layers.Add) and len(graph[into_block.name][2]) == 1
            np.testing.assert_array_equal(layer.gamma, np.full(layer.gamma.shape, 0.0 if last else 1.0), layer.name)
            np.testing.assert_array_equal(layer.beta, np.zeros(layer.beta.shape), layer.name)
            zeros += last
    assert zeros == {"resnet8": 3, "resnet18": 8, "resnet50": 16}[case[0]] == len(of_type(model, keras.layers.Add))


# of resnet110 the two norms that differ most
STARTS = [(name, norm) for name in ("convnet", "resnet8", "resnet20", "resnet50") for norm in config.NORM_TYPES]


@pytest.mark.parametrize("name, norm_type", [*STARTS, ("resnet110", "none"), ("resnet110", "group")])
def test_every_network_starts_near_the_loss_of_a_guess(name, norm_type):
    """log(10), with norms and without: resnet50 without a norm started at 308, resnet110 at 1.4e9."""
    keras.utils.set_random_seed(0)
    side = 64 if name == "resnet50" else 32
    model = build(name, (side, side, 3), norm_type=norm_type)
    x = np.random.default_rng(0).random((16, side, side, 3), np.float32)
    loss = keras.losses.sparse_categorical_crossentropy(np.arange(16) % 10, model(x, training=True), from_logits=True)
    assert abs(float(np.mean(loss)) - math.log(10)) < 0.25


def test_without_norms_each_block_ends_in_a_scalar_at_0():
    """SkipInit (arXiv 2002.10444): the block is its shortcut at first, and the scalar is learned."""
    model = build("resnet20", norm_type="none")
    scalars = of_type(model, layers.SkipInit)
    assert len(scalars) == 9 == len(of_type(model, keras.layers.Add))
    assert all(layer.scale.trainable and layer.scale.numpy() == 0 and layer.scale.shape == () for layer in scalars)
    scalars[0].scale.assign(2.5)
    x = images(2, scalars[0].input.shape[1:])
    np.testing.assert_array_equal(scalars[0](x), np.float32(2.5) * x)
    assert not of_type(built("resnet8", norm_type="group"), layers.SkipInit)


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
        ("resnet18", {"groups": 16}, lambda channels: 16),
        ("resnet8", {"groups": 1}, lambda channels: 1),
        ("resnet18", {"group_size": 64}, lambda channels: channels // 64),
        ("resnet8", {"groups": 4, "group_size": 16}, lambda channels: channels // 16),
        ("resnet8", {"norm_type": "layer"}, lambda channels: 1),
        ("resnet8", {"norm_type": "instance"}, lambda channels: channels),
    ],
)
def test_groups_of_every_norm(name, flags, groups):
    """groups, group_size or the default reach every norm of the model, never clamped to the channels."""
    norms = of_type(build(name, **{"norm_type": "group", **flags}), NORMS)
    assert norms and all(layer.groups == groups(layer.gamma.shape[0]) for layer in norms)


@pytest.mark.parametrize("standardized", [False, True])
@pytest.mark.parametrize("norm_type", ["batch", "batch+renorm"])
def test_weight_standardization_and_momentum_reach_every_layer(norm_type, standardized):
    """And Keras' batch renormalization has the bounds of arXiv 1702.03275, section 4: r up to 3, d up to 5."""
    flags = {"norm_type": norm_type, "weight_standardization": standardized, "batch_norm_momentum": 0.7}
    model = build("resnet8", **flags)
    convolutions = of_type(model, keras.layers.Conv2D)
    assert {isinstance(layer, layers.StandardizedConv2D) for layer in convolutions} == {standardized}
    wanted = {"momentum": 0.7, "epsilon": 1e-5}
    if norm_type == "batch+renorm":
        wanted |= {"renorm": True, "renorm_momentum": 0.7, "renorm_clipping": {"rmin": 1 / 3, "rmax": 3.0, "dmax": 5.0}}
    for layer in of_type(model, LAYER_OF[norm_type]):
        assert wanted.items() <= layer.get_config().items()


@pytest.mark.parametrize("norm_type", config.NORM_TYPES)
@pytest.mark.parametrize("name", ["convnet", "resnet8"])
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


def test_training_mode_differs_where_it_should():
    """In training batch norm mixes images and moves its statistics, dropout drops, group norm does as in inference."""
    keras.utils.set_random_seed(0)
    x = images(5)
    group = randomize(build("resnet8", norm_type="group"))
    np.testing.assert_array_equal(group(x, training=True), group(x, training=False))
    batch = randomize(build("resnet8"))
    statistics = [weight.numpy() for weight in batch.non_trainable_weights]
    together, some = batch(x, training=True).numpy(), batch(x[:2], training=True).numpy()
    assert np.abs(together[:2] - some).max() > 1e-2 * np.abs(together).max()
    for old, weight in zip(statistics, batch.non_trainable_weights):
        assert (weight.numpy() != old).all(), weight.path
    convnet = randomize(build("convnet", norm_type="none"))
    assert (convnet(x, training=True).numpy() != convnet(x, training=True).numpy()).any()


@pytest.mark.parametrize("name", ["convnet", "resnet8"])
def test_logits_are_linear(name):
    """No activation on the logits: other signs of the last layer give other signs of the logits."""
    model = randomize(build(name))
    x, logits = images(2), model.get_layer("logits")
    plain = model(x).numpy()
    logits.set_weights([-3 * value for value in logits.get_weights()])
    np.testing.assert_allclose(model(x), -3 * plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm_type", ["group", "batch"])
def test_logits_and_weights_are_float32_in_bfloat16(norm_type):
    """With --dtype bfloat16 the network computes in bfloat16, its weights and logits stay float32."""
    model = build("resnet8", norm_type=norm_type, dtype="bfloat16")
    assert {layer.compute_dtype for layer in of_type(model, NORMS + (keras.layers.Conv2D,))} == {"bfloat16"}
    assert {weight.dtype for weight in model.weights} == {"float32"}
    logits = model(images(2), training=True)
    assert logits.dtype == "float32" and np.isfinite(logits).all()
    rounded = keras.ops.cast(keras.ops.cast(logits, "bfloat16"), "float32")
    assert (np.asarray(rounded) != np.asarray(logits)).any()  # computed in float32, not only cast to it


@pytest.mark.parametrize("name, norm_type", [("resnet8", "group"), ("resnet8", "batch"), ("resnet18", "group")])
def test_resnets_take_images_of_any_size(name, norm_type):
    """Height and width may be None: the same weights serve every size."""
    model, fixed = (randomize(build(name, (*sides, 1), 3, norm_type=norm_type)) for sides in ((None, None), (40, 24)))
    for shape in ((40, 24, 1), (33, 47, 1)):
        logits = model(images(2, shape))
        assert logits.shape == (2, 3) and np.isfinite(logits).all()
    x = images(2, (40, 24, 1))
    np.testing.assert_allclose(model(x), fixed(x), rtol=1e-5, atol=1e-5)


RESNET50 = "--model resnet50 --image_size 224 224 3 --classes 1000"
SMALL = "--model resnet8 --norm_type group --group_size 4 --classes 7 --image_size 20 24 1 --weight_standardization"


@pytest.mark.parametrize(
    "flags, words",
    [  # 25,557,032 parameters that are trained, and 2 statistics for each of 26,560 channels
        (
            RESNET50,
            "25,610,152 25,557,032 53,120 (None,~112,~112,~64) (None,~7,~7,~2048) (None,~1000) BatchNorm logits",
        ),
        (SMALL, "resnet8 GroupNorm (None,~20,~24,~1) (None,~7) StandardizedConv2D"),
    ],
)
def test_command_prints_the_table(flags, words):
    """`python model.py` prints every layer and the totals for the flags given, and nothing on stderr."""
    done = subprocess.run(scripts.command("model.py", *flags.split()), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stderr == ""
    for word in words.split():
        assert word.replace("~", " ") in done.stdout, word


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--groups 7 --norm_type group", ["16 channels", "7 groups", "1, 2, 4, 8, 16"]),
        ("--groups 32 --norm_type group", ["16 channels", "32 groups", "1, 2, 4, 8, 16"]),
        ("--groups 128 --norm_type group --model resnet18", ["64 channels", "128 groups", "1, 2, 4, 8, 16, 32, 64"]),
        ("--group_size 5 --norm_type group", ["16 channels", "groups of 5", "1, 2, 4, 8, 16"]),
        ("--group_size 32 --norm_type group", ["16 channels", "groups of 32", "1, 2, 4, 8, 16"]),
        ("--groups 4", ["--groups 4", "--norm_type batch", "--norm_type group"]),
        ("--group_size 4 --norm_type none", ["--group_size 4", "--norm_type none"]),
        ("--groups 4 --group_size 4 --norm_type group", ["--groups", "--group_size"]),
        ("--groups 0 --norm_type group", ["--groups", "at least 1", "0"]),
        ("--groups four --norm_type group", ["--groups", "int", "four"]),
        ("--image_size 0 0 3", ["--image_size", "at least 1", "0"]),
        ("--classes 1", ["--classes", "at least 2", "1"]),
        ("--model resnet9", ["resnet9", "resnet8", "resnet50"]),
        ("--norm_type weight", ["weight", "batch", "group"]),
        ("--model convnet --norm_type instance --image_size 16 16 3", ["512 channels", "single value"]),
    ],
)
def test_wrong_flags_end_in_one_line(flags, words):
    """With exit code 2, the wrong value and what would be right; a flag that has no effect is wrong, too."""
    error = scripts.run("model.py", *flags.split(), code=2)
    for word in words:
        assert word in error
