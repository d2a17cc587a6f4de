"""What command.py does for every script: how it starts, and how it ends."""

import os
import platform
import signal
import subprocess
import sys

import pytest
from scripts import REPO, SMALL

import command
from config import training_parser

RUNS = """
import command, os, sys, time
command.run(lambda: (os.kill(os.getpid(), int(sys.argv[1])), [time.sleep(0.1) for _ in range(300)]))
"""
LOADS = """
import command, os, sys
command.import_tensorflow = lambda: os.kill(os.getpid(), int(sys.argv[1]))  # the signal comes while TensorFlow loads
command.start("__main__", lambda: None)
"""
STARTS = """
import runpy, sys
sys.path.insert(0, "figure")
for script in ("trainer", "evaler", "model", "download", "figure/compare", "figure/speed"):
    for flag in ("--help", "--no_such_flag"):
        sys.argv = [script, flag]
        try:
            runpy.run_path(f"{script}.py", run_name="__main__")
        except SystemExit as end:
            print("ended", script, flag, end.code, "tensorflow" in sys.modules, "keras" in sys.modules)
"""
TRAINS = """
import sys
import trainer, command, config, tensorflow as tf
command.set_threads(17, (32, 32, 3))
print("threads", tf.config.threading.get_intra_op_parallelism_threads())
trainer.main(*config.parse_training())
print("threads", tf.config.threading.get_intra_op_parallelism_threads())
sys.path.insert(0, "tests")
from test_ops import test_an_example_is_bitwise_the_same_in_every_batch as compare
compare((6, 9, 5, 33), 3, False, "channels_last")
print("bitwise")
"""


def python(code, *flags, **environment):
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": REPO}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, flags)], env=os.environ | environment, **options)


@pytest.mark.parametrize("script", [RUNS, LOADS])
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGHUP, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_script_in_one_line_also_while_tensorflow_loads(script, number, code):
    process = python(script, int(number))
    out, error = process.communicate(timeout=30)
    assert (process.returncode, out, len(error.splitlines())) == (code, "", 1) and "error: " in error


def test_a_terminal_without_the_letters_gets_their_numbers():
    out, error = python("import command; command.run(lambda: print('grün'))", PYTHONIOENCODING="ascii").communicate()
    assert (out, error) == ("gr\\xfcn\n", "")


@pytest.mark.parametrize(
    "error, code",
    [
        (command.UserError("wrong\nvalue"), 2),
        (FileNotFoundError(2, "No such file", "wrong value"), 2),
        (command.ExternalError("wrong value"), 1),
        (OSError(28, "No space left on device", "wrong value"), 1),
        (MemoryError("wrong value"), 1),
        (type("ResourceExhaustedError", (Exception,), {})("wrong value"), 1),  # TensorFlow's
    ],
)
def test_an_error_that_is_no_bug_ends_a_script_in_one_line(error, code, call):
    def main():
        raise error

    assert "wrong value" in call(main, code=code)


def test_flags_are_parsed_before_tensorflow_loads():
    lines = [line.split() for line in python(STARTS).communicate()[0].splitlines() if line.startswith("ended")]
    assert len(lines) == 12
    for _, script, flag, code, *loaded in lines:
        assert code == ("0" if flag == "--help" else "2") and loaded == ["False", "False"], script


def test_help_shows_defaults_of_0():
    assert "dropout (default: 0)" in " ".join(training_parser().format_help().split())


def test_small_updates_take_one_thread_an_operation(data_dir, tmp_path):
    """TensorFlow's choice (0) above 16 images of 32 by 32, and where the size is not known. It refuses the setting once
    it has begun to compute: the run shows that it comes before. Group norm is exact with one thread, too."""
    flags = (*SMALL, "--batch_size", 16, "--max_training_step", 1, "--data_dir", data_dir, "--train_dir", tmp_path)
    out, error = python(TRAINS, *flags).communicate()
    assert [line.split()[1] for line in out.splitlines() if line.startswith("threads")] == ["0", "1"], error
    assert out.splitlines()[-1] == "bitwise", error


def test_onednn_is_on_and_keeps_its_kernels_unless_the_user_says_no(monkeypatch):
    """On x86; other processors keep TensorFlow's own default."""
    x86 = platform.machine() in ("x86_64", "AMD64")
    for name, other, default in ("ENABLE_ONEDNN_OPTS", "0", "1"), ("MKL_OPTIMIZE_PRIMITIVE_MEMUSE", "1", "0"):
        for given, expected in ({f"TF_{name}": other}, other), ({}, default if x86 else None):
            monkeypatch.setattr(os, "environ", given)
            command.import_tensorflow()
            assert os.environ.get(f"TF_{name}") == expected
