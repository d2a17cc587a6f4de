"""figure/compare.py: the grid through the real scripts, and what its tables say of run folders."""

import contextlib
import csv
import dataclasses
import json
import math
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import scripts

import challenge
import compare
import pictures
import results

from config import Config, derive, parse_training
from datasets import hdf5
import command
import runs

GRID = "--dataset Digits --model resnet8 --max_batch_size 16 --seeds 1".split()
SMALL_GRID = [*GRID, *"--norm_type batch group+ws --batch_size 8 --max_training_step 6 --validation 200".split()]


def write_run(folder, name, accuracy, steps=100, diverged=False, evaluation=None, images=10_000, **settings):
    """Write the logs of a run of 100 steps that ended at `steps`, and what evaler.py wrote."""
    usual = dict(dataset="SET", model="resnet8", groups=8, batch_size=2, max_batch_size=64, max_training_step=100)
    usual |= dict(optimizer="momentum", base_learning_rate=0.1, log_step=50)
    data = {"train": 800, "test": images, "num_classes": 10, "class_names": ["a"]}
    run_dir = folder / name
    run_dir.mkdir(parents=True)
    stored = {"flags": dataclasses.asdict(Config(**usual | settings)), "derived": {}, "data": data}
    (run_dir / "config.json").write_text(json.dumps(stored))
    rows = [{"step": step, "loss/accuracy": 0.5, "test_loss/accuracy": accuracy} for step in range(50, steps + 1, 50)]
    write_rows(run_dir, rows + [{"step": steps + 1, "diverged": True}] * diverged)
    if evaluation is not None:
        record = {"step": 100, "split": "test", "accuracy": accuracy}
        record |= {measure: {"accuracy": value} for measure, value in evaluation.items()}
        (run_dir / "evaluation.json").write_text(json.dumps(record))
    return run_dir


def write_rows(run_dir, rows):
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def table(folder):
    """The only table of the runs in a folder."""
    (found,) = results.tables(runs.read_runs([folder]))
    return found


def rows_of(folder):
    """{row name: [cells]} of the only table of the runs in a folder."""
    markdown = results.markdown(table(folder)).splitlines()
    return {row: cells for row, *cells in (line.strip("| ").split(" | ") for line in markdown if line.startswith("|"))}


def test_seeds_share_a_cell_and_other_settings_do_not(tmp_path, capsys):
    """The old table called --groups 4 and --groups 2 two seeds of one experiment. A copied run is no other seed."""
    for seed, accuracy in enumerate((0.61, 0.65, 0.60)):
        write_run(tmp_path, f"four{seed}", accuracy, norm_type="group", groups=4, seed=seed)
    write_run(tmp_path, "two", 0.553, norm_type="group", groups=2)
    write_run(tmp_path, "ws", 0.7, norm_type="group", groups=4, weight_standardization=True)
    write_run(tmp_path, "batch", 0.5, groups=32)  # batch norm has no groups to differ in
    write_run(tmp_path, "batch_2", 0.52, groups=8, seed=1)
    shutil.copytree(tmp_path / "batch_2", tmp_path / "copies" / "batch_2")
    assert rows_of(tmp_path) == {
        "norm": ["batch size 2"],
        "---": ["---"],
        "batch": ["50.0 ← 51.0 → 52.0 (2 seeds)"],
        "group (groups 2)": ["55.3"],
        "group (groups 4)": ["60.0 ← 61.0 → 65.0"],
        "group+ws (groups 4)": ["70.0"],
    }
    assert "of 3 seeds; a single number is of one seed" in results.markdown(table(tmp_path))
    assert "seed 1" in capsys.readouterr().out


def different(value):
    """Another value of the kind of a setting."""
    if isinstance(value, list):
        return [*value, "more"]
    return not value if isinstance(value, bool) else f"other_{value}" if isinstance(value, str) else (value or 0) + 3


