"""trainer.py: what a run leaves, how it ends, and how it goes on."""

import errno
import fcntl
import json
import math
import os
import re
import shutil
import signal
import subprocess
from unittest import mock

import archives
import numpy as np
import pytest
import scripts
import tensorflow as tf
from tensorboard.plugins.hparams import plugin_data_pb2

from config import derive, parse_training
from runs import describe_data, write_config
import checkpoints
import datasets
import evaler
import input_ops
import runs
import summaries
import trainer


def test_config_json_has_the_flags_what_follows_and_what_made_the_run(group_run):
    run_dir, printed = group_run
    assert run_dir.name.startswith("mine-Digits_group+ws_bs_8_resnet8_s0-20") and str(run_dir) in printed
    config = json.loads((run_dir / "config.json").read_text())
    assert config["flags"]["seed"] == 0 and config["flags"]["batch_size"] == 8
    assert config["derived"]["updates_per_step"] == 4 and config["derived"]["groups"] == 16
    assert config["versions"]["tensorflow"] == tf.__version__
    assert len(config["data"].pop("class_names")) == 10
    assert len(config["data"].pop("split")) == 16
    counts = {"train": 1437, "test": 360, "image_shape": [8, 8, 1], "num_classes": 10}
    assert config["data"] == counts | {"made_from": "the original archives"}
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=scripts.REPO, capture_output=True, text=True)
    assert (config["source"] or {}).get("commit", "") == head.stdout.strip()
    assert config["machine"]["processors"] == os.cpu_count() and config["machine"]["processor"]
    assert config["machine"]["avx512"] in (True, False)


def test_it_prints_what_it_will_do_and_how_long_that_takes(group_run):
    lines = group_run[1].splitlines()
    assert all(word in lines[0] for word in ("Digits", "1437", "360", "8x8x1", "10 classes"))
    assert all(word in lines[2] for word in ("resnet8", "group+ws", "9 steps", "32 images", "4 updates", "2 tests"))
    assert any(line.startswith("an epoch takes about 0:00:0") for line in lines)
    tests = [line for line in lines if re.match("step [59]/9 ", line)]
    assert len(tests) == 2 and all("test" in line and len(line) <= 100 for line in tests)
    accuracy = scripts.metrics(group_run[0])[-1]["test_loss/accuracy"]
    assert f"{100 * accuracy:.2f} %" in lines[-3] and lines[-2].endswith(f"evaler.py {group_run[0]}")


def test_metrics_and_checkpoints_are_of_each_interval_and_the_end(group_run):
    """With the rate that the optimizer used: --learning_rate is that at max_batch_size, scaled, here on a cosine. The
    original repo saved every so many steps only, and lost the rest."""
    rows = scripts.metrics(group_run[0], without=())
    assert [row["step"] for row in rows] == [2, 4, 5, 6, 8, 9]
    assert [row["step"] for row in rows if "test_loss/accuracy" in row] == [5, 9]
    for row in rows:
        assert 0 <= row["loss/accuracy"] <= 1 and math.isfinite(row["loss/loss"]) and row["images_per_second"] > 0
        used = 0.01 * 8 / 32 * 0.5 * (1 + math.cos(math.pi * (row["step"] - 1) / 9))
        assert row["learning_rate"] == pytest.approx(used, rel=1e-6)
    assert tf.train.latest_checkpoint(group_run[0]).endswith("model-9")
    assert scripts.checkpoint(group_run[0])[scripts.STEP] == 9
    assert {path.stem for path in group_run[0].glob("model-*.index")} == {"model-4", "model-8", "model-9"}


def test_tensorboard_shows_the_tags_of_the_original_repo(group_run):
    tags = {f"{split}/{name}" for split in ("loss", "test_loss") for name in ("accuracy", "loss")}
    tags |= {"learning_rate", "images_per_second"}
    rows = {row["step"]: row for row in scripts.metrics(group_run[0], without=())}
    found = {tag: {} for tag in tags}
    for tag, step, value in scripts.shown(group_run[0], "scalars"):
        found.setdefault(tag, {})[step] = float(value)
    for tag in tags:
        steps = (5, 9) if tag.startswith("test") else (4, 5, 8, 9)
        assert found[tag] == pytest.approx({step: rows[step][tag] for step in steps}, rel=1e-6)
    pictures = [(tag, step) for tag, step, _ in scripts.shown(group_run[0], "images")]
    assert {(tag, step) for tag in ("img/image", "test_img/image") for step in (5, 9)} <= set(pictures)


