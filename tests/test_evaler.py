"""evaler.py: the whole split, in inference mode, the same number that the trainer printed; and its pictures."""

import csv
import dataclasses
import json
import os
import shutil

import archives
import imageio.v3 as iio
import keras
import numpy as np
import pytest
import scripts
import tensorflow as tf

import checkpoints
import download
import evaler
import ops
import summaries
from runs import describe_data, find_run, read_config, write_config
from input_ops import create_input_ops
from model import create_model


@pytest.fixture(scope="module")
def batch_run(data_dir, tmp_path_factory):
    """A short run with batch norm, and what evaler.py printed of it."""
    train_dir = tmp_path_factory.mktemp("batch_run")
    training = "--norm_type batch --augment crop --seed 3 --batch_size 4 --max_training_step 12 --ckpt_save_step 5"
    run_dir = scripts.train(data_dir, train_dir, *training.split())
    choices = "--batch_statistics", "reestimate", "reestimate_small", "batch"
    return run_dir, scripts.recorded(scripts.evaluate_digits, data_dir, run_dir, *choices)[1]


@pytest.fixture
def copied_run(batch_run, tmp_path):
    return shutil.copytree(batch_run[0], tmp_path / "run")


def test_it_agrees_with_the_trainers_last_test(batch_run):
    run_dir, printed = batch_run
    last, results = scripts.metrics(run_dir)[-1], scripts.results_of(run_dir)
    result = results["accuracy"]
    assert result["accuracy"] == last["test_loss/accuracy"] and result["loss"] == last["test_loss/loss"]
    assert (result["images"], result["step"]) == (360, 12)
    assert results["by_batch"]["batch_size"] == 4  # that of training
    for measure in ("accuracy", "reestimated", "reestimated_small"):
        assert f"accuracy {100 * results[measure]['accuracy']:.2f} %" in printed


def test_statistics_are_reestimated_over_training_images_as_the_run_saw_them(batch_run, digits):
    """Cut at random where it trained on such images: in batches of 250, and in batches of its own batch size."""
    run_dir, (train, test) = batch_run[0], digits
    model = scripts.network_of(run_dir)

    def loss(augment, size):
        checkpoints.load_weights(model, run_dir)
        evaler.reestimate_batch_statistics(model, train, size, augment, 3)
        return evaler.evaluate(model, test)["loss"]

    large, small = (scripts.results_of(run_dir)[name]["loss"] for name in ("reestimated", "reestimated_small"))
    assert large == pytest.approx(loss("crop", 250), rel=1e-5) != pytest.approx(loss(None, 250), rel=1e-3)
    assert small == pytest.approx(loss("crop", 4), rel=1e-5)


def test_summaries_and_mistakes_are_pictures(batch_run):
    run_dir, _ = batch_run
    assert iio.imread(run_dir / "mistakes.png").shape[:2] == (1200, 1100)
    assert iio.imread(run_dir / "confusion.png").shape[:2] == (720, 800)
    with open(run_dir / "classes.csv", newline="") as file:
        found = [(row["class"], float(row["accuracy"])) for row in csv.DictReader(file)]
    assert found == list(zip(map(str, range(10)), scripts.results_of(run_dir)["accuracy"]["per_class_accuracy"]))
    assert ("evaluation_test/accuracy", 12) in scripts.scalars(run_dir)
    pictures = {tag: value for tag, _, value in scripts.shown(run_dir, "images")}
    width, height, picture = pictures["evaluation_test/confusion"][:3]
    assert tf.io.decode_png(picture).shape == (int(height), int(width), 3)


def test_checkpoint_and_split_can_be_chosen_and_other_results_are_kept(copied_run, data_dir, capsys, figures):
    flags = "--dataset Digits --split train --batch_size 100 --data_dir".split()
    before = scripts.results_of(copied_run)
    scripts.evaluate([*flags, data_dir, "--checkpoint", copied_run / "model-5.index"])
    printed = capsys.readouterr().out
    result = scripts.results_of(copied_run, "train")["accuracy"]
    assert (result["images"], result["step"]) == (1437, 5)
    assert "step 5" in printed and "Digits train" in printed and "classes_train.csv" in printed
    assert scripts.evaluate_digits(data_dir, copied_run)["reestimated"] == before["reestimated"]
    assert scripts.results_of(copied_run, "train")["accuracy"] == result


def test_the_newest_run_of_the_dataset_is_taken(batch_run, tmp_path):
    for name in ("older", "newer"):
        shutil.copytree(batch_run[0], tmp_path / name)
    (tmp_path / "newer" / "checkpoint").touch()
    assert find_run(tmp_path, "Digits") == tmp_path / "newer"