def test_runs_share_a_cell_if_they_differ_in_what_is_listed_alone(begun, tmp_path):
    """Every flag, derived value and fact of the data of a run in turn; what makes another row is named in it."""
    listed = "prefix data_dir train_dir log_step write_summary_step worker_timeout class_names seed replicas "
    listed += "test_sample_step ckpt_save_step learning_rate no_adjust_learning_rate no_augment epochs "
    listed += "peak_learning_rate batch_norm_momentum updates_per_step"  # these and the four before follow from others
    run_dir, parts, alike = scripts.only_run(begun[0]), ("flags", "derived", "data"), set()
    shutil.copytree(run_dir, tmp_path / "run")
    stored = json.loads((run_dir / "config.json").read_text())
    (tmp_path / "other").mkdir()
    for name in sorted({name for part in parts for name in stored[part]}):
        known = {"norm_type": "layer", "weight_standardization": False, "accumulate": True}
        value = known.get(name, different((stored["data"] | stored["flags"] | stored["derived"])[name]))
        other = {part: {**stored[part], **({name: value} if name in stored[part] else {})} for part in parts}
        (tmp_path / "other" / "config.json").write_text(json.dumps(other))
        if name == "split":
            with pytest.raises(command.UserError, match="different images"):
                results.tables(runs.read_runs([tmp_path]))
            continue
        cells = [key for found in results.tables(runs.read_runs([tmp_path])) for key in found.cells]
        if len(cells) == 1:
            alike.add(name)
        elif name not in ("dataset", "model", "batch_size", *known):
            assert any(f"{value}" in words for (_, words), *_ in cells), (name, cells)
    assert alike == set(listed.split())


def test_datasets_and_models_have_tables_of_their_own_with_what_their_runs_share_in_the_title(tmp_path):
    """100 steps of 64 images are 8 passes over 800. Each norm can have its own rate."""
    write_run(tmp_path, "one", 0.5, dataset="A")
    write_run(tmp_path, "other", 0.5, dataset="A", norm_type="group")
    write_run(tmp_path, "batch", 0.5, dataset="B")
    write_run(tmp_path, "group", 0.5, dataset="B", norm_type="group", base_learning_rate=0.4)
    write_run(tmp_path, "large", 0.5, dataset="B", model="resnet20")
    first, second, third = results.tables(runs.read_runs([tmp_path]))
    assert first.title == "A, resnet8, 100 steps of 64 images (8 epochs), momentum at 0.1, 10000 test images"
    assert second.title.startswith("B, resnet20, ") and third.title.startswith("B, resnet8, ")
    assert "batch: momentum at 0.1, group: momentum at 0.4" in third.title
    assert [row for row, _ in third.rows] == [("batch", ""), ("group", "")]
    write_run(tmp_path / "longer", "group", 0.5, steps=150, max_training_step=150, norm_type="group", dataset="A")
    (longer,) = results.tables(runs.read_runs([tmp_path / "one", tmp_path / "longer"]))
    assert [row for row, _ in longer.rows] == [("batch", "steps 100"), ("group", "steps 150")]
    assert not results.sentences(longer) and "epochs" not in longer.title
    write_run(tmp_path / "crops", "group", 0.7, norm_type="group", dataset="A", augment="crop")
    (crops,) = results.tables(runs.read_runs([tmp_path / "one", tmp_path / "crops"]))
    assert not results.sentences(crops)  # batch norm has no crops
    write_run(tmp_path / "larger", "group", 0.5, norm_type="group", dataset="A", max_batch_size=128, images=500)
    (larger,) = results.tables(runs.read_runs([tmp_path / "one", tmp_path / "larger"]))
    assert not any(word in larger.title for word in ("epochs", "64 images", "test images"))


def test_runs_without_a_result_are_named_and_a_last_line_cut_short_does_not_count(tmp_path):
    with open(write_run(tmp_path, "done", 0.5) / "metrics.jsonl", "a") as file:
        file.write('{"step": 101, "los')
    write_run(tmp_path, "half", 0.4, steps=50, seed=1)
    write_run(tmp_path, "lost", 0.1, steps=50, seed=2, diverged=True)
    write_run(tmp_path, "alone", 0.1, steps=50, norm_type="none", diverged=True)
    write_run(tmp_path, "evaluated", 0.3, steps=50, norm_type="group", evaluation={})  # its log is incomplete
    rows = rows_of(tmp_path)
    assert rows["batch"] == ["50.0, 1 diverged, 1 not finished"] and rows["none"] == ["1 diverged"]
    assert rows["group"] == ["1 not finished"] and not runs.read_run(tmp_path / "evaluated").accuracies


