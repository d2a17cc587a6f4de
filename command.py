"""Code that all scripts share: errors and exit codes, flags, atomic writing of files, and the start of TensorFlow.

An expected error prints one line on stderr and no traceback. Exit codes:
    2    mistakes of the user (UserError, or a path that cannot be used)
    1    external failures (ExternalError, OSError: network, disk), and training that diverged
    130  Ctrl-C; 143 SIGTERM or SIGHUP; a trainer that has saved: 128 + the number of the signal
"""

import argparse
import contextlib
import csv
import dataclasses
import difflib
import errno
import gc
import os
import platform
import re
import signal
import sys
import threading
import typing

# The user can fix a path that is missing, of the wrong kind or not permitted, but not ENOSPC or EIO.
PATH_ERRORS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # SIGHUP: the terminal was closed
ONE_THREAD_PIXELS = 2**14  # 16 images of 32 by 32: up to here, one thread per operation was faster


class UserError(Exception):
    """A user error; the message is one line with the wrong value and the remedy."""


class ExternalError(Exception):
    """A failure caused neither by the user nor by the code: of the network, the disk, or training that diverged."""


class Terminated(BaseException):
    """SIGTERM or SIGHUP arrived: raised like KeyboardInterrupt, so that half-written files are removed."""


def terminate(number, frame):
    raise Terminated


def end_at_once(number, frame):
    complain("interrupted" if number == signal.SIGINT else "terminated")
    os._exit(130 if number == signal.SIGINT else 143)


def handle_signals(stop, interrupt):
    """Handle SIGTERM and SIGHUP with `stop`, SIGINT with `interrupt`. An ignored one (nohup) stays so."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, interrupt if number == signal.SIGINT else stop)


def run(main):
    """Return main(); on an expected error, end the script with one line on stderr and the exit code above."""
    handle_signals(terminate, signal.default_int_handler)
    # Show each line at once, also in a pipe, and characters that the terminal's encoding lacks by their numbers.
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        return main()
    except UserError as error:
        code, message = 2, error
    except ExternalError as error:
        code, message = 1, error
    except OSError as error:  # requests' errors are OSErrors too
        is_path = isinstance(error, PATH_ERRORS) or error.errno in (errno.EROFS, errno.ENAMETOOLONG)
        code, message = (2 if is_path else 1), f"{type(error).__name__}: {error}"
        if error.errno in DISK_FULL:
            message = f"the disk is full: {error.filename or error}; free some space, and run this again"
    except Exception as error:
        if not isinstance(error, MemoryError) and type(error).__name__ != "ResourceExhaustedError":  # TensorFlow's
            raise
        code, message = 1, f"memory or disk is full: {error}"
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    except Terminated:
        code, message = 143, "terminated"
    complain(message)
    sys.exit(code)


class Stopped(Exception):
    """A signal arrived during a test."""


class Interruption:
    """Remembers a signal to stop, so that the run can save first. A second signal, or one that arrives before there is
    anything to save, ends the process at once.

    Python runs signal handlers only between calls into TensorFlow, which may take minutes. A thread therefore reads the
    signal numbers from a pipe, where they arrive at once.
    """

    def __init__(self, alone):
        self.signal, self.worth_saving, self.alone = None, False, alone
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing)
        threading.Thread(target=self.watch, args=(reading,), daemon=True).start()
        handle_signals(lambda *_: None, lambda *_: None)

    def watch(self, pipe):
        while True:
            number = os.read(pipe, 1)[0]
            if number not in STOP_SIGNALS:
                continue
            name = signal.Signals(number).name
            if not self.worth_saving or (self.signal and number != signal.SIGHUP):  # SIGHUP may arrive twice
                print(f"stopped by {name}", file=sys.stderr)
                os._exit(128 + number)
            self.signal = number
            print(f"{name}: stopping after this step is saved; send it again to stop at once")

    def until_stopped(self, batches):
        """Yield the batches; raise Stopped if a signal arrives between two. Several workers finish the test."""
        for batch in batches:
            if self.signal and self.alone:
                raise Stopped
            yield batch

    def should_stop(self, agreed):
        """Whether to stop after this step. Several workers stop only when all have `agreed` to it within the step."""
        return agreed or (self.alone and self.signal)


def complain(message):
    """Print an error as one line on stderr."""
    print(f"{os.path.basename(sys.argv[0])}: error: {one_line(message)}", file=sys.stderr)


def one_line(text, limit=2000):
    """`text` in one line, with single spaces, cut after `limit` characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= limit else line[:limit] + " ..."


