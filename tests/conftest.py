"""Data that several files of tests share; TensorFlow starts here as the scripts start it."""

import contextlib
import os
import signal
import sys
from pathlib import Path

import pytest
import scripts  # first: it quietens TensorFlow as it loads
import tensorflow as tf
from matplotlib.figure import Figure

import command
import datasets
import download

two = [tf.config.LogicalDeviceConfiguration()] * 2
tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], two)  # for test_replicas.py
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have jobs in the background ignore it
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has its commands ignore it


def pytest_xdist_auto_num_workers():
    """One more worker than cores, because some tests wait for processes of their own."""
    return os.cpu_count() + 1


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A data folder with Digits packed in it."""
    path = tmp_path_factory.mktemp("data")
    download.prepare("Digits", str(path))
    return str(path)


@pytest.fixture(scope="session")
def digits(data_dir):
    return datasets.create_default_splits("Digits", data_dir)


@pytest.fixture
def call(monkeypatch, capsys):
    """Run main() of a script in this process; returns what it printed, its error of one line if it ends with `code`."""

    def run_main(main, *flags, code=0):
        monkeypatch.setattr(sys, "argv", [f"{main.__module__}.py", *map(str, flags)])
        with pytest.raises(SystemExit) if code else contextlib.nullcontext() as end:
            command.run(main)
        out, error = capsys.readouterr()
        if code:
            assert end.value.code == code and error.count("\n") == 1, error
            assert error.startswith(f"{sys.argv[0]}: error: "), error
        return error if code else out

    return run_main


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn; their files are empty."""
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: drawn.append(figure) or Path(path).touch())
    return drawn


@pytest.fixture(scope="session")
def group_run(data_dir, tmp_path_factory):
    """(folder, what it printed) of a run of 9 steps that logged, tested and saved at intervals that do not divide 9."""
    return scripts.recorded(scripts.train, data_dir, tmp_path_factory.mktemp("group_run"), *scripts.GROUP_RUN)
