"""What command.py does for every script: how it ends.

python -m pytest tests/test_command.py
"""

import os
import signal
import subprocess
import sys

import pytest
from scripts import REPO

SLOW_TO_FREE = """
import command, sys, time, weakref

class Thing:
    pass

def main():
    thing = Thing()
    callback = weakref.ref(thing, lambda _: (print("freeing", flush=True), time.sleep(0.5)))
    del thing
    for _ in range(100):
        time.sleep(0.05)
    print("went on to the end")

command.run(main)
"""


def python(code, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=REPO,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    "number, code, word",
    [(signal.SIGTERM, 143, "terminated"), (signal.SIGHUP, 143, "terminated"), (signal.SIGINT, 130, "interrupted")],
)
def test_a_signal_that_comes_while_objects_are_freed_is_not_lost(number, code, word):
    """Python drops what its handler raises there."""
    process = python("import signal; signal.signal(signal.SIGINT, signal.default_int_handler)" + SLOW_TO_FREE)
    assert process.stdout.readline() == "freeing\n"
    process.send_signal(number)
    rest, error = process.communicate(timeout=30)
    assert process.returncode == code and rest == ""
    assert len(error.splitlines()) == 1 and error.endswith(f"error: {word}\n")


def test_a_terminal_without_the_letters_gets_their_numbers():
    out, error = python("import command; command.run(lambda: print('grün'))", PYTHONIOENCODING="ascii").communicate()
    assert (out, error) == ("gr\\xfcn\n", "")