def test_batch_norm_has_three_rows(tmp_path):
    """evaler.py once re-estimated the statistics of plain images for a run that augmented: they do not count, nor does
    an evaluation of another step or split."""
    evaluation = {"reestimated": 0.26, "by_batch": 0.59}
    path = write_run(tmp_path / "plain", "batch", 0.25, evaluation=evaluation) / "evaluation.json"
    write_run(tmp_path / "augmented", "batch", 0.25, evaluation=evaluation, augment="flip+crop")
    names = "batch", "batch, statistics re-estimated", "batch, statistics of the test batch"
    assert [rows_of(tmp_path / "plain")[name] for name in names] == [["25.0"], ["26.0"], ["59.0"]]
    assert list(rows_of(tmp_path / "augmented"))[2:] == [names[0], names[2]]
    record = json.loads(path.read_text())
    for change in ({"step": 50}, {"split": "train"}):
        path.write_text(json.dumps(record | change | {"accuracy": 0.99}))
        assert list(rows_of(tmp_path / "plain").items())[2:] == [("batch", ["25.0"])]


def test_imagenet_has_the_median_of_its_last_epochs(tmp_path):
    """800 images are 13 steps of 64: of 100 steps, the last 65 are five epochs. No other dataset has that row."""
    for name in ("SET", "ImageNet"):
        run_dir = write_run(tmp_path / name, "run", 0.5, dataset=name)
        accuracies = (0.1, 0.2, 0.2, 0.3, 0.5, 0.4, 0.9, 0.6)
        write_rows(run_dir, [{"step": 9 + 13 * k, "test_loss/accuracy": value} for k, value in enumerate(accuracies)])
    assert rows_of(tmp_path / "SET")["batch"] == ["60.0"] and len(rows_of(tmp_path / "SET")) == 3
    assert rows_of(tmp_path / "ImageNet")["batch, median of the last epochs"] == ["50.0"]
    assert rows_of(tmp_path / "ImageNet")["batch"] == ["60.0"]


@pytest.mark.parametrize(
    "base, other, images, said",
    [
        ([0.50, 0.52], [0.60, 0.62], 10_000, "10.0 points above batch (60.0 ← 61.0 → 62.0 and 50.0 ← 51.0 → 52.0 %, 2"),
        ([0.70], [0.60], 10_000, "10.0 points below batch (60.0 and 70.0 %, 1 seed)"),
        ([1.0], [1.0], 10_000, "level with batch (+0.0 points, standard error 0.0, "),
        # one image of 140 is 0.7 points, and sqrt((0.9 · 0.1 + 0.893 · 0.107) · (1 / 140 + 1 / 5300)) 3.7
        ([0.9], [0.893], 140, "level with batch (-0.7 points, standard error 3.7, "),
        # sqrt((0.6 · 0.4 + 0.615 · 0.385) · (1 / 10,000 + 1 / (5300 · seeds))) is 1.2 points with one seed, 0.9 with 3
        ([0.6], [0.615], 10_000, "level with batch (+1.5 points, standard error 1.2, "),
        ([0.6] * 3, [0.62] * 3, 10_000, "2.0 points above batch"),
        ([0.5, 0.6, 0.6, 0.6, 0.7], [0.65] * 5, 10_000, "level with batch (+5.0 points, standard error 3.2, "),
        ([0.6, 0.75, 0.9], [0.8] * 3, 10_000, "level with batch (+5.0 points, standard error 8.7, "),
        ([0.60] * 4 + [0.69], [0.70] * 5, 10_000, "5 seeds, the ranges do not overlap"),
        ([0.60] * 4 + [0.75], [0.70] * 5, 10_000, "5 seeds, the ranges overlap"),
    ],
)
def test_sentences_say_what_the_numbers_support(base, other, images, said, tmp_path):
    """The ranges are only compared from five seeds on, and small differences are called level."""
    for norm, accuracies in (("batch", base), ("group", other)):
        for seed, accuracy in enumerate(accuracies):
            write_run(tmp_path, f"{norm}{seed}", accuracy, seed=seed, norm_type=norm, images=images)
    (sentence,) = results.sentences(table(tmp_path))
    assert sentence.startswith("At batch size 2 group is ") and said in sentence
    assert ("ranges" in sentence) == (len(base) >= 5)
    write_run(tmp_path, "lost", 0.1, steps=50, seed=9, norm_type="group", images=images, diverged=True)
    assert not results.sentences(table(tmp_path))


