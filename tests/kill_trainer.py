"""Kill training runs at random moments, continue them, and compare with runs that were left alone, bit by bit.

    python tests/kill_trainer.py --kills 20         # over both norms; ten minutes or so

Compared are every tensor of the last checkpoint (weights, moving statistics, optimizer, step, state of dropout),
metrics.jsonl but for its timings, and the steps of every TensorBoard scalar.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import scripts  # first: it quietens TensorFlow as it loads

import download

STEPS = 40
FLAGS = (
    *"--dataset Digits --max_batch_size 32 --batch_size 16 --max_training_step".split(),
    STEPS,
    *"--augment --test_sample_step 25 --log_step 7 --write_summary_step 5 --ckpt_save_step 3 --seed 5".split(),
)


def assert_same_runs(run_dir, expected_dir):
    """Raise AssertionError unless two finished runs agree in all but their timings."""
    found, expected = scripts.checkpoint(run_dir), scripts.checkpoint(expected_dir)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert scripts.metrics(run_dir) == scripts.metrics(expected_dir)
    # images_per_second is missing where a process made its first step, which it does not time
    found, expected = (
        sorted(point for point in scripts.scalars(path) if point[0] not in scripts.TIMINGS)
        for path in (run_dir, expected_dir)
    )
    assert found == expected, "TensorBoard events lost or doubled"


def half_written(folder):
    """Whether a run folder in `folder` holds a checkpoint that is not written to its end."""
    return any(Path(folder).glob("*/model-*temp*"))


def kill_and_continue(data_dir, folder, flags, kills, rng, longest=1.0):
    """Train under SIGKILL; returns the run folder and the last step in metrics.jsonl at each kill."""
    command = scripts.command("trainer.py", *FLAGS, *flags, "--data_dir", data_dir, "--train_dir", folder)
    killed_at = []
    while True:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd="/")
        printed = ""
        if kills:
            lines = rng.randint(0, 5)  # 0: while it starts; else somewhere after so many lines of log
            for line in process.stdout:
                printed += line
                lines -= line.startswith(("step", "epoch"))
                if lines <= 0 and line.startswith(("run folder", "step", "epoch")):
                    break
            if rng.random() < 0.5:
                time.sleep(rng.uniform(0, longest))
            else:  # as soon as a checkpoint is being written
                while process.poll() is None and not half_written(folder):
                    pass
            process.kill()
            kills -= process.wait() < 0  # a run that finished first was not killed
        printed += process.stdout.read()
        if process.wait() >= 0:
            assert process.returncode == 0 and f"done: {STEPS} steps" in printed, printed
            return scripts.only_run(folder), killed_at
        run_dir = scripts.only_run(folder)
        rows = scripts.metrics(run_dir) if (run_dir / "metrics.jsonl").exists() else []
        killed_at.append(f"{rows[-1]['step'] if rows else 0}{' in a checkpoint' * half_written(folder)}")
        command = scripts.command("trainer.py", "--resume", run_dir)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="in all, over both norms")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        download.prepare("Digits", str(folder / "data"))
        for flags in ("--norm_type batch --model convnet", "--norm_type group --model resnet8"):
            data_dir, name = folder / "data", flags.split()[1]
            alone, left, part = folder / f"{name}0", arguments.kills // 2, 0
            scripts.run("trainer.py", *FLAGS, *flags.split(), "--data_dir", data_dir, "--train_dir", alone)
            while left:  # a run is over after some kills: then another one is killed
                part += 1
                place = folder / f"{name}{part}"
                run_dir, killed_at = kill_and_continue(data_dir, place, flags.split(), min(left, 5), rng)
                assert_same_runs(run_dir, scripts.only_run(alone))
                left -= len(killed_at)
                print(f"{flags}: killed {len(killed_at)} times, after logging step {', '.join(killed_at)}", flush=True)


if __name__ == "__main__":
    main()