@contextlib.contextmanager
def reading(path, remedy="replace this file"):
    """Turn any error of reading `path` into a UserError that names it; disk errors stay OSErrors."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # OSErrors of parsers have no number, or EINVAL from a seek to an impossible position.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {one_line(error, 300)}): {remedy}") from error


MISTAKES = {"gn": "group", "bn": "batch", "ln": "layer", "in": "instance", "groupnorm": "group", "batchnorm": "batch"}
MISTAKES |= {"--lr": "--learning_rate", "--norm": "--norm_type", "--bs": "--batch_size", "--data": "--data_dir"}
OWN_METADATA = ("low", "above", "exclusive", "on_resume", "derived", "local", "ignored")  # the rest is argparse's


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show descriptions unchanged, and defaults other than None and False."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False:
            return action.help
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser without abbreviations; errors are one line on stderr with exit code 2."""

    def __init__(self, passes_to=None, **kwargs):  # passes_to: the parser of the flags that are unknown here
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)
        self.passes_to = passes_to or self

    def names_given(self, argv=None):
        """The names of the flags in the command line, including those given with their default values."""
        unset = object()
        flags, _ = self.parse_known_args(argv, argparse.Namespace(**{action.dest: unset for action in self._actions}))
        return [name for name, value in vars(flags).items() if value is not unset]

    def add_flags(self, settings):
        """Add the flags of a dataclass whose fields were made by flag()."""
        groups = {}  # flags that exclude each other
        for field in dataclasses.fields(settings):
            if "help" not in field.metadata:
                continue
            options = {name: value for name, value in field.metadata.items() if name not in OWN_METADATA}
            kind = (typing.get_args(field.type) or (field.type,))[0]  # int for int | None
            exclusive = field.metadata.get("exclusive")
            if exclusive and exclusive not in groups:
                groups[exclusive] = self.add_mutually_exclusive_group()
            target = groups.get(exclusive, self)
            if kind is bool:
                target.add_argument(f"--{field.name}", action="store_true", **options)
            else:
                kind = within(kind, field.metadata.get("low"), field.metadata.get("above"))
                target.add_argument(f"--{field.name}", type=kind, default=field.default, **options)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {one_line(self.with_hint(message))}\n")

    def with_hint(self, message):
        """The message, followed by 'did you mean ...?' for a common mistake, or a flag that is close to a valid one."""
        flags = self._option_string_actions | self.passes_to._option_string_actions
        value = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        flag = re.search(r"unrecognized arguments: .*?(--[\w-]+)", message)
        meant = None
        if value:
            meant = MISTAKES.get(value[1].lower())
            meant = meant if meant in re.findall(r"[^\s',]+", value[2]) else None
        elif flag:
            meant = MISTAKES.get(flag[1])
            meant = meant if meant in flags else next(iter(difflib.get_close_matches(flag[1], flags, 1)), None)
        return f"{message.partition(' (choose from')[0]}: did you mean {meant}?" if meant else message


def flag(default, help, **metadata):
    """A dataclass field that is set by the flag of the same name.

    metadata: low (the smallest valid value), above (values must be greater), exclusive (a name shared by flags of which
        only one may be given), on_resume, derived, local and ignored, which config.py explains, and options of
        argparse's add_argument.
    """
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


def within(kind, low=None, above=None):
    """A type for add_argument: kind(text), at least `low` or greater than `above`."""

    def parse(text):
        value = kind(text)
        if low is not None and not low <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be at least {low}, not {text}")
        if above is not None and not above < value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be a number above {above}, not {text}")
        return value

    parse.__name__ = kind.__name__  # argparse prints it: 'invalid int value'
    return parse


@contextlib.contextmanager
def atomic_file(path, part=None):
    """Yield a temporary path to write to. It is renamed to `path` at the end, or removed after an exception."""
    part = part or f"{path}.{os.getpid()}.part"
    try:
        yield part
        sync(part)
        os.replace(part, path)
    except BaseException:
        if os.path.exists(part):
            os.remove(part)
        raise


def write_atomically(path, text, part=None):
    """Write a text file atomically: completely or not at all."""
    with atomic_file(path, part) as part, open(part, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)


def write_csv(path, names, rows):
    """Write a CSV file atomically: a line of names, and a line per row."""
    with atomic_file(path) as part, open(part, "w", encoding="utf-8", newline="\n") as file:
        csv.writer(file, lineterminator="\n").writerows([names, *rows])


def save_figure(figure, path, dpi=100):
    """Write a figure of matplotlib as a PNG file atomically."""
    with atomic_file(path) as part:
        figure.savefig(part, format="png", dpi=dpi)


def sync(path):
    """Wait until a file or folder is written to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def start(name, parse):
    """Parse the flags of a script, then import TensorFlow, which takes seconds; returns the flags.

    name: __name__ of the script. If the script is imported, no flags are parsed and None is returned.
    """
    flags = None
    if name == "__main__":
        flags = run(parse)
        handle_signals(end_at_once, end_at_once)  # until run() is called again
    import_tensorflow()
    return flags


def import_tensorflow():
    """Import TensorFlow without its messages about missing GPUs, which no setting suppresses.

    Keras imports scikit-learn if it is installed, which takes a second that no script needs: it is hidden meanwhile.

    TF_CPP_MIN_LOG_LEVEL, if set, still controls later messages. Two variables get a value on x86, unless they have one.
    TF_ENABLE_ONEDNN_OPTS becomes 1: on CPUs without AVX-512 TensorFlow does not use oneDNN's convolutions by default,
    but they are up to 5 times as fast. TF_MKL_OPTIMIZE_PRIMITIVE_MEMUSE becomes 0: to save memory, TensorFlow
    otherwise sets up oneDNN's kernels for the gradients of a convolution again for each batch (tensorflow#21690), which
    takes long for small batches.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if platform.machine() in ("x86_64", "AMD64"):
        os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
        os.environ.setdefault("TF_MKL_OPTIMIZE_PRIMITIVE_MEMUSE", "0")
    hides = "sklearn" not in sys.modules
    if hides:
        sys.modules["sklearn"] = None  # importing it now raises ImportError
    sys.stderr.flush()
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    gc.disable()  # collection would take a fifth of the import, and find nothing
    try:
        import tensorflow  # noqa: F401
    finally:
        gc.freeze()  # later collections skip TensorFlow's modules
        gc.enable()
        if hides:
            del sys.modules["sklearn"]
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)


def set_threads(images, image_shape):
    """Use one thread per operation if an update has few pixels; call this before any other TensorFlow function.

    Waking a second thread takes longer than half of a small operation. Instead, the cores run independent operations in
    parallel: the gradients of weights and of inputs, and the updates of weights.
    """
    height, width, _ = image_shape
    if images * height * width <= ONE_THREAD_PIXELS:
        import tensorflow as tf  # not at the top: scripts without TensorFlow use this file, too

        tf.config.threading.set_intra_op_parallelism_threads(1)