def test_testing_is_in_inference_mode_and_learns_nothing(data_dir, digits):
    state, test = scripts.state_of(*scripts.SMALL, "--model", "convnet", "--data_dir", data_dir), digits[1]
    before = [weight.copy() for weight in state.model.get_weights()]
    whole, parts = (evaler.evaluate(state.model, test, size) for size in (360, 7))
    assert whole["images"] == parts["images"] == 360
    np.testing.assert_allclose(whole["losses"], parts["losses"], rtol=1e-4, atol=1e-5)
    for weight, old in zip(state.model.get_weights(), before):
        np.testing.assert_array_equal(weight, old)


def test_reestimation_joins_the_variances_within_and_between_batches_and_drops_nothing_out(digits, monkeypatch):
    """Batches of 2, whose means differ: the moments of all images in float64, for dropout is off."""
    monkeypatch.setattr(evaler, "REESTIMATION_IMAGES", 100)
    norm = ops.BatchNorm(momentum=0.7)
    model = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Dropout(0.5), norm])
    evaler.reestimate_batch_statistics(model, digits[0], seed=3, batch_size=2)
    batches = create_input_ops(digits[0], 2, True, seed=3, last_step=50)
    images = np.stack([images.numpy() for images, _ in batches]).astype(np.float64)  # [50, 2, 8, 8, 1]
    assert images.mean(axis=(1, 2, 3, 4)).var() > 0.003 * images.var()  # 300 times the tolerance below
    np.testing.assert_allclose(norm.moving_mean.numpy(), [images.mean()], rtol=1e-5)
    np.testing.assert_allclose(norm.moving_variance.numpy(), [images.var()], rtol=1e-5)
    assert norm.momentum == 0.7 and not norm.use_batch_statistics


def test_statistics_of_the_test_batch_are_those_of_training(copied_run, data_dir, digits, figures):
    """--batch_statistics batch: each image normalized with the others of its batch, as in training; nothing moves. Two
    synchronized replicas that normalized over 4 images each normalized over 8."""
    stored = json.loads((copied_run / "config.json").read_text())
    stored["flags"]["sync_batch_norm"], stored["derived"]["num_replicas"] = True, 2
    (copied_run / "config.json").write_text(json.dumps(stored))
    results = scripts.evaluate_digits(data_dir, copied_run, "--batch_statistics", "batch", "reestimate_small")
    assert results["by_batch"]["batch_size"] == results["reestimated_small"]["batch_size"] == 8
    assert results["by_batch"]["images"] == 360
    model, test, correct = scripts.network_of(copied_run), digits[1], 0
    before = [weight.numpy() for weight in model.weights]
    again = evaler.evaluate_by_batch(model, test, 8, seed=3)
    for old, weight in zip(before, model.weights):
        np.testing.assert_array_equal(weight.numpy(), old)
    compute = tf.function(lambda images: model(images, training=True), autograph=False)
    for rows in np.split(np.random.RandomState(3).permutation(360), 45):
        logits = compute(test.images()[rows].astype(np.float32) / 255)
        correct += int((np.argmax(logits, axis=1) == test.labels[rows]).sum())
    assert again["accuracy"] == results["by_batch"]["accuracy"] == correct / 360 != results["accuracy"]["accuracy"]


def test_top5_accuracy_where_there_are_many_classes(capsys):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(100)])
    x, labels = np.random.default_rng(0).normal(size=(300, 4)).astype("float32"), np.arange(300, dtype=np.int32) % 100
    best = np.argsort(-model(x).numpy(), axis=1)[:, :5]
    batches = [(x[i : i + 128], labels[i : i + 128]) for i in range(0, 300, 128)]
    result = evaler.summarize(*evaler.predict_all(evaler.make_predictor(model), batches), labels, 100)
    assert result["top5_accuracy"] == (best == labels[:, None]).any(axis=1).mean() > result["accuracy"]
    evaler.print_result("SET", result, [f"class {i}" for i in range(100)])
    first, _, *rows = capsys.readouterr().out.splitlines()
    for name in ("accuracy", "top5_accuracy"):
        assert f"{100 * result[name]:.2f}" in first and f"{100 - 100 * result[name]:.2f}" in first
    shown = [(int(row.split()[1]), float(row.split()[2]) / 100) for row in rows]  # the ten worst
    assert [accuracy for _, accuracy in shown] == pytest.approx(sorted(result["per_class_accuracy"])[:10], abs=1e-4)
    for number, accuracy in shown:
        assert accuracy == pytest.approx(result["per_class_accuracy"][number], abs=1e-4)
    few = keras.Sequential([keras.Input((4,)), keras.layers.Dense(99)])
    outputs = evaler.predict_all(evaler.make_predictor(few), [(x, labels % 99)])
    assert "top5_accuracy" not in evaler.summarize(*outputs, labels % 99, 99)


