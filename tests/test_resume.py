"""A run that was interrupted ends exactly like one left alone. KILLS=20 tries more moments than one."""

import os
import random
import time

import scripts

from config import Config, derive
import runs
import summaries

STEPS = 24
FLAGS = f"--dataset Digits --max_batch_size 32 --batch_size 16 --max_training_step {STEPS} --augment --seed 5".split()
FLAGS += "--test_sample_step 13 --log_step 7 --write_summary_step 5 --ckpt_save_step 3".split()


def kill(process, folder, rng):
    """Kill a run: while it starts, at some moment after a line of log, or while it writes a checkpoint."""
    lines = rng.randint(0, 5)
    for line in process.stdout:
        lines -= line.startswith(("step", "epoch"))
        if lines <= 0 and line.startswith(("run folder", "step", "epoch")):
            break
    if rng.random() < 0.5:
        time.sleep(rng.uniform(0, 1))
    else:
        while process.poll() is None and not any(folder.glob("*/model-*temp*")):
            pass
    process.kill()
    return process.wait() < 0  # or else it had finished


def test_killed_runs_end_like_the_one_left_alone(data_dir, tmp_path):
    """SIGKILL at random moments; dropout, augmentation, moving statistics and Adam are all in play. Compared are all
    tensors of the last checkpoint, metrics.jsonl but for its timings, and the steps of every TensorBoard scalar."""
    kills, rng = int(os.environ.get("KILLS", 1)), random.Random(1)
    flags = *FLAGS, "--norm_type", "batch", "--model", "convnet", "--data_dir", data_dir, "--train_dir"
    scripts.run("trainer.py", *flags, tmp_path / "alone", "--ckpt_save_step", 1000)  # saving changes nothing
    part = 0
    while kills:  # a run is over after some kills: then another one is started
        part += 1
        folder = tmp_path / f"killed{part}"
        command = ("trainer.py", *flags, folder)
        for _ in range(min(kills, 5)):
            with scripts.start(*command) as process:
                kills -= kill(process, folder, rng)
            command = ("trainer.py", "--resume", scripts.only_run(folder))
        assert f"done: {STEPS} steps" in scripts.run("trainer.py", "--resume", scripts.only_run(folder))
        scripts.assert_same_runs(scripts.only_run(folder), scripts.only_run(tmp_path / "alone"))


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