@pytest.mark.parametrize("accumulate, style", [(False, "-"), (True, "--")])
def test_the_picture_has_the_median_and_the_range(accumulate, style, tmp_path, figures):
    """Of the accuracy by moving averages alone; dashed if gradients were accumulated."""
    for seed, accuracy in enumerate((0.5, 0.59, 0.51)):
        write_run(tmp_path, f"two{seed}", accuracy, seed=seed, accumulate=accumulate)
    for size, accuracy in ((4, 0.65), (8, 0.7)):
        write_run(tmp_path, str(size), accuracy, evaluation={"by_batch": 0.8}, batch_size=size, accumulate=accumulate)
    pictures.draw_batch_sizes([table(tmp_path)], tmp_path / "unused")
    everything, upper = figures[0].subfigs[0].axes
    assert figures[0].subfigs[0].get_suptitle() == "SET, resnet8, 8 epochs, median and range of up to 3 seeds"
    assert upper.get_ylim()[0] == pytest.approx(60)
    for axes in (everything, upper):
        (line,), (area,) = axes.lines, axes.collections
        assert line.get_linestyle() == style
        np.testing.assert_allclose(line.get_xydata(), [(2, 51), (4, 65), (8, 70)])
        corners = {(x, round(y, 9)) for x, y in area.get_paths()[0].vertices}
        assert corners == {(2, 50), (2, 59), (4, 65), (8, 70)}


def test_a_line_that_ends_early_is_named_at_its_end(tmp_path, figures):
    """Beside the picture its name would be that of a value at the largest batch size."""
    for size in (2, 4, 8, 16):
        write_run(tmp_path, f"group{size}", 0.7, batch_size=size, norm_type="group")
    for size in (2, 4, 8):
        write_run(tmp_path, f"batch{size}", 0.68, batch_size=size)
    pictures.draw_batch_sizes([table(tmp_path)], tmp_path / "unused")
    batch, group = figures[0].subfigs[0].axes[1].texts
    assert (batch.get_text(), batch.xy) == ("batch", (8, 68)) and group.get_text() == "group"
    assert figures[0].subfigs[0].axes[1].get_ylim()[0] > 67  # 10 points would be more than the other panel has


def test_a_study_without_a_finished_run_has_no_picture(tmp_path, figures):
    for size in (2, 4):
        write_run(tmp_path, str(size), 0.5, steps=50, batch_size=size)
    pictures.draw_batch_sizes([table(tmp_path)], tmp_path / "unused")
    assert not figures


def test_the_curves_are_test_accuracy_thick_and_training_accuracy_thin(tmp_path, figures):
    """A panel for each batch size; write_run trains at 50 %. Training accuracy over few steps is not drawn."""
    with open(write_run(tmp_path, "two", 0.6) / "metrics.jsonl", "a") as file:
        file.write('{"step": 103, "loss/accuracy": 0.9}\n')
    eight = write_run(tmp_path, "eight", 0.7, batch_size=8)
    write_run(tmp_path, "sixteen", 0.75, batch_size=16)
    pictures.draw_curves([table(tmp_path)], tmp_path / "unused")
    write_rows(eight, [{"step": step, "loss/accuracy": 0.5} for step in range(10, 110, 10)])  # with --log_step 50
    assert pictures.curve_of([runs.read_run(eight)], "loss/accuracy")[0] == list(range(10, 110, 10))
    for axes, size, tested in zip(figures[0].subfigs[0].axes, (2, 8, 16), (60, 70, 75)):
        thin, thick = sorted(axes.lines, key=lambda line: line.get_linewidth())
        assert axes.get_title() == f"batch size {size}" and thick.get_label() == "batch"
        for line, accuracy in ((thin, 50), (thick, tested)):
            assert [tuple(point) for point in line.get_xydata()] == [(50, accuracy), (100, accuracy)]
    assert [axes.get_xlabel() for axes in figures[0].subfigs[0].axes] == ["", "step", "step", ""]