def test_hparams_has_one_schema_which_begins_with_the_norm(group_run):
    found = scripts.EventAccumulator(str(group_run[0])).Reload().PluginTagToContent("hparams")
    parse = plugin_data_pb2.HParamsPluginData.FromString
    session = parse(found["_hparams_/session_start_info"]).session_start_info
    shown = {name: getattr(value, value.WhichOneof("kind")) for name, value in session.hparams.items()}
    assert session.group_name == group_run[0].name
    main = {"1 norm": "group+ws", "2 batch size": 8, "3 model": "resnet8", "4 rate": 0.01, "5 seed": 0}
    assert sorted(shown)[:5] == list(main) and shown | main | {"dataset": "Digits", "steps": 9, "groups": 16} == shown
    columns = parse(found["_hparams_/experiment"]).experiment.hparam_infos
    assert sorted(column.name for column in columns) == sorted(shown)


def test_a_run_trains_on_augmented_images_from_weights_of_its_seed_and_logs_mean_losses(data_dir, digits, tmp_path):
    """At a rate of next to nothing, which leaves the weights: each step's loss is that of its images. A row has the
    mean over the last log_step steps, also that of a test, here the last one, which follows another after one step."""
    flags = "--norm_type group --augment --seed 5 --max_training_step 5 --log_step 2 --learning_rate 1e-30".split()
    run_dir = scripts.train(data_dir, tmp_path, *flags)
    model = scripts.state_of(*scripts.SMALL, *flags, "--data_dir", data_dir).model
    for found, expected in zip(scripts.network_of(run_dir).get_weights(), model.get_weights(), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-30)

    def losses(augment, seed=5):
        batches = input_ops.create_input_ops(digits[0], 32, True, augment, seed=seed, last_step=5)
        of_batch = tf.nn.sparse_softmax_cross_entropy_with_logits
        return [float(tf.reduce_mean(of_batch(labels, model(images, training=True)))) for images, labels in batches]

    rows, steps = scripts.metrics(run_dir), losses("flip+crop")
    assert [row["step"] for row in rows] == [2, 4, 5]
    expected = [np.mean(steps[:2]), np.mean(steps[2:4]), np.mean(steps[3:])]
    assert [row["loss/loss"] for row in rows] == pytest.approx(expected, rel=1e-6)
    for other in (losses(None), losses("flip+crop", seed=0)):
        assert steps != pytest.approx(other, rel=1e-4)


def test_speed_counts_neither_the_first_step_nor_what_is_not_training(digits, tmp_path, monkeypatch):
    """A clock of our own: steps of 32 images take 2 s, tracing and a test take longer."""
    flags = (*scripts.SMALL, "--max_training_step", 100, "--log_step", 3, "--write_summary_step", 50)
    config = derive(parse_training([*map(str, flags)])[0], digits[0])
    now = [1000.0]
    monkeypatch.setattr(summaries.time, "perf_counter", lambda: now[0])
    write_config(tmp_path, config, config, {})
    log = summaries.Log(tmp_path, config, *digits, first_step=0)
    for step, seconds in enumerate((70, 2, 2, 2, 2, 4), 1):
        now[0] += seconds
        log.stepped(step)
        if step % 3 == 0:
            with log.paused():
                now[0] += 500
            log.write({"step": step, "loss/loss": 0.0, "loss/accuracy": 0.0, "learning_rate": 0.1}, None)
    log.close()
    assert [row["images_per_second"] for row in scripts.metrics(tmp_path, without=())] == [32 * 2 / 4, 32 * 3 / 8]


