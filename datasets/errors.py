"""How every script of the repo fails: one clear line on stderr and an exit code, never a traceback for a mistake.

    2    a mistake of the user, or something that the user must provide (UserError, a path that cannot be used)
    1    a failure of the world (WorldError: the network; OSError: the disk)
    130  Ctrl-C; 143  SIGTERM
"""
import argparse
import errno
import importlib
import os
import platform
import signal
import sys

# A path that is missing, of the wrong kind or closed to us is for the user to put right; ENOSPC or EIO are not.
USER_ERRNO = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
              errno.ENAMETOOLONG)


class UserError(Exception):
    """The user's mistake, or something the user must provide: one line with the wrong value and what would be right."""


class WorldError(Exception):
    """The network or the disk failed: one line with what was tried."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keep the commands of a script's docstring as they are, and show the defaults that say something."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser without abbreviations, whose errors are one line on stderr and exit code 2."""

    def __init__(self, **kwargs):
        super().__init__(**{"allow_abbrev": False, "formatter_class": HelpFormatter, **kwargs})

    def names_given(self, argv=None):
        """The names of the flags that the command line gives, whether or not their values are the defaults."""
        unset = object()
        flags, _ = self.parse_known_args(argv, argparse.Namespace(**{action.dest: unset for action in self._actions}))
        return [name for name, value in vars(flags).items() if value is not unset]

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")


class Terminated(BaseException):
    """SIGTERM: as Ctrl-C, nothing half-written stays behind."""


def terminate(number, frame):
    raise Terminated


def one_line(text, limit=2000):
    """`text` with every run of white space as one blank, cut after `limit` characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= limit else line[:limit] + " ..."


def run(main):
    """Call main(); end the script with one line on stderr and the exit code above if it fails in a foreseen way."""
    signal.signal(signal.SIGTERM, terminate)
    try:
        main()
        return
    except UserError as error:
        code, message = 2, error
    except WorldError as error:
        code, message = 1, error
    except OSError as error:                                            # requests' errors are OSErrors too
        code, message = (2 if error.errno in USER_ERRNO else 1), f"{type(error).__name__}: {error}"
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    except Terminated:
        code, message = 143, "terminated"
    print(f"{os.path.basename(sys.argv[0])}: error: {one_line(message)}", file=sys.stderr, flush=True)
    sys.exit(code)


def import_tensorflow():
    """Import TensorFlow without the notices on missing GPUs that it prints, past every setting, as it loads.

    TF_CPP_MIN_LOG_LEVEL, where the user has set it, decides on what it says later. TF_ENABLE_ONEDNN_OPTS is 1 unless
    set: TensorFlow leaves oneDNN's convolutions out on CPUs without AVX-512, where they are up to 5 times as fast too.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if platform.machine() in ("x86_64", "AMD64"):
        os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    sys.stderr.flush()
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        import tensorflow  # noqa: F401
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)


class Later:
    """A module that is imported where it is first used: TensorFlow takes seconds, --help and a wrong flag need none.

        tf = Later("tensorflow")
    """

    def __init__(self, name):
        self._name = name

    def __getattr__(self, attribute):
        if "tensorflow" not in sys.modules:
            import_tensorflow()
        return getattr(importlib.import_module(self._name), attribute)
