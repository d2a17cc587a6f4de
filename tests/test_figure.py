"""figure/: the benchmarks compare what they say, and run as users run them."""

import json
import re
import signal
from pathlib import Path

import archives
import numpy as np
import pytest
import tensorflow as tf
from scripts import refused, start, wait_for

import config
import datasets
import model
from datasets import hdf5

import scaling
import speed


def test_contenders_compute_the_same():
    """Group norm, Keras' and the transpose formula: the same outputs, or the ratios mean nothing."""
    rng = np.random.default_rng(0)
    x, gamma, beta = (tf.constant(rng.standard_normal(size), tf.float32) for size in ((2, 6, 5, 16), (16,), (16,)))
    results = {name: np.array(function(x, gamma, beta)) for name, function in speed.contenders(x.shape).items()}
    for name in ("Keras", "transpose"):
        np.testing.assert_allclose(results["group"], results[name], rtol=0, atol=1e-4)
    assert np.abs(results["batch"] - results["group"]).max() > 0.1
    assert np.isfinite(speed.forward_and_backward(speed.contenders(x.shape)["group"], x.shape)())


def test_ratios_are_taken_within_a_round():
    times = {"a": [1.0, 20.0, 300.0], "b": [2.0, 10.0, 100.0]}
    assert speed.ratio(times, "a", "b") == "2.00 [1.25 2.50]"


def test_the_memory_of_a_step_is_measured_in_a_process_of_its_own(capsys, monkeypatch):
    monkeypatch.setattr(speed, "MEMORY_NORMS", ("group",))
    model.main(config.parse_network(["--model", "resnet8", "--memory", "32"]))
    size, peak = capsys.readouterr().out.splitlines()[-1].split()
    assert size == "32" and 0.01 < float(peak) < 10


def test_a_batch_that_is_too_small_to_measure_is_named_on_a_line_of_its_own(capsys):
    with refused("--batch_size 1 is too small for batch norm in convnet") as error:
        model.main(config.parse_network("--model convnet --image_size 16 --memory 1".split()))
    assert "exit code" not in str(error.value) and capsys.readouterr().out.endswith("group+ws\n")


def test_the_input_is_measured_beside_decoding_alone(tmp_path, capsys):
    rng, size = np.random.default_rng(0), (90, 120, 3)
    jpegs = [archives.picture_file(rng.integers(0, 256, size, dtype=np.uint8)) for _ in range(70)]
    parts = ((split, jpegs[a:b], [0, 1] * ((b - a) // 2), None) for split, (a, b) in enumerate(((0, 2), (2, 70))))
    (tmp_path / "imagenet").mkdir()
    hdf5.write(str(tmp_path / "imagenet"), hdf5.Source(["a", "b"], None, None, parts))
    assert len(datasets.create_default_splits("ImageNet", str(tmp_path))[1]) == 68
    speed.main(speed.parse_flags(["imagenet", "--quick", "--data_dir", str(tmp_path)]))
    printed = capsys.readouterr().out
    for name in ("training", "testing"):
        ((alone, both, ratio),) = re.findall(rf"^{name} +(\d+) +(\d+)  ([\d.]+) \[", printed, re.MULTILINE)
        assert int(alone) > 0 and float(ratio) == pytest.approx(int(both) / int(alone), abs=0.3)


def test_a_dataset_that_is_missing_is_named(tmp_path):
    with refused("download.py --dataset CIFAR10"):
        speed.main(speed.parse_flags(["trainer", "--data_dir", str(tmp_path)]))


def test_two_workers_are_measured(tmp_path):
    (network,) = scaling.QUICK_NETWORKS
    scaling.pack(network, tmp_path)
    cores = scaling.available_cores()[:2]
    assert scaling.train(network, network.batch_sizes[0], "2 workers", True, cores, tmp_path) > 0


def test_speeds_are_of_rows_written_while_all_runs_train(tmp_path, monkeypatch):
    """Neither the first row of a run counts, nor the one under way when the last run has begun."""
    written = iter([(0, 1), (0, 2), (1, 3), (0, 4), (1, 5), (0, 60), (0, 80), (1, 7), (1, 9)])  # (run, its speed)

    def write_next(seconds):
        number, images_per_second = next(written)
        (tmp_path / str(number) / "RUN").mkdir(parents=True, exist_ok=True)
        with open(tmp_path / str(number) / "RUN" / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": 1, "images_per_second": images_per_second}) + "\n")

    monkeypatch.setattr(scaling.time, "sleep", write_next)
    assert scaling.speeds([], tmp_path, [tmp_path / "0", tmp_path / "1"], 2) == [70, 8]


def test_scaling_ends_its_workers_when_it_is_ended():
    with start("figure/scaling.py", "--quick") as script:
        try:
            children = Path(f"/proc/{script.pid}/task/{script.pid}/children")
            wait_for(lambda: "trainer.py" in commands_of(children.read_text().split()))
            found = children.read_text().split()
            script.send_signal(signal.SIGTERM)
            assert script.wait(60) == 143
        finally:
            script.kill()
    wait_for(lambda: not commands_of(found))  # one that was being started gets its SIGKILL when the script has ended


def commands_of(processes):
    """The command lines of those of the processes that are there."""
    files = (Path(f"/proc/{process}/cmdline") for process in processes)
    return "".join(file.read_text() for file in files if file.exists())