def test_results_and_pictures_come_from_logs_alone(call, tmp_path):
    for size in (1, 2, 4, 8, 16):  # five batch sizes were more than the old picture had
        more = {"reestimated": 0.4, "reestimated_small": 0.4, "by_batch": 0.6}
        write_run(tmp_path, f"b{size}", 0.5, batch_size=size, evaluation=more)
        write_run(tmp_path, f"g{size}", 0.6, batch_size=size, norm_type="group")
    stored = json.loads((tmp_path / "b8" / "config.json").read_text())
    (tmp_path / "b8" / "config.json").write_text(json.dumps(stored | {"source": {"commit": "abc", "changed": True}}))
    printed = call(compare.main, "--from_logs", tmp_path)
    assert (tmp_path / "table.md").read_text() in printed
    with open(tmp_path / "results.csv", newline="") as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert len(rows) == 10
    expected = {"norm": "batch", "batch_size": "4", "rate": "0.1", "epochs": "8", "accuracy": "0.5", "by_batch": "0.6"}
    assert rows["b4"] | expected | {"training_accuracy": "0.50000", "seed": "0"} == rows["b4"]
    assert rows["b4"]["commit"] == "" and rows["b8"]["commit"] == "abc+changed"
    for name in ("batch_size.png", "curves.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    assert "/nowhere" in call(compare.main, "--from_logs", tmp_path, "/nowhere", code=2)
    assert "so --batch_size has" in call(compare.main, "--from_logs", tmp_path, "--batch_size", 2, code=2)


@pytest.mark.parametrize(
    "file, text",
    [
        ("config.json", '{"flags": 3}'),
        ("metrics.jsonl", '{"loss": 1}\n'),
        ("metrics.jsonl", "nothing\n"),
        ("metrics.jsonl", "\xff\n"),
        ("evaluation.json", '{"step": '),
    ],
)
def test_damaged_logs_are_named(file, text, call, tmp_path):
    run_dir = write_run(tmp_path, "run", 0.5)
    (run_dir / file).write_text(text, encoding="latin1")
    assert str(run_dir / file) in call(compare.main, "--from_logs", tmp_path, code=2)


def grid(data_dir, *flags):
    """The cells that compare.py makes of the flags."""
    flags = ["--dataset", "Digits", "--data_dir", data_dir, *map(str, flags)]
    return compare.make_grid(*compare.parse_flags(flags))[0]


@pytest.mark.parametrize(
    "flags, norms, steps, log_step",
    [
        ("group+ws batch+acc group+ws+acc", ["group+ws", "batch+acc", "group+ws+acc"], 8 * 23, 50),  # of 1437 images
        ("group+acc group+ws batch --weight_standardization", ["group+ws+acc", "group+ws", "batch+ws"], 8 * 23, 50),
        ("batch --accumulate --max_training_step=7 --log_step=3", ["batch+acc"], 7, 3),
        ("batch --epochs 1 --max_batch_size 32", ["batch"], 45, 50),
    ],
)
def test_the_grid_has_a_cell_for_each_seed_batch_size_and_norm(flags, norms, steps, log_step, data_dir):
    cells = grid(data_dir, "--norm_type", *flags.split(), "--batch_size", 4, 16, 2, "--seeds", 2)
    assert [(cell.seed, cell.batch_size, cell.norm) for cell in cells] == [
        (seed, size, norm) for seed in (0, 1) for size in (2, 4, 16) for norm in norms
    ]
    for cell in cells:
        assert (cell.config.norm, cell.config.batch_size, cell.config.seed) == (cell.norm, cell.batch_size, cell.seed)
        assert cell.config.max_training_step == steps and cell.images == steps * cell.config.max_batch_size
        assert cell.config.log_step == min(log_step, steps, cell.config.test_sample_step)  # at most an epoch
        copy = run_of(cell, 1, [], "unfinished")._replace(path=Path("backup/of/it"))
        finished = run_of(cell, 1, [])
        assert [other for other in cells if other.find([copy, finished]) is finished] == [cell]


def run_of(cell, step, speeds, state="finished"):
    """A Run of a cell, as far as `step`, with a row for each of its speeds."""
    rows = [{"step": step, "images_per_second": speed} for speed in speeds]
    return runs.Run(Path("it"), cell.config, {"data": {}}, cell.settings, rows, {}, {}, state)


def test_the_plan_has_the_hours_of_what_is_to_do(data_dir, monkeypatch, capsys):
    """By the median speed of the runs that are there, of the nearest batch size: 100,000 steps of 64 images
    are to do of batch size 4 at 100 per second, and half of them of 32 at 1000, with two processes."""
    flags = "--norm_type group --batch_size 2 32 4 --seeds 1 --max_training_step 100000 --jobs 2".split()
    two, thirty_two, four = cells = grid(data_dir, *flags)
    done = run_of(two, 100_000, [100.0, 50.0, 400.0])._replace(evaluation={"accuracy": 0.5})
    found = [done, run_of(thirty_two, 50_000, [1000.0], "unfinished")]
    monkeypatch.setattr(compare, "read_runs", lambda folders: found)
    compare.print_grid(cells, compare.parse_flags(["--dataset", "Digits", *flags])[0])
    printed = capsys.readouterr().out
    hours = (6.4e6 / 100 + 3.2e6 / 1000) / 2 / 3600
    assert f"3 runs, 2 to do; about {hours:.1f} hours" in printed and "done   group, batch size 2" in printed
    monkeypatch.setattr(compare, "available_cores", lambda: [0])  # on which two processes take turns
    compare.print_grid(cells, compare.parse_flags(["--dataset", "Digits", *flags])[0])
    assert f"about {2 * hours:.1f} hours with 2 processes" in capsys.readouterr().out


def test_memory_is_needed_for_what_is_loaded_alone(digits, monkeypatch):
    """Not for JPEG files and large splits, whose images are read batch by batch."""
    compare.check_memory(1, *digits)
    monkeypatch.setattr(hdf5.Dataset, "nbytes", 1 << 60)
    with scripts.refused("training 1 at a time", "free some memory"):
        monkeypatch.setattr(hdf5, "IN_MEMORY", 1 << 61)
        compare.check_memory(1, *digits)
    monkeypatch.setattr(hdf5, "IN_MEMORY", 1 << 59)
    compare.check_memory(1, *digits)
    with scripts.refused("training 1000000 at a time", "give --jobs"):
        compare.check_memory(1_000_000, *digits)


def test_runs_of_other_settings_do_not_belong_beside_a_grid(data_dir):
    """Other norms, groups and batch sizes do, whatever follows from them; what else differs is named."""
    flags = ("--norm_type", "batch", "group", "--seeds", 1, "--epochs", 1)
    cells = grid(data_dir, *flags, "--batch_size", 2)
    changes = (("--batch_size", 4), ("--norm_type", "layer"), ("--seeds", 2))
    beside = [cell for change in changes for cell in grid(data_dir, *flags, *change)]
    compare.check_train_dir("runs", cells, [run_of(cell, 1, []) for cell in beside], "hash")
    other = run_of(cells[0], 1, [])._replace(stored={"data": {"split": "another hash"}})
    with scripts.refused("different images", "--train_dir"):
        compare.check_train_dir("runs", cells, [other], "hash")
    for change, said in (
        (("--groups", 4), "groups 4, where this grid has 16"),
        (("--learning_rate", 0.5), "base_learning_rate 0.5, where this grid has 0.2"),
        (("--augment", "crop"), "augment crop, where this grid has None"),
        (("--epochs", 2), "max_training_step 46, where this grid has 23"),
    ):
        other = run_of(grid(data_dir, *flags, *change)[-1], 1, [])
        with scripts.refused(said, "--train_dir"):
            compare.check_train_dir("runs", cells, [other], "hash")


@pytest.mark.parametrize(
    "norm, evaluation, needed",
    [
        ("group", {}, True),
        ("group", {"accuracy": 0.5}, False),
        ("batch", {"accuracy": 0.5}, True),
        ("batch", {"accuracy": 0.5, "by_batch": 0.6, "reestimated": 0.6}, True),
        ("batch", {"accuracy": 0.5, "by_batch": 0.6, "reestimated": 0.6, "reestimated_small": 0.6}, False),
    ],
)
def test_batch_norm_is_evaluated_until_it_has_its_rows(norm, evaluation, needed, tmp_path):
    """At batch size 2, four; where no checkpoint is left, a finished run is kept as it is."""
    config = Config(norm_type=norm, batch_size=2)
    states = "finished", "unfinished", "diverged"
    found = [runs.Run(tmp_path, config, {}, {}, [], {}, evaluation, state) for state in states]
    assert [compare.needs_evaluation(run) for run in found] == [False, False, False]
    (tmp_path / "model-1.index").touch()
    assert [compare.needs_evaluation(run) for run in found] == [needed, False, False]


@pytest.fixture(scope="module")
def begun(data_dir, tmp_path_factory):
    """(folder, flags) of a small grid, in which the run of group+ws has begun, without a step."""
    train_dir = tmp_path_factory.mktemp("begun")
    flags = [*SMALL_GRID, "--data_dir", data_dir, "--train_dir", train_dir]
    (_, group), *splits = compare.make_grid(*compare.parse_flags([*map(str, flags)]))
    given, _ = parse_training(group.flags)
    runs.write_config(runs.make_run_dir(group.config), given, group.config, runs.describe_data(*splits))
    return train_dir, flags


def test_what_is_missing_is_trained_and_evaluated_and_no_more(data_dir, tmp_path, call):
    """On the images held out; batch norm's run is there, but not evaluated. --dry_run says what is missing, and changes
    nothing."""
    flags = [*SMALL_GRID, "--data_dir", data_dir, "--train_dir", tmp_path]
    scripts.run_here(*grid(data_dir, *flags)[0].flags)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*")}
    printed = scripts.run("figure/compare.py", *flags)
    assert len(before) > 4 and {path: path.stat().st_mtime_ns for path in before} == before
    batch, group = found = runs.read_runs([tmp_path])
    assert [(run.norm, run.config.batch_size) for run in found] == [("batch", 8), ("group+ws", 8)]
    assert set(batch.evaluation) == {"accuracy", "reestimated", "by_batch"} and set(group.evaluation) == {"accuracy"}
    for run in found:
        assert run.state == "finished" and run.evaluation["accuracy"] == run.rows[-1]["test_loss/accuracy"]
        assert f"{100 * run.evaluation['accuracy']:.1f}" in printed
        assert scripts.results_of(run.path, "validation")["accuracy"]["images"] == 200
    assert "At batch size 8 group+ws is" in printed and "1 seed)" in printed
    (group.path / "evaluation.json").unlink()
    plan = call(compare.main, *flags, "--dry_run")
    assert "done   batch, batch size 8, seed 0" in plan and "to do  group+ws, batch size 8, seed 0" in plan
    assert not (group.path / "evaluation.json").exists()


def is_free(run_dir):
    with contextlib.suppress(command.UserError), runs.lock(run_dir):
        return True


def test_an_interrupted_grid_goes_on(data_dir, tmp_path):
    """Ctrl-C, or the death of compare.py, stops the run after saving it; the same command goes on with it."""
    flags = "--norm_type group --batch_size 4 --max_training_step 10000 --log_step 1".split()
    flags = *GRID, *flags, "--data_dir", data_dir, "--train_dir", tmp_path

    def has_rows_after(step):
        return any(row["step"] > step for run in runs.read_runs([tmp_path]) for row in run.rows)

    saved = 0
    for stop in (signal.SIGINT, signal.SIGKILL):
        process = scripts.start("figure/compare.py", *flags)
        scripts.wait_for(has_rows_after, saved)
        process.send_signal(stop)
        _, error = process.communicate(timeout=120)
        assert process.returncode == (130 if stop == signal.SIGINT else -9), error
        ((run_dir, *_),) = runs.read_runs([tmp_path])
        scripts.wait_for(is_free, run_dir)
        before, saved = saved, int(scripts.checkpoint(run_dir)[scripts.STEP])
        assert before < saved == scripts.metrics(run_dir)[-1]["step"] < 10000


def test_a_run_that_diverges_is_a_row_and_a_crash_is_reported(data_dir, tmp_path, call):
    """At batch size 1 the last convolutions of the convnet leave batch norm a single value of an image of 8 by 8."""
    flags = "--model convnet --norm_type batch none --batch_size 1 --max_training_step 3 --learning_rate 1e30".split()
    error = call(compare.main, *GRID, *flags, "--data_dir", data_dir, "--train_dir", tmp_path, code=1)
    assert "1 of 2 runs failed" in error and "batch, batch size 1" in error and "a single value" in error
    assert rows_of(tmp_path)["none"] == ["1 diverged"] and (tmp_path / "table.md").exists()


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--norm_type grupo", "grupo"),
        ("--dataset NO_SUCH", "download.py --dataset NO_SUCH --image_dir DIR"),
        ("--dry-run", "did you mean --dry_run?"),
        ("--learning-rate 4", "did you mean --learning_rate?"),
        ("--seed=7", "--seeds"),
        ("--steps 20", "--max_training_step"),
        ("--groups 7", "7 groups"),
        ("--norm_type batch --groups 8", "--groups"),
        ("--epochs 2", "--epochs"),
        ("--checkpoint nowhere", "not in a run folder"),
        ("--max_training_step 7", "max_training_step 6"),
        ("--learning_rate 0.5", "base_learning_rate 0.2"),
    ],
)
def test_wrong_requests_end_in_one_line_before_anything_is_trained(flags, said, begun, call):
    train_dir, known = begun
    before = sorted(train_dir.glob("*/*"))
    assert said in call(compare.main, *known, *flags.split(), code=2)
    assert sorted(train_dir.glob("*/*")) == before


