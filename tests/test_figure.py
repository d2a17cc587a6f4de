"""figure/: what the benchmarks compare is what they say, and they run as users run them.

python -m pytest tests/test_figure.py
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import archives
import numpy as np
import pytest
import tensorflow as tf
from scripts import REPO, command, run

sys.path.insert(0, str(REPO / "figure"))

import norm_speed
import scaling


def test_contenders_compute_the_same():
    """Group norm, Keras' and the transpose formula: the same outputs and gradients, or the ratios mean nothing."""
    shape = (2, 6, 5, 16)
    x, gamma, beta, dy = norm_speed.draw_inputs(shape, 0.5)
    results = {
        name: norm_speed.with_gradients(function)(x, gamma, beta, dy)
        for name, function in norm_speed.contenders(shape).items()
    }
    for name in ("Keras", "transpose"):
        for ours, theirs in zip(results["group"], results[name]):
            np.testing.assert_allclose(ours, tf.convert_to_tensor(theirs), rtol=0, atol=1e-4)
    assert np.abs(results["batch"][0] - results["group"][0]).max() > 0.1


def test_the_error_is_that_against_float64():
    errors = norm_speed.measure_error((2, 6, 5, 16), 1000)
    assert set(errors) == {"group", "Keras", "transpose"}
    for of_y, of_dx in errors.values():
        assert 1e-7 < of_y < 2e-3 and 1e-8 < of_dx < 2e-3


def test_ratios_are_taken_within_a_round():
    times = {"a": [1.0, 20.0, 300.0], "b": [2.0, 10.0, 100.0]}
    assert norm_speed.ratios(times, "a", "b") == [1.25, 2.0, 2.5]


def test_a_step_is_measured_in_a_process_of_its_own():
    times = norm_speed.in_own_process(
        {
            "kind": "step",
            "model": "resnet8",
            "size": 8,
            "batch_size": 8,
            "rounds": 2,
            "variants": ["batch", "group", "none"],
        }
    )
    assert set(times) == {"batch", "group", "none"}
    assert all(len(of_rounds) == 2 and 0 < min(of_rounds) for of_rounds in times.values())


def test_throughput_runs_the_trainer(data_dir):
    printed = run(
        "figure/throughput.py", "--quick", "--dataset", "Digits", "--model", "resnet8", "--data_dir", data_dir
    )
    rows = re.findall(r"^ +(\d+) +([\d.]+) \[.*\] +([\d.]+) \[.*\] +([\d.]+)$", printed, re.MULTILINE)
    ((size, batch, group, ratio),) = rows
    assert size == "2" and float(ratio) == pytest.approx(float(group) / float(batch), abs=0.02)
    assert "times the fastest step" in printed and "to import TensorFlow" in printed


def test_the_input_is_measured_beside_decoding_alone(tmp_path):
    (tmp_path / "photos").mkdir()
    rng, size = np.random.default_rng(0), (90, 120, 3)
    for i in range(33):
        jpeg = archives.picture_file(rng.integers(0, 256, size, dtype=np.uint8))
        (tmp_path / "photos" / f"{i}.jpg").write_bytes(jpeg)
    flags = ("--photos", tmp_path / "photos", "--output", tmp_path / "speed.json")
    printed = run("figure/input_speed.py", *flags, "--rounds", 3, "--store", 0.01)
    found = json.loads((tmp_path / "speed.json").read_text())
    assert found["photographs"] == 33 and min(found["reads"]) > 0
    for name in ("training", "testing"):
        times = found["seconds"][name]["wall"]
        ratio = np.median(np.array(times["alone"]) / times["input"])
        assert len(times["input"]) == 3 and re.search(rf"^{name} .* {ratio:.2f} \[", printed, re.MULTILINE)
    for path in list((tmp_path / "photos").iterdir())[:2]:
        path.unlink()
    assert "31 JPEG files" in run("figure/input_speed.py", *flags, code=2)


def test_throughput_names_a_dataset_that_is_missing(tmp_path):
    assert "download.py --dataset CIFAR10" in run("figure/throughput.py", "--data_dir", tmp_path, code=2)


on_linux = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no processes pinned to a core here")