def test_held_out_images_are_neither_trained_on_nor_the_test_split(data_dir, capsys, figures, monkeypatch, tmp_path):
    """--validation tests on training images that are left out, each class in proportion; evaler.py does the same."""
    whole, _ = datasets.create_default_splits("Digits", data_dir)
    train, held = datasets.create_default_splits("Digits", data_dir, validation=200)
    assert len(held) == 200 and sorted(train.ids + held.ids) == sorted(whole.ids)
    assert np.abs(np.bincount(held.labels) - 200 * np.bincount(whole.labels) / 1437).max() <= 1
    for split in (train, held):
        rows = [whole.ids.index(name) for name in split.ids]
        np.testing.assert_array_equal(split.images(), whole.images()[rows])
        np.testing.assert_array_equal(split.labels, whole.labels[rows])
    run_dir = scripts.train(data_dir, tmp_path, "--max_training_step", 2, "--validation", 200)
    data = json.loads((run_dir / "config.json").read_text())["data"]
    assert (data["train"], data["test"]) == (1237, 200)
    trained = capsys.readouterr().out
    flags = ["--dataset", "Digits", "--data_dir", data_dir, "--train_dir", tmp_path, "--validation"]
    scripts.evaluate([*flags, 200])
    result = scripts.results_of(run_dir, "validation")["accuracy"]
    assert "Digits validation: accuracy" in capsys.readouterr().out and result["images"] == 200
    assert result["accuracy"] == scripts.metrics(run_dir)[-1]["test_loss/accuracy"]
    assert f"validation accuracy {100 * result['accuracy']:.2f} %" in trained and "--validation 200" in trained
    with scripts.refused("--validation 100", 200):
        scripts.evaluate([*flags, 100])
    reestimate = mock.Mock(wraps=evaler.reestimate_batch_statistics)
    monkeypatch.setattr(evaler, "reestimate_batch_statistics", reestimate)
    for split, images in (("train", 1237), ("test", 360)):
        scripts.evaluate([*flags[:-1], "--split", split, "--batch_statistics", "reestimate"])
        assert scripts.results_of(run_dir, split)["accuracy"]["images"] == images
        assert reestimate.call_args.args[1].ids == train.ids
    scripts.run_here("--resume", run_dir)
    assert "step 2 of 2" in capsys.readouterr().out


def test_own_dataset_trains_and_evaluates_with_no_code_touched(figures, tmp_path):
    """The original repo's layout, by name alone."""
    images, labels = np.random.default_rng(0).integers(0, 64, (60, 12, 10, 3), np.uint8), np.arange(60) % 2
    images[labels == 1, :, :5] += 150
    archives.write_own(tmp_path / "data" / "MY_SHAPES", [str(i) for i in range(60)], images, np.eye(2)[labels])
    flags = ("--dataset", "MY_SHAPES", "--data_dir", tmp_path / "data", "--train_dir", tmp_path / "runs")
    training = "--norm_type group --model resnet8 --batch_size 4 --max_batch_size 8 --max_training_step 40"
    scripts.run_here(*flags, *training.split(), "--test_sample_step", 40, "--learning_rate", 0.1)
    scripts.evaluate(flags)
    result = scripts.results_of(scripts.only_run(tmp_path / "runs"))["accuracy"]
    assert (result["images"], result["accuracy"]) == (12, 1.0)


class StoppedInTest(trainer.Interruption):
    """As if a signal came in the middle of the first test."""

    def __init__(self, alone):
        self.signal, self.worth_saving, self.alone = None, False, alone

    def until_stopped(self, batches):
        yield next(iter(batches))
        self.signal = signal.SIGTERM
        raise trainer.Stopped


def test_a_stopped_test_is_made_up_for(group_run, data_dir, tmp_path, monkeypatch):
    """A signal in a test stops it between batches; the run goes on and ends like one left alone, that row included."""
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "Interruption", StoppedInTest)
        with pytest.raises(SystemExit) as ended:
            scripts.train(data_dir, tmp_path, *scripts.GROUP_RUN)
    assert ended.value.code == 128 + signal.SIGTERM
    run_dir = scripts.only_run(tmp_path)
    assert [row["step"] for row in scripts.metrics(run_dir)] == [2, 4]
    scripts.run_here("--resume", run_dir)
    scripts.assert_same_runs(run_dir, group_run[0])