def test_a_run_is_repeated_with_its_own_flags_also_if_a_value_is_0(digits):
    given = "--dataset Digits --norm_type group+ws+acc --batch_size 4 --model resnet8 --weight_decay 0 --no_augment"
    first = derive(parse_training(given.split())[0], digits[0])
    again = derive(parse_training(challenge.flags_of(first))[0], digits[0])
    assert first.weight_decay == 0 and runs.settings_of(again, {}) == runs.settings_of(first, {})


def test_the_hash_of_an_archive_makes_no_other_row():
    """It changes with the time stamp in the gzip header. The hash of the images tells whether they are the same."""
    made_from = [f"other archives than the original: a.gz sha256 {name}" for name in "ab"] + ["the original archives"]
    first, again, original = (runs.settings_of(Config(), {"made_from": text}) for text in made_from)
    assert first == again != original and runs.settings_of(Config(), {"made_from": None})["made_from"] is None


def test_a_run_is_repeated_with_its_own_convolutions_and_a_repetition_that_fails_is_no_result(monkeypatch, tmp_path):
    """Not even if it logged a row first. It says whether it has oneDNN's, which round differently, and fails."""
    write_run(tmp_path / "again", "run", 0.5)
    copy = f"import os, shutil, sys; shutil.copytree({str(tmp_path / 'again')!r}, sys.argv[-3])"
    (tmp_path / "trainer.py").write_text(f"{copy}; sys.exit(os.environ['TF_ENABLE_ONEDNN_OPTS'])")
    monkeypatch.setattr(challenge, "TRAINER", tmp_path / "trainer.py")
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", "1")
    run = runs.read_run(write_run(tmp_path, "run", 0.5, steps=50))
    for machine, said in (({"onednn": "0"}, ": 0"), ({}, ": 1")):
        with pytest.raises(command.ExternalError, match=f"{said}$"):
            challenge.repeat(run._replace(stored=run.stored | {"machine": machine}), 1000, str(tmp_path))


