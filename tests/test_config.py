"""config.py: what follows from flags and data, which flags are refused, and config.json."""

import dataclasses
import math

import numpy as np
import pytest
import scripts

import checkpoints
import config
import trainer
from config import Workers, derive, parse_evaluation, parse_network, parse_training, workers

STEPS_PER_EPOCH = 23  # of the 1,437 images of Digits, 64 a step
SMALL = "--dataset Digits --model resnet8 --max_batch_size 32"


def derived(digits, flags):
    """The configuration that follows from flags; Digits stands for the images of every dataset."""
    return derive(parse_training(flags.split())[0], digits[0])


@pytest.mark.parametrize("dataset, augment, epochs", [("MNIST", None, 5), ("CIFAR10", "flip+crop", 30)])
def test_what_a_dataset_is_trained_with_by_default(dataset, augment, epochs, digits):
    config = derived(digits, f"--dataset {dataset}")
    assert (config.augment, config.optimizer, config.weight_decay) == (augment, "momentum", 1e-4)
    assert (config.base_learning_rate, config.lr_schedule) == (0.2, "cosine")
    assert (config.batch_size, config.max_batch_size, config.updates_per_step) == (64, 64, 1)
    assert (config.max_training_step, config.test_sample_step) == (epochs * STEPS_PER_EPOCH, STEPS_PER_EPOCH)


def test_imagenet_is_trained_as_in_the_paper(digits):
    """arXiv 1803.08494, section 4.1, without a flag: 0.1 at 256 images, a tenth at 30, 60 and 90 of 100 epochs."""
    config, epoch = derived(digits, "--dataset ImageNet"), math.ceil(1437 / 256)
    assert (config.batch_size, config.max_batch_size, config.updates_per_step) == (32, 256, 8)
    assert (config.optimizer, config.weight_decay, config.augment) == ("momentum", 1e-4, "flip+crop")
    assert (config.max_training_step, config.test_sample_step) == (100 * epoch, epoch)
    rates = [trainer.learning_rate_at(step, config) for step in range(100 * epoch)]
    shares = [1] * 30 + [0.1] * 30 + [0.01] * 30 + [0.001] * 10
    assert rates[::epoch] == rates[epoch - 1 :: epoch] == pytest.approx([0.1 * 32 / 256 * share for share in shares])


@pytest.mark.parametrize(
    "flags, expected",
    [
        (f"{SMALL} --batch_size 2", {"learning_rate_scaling": "linear", "peak_learning_rate": 0.2 * 2 / 32}),
        (f"{SMALL} --batch_size 2 --learning_rate 0.5", {"peak_learning_rate": 0.5 * 2 / 32}),
        (f"{SMALL} --batch_size 2 --no_adjust_learning_rate", {"peak_learning_rate": 0.2}),
        (f"{SMALL} --batch_size 2 --accumulate", {"peak_learning_rate": 0.2, "updates_per_step": 1}),
        (f"{SMALL} --batch_size 2 --optimizer adam", {"peak_learning_rate": 1e-3 / 4, "weight_decay": 0}),
        (f"{SMALL} --model convnet", {"optimizer": "adam", "learning_rate_scaling": "square root"}),
        (f"{SMALL} --batch_size 2", {"updates_per_step": 16, "batch_norm_momentum": 0.9 ** (2 / 32)}),
        (f"{SMALL} --replicas 2 --batch_size 8", {"updates_per_step": 2, "batch_norm_momentum": 0.9**0.5}),
        (f"{SMALL} --replicas 2 --batch_size 8", {"num_replicas": 2, "peak_learning_rate": 0.2 * 16 / 32}),
        (f"{SMALL} --norm_type group", {"groups": 16}),
        (f"{SMALL} --norm_type group --groups 4", {"groups": 4}),
        (f"{SMALL} --epochs 2 --augment", {"max_training_step": 90, "augment": "flip+crop"}),
        (f"{SMALL} --augment crop", {"augment": "crop"}),
        ("--dataset ImageNet --batch_size 2", {"max_batch_size": 256, "peak_learning_rate": 0.1 * 2 / 256}),
        ("--dataset ImageNet --max_batch_size 64", {"batch_size": 32, "base_learning_rate": 0.025}),
        ("--dataset ImageNet --max_batch_size 48", {"batch_size": 48, "peak_learning_rate": 0.1 * 48 / 256}),
        ("--dataset ImageNet --learning_rate 0.3", {"peak_learning_rate": 0.3 * 32 / 256}),
        ("--dataset ImageNet --optimizer adam", {"base_learning_rate": 1e-3, "weight_decay": 0}),
        ("--dataset ImageNet --lr_schedule cosine --no_augment", {"lr_schedule": "cosine", "augment": None}),
        ("--dataset ImageNet --max_training_step 7 --weight_decay 0", {"max_training_step": 7, "weight_decay": 0}),
    ],
)
def test_what_follows_from_flags(flags, expected, digits):
    config = derived(digits, flags)
    assert {name: getattr(config, name) for name in expected} == pytest.approx(expected)


