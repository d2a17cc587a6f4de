"""trainer.py, as users run it and step by step against independent formulas."""

import json
import math
import os
import platform
import signal
import subprocess
import sys
import time

import h5py
import keras
import kill_trainer
import numpy as np
import pytest
import scripts
import tensorflow as tf

import checkpoints
from config import Config, derive, parse_training, read_config, write_config
import datasets
import download
import evaler
import input_ops
import layers
import ops
import runs
import summaries
import trainer
from model import create_model

SMALL = ("--dataset", "Digits", "--model", "resnet8", "--max_batch_size", "32")


def configuration(data_dir, *flags):
    """(config, train, test) as trainer.py makes them of flags."""
    parsed, _ = parse_training([*SMALL, "--data_dir", data_dir, *map(str, flags)])
    train, test = download.load_splits(parsed.dataset, parsed.data_dir, parsed.validation)
    return derive(parsed, train), train, test


def machinery(data_dir, *flags):
    """What a run consists of: config, model, optimizer, totals and the graph of a step."""
    config, train, _ = configuration(data_dir, *flags)
    keras.utils.set_random_seed(config.seed)
    model = create_model(config, train.image_shape, train.num_classes)
    state = trainer.State(model, config)
    return config, model, state.optimizer, state.totals, trainer.make_train_step(state)


def random_batch(count, seed=0):
    rng = np.random.default_rng(seed)
    return tf.constant(rng.random((count, 8, 8, 1)), tf.float32), tf.constant(rng.integers(0, 10, count), tf.int32)


# ------------------------------------------------------------------------------------------- a run from outside


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    """A run of 9 steps that logged, tested and saved at intervals which do not divide 9, and what it printed."""
    train_dir = tmp_path_factory.mktemp("finished")
    printed = scripts.run(
        "trainer.py",
        *SMALL,
        *"--norm_type group --batch_size 8 --max_training_step 9 --log_step 2 --write_summary_step 4".split(),
        *"--test_sample_step 5 --ckpt_save_step 4 --learning_rate 0.01 --prefix mine --data_dir".split(),
        data_dir,
        "--train_dir",
        train_dir,
    )
    return scripts.only_run(train_dir), printed


def test_run_folder(finished):
    run_dir, printed = finished
    assert run_dir.name.startswith("mine-Digits_lr_0.01_bs_8_norm_type_group-20")
    assert str(run_dir) in printed
    config = json.loads((run_dir / "config.json").read_text())
    assert config["flags"]["seed"] == 0 and config["flags"]["batch_size"] == 8
    assert config["derived"]["updates_per_step"] == 4 and config["derived"]["groups"] == 16
    assert config["versions"]["tensorflow"] == tf.__version__
    assert config["data"] | {"class_names": 0} == {
        "train": 1437,
        "test": 360,
        "image_shape": [8, 8, 1],
        "num_classes": 10,
        "class_names": 0,
        "made_from": "the original archives",
    }


def test_metrics_have_a_row_each_interval_and_the_end(finished):
    rows = scripts.metrics(finished[0], without=())
    assert [row["step"] for row in rows] == [2, 4, 5, 6, 8, 9]
    assert [row["step"] for row in rows if "test_loss/accuracy" in row] == [5, 9]
    for row in rows:
        assert 0 <= row["loss/accuracy"] <= 1 and math.isfinite(row["loss/loss"]) and row["images_per_second"] > 0


def test_the_rate_in_use_is_scaled_and_logged(finished):
    """--learning_rate is the rate at max_batch_size, the log has what the optimizer used (cosine here)."""
    for row in scripts.metrics(finished[0]):
        used = 0.01 * 8 / 32 * 0.5 * (1 + math.cos(math.pi * (row["step"] - 1) / 9))
        assert row["learning_rate"] == pytest.approx(used, rel=1e-6)


def test_the_last_step_is_saved(finished):
    """The original repo saved every so many steps only, and lost the rest."""
    assert tf.train.latest_checkpoint(finished[0]).endswith("model-9")
    assert scripts.checkpoint(finished[0])["step/.ATTRIBUTES/VARIABLE_VALUE"] == 9
    assert {path.name for path in finished[0].glob("model-*.index")} == {
        "model-4.index",
        "model-8.index",
        "model-9.index",
    }


def test_tensorboard_serves_the_tags_of_the_original_repo(finished):
    """TensorBoard itself, on loopback, reads the scalars, the images and the settings of the run."""
    import socket
    import sys
    import urllib.request

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "tensorboard.main",
            "--logdir",
            str(finished[0].parent),
            "--port",
            str(port),
            *"--host 127.0.0.1 --load_fast false --reload_interval 1".split(),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def get(path):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/data/plugin/{path}", timeout=5) as answer:
            return json.load(answer)

    run_name = finished[0].name
    wanted = {
        "loss/accuracy",
        "loss/loss",
        "test_loss/accuracy",
        "test_loss/loss",
        "learning_rate",
        "images_per_second",
    }
    try:
        deadline, tags = time.monotonic() + 60, {}
        while not (wanted <= tags.keys()):
            assert time.monotonic() < deadline, f"TensorBoard shows {sorted(tags)}"
            try:
                tags = get("scalars/tags").get(run_name, {})
            except OSError:  # it is still starting
                time.sleep(0.2)
        for tag in wanted:
            points = get(f"scalars/scalars?run={run_name}&tag={tag}")
            rows = {row["step"]: row[tag] for row in scripts.metrics(finished[0], without=()) if tag in row}
            assert [step for _, step, _ in points] == ([5, 9] if tag.startswith("test") else [4, 5, 8, 9])
            for _, step, value in points:
                assert value == pytest.approx(rows[step], rel=1e-6)
        assert {"img/image", "test_img/image"} <= get("images/tags")[run_name].keys()
    finally:
        server.terminate()
        server.wait()


