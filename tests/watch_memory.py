"""Train for many updates and watch the memory of the process.

    python tests/watch_memory.py --updates 21000        # minutes; Linux, whose /proc it reads

Prints the resident memory along the way, and how much it grew after the first 1,000 updates; exit code 1 above 50 MB.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import scripts

UPDATES_A_STEP = 64
LIMIT = 50  # MB


def resident_megabytes(pid):
    return int(re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[1]) / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=21000)
    parser.add_argument("--norm_type", default="group")
    arguments = parser.parse_args()
    steps = -(-arguments.updates // UPDATES_A_STEP)
    with tempfile.TemporaryDirectory() as folder:
        scripts.run("download.py", "--dataset", "Digits", "--data_dir", folder)
        flags = "--dataset Digits --model resnet8 --batch_size 1 --log_step 4 --write_summary_step 4 "
        flags += "--test_sample_step 15 --ckpt_save_step 20 --max_batch_size"
        flags = [*flags.split(), UPDATES_A_STEP, "--max_training_step", steps, "--norm_type", arguments.norm_type]
        command = scripts.command("trainer.py", *flags, "--data_dir", folder, "--train_dir", folder + "/runs")
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        samples = []
        for line in process.stdout:
            step = re.match(r"step +(\d+)/", line)
            if step and int(step[1]) < steps:  # at the last one it may already have ended
                samples.append((int(step[1]) * UPDATES_A_STEP, resident_megabytes(process.pid)))
        assert process.wait() == 0
    early = [memory for updates, memory in samples if updates <= 1000][-1]
    for updates, memory in samples[:: max(1, len(samples) // 10)] + samples[-1:]:
        print(f"{updates:>7} updates  {memory:8.1f} MB")
    growth = max(memory for updates, memory in samples if updates > 1000) - early
    print(f"growth after the first 1000 updates: {growth:.1f} MB (limit {LIMIT})")
    sys.exit(growth > LIMIT)


if __name__ == "__main__":
    main()
