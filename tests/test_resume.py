"""An interrupted run ends exactly like an uninterrupted one."""

import random
import subprocess

import kill_trainer
import numpy as np
import pytest
import scripts
import tensorflow as tf

from config import Config, derive, describe_data, parse_training, write_config
import runs
import summaries


@pytest.mark.parametrize("norm_type, model", [("batch", "convnet"), ("group", "resnet8")])
def test_killed_runs_end_like_the_one_left_alone(norm_type, model, data_dir, tmp_path):
    """SIGKILL at two random moments; dropout, augmentation, moving statistics and Adam are all in play."""
    flags = ("--norm_type", norm_type, "--model", model)
    scripts.run("trainer.py", *kill_trainer.FLAGS, *flags, "--data_dir", data_dir, "--train_dir", tmp_path / "alone")
    run_dir, killed_at = kill_trainer.kill_and_continue(data_dir, tmp_path / "killed", flags, 2, random.Random(1))
    assert len(killed_at) == 2
    kill_trainer.assert_same_runs(run_dir, scripts.only_run(tmp_path / "alone"))


def test_rows_and_events_after_the_checkpoint_are_dropped(digits, tmp_path):
    """What a kill leaves: rows and events of steps that were not saved, and a last line and record cut short."""
    config = derive(Config(dataset="Digits", max_training_step=9), digits[0])
    (tmp_path / "config.json").write_text('{"flags": {}}')

    def write(first_step, last_step):
        log = summaries.Log(tmp_path, config, digits[1], first_step)
        for step in range(first_step + 1, last_step + 1):
            row = {"step": step, "loss/loss": 1.0 / step, "loss/accuracy": 0.5, "learning_rate": 0.1}
            log.add(row)
            log.write_summaries(row, None)
        log.close()

    write(0, 5)
    (events,) = tmp_path.glob("events*")
    events.write_bytes(events.read_bytes()[:-7])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "los')
    runs.drop_after(tmp_path, 3)
    assert [row["step"] for row in scripts.metrics(tmp_path)] == [1, 2, 3]
    write(3, 4)
    assert [row["step"] for row in scripts.metrics(tmp_path)] == [1, 2, 3, 4]
    assert [step for tag, step in scripts.scalars(tmp_path) if tag == "loss/loss"] == [1, 2, 3, 4]


def test_a_finished_run_stays_as_it_is(data_dir, main_of, capsys, tmp_path):
    flags = ("--dataset", "Digits", "--model", "resnet8", "--max_training_step", 2, "--data_dir", data_dir)
    main_of(*flags, "--train_dir", tmp_path)
    run_dir = scripts.only_run(tmp_path)
    before, rows, points = scripts.checkpoint(run_dir), scripts.metrics(run_dir), scripts.scalars(run_dir)
    capsys.readouterr()
    with runs.lock(run_dir), pytest.raises(runs.UserError, match="is being trained"):
        main_of("--resume", run_dir)
    main_of("--resume", run_dir)
    assert "done: 2 steps" in capsys.readouterr().out
    assert scripts.metrics(run_dir) == rows and sorted(scripts.scalars(run_dir)) == sorted(points)
    for name, value in scripts.checkpoint(run_dir).items():
        np.testing.assert_array_equal(value, before[name])


def test_a_full_disk_ends_in_one_line_and_can_be_continued(data_dir, main_of, capsys, tmp_path):
    """A limit on the size of files stands for the full disk: no checkpoint fits, which ends the run in one line, and
    nothing is left that would count as one."""
    flags = (
        *"--dataset Digits --model resnet8 --max_training_step 4 --ckpt_save_step 1 --data_dir".split(),
        data_dir,
        "--train_dir",
        tmp_path,
    )
    limited = ["prlimit", "--fsize=400000", *scripts.command("trainer.py", *flags)]
    done = subprocess.run(limited, capture_output=True, text=True, cwd="/", timeout=300)
    assert done.returncode == 1, done.stderr
    assert len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr, done.stderr
    run_dir = scripts.only_run(tmp_path)
    assert tf.train.latest_checkpoint(run_dir) is None
    main_of("--resume", run_dir)
    assert "done: 4 steps" in capsys.readouterr().out
    assert not list(run_dir.glob("*temp*"))


def test_data_that_changed_is_not_trained_on(data_dir, digits, tmp_path):
    run_dir = tmp_path / "run"
    flags, _ = parse_training(["--dataset", "Digits", "--data_dir", data_dir])
    run_dir.mkdir()
    write_config(run_dir, flags, derive(flags, digits[0]), describe_data(*digits) | {"train": 1000})
    error = scripts.run("trainer.py", "--resume", run_dir, code=2)
    assert "1000" in error and "1437" in error


def test_a_run_goes_on_with_its_own_length(data_dir, tmp_path):
    """With a longer schedule its first steps would have had other rates; --checkpoint starts a new run."""
    error = scripts.run("trainer.py", "--resume", tmp_path, "--max_training_step", 8, code=2)
    assert "--max_training_step 8" in error and f"--checkpoint {tmp_path}" in error