def test_what_needs_the_number_of_images(digits):
    """Held-out images count for the default network, so that settings are chosen on the network of the final run."""
    with scripts.refused("--warmup_steps 46", "45 steps"):
        derived(digits, f"{SMALL} --warmup_steps 46 --epochs 1")
    photos = dataclasses.replace(digits[0].subset(np.arange(437)), image=np.zeros((1, 80, 80, 3)), from_folder=True)
    for held_out, model in (("", "resnet18"), ("--validation 9563", "resnet50")):
        assert derived([photos], f"--dataset Digits {held_out}").model == model


@pytest.mark.parametrize("shape, images", [((32, 32, 3), 250), ((64, 64), 250), ((224, 224, 3), 20), ((999, 999), 8)])
def test_a_test_of_large_images_needs_no_more_memory_than_training(shape, images):
    assert config.evaluation_batch(shape) == images


def test_schedules(digits):
    def rates(flags):
        config = derived(digits, f"{SMALL} --learning_rate 2 --max_training_step 100 --lr_schedule {flags}")
        return [trainer.learning_rate_at(step, config) for step in range(100)]

    assert rates("constant") == [2.0] * 100
    cosine = rates("cosine --warmup_steps 10")
    assert cosine[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert cosine[10] == 2.0 and cosine[55] == pytest.approx(1.0) and 0 < cosine[99] < 0.001


WRONG = {  # parser: [(flags, words of the error: the wrong value, and what would be right)]
    parse_training: [
        ("--batch_size 3", ["--batch_size 3", "--max_batch_size 33"]),
        ("--dataset ImageNet --batch_size 48", ["--batch_size 48", "--max_batch_size 48"]),
        ("--batch_size 0", ["at least 1", "0"]),
        ("--learning_rate nan", ["above 0", "nan"]),
        ("--batch 2", ["--batch"]),
        ("--lr 1", ["did you mean --learning_rate?"]),
        ("--norm_type GN", ["did you mean group?"]),
        ("--optimizer gn", ["momentum", "adam"]),
        ("--groups 8", ["--groups 8", "--norm_type group"]),
        ("--norm_type group --groups 7", ["16 channels", "7", "1, 2, 4, 8, 16"]),  # before anything is downloaded
        ("--accumulate", ["--accumulate", "32"]),
        ("--norm_type batch+renorm --weight_standardization", ["--weight_standardization", "--norm_type batch+renorm"]),
        ("--augment flip", ["flip", "crop"]),
        ("--augment --no_augment", ["--augment", "--no_augment"]),
        ("--prefix a/b", ["a/b"]),
        ("--prefix lr[1]", ["lr[1]", "* ? [ ]"]),
        ("--prefix \udcff", ["UTF-8"]),
        ("--replicas 3 --batch_size 4", ["3 replicas", "4 images", "--max_batch_size 36"]),
        ("--freeze_batch_norm", ["--freeze_batch_norm", "--norm_type batch", "--checkpoint"]),
        ("--freeze_batch_norm --norm_type group --checkpoint RUN", ["--freeze_batch_norm", "--norm_type batch"]),
        ("--sync_batch_norm", ["--sync_batch_norm", "one replica"]),
        ("--replicas 2 --sync_batch_norm --norm_type group", ["--sync_batch_norm", "--norm_type group"]),
        ("--replicas 2 --jit_compile", ["--jit_compile", "2"]),
        ("--resume RUN --norm_type batch", ["--norm_type batch", "--checkpoint RUN"]),  # though it is the default
        ("--resume RUN --augment flip+crop", ["--augment flip+crop", "--checkpoint RUN"]),
        ("--resume RUN --max_training_step 8", ["--max_training_step 8", "--checkpoint RUN"]),
    ],
    parse_network: [
        ("--groups 128 --norm_type group --model resnet18", ["64 channels", "128 groups", "1, 2, 4, 8, 16, 32, 64"]),
        ("--group_size 5 --norm_type group", ["16 channels", "groups of 5", "1, 2, 4, 8, 16"]),
        ("--group_size 4 --norm_type none", ["--group_size 4", "--norm_type none", "--norm_type group"]),
        ("--groups 4 --group_size 4 --norm_type group", ["--groups", "--group_size"]),
        ("--groups 0 --norm_type group", ["--groups", "at least 1", "0"]),
        ("--groups four --norm_type group", ["--groups", "int", "four"]),
        ("--image_size 0 0 3", ["--image_size", "at least 1", "0"]),
        ("--classes 1", ["--classes", "at least 2", "1"]),
        ("--model resnet9", ["resnet9", "resnet8", "resnet50"]),
    ],
    parse_evaluation: [
        (". --train_dir OTHER", ["RUN", "--train_dir"]),
        (". --checkpoint OTHER/model-5", ["RUN", "--checkpoint"]),
        ("--checkpoint RUN --train_dir train_dir", ["--checkpoint", "--train_dir"]),  # though it is the default
        ("RUN/model-5", ["RUN/model-5 is not a folder", "--checkpoint"]),
        ("--output a.csv", ["--output", "--predict"]),
        ("--output a.csv --export new", ["--output", "--export"]),
        ("--split test --predict a.png", ["--split", "--predict"]),
        ("--batch_statistics moving --predict a.png", ["--batch_statistics", "--predict"]),
        ("--validation 5 --predict a.png", ["--validation", "--predict"]),
        ("--split test --export new", ["--split", "--export"]),
        ("--batch_statistics moving --export new", ["--batch_statistics", "--export"]),
        ("--validation 5 --export new", ["--validation", "--export"]),
    ],
}


@pytest.mark.parametrize("parse, flags, words", [(parse, *case) for parse, cases in WRONG.items() for case in cases])
def test_wrong_flags_are_one_line(parse, flags, words, call):
    given = f"{SMALL} {flags}" if parse is parse_training and "--resume" not in flags else flags
    error = call(lambda: parse(given.split()), code=2)
    assert all(word in error for word in words), error


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--norm_type batch --weight_standardization", ["--norm_type group", "batch"]),
        ("--norm_type none --weight_standardization", ["--norm_type group", "none"]),
        ("--norm_type group", ["--weight_standardization True", "False"]),
        ("--norm_type group --weight_standardization --model resnet14", ["--model resnet8", "resnet14"]),
    ],
)
def test_the_checkpoint_of_another_network_is_refused(flags, words, digits):
    other = derived(digits, f"{SMALL} --norm_type group --weight_standardization")
    with scripts.refused("RUN/model-9", *words):
        checkpoints.check_convertible(derived(digits, f"{SMALL} {flags}"), other, "RUN/model-9")


@pytest.mark.parametrize(
    "text",
    [
        "{",
        '{"cluster": {"worker": ["a"]}, "task": {"type": "worker", "index": 0}}',
        '{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 2}}',
        '{"cluster": {"chief": ["a:1"], "worker": ["b:1"]}, "task": {"type": "worker", "index": 0}}',
        '{"cluster": {"worker": ["a:1", "a:1"]}, "task": {"type": "worker", "index": 0}}',
    ],
)
def test_a_wrong_tf_config_is_one_line(text, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", text)
    with scripts.refused("TF_CONFIG"):
        workers()


@pytest.mark.parametrize("text", ["", "{}", '{"task": {"type": "worker", "index": 0}}'])
def test_a_tf_config_without_a_cluster_is_one_worker(text, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", text)
    assert workers() == Workers(("",), 0)