def start(data_dir, train_dir, *flags):
    flags = (*scripts.SMALL, *flags, "--log_step", 1, "--data_dir", data_dir, "--train_dir", train_dir)
    return scripts.start("trainer.py", *flags)


def test_a_run_is_evaluated_while_it_trains_and_a_signal_saves_it(data_dir, figures, tmp_path):
    flags = "--max_training_step 100000 --ckpt_save_step 10 --test_sample_step 11".split()
    process = start(data_dir, tmp_path / "my runs", *flags)
    scripts.read_until(process, "step     11/")
    run_dir = scripts.only_run(tmp_path / "my runs")
    assert scripts.evaluate_digits(data_dir, run_dir)["accuracy"]["images"] == 360
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    saved = int(scripts.checkpoint(run_dir)[scripts.STEP])
    assert f"after step {saved}" in rest and f"--resume '{run_dir}'" in rest
    last = scripts.metrics(run_dir)[-1]["step"]
    assert last == saved or (saved % 11 == 0 and last == saved - 1)  # --resume writes the row of an interrupted test


@pytest.mark.parametrize("insists", [False, True])
def test_a_signal_before_the_first_step_and_a_second_one_end_the_process_at_once(insists, data_dir, tmp_path):
    """In steps that take seconds: nothing is waited for where there is nothing to save, or the user insists."""
    flags = "--batch_size 1 --max_batch_size 512 --max_training_step 1000 --test_sample_step 1000".split()
    process = start(data_dir, tmp_path, *flags)
    scripts.read_until(process, "an epoch takes" if insists else "run folder")
    process.send_signal(signal.SIGINT)
    if insists:
        scripts.read_until(process, "SIGINT")
        process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == 130 and len(error.splitlines()) == 1 and "SIGINT" in error, error
    assert not list(scripts.only_run(tmp_path).glob("model-*"))


def test_divergence_stops_the_run_and_keeps_the_last_good_checkpoint(data_dir, monkeypatch, tmp_path):
    """A checkpoint is due after each step, as if it had taken 10 minutes, whatever --ckpt_save_step is."""
    monkeypatch.setattr(checkpoints, "CHECKPOINT_SECONDS", 0)
    flags = "--norm_type none --learning_rate 1e9 --max_training_step 50".split()
    with scripts.refused("1e+09", "--learning_rate", kind=trainer.ExternalError) as error:
        scripts.train(data_dir, tmp_path, *flags)
    run_dir = scripts.only_run(tmp_path)
    last = scripts.checkpoint(run_dir)
    step = int(last[scripts.STEP])
    assert f"step {step + 1}:" in str(error.value) and f"{run_dir}/model-{step};" in str(error.value)
    assert scripts.metrics(run_dir)[-1] == {"step": step + 1, "diverged": True}
    assert all(np.isfinite(value).all() for name, value in last.items() if name.startswith("model/"))


def test_a_step_ends_with_the_update_that_failed(tmp_path):
    """16 updates of one image each. One of each class is so bright that the norm of a wrong one's gradient is infinite,
    which clipping makes an update of nothing: the next updates would succeed, and the run would go on."""
    images = np.full((21, 8, 8, 1), 0.5, np.float32)
    images[:2] = 1e20
    archives.open_own(tmp_path / "data", images, np.arange(21) % 2)
    flags = "--dataset OWN --model resnet8 --norm_type none --batch_size 1 --max_batch_size 16".split()
    flags += "--learning_rate 1e-9 --max_training_step 1".split()
    with scripts.refused("step 1:", kind=trainer.ExternalError):
        scripts.run_here(*flags, "--data_dir", tmp_path / "data", "--train_dir", tmp_path / "runs")