# ------------------------------------------------------------------------------------- the step, against formulas


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
@pytest.mark.parametrize("scale", [1.0, 1e4])  # 1e4: gradients beyond the clipping norm of 20
def test_two_updates_against_the_papers_formulas(data_dir, optimizer, scale):
    """One optimizer, one set of slots. Clipped gradients with L2 decay, in float64 by the definitions."""
    config, model, updater, totals, step = machinery(
        data_dir,
        "--norm_type",
        "group",
        "--optimizer",
        optimizer,
        *"--weight_decay 0.01 --batch_size 16 --max_batch_size 16".split(),
    )
    model.get_layer("logits").kernel.assign(model.get_layer("logits").kernel * scale)
    weights = [variable.numpy().astype(np.float64) for variable in model.trainable_variables]
    m, v = ([np.zeros_like(w) for w in weights] for _ in range(2))
    updater.learning_rate.assign(0.003)
    for t in (1, 2):
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
        weights = [variable.numpy().astype(np.float64) for variable in model.trainable_variables]
    assert totals.numpy()[2] == 16


def test_totals_are_the_sums_of_losses_right_predictions_and_images(data_dir):
    """Of each step alone, at rate 0, against the logits in float64."""
    _, model, _, totals, step = machinery(data_dir, "--norm_type", "group", "--max_batch_size", 16)
    model.get_layer("logits").kernel.assign(model.get_layer("logits").kernel * 100)  # predictions of all kinds
    for seed in (1, 2):
        images, labels = random_batch(16, seed)
        logits, rows = model(images, training=True).numpy().astype(np.float64), np.arange(16)
        labels_of = np.where(rows % 3 == 0, logits.argmax(axis=1), labels)  # some of them right
        losses = np.log(np.exp(logits).sum(axis=1)) - logits[rows, labels_of]
        expected = losses.sum(), (logits.argmax(axis=1) == labels_of).sum(), 16
        step(images, tf.constant(labels_of, tf.int32))
        assert 6 <= expected[1] < 12
        np.testing.assert_allclose(totals.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("optimizer", ["adam", "momentum"])
def test_a_run_updates_with_its_optimizer_and_weight_decay(optimizer, main_of, data_dir, tmp_path):
    """Where the penalty is nearly all of the gradient, gamma's included, Adam first goes the rate towards zero, and
    momentum goes 20 times the rate, the clipping norm, shared as the weights are."""
    flags = *"--norm_type batch --learning_rate 0.01 --weight_decay 1000 --optimizer".split(), optimizer
    weights = {variable.path: variable.numpy() for variable in machinery(data_dir, *flags)[1].trainable_variables}
    norm = math.sqrt(sum((weight**2).sum() for weight in weights.values()))
    main_of(*SMALL, *flags, "--max_training_step", 1, "--data_dir", data_dir, "--train_dir", tmp_path)
    stored = scripts.checkpoint(scripts.only_run(tmp_path))
    for path, weight in weights.items():
        large = np.abs(weight) > 0.01
        moved = weight - stored[f"model/{path.replace('/', '.S')}/.ATTRIBUTES/VARIABLE_VALUE"]
        expected = np.sign(weight) if optimizer == "adam" else 20 * weight / norm
        np.testing.assert_allclose(moved[large], 0.01 * expected[large], rtol=0.02, atol=1e-5, err_msg=path)


def test_a_step_is_max_batch_size_images_in_equal_updates(data_dir):
    """Four updates of 8 images are what one call does, and equal four steps of 8 images."""
    images, labels = random_batch(32)
    _, model, updater, totals, step = machinery(data_dir, "--norm_type", "batch", "--batch_size", 8)
    _, other, other_updater, other_totals, other_step = machinery(
        data_dir, "--norm_type", "batch", "--batch_size", 8, "--max_batch_size", 8
    )
    for norm, other_norm in zip(model.layers, other.layers):
        if hasattr(norm, "momentum"):
            other_norm.momentum = norm.momentum
    for each in (updater, other_updater):
        each.learning_rate.assign(1e-3)
    step(images, labels)
    sums = np.zeros(3)
    for i in range(4):
        other_step(images[8 * i : 8 * i + 8], labels[8 * i : 8 * i + 8])
        sums += other_totals.numpy()
    for variable, expected in zip(model.variables, other.variables):
        np.testing.assert_array_equal(variable.numpy(), expected.numpy(), err_msg=variable.path)
    np.testing.assert_allclose(totals.numpy(), sums, rtol=1e-12)


@pytest.mark.parametrize("norm_type, alike", [("group", True), ("batch", False)])
@pytest.mark.parametrize("optimizer", ["adam", "momentum"])
def test_accumulated_gradients_are_those_of_the_whole_step(norm_type, alike, optimizer, data_dir):
    """Two steps of one update: of 32 images at once, and of 8 batches of 4, which only batch norm can tell apart."""
    ends = []
    for flags in ((), ("--accumulate", "--batch_size", 4)):
        config, model, updater, totals, step = machinery(
            data_dir, "--norm_type", norm_type, "--optimizer", optimizer, *flags
        )
        assert config.updates_per_step == 1 and config.peak_learning_rate == config.base_learning_rate
        updater.learning_rate.assign(0.01)
        for seed in (1, 2):
            finite, loss, _ = step(*random_batch(32, seed))
        ends.append([variable.numpy() for variable in model.trainable_variables])
        assert finite and totals.numpy()[0] / 32 == pytest.approx(float(loss), rel=1e-6)
    apart = max(np.abs(one - other).max() for one, other in zip(*ends))
    assert apart < 1e-5 if alike else apart > 1e-4, apart


def test_schedules():
    def rates(schedule, warmup=0, steps=100):
        config = Config(lr_schedule=schedule, warmup_steps=warmup, peak_learning_rate=2.0, max_training_step=steps)
        return [trainer.learning_rate_at(step, config) for step in range(steps)]

    assert rates("constant") == [2.0] * 100
    assert rates("step") == pytest.approx([2.0] * 30 + [0.2] * 30 + [0.02] * 30 + [0.002] * 10)
    cosine = rates("cosine", warmup=10)
    assert cosine[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert cosine[10] == 2.0 and cosine[55] == pytest.approx(1.0) and 0 < cosine[99] < 0.001


@pytest.mark.parametrize(
    "flags, scaling, share",
    [
        (("--optimizer", "momentum"), "linear", 2 / 32),
        (("--optimizer", "adam"), "square root", math.sqrt(2 / 32)),
        ((), "linear", 2 / 32),
        (("--model", "convnet"), "square root", math.sqrt(2 / 32)),
        (("--optimizer", "adam", "--no_adjust_learning_rate"), "none", 1),
    ],
)
def test_the_rate_scales_as_its_optimizer_needs(flags, scaling, share, data_dir):
    """Linear for momentum, as resnets have it by default, square root for Adam, as convnet does."""
    config, _, _ = configuration(data_dir, "--batch_size", 2, "--learning_rate", 0.5, *flags)
    assert config.learning_rate_scaling == scaling
    assert config.peak_learning_rate == pytest.approx(0.5 * share, rel=1e-12)


@pytest.mark.parametrize(
    "dataset, augment, optimizer",
    [
        ("MNIST", None, "momentum"),
        ("CIFAR10", "flip+crop", "momentum"),
        ("Fashion", "flip+crop", "momentum"),
        ("SVHN", None, "momentum"),
        ("OWN", None, "momentum"),
    ],
)
def test_defaults_of_a_dataset(dataset, augment, optimizer, digits):
    """A mirrored digit is another sign; photographs are mirrored. Weights decay by 1e-4 with momentum."""
    config = derive(parse_training(["--dataset", dataset])[0], digits[0])
    assert (config.augment, config.optimizer, config.weight_decay) == (augment, optimizer, 1e-4)
    assert (config.base_learning_rate, config.lr_schedule) == (0.2, "cosine")
    assert (config.batch_size, config.max_batch_size, config.updates_per_step) == (64, 64, 1)
    epochs = {"MNIST": 5, "Fashion": 10, "SVHN": 10, "CIFAR10": 30, "OWN": 30}[dataset]
    assert config.max_training_step == epochs * math.ceil(1437 / 64)


def recipe(train, *flags):
    """The configuration of a run on ImageNet with these flags; its images are stood in for by `train`."""
    return derive(parse_training(["--dataset", "ImageNet", *map(str, flags)])[0], train)


def test_imagenet_is_trained_as_in_the_paper(digits):
    """arXiv 1803.08494, section 4.1, without a flag: 0.1 at 256 images, a tenth at 30, 60 and 90 of 100 epochs."""
    config, epoch = recipe(digits[0]), math.ceil(1437 / 256)
    assert (config.batch_size, config.max_batch_size, config.updates_per_step) == (32, 256, 8)
    assert (config.optimizer, config.weight_decay, config.augment) == ("momentum", 1e-4, "flip+crop")
    assert config.base_learning_rate == 0.1 and config.peak_learning_rate == pytest.approx(0.1 * 32 / 256)
    assert (config.max_training_step, config.test_sample_step) == (100 * epoch, epoch)
    for epochs, share in ((0, 1), (30, 0.1), (60, 0.01), (90, 0.001)):
        rates = [trainer.learning_rate_at(epochs * epoch + step, config) for step in (0, 30 * epoch - 1)][
            : 1 + (epochs < 90)
        ]
        assert rates == pytest.approx([0.1 * 32 / 256 * share] * len(rates))


@pytest.mark.parametrize(
    "flags, expected",
    [
        (("--batch_size", 2), {"batch_size": 2, "max_batch_size": 256, "peak_learning_rate": 0.1 * 2 / 256}),
        (("--batch_size", 256), {"updates_per_step": 1, "peak_learning_rate": 0.1}),
        (("--max_batch_size", 64), {"batch_size": 32, "base_learning_rate": 0.025, "peak_learning_rate": 0.0125}),
        (("--max_batch_size", 16), {"batch_size": 16, "peak_learning_rate": 0.1 * 16 / 256}),
        (("--max_batch_size", 48), {"batch_size": 48, "peak_learning_rate": 0.1 * 48 / 256}),
        (("--learning_rate", 0.3), {"base_learning_rate": 0.3, "peak_learning_rate": 0.3 * 32 / 256}),
        (("--no_adjust_learning_rate",), {"peak_learning_rate": 0.1}),
        (("--optimizer", "adam"), {"base_learning_rate": 1e-3, "weight_decay": 0}),
        (("--lr_schedule", "cosine"), {"lr_schedule": "cosine"}),
        (("--max_training_step", 7), {"max_training_step": 7}),
        (("--no_augment",), {"augment": None}),
        (("--weight_decay", 0), {"weight_decay": 0}),
    ],
)
def test_flags_win_over_a_recipe(flags, expected, digits):
    config = recipe(digits[0], *flags)
    assert {name: getattr(config, name) for name in expected} == pytest.approx(expected)


def test_a_run_folder_of_before_recipes_is_read_as_it_was(finished, tmp_path):
    """Then the flags alone said max_batch_size and lr_schedule."""
    stored = json.loads((finished[0] / "config.json").read_text())
    whole = read_config(finished[0])[0]
    for name in ("max_batch_size", "lr_schedule"):
        stored["flags"][name] = stored["derived"].pop(name)
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert read_config(tmp_path)[0] == whole and (whole.max_batch_size, whole.lr_schedule) == (32, "cosine")


@pytest.mark.parametrize(
    "flags, augment",
    [
        (("--augment",), "flip+crop"),
        (("--augment", "crop"), "crop"),
        (("--augment", "flip+crop"), "flip+crop"),
        ((), None),
    ],
)
def test_augmentations(flags, augment, data_dir):
    assert configuration(data_dir, *flags)[0].augment == augment


def test_no_adjust_learning_rate_has_an_effect(data_dir):
    config, _, _ = configuration(data_dir, "--batch_size", 2, "--learning_rate", 0.5)
    assert config.peak_learning_rate == 0.5 * 2 / 32
    config, _, _ = configuration(data_dir, "--batch_size", 2, "--learning_rate", 0.5, "--no_adjust_learning_rate")
    assert config.peak_learning_rate == 0.5


@pytest.mark.parametrize(
    "flags, norm, expected",
    [
        ("batch", ops.BatchNorm, {"momentum": 0.9, "synchronized": False}),
        ("batch --batch_size 2", ops.BatchNorm, {"momentum": 0.9 ** (2 / 32)}),  # a step forgets a tenth of them
        (
            "batch --batch_size 8 --replicas 2 --sync_batch_norm",
            ops.BatchNorm,
            {"momentum": 0.9**0.5, "synchronized": True},
        ),
        ("batch --dtype bfloat16", ops.BatchNorm, {"compute_dtype": "bfloat16"}),
        ("batch+renorm --batch_size 2", keras.layers.BatchNormalization, {"renorm": True, "momentum": 0.9 ** (2 / 32)}),
        ("batch --weight_standardization", ops.BatchNorm, {}),
        ("group --weight_standardization", ops.GroupNorm, {"groups": (16, 16, 16)}),
        ("group --groups 4", ops.GroupNorm, {"groups": (4, 4, 4)}),
        ("group --group_size 8", ops.GroupNorm, {"groups": (2, 4, 8)}),
        ("layer", ops.GroupNorm, {"groups": (1, 1, 1)}),
        ("instance", ops.GroupNorm, {"groups": (16, 32, 64)}),
        ("none --weight_standardization --dtype bfloat16", None, {}),
    ],
)
def test_the_network_is_what_the_flags_ask_for(flags, norm, expected, data_dir):
    """The kind of its norms and convolutions, the settings of every norm (of 16, 32 and 64 channels), its dtypes."""
    config, train, _ = configuration(data_dir, "--norm_type", *flags.split())
    try:
        model = create_model(config, train.image_shape, train.num_classes)
    finally:
        keras.mixed_precision.set_dtype_policy("float32")
    norms = [layer for layer in model.layers if layer.name.endswith("_norm")]
    convolutions = [layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
    assert (model.name, model.output_shape) == ("resnet8", (None, 10))
    assert {type(layer) for layer in norms} == ({norm} if norm else set())
    standardized = layers.StandardizedConv2D if "--weight_standardization" in flags else layers.Conv2D
    assert {type(layer) for layer in convolutions} == {standardized}
    for name, values in expected.items():
        by_channels = values if isinstance(values, tuple) else (values,) * 3
        assert {(layer.output.shape[-1], getattr(layer, name)) for layer in norms} == set(
            zip((16, 32, 64), by_channels)
        )
    for layer in (*norms, *convolutions):
        assert (layer.compute_dtype, layer.variable_dtype) == (config.dtype, "float32"), layer.name
    assert model.get_layer("logits").compute_dtype == "float32"


def test_speed_counts_neither_the_first_step_nor_what_is_not_training(data_dir, tmp_path, monkeypatch):
    """A clock of our own: steps of 32 images take 2 s, tracing and a test take longer."""
    config, _, test = configuration(data_dir, "--max_training_step", 100, "--log_step", 3, "--write_summary_step", 50)
    now = [1000.0]
    monkeypatch.setattr(summaries.time, "perf_counter", lambda: now[0])
    write_config(tmp_path, config, config, {})
    log = summaries.Log(tmp_path, config, test, first_step=0)
    for step, seconds in enumerate((70, 2, 2, 2, 2, 4), 1):
        now[0] += seconds
        log.stepped(step)
        if step % 3 == 0:
            with log.paused():
                now[0] += 500
            log.write({"step": step, "loss/loss": 0.0, "loss/accuracy": 0.0, "learning_rate": 0.1}, None)
    log.close()
    assert [row["images_per_second"] for row in scripts.metrics(tmp_path, without=())] == [32 * 2 / 4, 32 * 3 / 8]


# -------------------------------------------------------------------------------------------- testing while training


def test_testing_is_in_inference_mode_and_learns_nothing(data_dir, digits):
    """The whole test split, by moving statistics, without dropout; nothing moves."""
    config, train, test = configuration(data_dir, "--norm_type", "batch", "--model", "convnet")
    model = create_model(config, train.image_shape, train.num_classes)
    before = {variable.path: variable.numpy().copy() for variable in model.variables}
    predict = evaler.make_predictor(model)
    results = [
        evaler.evaluate(predict, evaler.create_input_ops(test, size, False), test.labels, 10) for size in (360, 7)
    ]
    assert results[0]["images"] == results[1]["images"] == 360
    assert results[0]["accuracy"] == results[1]["accuracy"]
    np.testing.assert_allclose(results[0]["losses"], results[1]["losses"], rtol=1e-4, atol=1e-5)
    for variable in model.variables:
        np.testing.assert_array_equal(variable.numpy(), before[variable.path])


class StoppedInTest(trainer.Interruption):
    """As if a signal came in the middle of the first test."""

    def __init__(self, alone):
        self.signal, self.worth_saving, self.alone = None, False, alone

    def check(self, batches):
        yield next(iter(batches))
        self.signal = signal.SIGTERM
        raise trainer.Stopped


def test_a_stopped_test_is_made_up_for(main_of, data_dir, tmp_path, monkeypatch):
    """A signal in a test stops it between batches; the run goes on and ends like one left alone, that row included."""
    flags = (
        *SMALL,
        *"--norm_type batch --batch_size 8 --max_training_step 6".split(),
        *"--log_step 2 --test_sample_step 3 --data_dir".split(),
        data_dir,
    )
    main_of(*flags, "--train_dir", tmp_path / "alone")
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "Interruption", StoppedInTest)
        with pytest.raises(SystemExit) as ended:
            main_of(*flags, "--train_dir", tmp_path / "stopped")
    assert ended.value.code == 128 + signal.SIGTERM
    run_dir = scripts.only_run(tmp_path / "stopped")
    assert [row["step"] for row in scripts.metrics(run_dir)] == [2]
    main_of("--resume", run_dir)
    kill_trainer.assert_same_runs(run_dir, scripts.only_run(tmp_path / "alone"))


def test_a_checkpoint_is_written_in_time_whatever_a_step_takes(main_of, data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "CHECKPOINT_SECONDS", 0)
    main_of(*SMALL, "--max_training_step", 3, "--data_dir", data_dir, "--train_dir", tmp_path)
    assert len(list(scripts.only_run(tmp_path).glob("model-*.index"))) == 3


# --------------------------------------------------------------------------------------- a run, watched from within


@pytest.fixture(scope="module")
def watched(data_dir, tmp_path_factory):
    """A run of 5 steps with augmentation and a seed: (run folder, the weights it started from, each step's images,
    labels and loss)."""
    train_dir, weights, steps, make_train_step = tmp_path_factory.mktemp("watched"), [], [], trainer.make_train_step

    def make_watched(state):
        weights.extend(variable.numpy() for variable in state.model.variables)
        train_step = make_train_step(state)

        def step(images, labels, stop):
            finite, loss, stop = train_step(images, labels, stop)
            steps.append((images.numpy(), labels.numpy(), float(loss)))
            return finite, loss, stop

        return step

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(trainer, "make_train_step", make_watched)
        scripts.run_here(
            monkeypatch,
            *SMALL,
            *"--norm_type group --augment --seed 5 --max_training_step 5 --log_step 2 --data_dir".split(),
            data_dir,
            "--train_dir",
            train_dir,
        )
    return scripts.only_run(train_dir), weights, steps


def test_every_row_is_the_mean_over_the_last_log_step_steps(watched):
    """Also the row of a test, here the last one, which follows another after a single step."""
    run_dir, _, steps = watched
    losses = [loss for *_, loss in steps]
    rows = scripts.metrics(run_dir)
    assert [row["step"] for row in rows] == [2, 4, 5]
    for row, window in zip(rows, (losses[:2], losses[2:4], losses[3:])):
        assert row["loss/loss"] == pytest.approx(np.mean(window), rel=1e-6)


def test_a_run_trains_on_augmented_images_of_its_seed(watched, digits):
    _, _, steps = watched
    batches = list(input_ops.create_input_ops(digits[0], 32, True, "flip+crop", seed=5, last_step=5))
    plain, _ = next(iter(input_ops.create_input_ops(digits[0], 32, True, None, seed=5)))
    assert (batches[0][0].numpy() != plain.numpy()).any()
    assert len(steps) == len(batches)
    for (images, labels, _), (expected, expected_labels) in zip(steps, batches):
        np.testing.assert_array_equal(images, expected)
        np.testing.assert_array_equal(labels, expected_labels)


def test_a_run_starts_from_the_weights_of_its_seed(watched, data_dir):
    weights = {
        seed: [
            variable.numpy() for variable in machinery(data_dir, "--norm_type", "group", "--seed", seed)[1].variables
        ]
        for seed in (0, 5)
    }
    for found, expected in zip(watched[1], weights[5], strict=True):
        np.testing.assert_array_equal(found, expected)
    assert (weights[0][0] != weights[5][0]).any()


@pytest.mark.parametrize("flags, compiled", [((), None), (("--jit_compile",), True)])
def test_jit_compile_is_asked_of_tensorflow(flags, compiled, data_dir, monkeypatch):
    asked, function = [], tf.function

    def watched_function(*arguments, **options):
        asked.append(options.get("jit_compile"))
        return function(*arguments, **options)

    monkeypatch.setattr(tf, "function", watched_function)
    machinery(data_dir, *flags)
    assert asked[-1:] == [compiled]


def test_threads_are_set_for_the_images_of_an_update_before_the_network_is_built(data_dir, tmp_path, monkeypatch):
    class Asked(Exception):
        pass

    def set_threads(*arguments):
        raise Asked(arguments)

    flags = (*SMALL, "--batch_size", 2, "--data_dir", data_dir, "--train_dir", tmp_path)
    monkeypatch.setattr(trainer, "set_threads", set_threads)
    monkeypatch.setattr(trainer, "create_model", None)
    with pytest.raises(Asked) as asked:
        trainer.main(*parse_training([*map(str, flags)]))
    assert asked.value.args == ((2, (8, 8, 1)),)


# ------------------------------------------------------------------------------------------------ ways to start


@pytest.mark.parametrize("script", ["trainer", "evaler", "model", "download", "figure/compare", "figure/speed"])
@pytest.mark.parametrize("flag", ["--help", "--no_such_flag"])
def test_flags_are_parsed_before_tensorflow_loads(script, flag):
    """--help and wrong flags take a fraction of a second; TensorFlow takes five."""
    code = (
        f"import runpy, sys; sys.path.insert(0, 'figure'); sys.argv = ['{script}.py', '{flag}']\n"
        f"try:\n runpy.run_path('{script}.py', run_name='__main__')\n"
        f"finally:\n print([name for name in ('tensorflow', 'keras') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=scripts.REPO, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]" and done.returncode == (0 if flag == "--help" else 2)


def test_held_out_images_are_neither_trained_on_nor_the_test_split(data_dir, main_of, capsys, tmp_path):
    """--validation tests on training images that are left out, each class in proportion; evaler.py does the same."""
    whole, _ = datasets.create_default_splits("Digits", data_dir)
    train, held = datasets.create_default_splits("Digits", data_dir, validation=200)
    assert len(held) == 200 and sorted(train.ids + held.ids) == sorted(whole.ids)
    shares = np.bincount(held.labels) / np.bincount(whole.labels)
    assert np.abs(np.bincount(held.labels) - 200 * np.bincount(whole.labels) / 1437).max() <= 1, shares
    for split in (train, held):
        rows = [whole.ids.index(name) for name in split.ids]
        np.testing.assert_array_equal(split.images(), whole.images()[rows])
        np.testing.assert_array_equal(split.labels, whole.labels[rows])
    assert datasets.create_default_splits("Digits", data_dir, validation=200)[1].ids == held.ids
    common = ("--data_dir", data_dir, "--train_dir", tmp_path)
    main_of(*SMALL, *common, "--max_training_step", 2, "--validation", 200)
    run_dir = scripts.only_run(tmp_path)
    config = json.loads((run_dir / "config.json").read_text())
    assert (config["data"]["train"], config["data"]["test"]) == (1237, 200)
    printed = scripts.run("evaler.py", "--dataset", "Digits", *common, "--validation", 200)
    result = json.loads((run_dir / "evaluation.json").read_text())["splits"]["validation"]["accuracy"]
    assert "Digits validation: accuracy" in printed and result["images"] == 200
    assert result["accuracy"] == scripts.metrics(run_dir)[-1]["test_loss/accuracy"]
    with pytest.raises(evaler.UserError, match="held out 200"):
        scripts.evaluate(["--dataset", "Digits", *map(str, common), "--validation", "100"])
    main_of("--resume", run_dir)
    assert "going on at step 2" in capsys.readouterr().out


def test_the_configuration_says_what_made_the_run(finished):
    config = json.loads((finished[0] / "config.json").read_text())
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=scripts.REPO, capture_output=True, text=True)
    assert (config["source"] or {}).get("commit", "") == head.stdout.strip()
    assert config["machine"]["processors"] == os.cpu_count() and config["machine"]["processor"]


def test_hparams_has_every_setting_that_is_not_its_default(finished):
    from tensorboard.plugins.hparams import plugin_data_pb2

    shown = {}
    for path in finished[0].glob("events.out.tfevents.*"):
        for event in scripts.events(path):
            for value in event.summary.value:
                if value.tag == "_hparams_/session_start_info":
                    content = plugin_data_pb2.HParamsPluginData.FromString(value.metadata.plugin_data.content)
                    shown = {
                        name: getattr(held, held.WhichOneof("kind"))
                        for name, held in content.session_start_info.hparams.items()
                    }
    assert shown == {
        "dataset": "Digits",
        "norm_type": "group",
        "batch_size": 8,
        "learning_rate": 0.01,
        "seed": 0,
        "model": "resnet8",
        "optimizer": "momentum",
        "weight_standardization": False,
        "max_batch_size": 32,
        "max_training_step": 9,
        "test_sample_step": 5,
        "ckpt_save_step": 4,
    }


def test_the_first_line_comes_before_tensorflow_and_says_what_comes(finished):
    lines = finished[1].splitlines()
    assert lines[0] == "Digits: 1437 train, 360 test images of 8x8x1 in 10 classes"
    assert lines[1].startswith("resnet8, group norm: 9 steps of 32 images, in 4 updates each; 2 tests.")
    assert any(line.startswith("about 0:00:0") and "tests included" in line for line in lines)


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--norm_type", "batch"), "--norm_type group, which cannot become batch"),
        (("--norm_type", "none"), "--norm_type group, which cannot become none"),
        (("--norm_type", "group", "--weight_standardization"), "--weight_standardization False, not True"),
        (("--norm_type", "group", "--model", "resnet14"), "--model resnet8, not resnet14"),
    ],
)
def test_checkpoint_of_another_network_is_refused(flags, said, finished, data_dir):
    config, _, _ = configuration(data_dir, *flags)
    other, _ = read_config(finished[0])
    with pytest.raises(evaler.UserError, match=said):
        checkpoints.check_convertible(config, other, finished[0])