def test_evaluate_by_hand():
    """Five examples in batches of two, one class without examples."""
    logits = np.log([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.4, 0.3], [0.2, 0.2, 0.6], [0.5, 0.4, 0.1]])
    labels = np.array([0, 1, 0, 0, 1])

    def predict(rows, _):
        chosen = tf.constant(logits[rows])
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels[rows], chosen)
        return losses, tf.argmax(chosen, axis=1), tf.ones([len(rows)], tf.bool), tf.reduce_max(tf.exp(chosen), axis=1)

    batches = [(np.array(rows), None) for rows in ([0, 1], [2, 3], [4])]
    result = evaler.summarize(*evaler.predict_all(predict, batches), labels, 3)
    assert result["accuracy"] == 2 / 5 and result["images"] == 5
    assert result["per_class_accuracy"] == [1 / 3, 1 / 2, None]
    assert result["loss"] == pytest.approx(-np.log([0.7, 0.8, 0.3, 0.2, 0.4]).mean())
    assert result["confusion"].tolist() == [[1, 1, 1], [1, 1, 0], [0, 0, 0]]
    np.testing.assert_allclose(result["probabilities"], [0.7, 0.8, 0.4, 0.6, 0.5])


@pytest.mark.parametrize("images, shape", [((3, 4, 5, 3), (1, 8, 10, 3)), ((70, 2, 2, 1), (1, 16, 16, 1))])
def test_image_grids(images, shape):
    images = np.zeros(images) + np.arange(images[0]).reshape(-1, 1, 1, 1)
    grid = summaries.image_grid(images.astype(np.uint8))
    assert grid.shape == shape
    assert grid[0, 0, -1, 0] == shape[2] / images.shape[2] - 1  # the last picture of the first row


def test_floats_of_any_range_become_pictures():
    """0 is black and 1 is white unless the values go beyond: a dark image stays dark."""
    for images, expected in (([0.0, 0.4], [0, 102]), ([-1.0, 0.0, 4.0], [0, 51, 255]), ([0.0, 51, 255], [0, 51, 255])):
        shown = summaries.to_uint8(np.array(images, np.float32))
        assert shown.dtype == np.uint8 and shown.tolist() == expected
    assert summaries.to_uint8(np.array([3, 200], np.uint8)).tolist() == [3, 200]


def test_the_confusion_picture_shows_shares_of_each_label():
    """Rows are labels: 8 of 10 and 3 of 4 are right, the third label has no images."""
    figure = summaries.draw_confusion(np.array([[8, 2, 0], [1, 3, 0], [0, 0, 0]]), ["cost_$5_$6", "b", "c"])
    shares = figure.axes[0].images[0].get_array()
    np.testing.assert_allclose(shares, [[0.8, 0.2, 0], [0.25, 0.75, 0], [0, 0, 0]], rtol=1e-12)
    assert [text.get_text() for text in figure.axes[0].texts] == ["8", "2", "1", "3"]
    picture = summaries.as_pixels(figure)
    assert picture.shape == (1, 360, 400, 3) and picture.dtype == np.uint8


def test_the_worst_mistakes_come_first(digits, figures, tmp_path):
    """Of four mistakes the three of the largest loss; a right prediction of larger loss is none."""
    split = dataclasses.replace(digits[1].subset(np.arange(30)), ids=[f"test/shot_$0_and_$9_{i}" for i in range(30)])
    predictions, losses = split.labels.copy(), np.full(30, 0.1)
    for position, loss in ((4, 2.5), (11, 0.7), (17, 9.25), (26, 4.0)):
        predictions[position], losses[position] = (split.labels[position] + 1) % 10, loss
    losses[8] = 50.0
    result = {"predictions": predictions, "losses": losses, "probabilities": np.linspace(0.3, 0.59, 30)}
    summaries.draw_mistakes(tmp_path / "a.png", split, result, most=3)
    (figure,) = figures
    assert figure.get_suptitle() == "Digits: the 3 worst of 4 mistakes in 30 images"
    for axes, position, percent in zip(figure.axes, (17, 26, 4), (47, 56, 34), strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), split.images()[position, ..., 0])
        label = split.labels[position]
        name = split.ids[position].split("/")[-1]
        assert axes.get_title() == f"{name}\ntrue {label}\npredicted {(label + 1) % 10} {percent} %"
    assert summaries.as_pixels(figure).shape == (1, 1200, 1100, 3)