def test_a_full_disk_ends_in_one_line_and_can_be_continued(data_dir, capsys, monkeypatch, tmp_path):
    """No checkpoint fits, and nothing is left that would count as one. Then all fits but the last row, which makes a
    run a finished one: it must have a checkpoint by then, to be continued."""

    def fail(log, row, images):
        raise OSError(28, "No space left on device")

    with scripts.full_disk(400_000), scripts.refused("--resume", kind=trainer.ExternalError):
        scripts.train(data_dir, tmp_path, "--max_training_step", 2, "--ckpt_save_step", 1)
    run_dir = scripts.only_run(tmp_path)
    assert tf.train.latest_checkpoint(run_dir) is None
    with monkeypatch.context() as patch, scripts.refused("--resume", kind=trainer.ExternalError):
        patch.setattr(summaries.Log, "write", fail)
        scripts.run_here("--resume", run_dir)
    assert scripts.checkpoint(run_dir)[scripts.STEP] == 2 and not scripts.metrics(run_dir)
    scripts.run_here("--resume", run_dir)
    assert [row["step"] for row in scripts.metrics(run_dir)] == [2]
    assert "done: 2 steps" in capsys.readouterr().out
    assert not list(run_dir.glob("*temp*"))


def test_runs_of_the_same_second_get_folders_of_their_own(digits, tmp_path):
    config = derive(parse_training(["--dataset", "Digits", "--train_dir", str(tmp_path)])[0], digits[0])
    folders = {runs.make_run_dir(config) for _ in range(3)}
    assert len(folders) == 3 and all(folder.is_dir() for folder in folders)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--dataset NO_SUCH", ["NO_SUCH"]),
        ("--checkpoint /nowhere/model-1", ["/nowhere/model-1"]),
        ("--validation 1437", ["1437"]),
        ("--model resnet18 --batch_size 1", ["a single value per channel"]),
    ],
)
def test_what_does_not_suit_the_data_is_one_line(flags, words, data_dir, tmp_path):
    with scripts.refused(*words):
        scripts.train(data_dir, tmp_path / "runs", *flags.split())
    assert not (tmp_path / "runs").exists()


def test_a_run_is_not_resumed_with_other_data_or_convolutions(data_dir, digits, monkeypatch, tmp_path):
    flags, _ = parse_training(["--dataset", "Digits", "--data_dir", data_dir])
    write_config(tmp_path, flags, derive(flags, digits[0]), describe_data(*digits) | {"train": 1000})
    with scripts.refused(1000, 1437, tmp_path):
        scripts.run_here("--resume", tmp_path)
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", "0")
    with scripts.refused("TF_ENABLE_ONEDNN_OPTS=1", "but it is 0"):
        scripts.run_here("--resume", tmp_path)


def test_a_run_folder_on_nfs_can_be_locked(monkeypatch, tmp_path):
    """Where flock(2) needs a file that is open for writing, as no folder can be."""

    def flock(file, operation, flock=fcntl.flock):
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    (tmp_path / "config.json").write_text("{}")
    with runs.lock(tmp_path), scripts.refused(tmp_path, "another process"), runs.lock(tmp_path):
        pass


def test_a_finished_run_stays_as_it_is(group_run, data_dir, capsys, tmp_path):
    run_dir = shutil.copytree(group_run[0], tmp_path / "run")
    before, rows, points = scripts.checkpoint(run_dir), scripts.metrics(run_dir), scripts.scalars(run_dir)
    with runs.lock(run_dir), scripts.refused(run_dir, "another process"):
        scripts.run_here("--resume", run_dir)
    capsys.readouterr()
    scripts.run_here("--resume", run_dir)
    assert "done: 9 steps" in capsys.readouterr().out
    assert scripts.metrics(run_dir) == rows and sorted(scripts.scalars(run_dir)) == sorted(points)
    for name, value in scripts.checkpoint(run_dir).items():
        np.testing.assert_array_equal(value, before[name])
    for damaged in ("", "\0" * 100):  # as a power cut may leave it
        (run_dir / "checkpoint").write_text(damaged)
        with scripts.refused(run_dir / "checkpoint", "new run"):
            scripts.run_here("--resume", run_dir)
        with scripts.refused(run_dir):
            scripts.evaluate([run_dir, "--data_dir", data_dir])
    assert scripts.metrics(run_dir) == rows
    for path in (run_dir / "checkpoint", *run_dir.glob("model-*")):
        path.unlink()
    with scripts.refused(run_dir, "no checkpoint", "new run"):
        scripts.run_here("--resume", run_dir)
    assert scripts.metrics(run_dir) == rows
