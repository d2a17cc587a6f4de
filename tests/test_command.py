"""What command.py does for every script: how it ends.

python -m pytest tests/test_command.py
"""

import os
import signal
import subprocess
import sys

import pytest
from scripts import REPO

WAITS = """
import command, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have jobs in the background ignore it
command.run(lambda: (print("ready", flush=True), signal.pause()))
"""


def python(code, **environment):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], cwd=REPO, env=os.environ | environment, **pipes)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGHUP, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_script_in_one_line(number, code):
    process = python(WAITS)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    rest, error = process.communicate(timeout=30)
    assert (process.returncode, rest, len(error.splitlines())) == (code, "", 1) and "error: " in error


def test_a_terminal_without_the_letters_gets_their_numbers():
    out, error = python("import command; command.run(lambda: print('grün'))", PYTHONIOENCODING="ascii").communicate()
    assert (out, error) == ("gr\\xfcn\n", "")