def test_requests_that_do_not_suit_the_runs_are_refused(batch_run, data_dir, tmp_path):
    run_dir, _ = batch_run
    for name in ("empty", "damaged", "a[1]", "other", "group"):
        (tmp_path / name).mkdir()
    for name in ("damaged", "a[1]"):
        (tmp_path / name / "config.json").write_text("{}")
    for name in ("checkpoint", "model-12.index", "model-12.data-00000-of-00001"):
        shutil.copy(run_dir / name, tmp_path / "other")
    config = json.loads((run_dir / "config.json").read_text())
    config["derived"]["model"] = "resnet14"
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    flags, config, *splits = scripts.configure(*scripts.SMALL, "--norm_type", "group", "--data_dir", data_dir)
    write_config(tmp_path / "group", flags, config, describe_data(*splits))
    for flag, path, words in (
        ("--train_dir", tmp_path / "empty", ["Digits", tmp_path / "empty"]),
        ("--train_dir", tmp_path / "damaged", ["config.json"]),
        ("--checkpoint", tmp_path / "a[1]", ["a[1]", "* ? [ ]"]),
        ("--checkpoint", run_dir / "model-77", ["model-77", "model-*.index", "RUN_FOLDER"]),
        ("--predict", run_dir, [f"{run_dir} is a run folder", "RUN --predict"]),
        ("--checkpoint", tmp_path / "other" / "model-12", ["model-12", "missing"]),
        ("--checkpoint", tmp_path / "group", ["--batch_statistics reestimate", "--norm_type group"]),
    ):
        with scripts.refused(*words):
            flags = ["--dataset", "Digits", "--data_dir", data_dir, "--batch_statistics", "reestimate"]
            scripts.evaluate([*flags, flag, path])


@pytest.mark.parametrize("file, size", [("data-00000-of-00001", 1000), ("data-00000-of-00001", None), ("index", None)])
def test_a_checkpoint_that_is_cut_or_incomplete_is_named(file, size, copied_run, data_dir):
    path = copied_run / f"model-12.{file}"
    os.truncate(path, size) if size else path.unlink()
    with scripts.refused(copied_run, "checkpoint"):
        scripts.evaluate_digits(data_dir, copied_run)
    with scripts.refused(copied_run / "model-12", "--checkpoint", "new run"):
        scripts.run_here("--resume", copied_run)


def test_a_checkpoint_of_other_classes_is_named(batch_run):
    model = create_model(read_config(batch_run[0])[0], (8, 8, 1), 11)
    with scripts.refused("logits", "10", "11"):
        checkpoints.load_weights(model, batch_run[0])


def test_a_run_is_opened_on_its_own_classes_alone(tmp_path, capsys, monkeypatch):
    """Also if the folder is packed again by another spelling of its path. Then
    a class of three is renamed: the labels of the images stay, their names move."""
    photos, data_dir, train_dir = tmp_path / "photos", tmp_path / "data", tmp_path / "runs"
    archives.write_photos(photos, (5, 5, 5))
    flags = ["--dataset", "FRUIT", "--data_dir", str(data_dir), "--train_dir", str(train_dir)]
    download.prepare_folder("FRUIT", str(photos), data_dir=str(data_dir))
    training = ["--model", "resnet8", "--max_batch_size", "4", "--max_training_step", "1"]
    run_dir, image = scripts.untrained_run(train_dir / "run", *flags, *training), str(photos / "class2" / "000.png")
    (data_dir / "FRUIT" / "data.hdf5").unlink()
    monkeypatch.chdir(tmp_path)
    download.prepare_folder("FRUIT", "photos", data_dir=str(data_dir))
    scripts.evaluate([*flags, "--predict", image])
    (photos / "class0").rename(photos / "class3")
    (data_dir / "FRUIT" / "data.hdf5").unlink()
    download.prepare_folder("FRUIT", str(photos), data_dir=str(data_dir))
    for ask in ([], ["--predict", image], ["--export", str(tmp_path / "exported")]):
        with scripts.refused("class 0", "class0", "class1"):
            scripts.evaluate([*flags, *ask])
    with scripts.refused("class 0", "class0", "class1"):
        scripts.run_here("--resume", run_dir, "--data_dir", data_dir)
    capsys.readouterr()
    scripts.run_here(*flags, *training, "--checkpoint", run_dir)
    assert "new: logits/kernel, logits/bias" in capsys.readouterr().out