@pytest.mark.parametrize("flag", [("--dtype", "bfloat16"), ("--jit_compile",)])
@pytest.mark.parametrize("norm_type", ["batch", "group"])
def test_other_ways_to_compute_learn_the_same(flag, norm_type, data_dir, digits):
    """Mixed precision and XLA start from the same loss as float32 and TensorFlow's kernels, and move alike."""
    images = tf.constant(digits[0].images()[:32] / np.float32(255))
    labels = tf.constant(digits[0].labels[:32])
    losses = []
    try:
        for flags in ((), flag):
            _, _, optimizer, _, step = machinery(data_dir, "--norm_type", norm_type, "--batch_size", 8, *flags)
            optimizer.learning_rate.assign(1e-3)
            losses.append([float(step(images, labels)[1]) for _ in range(6)])
    finally:
        keras.mixed_precision.set_dtype_policy("float32")
    assert losses[0][-1] < losses[0][0]
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.05)  # bfloat16 has 3 digits


def test_own_dataset_trains_and_evaluates_with_no_code_touched(tmp_path):
    """The original repo's layout, by name alone."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "data" / "MY_SHAPES"
    folder.mkdir(parents=True)
    with h5py.File(folder / "data.hy", "w") as file:
        for i in range(60):
            image = rng.integers(0, 60, (12, 10, 3))
            image[:, :5] += (i % 2) * 150
            file[f"{i}/image"] = image.astype(np.uint8)
            file[f"{i}/label"] = np.eye(2)[i % 2]
    (folder / "id.txt").write_text("".join(f"{i}\n" for i in range(60)))
    common = ("--dataset", "MY_SHAPES", "--data_dir", tmp_path / "data", "--train_dir", tmp_path / "runs")
    scripts.run(
        "trainer.py",
        *common,
        *"--norm_type group --model resnet8 --batch_size 4".split(),
        *"--max_batch_size 8 --max_training_step 40 --learning_rate 0.1".split(),
    )
    printed = scripts.run("evaler.py", *common)
    assert "12 images" in printed and "accuracy 100.00 %" in printed


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_go_on(stop, data_dir, tmp_path):
    flags = (*SMALL, "--max_training_step", 100000, "--log_step", 1, "--data_dir", data_dir, "--train_dir", tmp_path)
    process = subprocess.Popen(scripts.command("trainer.py", *flags), stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step"):
            break
    process.send_signal(stop)
    rest = process.stdout.read()
    assert process.wait() == 128 + stop
    run_dir = scripts.only_run(tmp_path)
    saved = int(scripts.checkpoint(run_dir)["step/.ATTRIBUTES/VARIABLE_VALUE"])
    assert f"after step {saved}, which is saved" in rest and f"--resume {run_dir}" in rest
    assert scripts.metrics(run_dir)[-1]["step"] == saved


@pytest.mark.parametrize("lines, signals", [("run folder", 1), ("step", 2)])
def test_a_signal_before_the_first_step_and_a_second_one_end_the_process_at_once(lines, signals, data_dir, tmp_path):
    """Steps that take long: nothing is waited for, where there is nothing to save or the user insists."""
    flags = (
        *"--dataset Digits --model resnet110 --max_batch_size 1024".split(),
        *"--max_training_step 1000 --log_step 1 --test_sample_step 1000 --data_dir".split(),
        data_dir,
        "--train_dir",
        tmp_path,
    )
    process = subprocess.Popen(
        scripts.command("trainer.py", *flags), stdout=subprocess.PIPE, text=True, stderr=subprocess.PIPE
    )
    for line in process.stdout:
        if line.startswith(lines):
            break
    time.sleep(0.3)
    for _ in range(signals):
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    began = time.monotonic()
    _, error = process.communicate()
    assert time.monotonic() - began < 2 and process.returncode == 130
    assert len(error.splitlines()) == 1 and ("SIGINT" in error or "interrupted" in error), error
    assert not list(scripts.only_run(tmp_path).glob("model-*"))


def test_divergence_stops_the_run_and_keeps_the_last_good_checkpoint(data_dir, tmp_path):
    error = scripts.run(
        "trainer.py",
        *SMALL,
        *"--norm_type none --optimizer momentum --learning_rate 1000000000.0".split(),
        *"--max_training_step 50 --ckpt_save_step 1 --data_dir".split(),
        data_dir,
        "--train_dir",
        tmp_path,
        code=1,
    )
    run_dir = scripts.only_run(tmp_path)
    last = scripts.checkpoint(run_dir)
    step = int(last["step/.ATTRIBUTES/VARIABLE_VALUE"])
    assert f"diverged at step {step + 1}" in error and "1e+09" in error and f"model-{step}" in error
    assert all(np.isfinite(value).all() for name, value in last.items() if name.startswith("model/"))


def test_a_step_ends_with_the_update_that_failed(main_of, tmp_path):
    """16 updates of one image each. One of each class is so bright that the norm of a wrong one's gradient is infinite,
    which clipping makes an update of nothing: the next updates would succeed, and the run would go on."""
    folder = tmp_path / "data" / "BRIGHT"
    folder.mkdir(parents=True)
    with h5py.File(folder / "data.hy", "w") as file:
        for i in range(20):
            file[f"{i}/image"] = np.full((8, 8, 1), 1e20 if i < 2 else 0.5, np.float32)
            file[f"{i}/label"] = np.eye(2)[i % 2]
    for name, ids in (("id", range(20)), ("id_train", range(16)), ("id_test", range(16, 20))):
        (folder / f"{name}.txt").write_text("".join(f"{i}\n" for i in ids))
    flags = "--dataset BRIGHT --model resnet8 --norm_type none --batch_size 1 --max_batch_size 16".split()
    flags += "--learning_rate 1e-9 --max_training_step 1".split()
    with pytest.raises(trainer.ExternalError, match="diverged at step 1"):
        main_of(*flags, "--data_dir", tmp_path / "data", "--train_dir", tmp_path / "runs")


def test_runs_of_the_same_second_get_folders_of_their_own(data_dir, tmp_path):
    config, _, _ = configuration(data_dir, "--train_dir", tmp_path)
    folders = {runs.make_run_dir(config) for _ in range(3)}
    assert len(folders) == 3 and all(folder.is_dir() for folder in folders)


def test_two_trainers_and_an_evaler_at_once(data_dir, tmp_path):
    """Two runs of the same flags side by side, of which one is evaluated while it trains."""
    flags = (
        *SMALL,
        *"--max_training_step 60 --log_step 1 --ckpt_save_step 1 --test_sample_step 1000 --data_dir".split(),
        data_dir,
        "--train_dir",
        tmp_path,
    )
    both = [
        subprocess.Popen(scripts.command("trainer.py", *flags), stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    for line in both[0].stdout:
        if line.startswith("step  2"):
            break
    evaluated = scripts.run("evaler.py", "--dataset", "Digits", "--data_dir", data_dir, "--train_dir", tmp_path)
    assert "360 images" in evaluated
    for process in both:
        process.stdout.read()
        assert process.wait() == 0
    runs = list(tmp_path.iterdir())
    assert len(runs) == 2
    assert scripts.metrics(runs[0]) == scripts.metrics(runs[1])
    assert len(scripts.metrics(runs[0])) == 60


# ----------------------------------------------------------------------------------------- TensorFlow's settings


def test_small_updates_take_one_thread_an_operation():
    """Up to 16 images of 32 by 32; TensorFlow's choice (0) above, and where the size of the images is not known."""
    script = (
        "import command, tensorflow as tf\n"
        "for images, shape in ((17, (32, 32, 3)), (64, (None, None, 3)), (16, (32, 32, 3))):\n"
        "    command.set_threads(images, shape)\n"
        "    print(tf.config.threading.get_intra_op_parallelism_threads())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=scripts.REPO, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "0", "1"]


@pytest.mark.parametrize("given", [None, "0"])
def test_onednn_is_on_unless_the_user_says_no(given):
    """On x86; other processors keep TensorFlow's own default."""
    x86 = platform.machine() in ("x86_64", "AMD64")
    then = given or ("1" if x86 else "None")
    environment = {name: value for name, value in os.environ.items() if name != "TF_ENABLE_ONEDNN_OPTS"}
    if given:
        environment["TF_ENABLE_ONEDNN_OPTS"] = given
    script = "import model, os; model.ops.EPSILON; print(os.environ.get('TF_ENABLE_ONEDNN_OPTS'))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=scripts.REPO, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == then


# ------------------------------------------------------------------------------------------------ wrong flags


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--batch_size", "3"), "3"),
        (("--batch_size", "64"), "64"),
        (("--dataset", "ImageNet", "--batch_size", "48"), "48 does not divide --max_batch_size 32"),
        (("--batch_size", "0"), "0"),
        (("--learning_rate", "-1"), "-1"),
        (("--learning_rate", "nan"), "nan"),
        (("--groups", "8"), "--norm_type group"),
        (("--norm_type", "group", "--groups", "4", "--group_size", "4"), "--group_size"),
        (("--augment", "--no_augment"), "--no_augment"),
        (("--seed", "-1"), "-1"),
        (("--log_step", "0"), "0"),
        (("--warmup_steps", "20", "--max_training_step", "10"), "20"),
        (("--prefix", "a/b"), "a/b"),
        (("--max_training_step", "0"), "0"),
        (("--weight_decay", "-0.1"), "-0.1"),
        (("--resume", "somewhere"), "--model resnet8"),
        (("--validation", "0"), "0"),
        (("--augment", "flip"), "flip"),
        (("--prefix", "lr[1]"), "lr[1]"),
        (("--train_dir", "runs*"), "runs*"),
        (("--prefix", "\udcff"), "is not UTF-8"),
    ],
)
def test_wrong_flags_are_named(flags, said, capsys):
    with pytest.raises((trainer.UserError, SystemExit)) as error:
        parse_training([*SMALL, *flags])
    words = str(error.value) if error.type is trainer.UserError else capsys.readouterr().err
    assert said in words and len(words.splitlines()) == 1


@pytest.mark.parametrize("flags", [("--norm_type", "batch"), ("--seed", "0"), ("--batch_size", "32"), ("--augment",)])
def test_flags_beside_resume_are_refused_though_they_are_the_defaults(flags):
    with pytest.raises(trainer.UserError, match=f"{flags[0]} .*has no effect"):
        parse_training(["--resume", "somewhere", *flags])


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--norm_type", "group", "--groups", "7"), "16 channels cannot be split into 7 groups"),
        (("--dataset", "NO_SUCH"), "NO_SUCH"),
        (("--norm_type", "grupo"), "grupo"),
        (("--batch", "2"), "--batch"),
        (("--checkpoint", "/nowhere/model-1"), "/nowhere/model-1"),
        (("--train_dir", "/proc/no"), "/proc/no"),
        (("--model", "resnet18", "--batch_size", "1"), "a single value per channel"),
        (("--validation", "1437"), "1437"),
    ],
)
def test_wrong_flags_end_in_one_line(flags, said, data_dir, tmp_path):
    error = scripts.run("trainer.py", *SMALL, "--data_dir", data_dir, "--train_dir", tmp_path / "runs", *flags, code=2)
    assert said in error
    assert not (tmp_path / "runs").exists()
