"""figure/finetune.py: its two tasks, its rates, which are the best ones, and its table, which is that of the logs."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import archives
import numpy as np
import pytest
import scripts

import finetune

import datasets
import runs
from command import UserError

STUDY = scripts.REPO / "figure" / "studies" / "finetune"


@pytest.fixture
def cifar10(tmp_path):
    """A data folder with a small CIFAR10 in it."""
    archives.pack("CIFAR10", tmp_path, per_class=7)
    return tmp_path / "data"


def test_the_tasks_are_the_two_halves_of_cifar10(cifar10, monkeypatch):
    """Every test image of its classes, and the first training images of each class as far as they count."""
    monkeypatch.setattr(finetune, "IMAGES_PER_CLASS", {finetune.BEFORE: None, finetune.AFTER: 5})
    whole = datasets.create_default_splits("CIFAR10", cifar10)
    for name, first, most in ((finetune.BEFORE, 0, 1000), (finetune.AFTER, 5, 5)):
        finetune.make_task(name, cifar10)
        made = datasets.create_default_splits(name, cifar10)
        assert made[0].class_names == whole[0].class_names[first : first + 5]
        assert "other archives than the original" in made[0].made_from
        for of_all, found, kept in zip(whole, made, (most, 1000)):
            classes = [np.flatnonzero(of_all.labels == label)[:kept] for label in range(first, first + 5)]
            positions = np.sort(np.concatenate(classes))
            assert found.ids == [of_all.ids[i] for i in positions]
            np.testing.assert_array_equal(found.images(), of_all.images()[positions])
            np.testing.assert_array_equal(found.labels, of_all.labels[positions] - first)


@pytest.mark.parametrize("task", [finetune.BEFORE, finetune.AFTER])
def test_a_run_of_today_is_that_of_the_logs(task, cifar10):
    """What --train_dir and the data give is another here; all else is the recipe of the committed runs."""
    finetune.make_task(task, cifar10)
    logged = next(run for run in runs.read_runs([STUDY / task]) if run.norm == "group" and not run.config.validation)
    flags = SimpleNamespace(train_dir=cifar10, data_dir=str(cifar10), jobs=1)
    rate = ("--learning_rate", str(logged.config.base_learning_rate))
    made = finetune.Task(task, flags, 1).cell("group", 0, *rate).settings
    assert made.keys() == logged.settings.keys()
    differing = {name for name, value in made.items() if value != logged.settings[name]}
    assert differing - {"checkpoint"} == {"train", "test", "max_training_step"}


def test_a_run_that_is_not_of_the_grid_is_not_in_the_table(cifar10, tmp_path):
    finetune.make_task(finetune.AFTER, cifar10)
    folder = shutil.copytree(STUDY, tmp_path / "study") / finetune.AFTER
    run = next(run for run in runs.read_runs([folder]) if run.norm == "group" and not run.config.validation)
    stored = json.loads(shutil.copytree(run.path, folder / "stray").joinpath("config.json").read_text())
    stored["derived"]["max_training_step"] = 40
    (folder / "stray" / "config.json").write_text(json.dumps(stored))
    task = finetune.Task(finetune.AFTER, SimpleNamespace(train_dir=folder.parent, data_dir=str(cifar10), jobs=1), 1)
    cell = task.cell("group", 0)
    cell.settings = run.settings  # which are of the whole of CIFAR10
    assert [found.path for found in task.train([cell])] == [run.path]
    with pytest.raises(UserError, match="max_training_step"):
        finetune.text_of(runs.read_runs([folder]))
    shutil.rmtree(folder / "stray")
    shutil.copytree(run.path, folder / "copy")
    with pytest.raises(UserError, match="copy"):
        finetune.text_of(runs.read_runs([folder]))


@pytest.mark.parametrize("flags, said", [("--seeds 9", "--seeds"), ("--jobs 3", "--jobs"), ("", "no run folder in")])
def test_logs_alone_need_no_flags_for_training_but_runs(flags, said, tmp_path, call):
    assert said in call(finetune.main, "--from_logs", "--train_dir", tmp_path, *flags.split(), code=2)


def run_of(way, rate, validation=None, **accuracies):
    config = SimpleNamespace(validation=validation, base_learning_rate=rate)
    return SimpleNamespace(way=way, config=config, accuracies=accuracies)


def test_a_rate_is_chosen_on_images_held_out(monkeypatch):
    monkeypatch.setattr(finetune, "way_of", lambda found: found.way)
    found = [run_of("group", 0.02, 500, accuracy=0.5), run_of("group", 0.2, 500, accuracy=0.7)]
    found += [run_of("batch", 0.02, 500, accuracy=0.6), run_of("batch", 0.2, 500)]  # it diverged
    found.append(run_of("group", 0.06, accuracy=0.9))  # on the test split
    assert finetune.best_rates(found) == {"group": 0.2, "batch": 0.02}


def test_the_table_is_that_of_the_logs():
    """Fifteen runs on the test split, and one per way and rate on held-out images; the page has the first table."""
    found = runs.read_runs([STUDY / finetune.AFTER])
    tested = [run for run in found if not run.config.validation]
    expected = [(way, seed) for way in finetune.WAYS for seed in range(3)]
    assert sorted((finetune.way_of(run), run.config.seed) for run in tested) == sorted(expected)
    assert {run.config.base_learning_rate for run in found if run.config.validation} == set(finetune.RATES)
    rates = finetune.best_rates(found)
    assert all(run.config.base_learning_rate == rates[finetune.way_of(run)] for run in tested)
    written = (STUDY / "table.md").read_text()
    assert finetune.text_of(found) == written
    page = (STUDY.parent / "README.md").read_text()
    for line in finetune.table(tested).splitlines():
        assert line in page, line
    with scripts.refused(found[0].path, "another folder"):
        finetune.way_of(found[0]._replace(config=dataclasses.replace(found[0].config, norm_type="layer")))
