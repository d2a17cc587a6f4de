"""What every script shares: how it fails, its flags, files that are whole or not there, and how TensorFlow starts.

A script fails in one clear line on stderr, never in a traceback for a mistake, and ends with the exit code
    2    for a mistake of the user, or something that the user must provide (UserError, a path that cannot be used)
    1    for a failure of the world (ExternalError, OSError: the network, the disk), and for training that diverges
    130  for Ctrl-C; 143 for SIGTERM
"""

import argparse
import contextlib
import dataclasses
import difflib
import errno
import os
import platform
import re
import signal
import sys
import typing

# A path that is missing, of the wrong kind or closed to us is for the user to put right; ENOSPC or EIO are not.
USER_ERRNO = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
)
ONE_THREAD_PIXELS = 2**14  # 16 images of 32 by 32: up to there one thread per operation was measured to be faster


class UserError(Exception):
    """The user's mistake, or something the user must provide: one line with the wrong value and what would be right."""


class ExternalError(Exception):
    """What neither the user nor the code did wrong: the network, the disk, training that diverged."""


class Terminated(BaseException):
    """SIGTERM, or SIGHUP from a closed terminal: as after Ctrl-C, nothing half-written stays behind."""


def terminate(number, frame):
    raise Terminated


def run(main):
    """Return main(); end the script with one line on stderr and the exit code above if it fails in a foreseen way."""
    signal.signal(signal.SIGTERM, terminate)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # nohup ignores it: the terminal was closed
        signal.signal(signal.SIGHUP, terminate)
    sys.stdout.reconfigure(errors="backslashreplace")  # what a terminal has no letters for
    try:
        return main()
    except UserError as error:
        code, message = 2, error
    except ExternalError as error:
        code, message = 1, error
    except OSError as error:  # requests' errors are OSErrors too
        code, message = (2 if error.errno in USER_ERRNO else 1), f"{type(error).__name__}: {error}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"the disk is full: {error.filename or error}; free some space, and run this again"
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    except Terminated:
        code, message = 143, "terminated"
    complain(message)
    sys.exit(code)


def complain(message):
    """Print an error as one line on stderr."""
    print(f"{os.path.basename(sys.argv[0])}: error: {one_line(message)}", file=sys.stderr, flush=True)


def one_line(text, limit=2000):
    """`text` with every run of white space as one blank, cut after `limit` characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= limit else line[:limit] + " ..."


# Flags.


MEANT = {"gn": "group", "bn": "batch", "ln": "layer", "in": "instance", "groupnorm": "group", "batchnorm": "batch"}
MEANT |= {"--lr": "--learning_rate", "--norm": "--norm_type", "--bs": "--batch_size", "--data": "--data_dir"}
FACTS = ("low", "above", "exclusive", "on_resume", "derived", "place", "ignored")


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

    def add_flags(self, settings):
        """Add the flags of a dataclass whose fields were made by flag()."""
        groups = {}  # of flags that exclude each other
        for field in dataclasses.fields(settings):
            if "help" not in field.metadata:
                continue
            how = {name: value for name, value in field.metadata.items() if name not in FACTS}
            kind = (typing.get_args(field.type) or (field.type,))[0]  # int of int | None
            exclusive, target = field.metadata.get("exclusive"), self
            if exclusive:
                target = groups.setdefault(exclusive, None) or self.add_mutually_exclusive_group()
                groups[exclusive] = target
            if kind is bool:
                target.add_argument(f"--{field.name}", action="store_true", **how)
            else:
                kind = within(kind, field.metadata.get("low"), field.metadata.get("above"))
                target.add_argument(f"--{field.name}", type=kind, default=field.default, **how)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {one_line(self.with_hint(message))}\n")

    def with_hint(self, message):
        """The message; for a flag or a value that is nearly right followed by 'did you mean ...?'."""
        flags = [name for action in self._actions for name in action.option_strings]
        value = re.search(r"invalid choice: '(.*?)'", message)
        flag = re.search(r"unrecognized arguments: .*?(--\w+)", message)
        meant = MEANT.get(value[1].lower() if value else flag[1] if flag else None)
        if flag and meant not in flags:
            meant = next(iter(difflib.get_close_matches(flag[1], flags, 1)), None)
        return f"{message.partition(' (choose from')[0]}: did you mean {meant}?" if meant else message


def flag(default, help, **how):
    """A field of a dataclass that a flag of the same name sets: its default, help and range in one place.

    how: low (the least value allowed), above (values must be greater), exclusive (a name: of the flags that share it
    one may be given), the other FACTS, which config.py explains, and what add_argument takes.
    """
    return dataclasses.field(default=default, metadata={"help": help, **how})


def within(kind, low=None, above=None):
    """A type for add_argument: int, float or str, of at least `low` or more than `above`."""

    def parse(text):
        value = kind(text)
        if low is not None and not low <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be at least {low}, not {text}")
        if above is not None and not above < value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be a number above {above}, not {text}")
        return value

    parse.__name__ = kind.__name__  # argparse says 'invalid int value'
    return parse


# Files.


@contextlib.contextmanager
def whole_file(path, part=None):
    """Yield a path to write to, in place of `path`: what was written there whole takes its name, else nothing stays."""
    part = part or f"{path}.{os.getpid()}.part"
    try:
        yield part
        sync(part)
        os.replace(part, path)
    except BaseException:
        if os.path.exists(part):
            os.remove(part)
        raise


def write_whole(path, text, part=None):
    """Write a text file so that it is either there as a whole or not at all."""
    with whole_file(path, part) as part, open(part, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)


def sync(path):
    """Wait until `path` (a file or a folder) is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# TensorFlow.


def start(name, parse):
    """Parse the flags of a script, then import TensorFlow, which takes seconds; returns the flags.

    name: __name__ of the script. Where it is imported by another, there are no flags to parse.
    """
    flags = run(parse) if name == "__main__" else None
    import_tensorflow()
    return flags


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


def set_threads(images, image_shape):
    """One thread per operation where an update holds few pixels; call it before anything else of TensorFlow.

    Waking a second thread takes longer than half of a small operation, and the two cores find more work in
    operations that do not depend on each other: the gradients of weights and of inputs, the updates of weights.
    """
    height, width, _ = image_shape
    if height and images * height * width <= ONE_THREAD_PIXELS:
        import tensorflow as tf  # not at the top: this file is for scripts without it, too

        tf.config.threading.set_intra_op_parallelism_threads(1)