@on_linux
def test_scaling_is_measured_and_modelled(tmp_path):
    output = tmp_path / "scaling"
    printed = run("figure/scaling.py", "--quick", "--output", output)
    results = json.loads(output.with_suffix(".json").read_text())
    (speed,), (allreduce,) = results["speed"].values(), results["allreduce"].values()
    assert {way: len(rounds) for way, rounds in speed.items()} == dict.fromkeys(scaling.WAYS, 1)
    assert all(0 < rounds[0] for rounds in speed.values())
    assert allreduce["bytes"] == 4 * 78042 and 0 < allreduce["seconds"]  # resnet8's parameters
    (row,) = re.findall(r"^\| resnet8 \| 32 \| 2 \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", printed, re.M)
    assert float(row[3]) == pytest.approx(float(row[2]) / float(row[1]), abs=0.01)
    assert "Model, not measured" in printed
    assert [row["devices"] for row in results["model"]] == [2, 8, 256]

    run("figure/scaling.py", "--quick", "--output", output, "--resume", "--bandwidth", 1e9, "--latency", 1e-4)
    again = json.loads(output.with_suffix(".json").read_text())
    assert again["speed"] == results["speed"] and again["allreduce"] == results["allreduce"]
    assert again["model"][2]["allreduce"] == pytest.approx(2 * 255 * (allreduce["bytes"] / 256e9 + 1e-4))


def test_the_model_of_two_devices_is_what_was_measured():
    allreduces = {
        "small": {"bytes": 1000, "seconds": 0.4, "seconds_of_one_number": 0.3},
        "large": {"bytes": 8e6, "seconds": 4.2, "seconds_of_one_number": 0.2},
    }
    bandwidth, latency = scaling.link(allreduces)
    assert (bandwidth, latency) == pytest.approx((2e6, 0.1))
    assert scaling.ring_seconds(2, 8e6, bandwidth, latency) == pytest.approx(4.2)
    assert scaling.ring_seconds(4, 8e6, bandwidth, latency) == pytest.approx(2 * 3 / 4 * 4 + 2 * 3 * 0.1)
    assert scaling.predict(3, 1, images_on_host=8, images_per_second=100) == (0.75, 2)
    assert scaling.predict(3, 1, images_on_host=8, images_per_second=1) == (3 / 8, 2)  # the input is slower


def test_speeds_are_of_rows_written_while_all_runs_train(tmp_path, monkeypatch):
    """Neither the first row of a run counts, nor the one under way when the last run has begun."""
    written = iter([(0, 1), (0, 2), (1, 3), (0, 4), (1, 5), (0, 60), (0, 80), (1, 7), (1, 9)])  # (run, its speed)

    def write_next(seconds):
        run, speed = next(written)
        (tmp_path / str(run) / "RUN").mkdir(parents=True, exist_ok=True)
        with open(tmp_path / str(run) / "RUN" / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": 1, "images_per_second": speed}) + "\n")

    monkeypatch.setattr(scaling.time, "sleep", write_next)
    assert scaling.speeds([], tmp_path, [tmp_path / "0", tmp_path / "1"], 2) == [70, 8]


@on_linux
def test_scaling_ends_its_workers_when_it_is_ended(tmp_path):
    with subprocess.Popen(command("figure/scaling.py", "--quick", "--output", tmp_path / "scaling")) as script:
        try:
            children = Path(f"/proc/{script.pid}/task/{script.pid}/children")
            deadline = time.monotonic() + 120
            while "trainer.py" not in commands_of(children.read_text().split()) and time.monotonic() < deadline:
                time.sleep(0.1)
            found = children.read_text().split()
            assert found
            script.send_signal(signal.SIGTERM)
            assert script.wait(60) == 143
        finally:
            script.kill()
    assert not commands_of(found) and not list(tmp_path.iterdir())


def commands_of(processes):
    """The command lines of those of the processes that are there."""
    files = (Path(f"/proc/{process}/cmdline") for process in processes)
    return "".join(file.read_text() for file in files if file.exists())


@on_linux
def test_scaling_wants_two_cores(tmp_path):
    assert "two cores are needed" in run("figure/scaling.py", "--cores", 0, 0, code=2)
    assert "folder is not there" in run("figure/scaling.py", "--output", tmp_path / "none" / "scaling", code=2)