def test_a_repetition_says_what_may_have_changed_its_bits(digits, data_dir):
    """Also instructions that a processor of the same name lacks; not what older runs did not record."""
    now = {"versions": runs.versions() | {"keras": "3.0"}, "machine": runs.machine(), "data": {}}
    avx512 = now["machine"]["avx512"] = not now["machine"]["avx512"]
    run = runs.read_runs([scripts.REPO / "figure" / "studies" / "digits"])[0]._replace(stored=now)
    changes = [change.split(", is")[0] for change in challenge.list_changes(run, data_dir)]
    assert changes == ["keras was 3.0", f"avx512 was {avx512}"]


@pytest.mark.parametrize(
    "old, new, expected",
    [({"loss": 2.5}, {"loss": 2.0}, 0.5), ({"loss": 2.5}, {}, math.inf), ({"loss": 2.5}, {"loss": math.nan}, math.inf)],
)
def test_a_row_that_diverged_differs_from_one_that_did_not(old, new, expected):
    assert challenge.difference(old, new, "loss") == challenge.difference(new, old, "loss") == expected
    assert challenge.difference(new, new, "loss") == challenge.difference({}, {}, "loss") == 0
    assert challenge.difference({"loss": math.inf}, {"loss": math.inf}, "loss") == 0


def test_a_run_of_several_workers_or_without_rows_is_not_challenged(call, data_dir, tmp_path):
    run_dir = write_run(tmp_path, "run", 0.5, dataset="Digits", num_replicas=2)
    assert "several workers" in challenge.find_problem(runs.read_run(run_dir), data_dir)
    write_rows(run_dir, [])
    said = call(compare.main, "--challenge", tmp_path, "--data_dir", data_dir, code=2)
    assert "none of the 1 runs" in said


def test_a_published_run_of_digits_is_trained_again(call, tmp_path):
    """Its first 20 steps, bitwise or to within the tolerance of another processor; Digits is packed first."""
    study = scripts.REPO / "figure" / "studies" / "digits"
    flags = "--runs", 1, "--steps", 20, "--data_dir", tmp_path
    assert "of 1 are bitwise equal" in call(compare.main, "--challenge", study, *flags)
