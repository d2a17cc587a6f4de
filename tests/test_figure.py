"""figure/: what the benchmarks compare is what they say, and they run as users run them.

python -m pytest tests/test_figure.py
"""

import json
import re
import sys

import archives
import numpy as np
import pytest
import tensorflow as tf
from scripts import REPO, run

sys.path.insert(0, str(REPO / "figure"))

import norm_speed


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
    assert [row[0] for row in rows] == ["2", "32"]
    for _, batch, group, ratio in rows:
        assert float(ratio) == pytest.approx(float(group) / float(batch), abs=0.02)
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
