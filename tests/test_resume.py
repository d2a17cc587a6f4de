"""An interrupted run ends exactly like an uninterrupted one."""

import random

import kill_trainer
import scripts

from config import Config, derive
import runs
import summaries


def test_killed_runs_end_like_the_one_left_alone(data_dir, tmp_path):
    """SIGKILL at two random moments; dropout, augmentation, moving statistics and Adam are all in play."""
    flags = ("--norm_type", "batch", "--model", "convnet")
    scripts.run("trainer.py", *kill_trainer.FLAGS, *flags, "--data_dir", data_dir, "--train_dir", tmp_path / "alone")
    run_dir, killed_at = kill_trainer.kill_and_continue(data_dir, tmp_path / "killed", flags, 2, random.Random(1))
    assert len(killed_at) == 2
    kill_trainer.assert_same_runs(run_dir, scripts.only_run(tmp_path / "alone"))


def test_rows_and_events_after_the_checkpoint_are_dropped(digits, tmp_path):
    """What a kill leaves: rows and events of steps that were not saved, and a last line and record cut short."""
    config = derive(Config(dataset="Digits", max_training_step=9), digits[0])
    (tmp_path / "config.json").write_text('{"flags": {}}')

    def write(first_step, last_step):
        log = summaries.Log(tmp_path, config, *digits, first_step)
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
