"""Run the scripts as users do, and read what they leave."""

import contextlib
import io
import json
import math
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

from command import import_tensorflow

import_tensorflow()

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

import checkpoints
import config
import datasets
import evaler
import runs
import trainer
from command import UserError
from model import create_model

REPO = Path(__file__).resolve().parent.parent
TIMINGS = ("images_per_second",)
SMALL = ("--dataset", "Digits", "--model", "resnet8", "--max_batch_size", 32)
GROUP_RUN = "--norm_type group --weight_standardization --batch_size 8 --learning_rate 0.01 --prefix mine".split()
GROUP_RUN += "--max_training_step 9 --log_step 2 --write_summary_step 4 --test_sample_step 5 --ckpt_save_step 4".split()
STEP = "step/.ATTRIBUTES/VARIABLE_VALUE"  # of a checkpoint


def command(script, *flags):
    return [sys.executable, str(REPO / script), *map(str, flags)]


def run(script, *flags):
    """Run a script from another folder; returns what it printed."""
    done = subprocess.run(command(script, *flags), capture_output=True, text=True, cwd="/", timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def start(script, *flags, **options):
    """Start a script from another folder, whose output can be read."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": "/"}
    return subprocess.Popen(command(script, *flags), **pipes | options)


def read_until(process, start_of_line):
    assert any(line.startswith(start_of_line) for line in process.stdout), process.stderr and process.stderr.read()


def wait_for(condition, *arguments):
    limit = time.monotonic() + 120
    while not condition(*arguments):
        assert time.monotonic() < limit
        time.sleep(0.01)


def recorded(function, *arguments):
    """(what a function returns, what it prints)."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        return function(*arguments), printed.getvalue()


def run_here(*flags):
    """trainer.main() in this process, whose TensorFlow runs already and whose signals stay as they are."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        with mock.patch.object(trainer, "set_threads"):
            trainer.main(*config.parse_training([*map(str, flags)]))
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)


def train(data_dir, train_dir, *flags):
    """The folder of a run of SMALL that is trained in this process."""
    run_here(*SMALL, *flags, "--data_dir", data_dir, "--train_dir", train_dir)
    return only_run(train_dir)


def evaluate(flags):
    evaler.main(config.parse_evaluation([*map(str, flags)]))


def evaluate_digits(data_dir, run_dir, *flags):
    """{measure: result} that evaluation.json has of the test split after evaler.py was run with the flags."""
    evaluate(["--dataset", "Digits", "--data_dir", data_dir, "--train_dir", run_dir, *flags])
    return results_of(run_dir)


def results_of(run_dir, split="test"):
    """{measure: result} that evaluation.json has of a split."""
    return json.loads((run_dir / "evaluation.json").read_text())["splits"][split]


@contextlib.contextmanager
def full_disk(limit):
    """No file can grow beyond `limit` bytes, which stands for a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def refused(*words, kind=UserError):
    """The block raises an error of one line that has these words in it: the wrong value, and what would be right."""
    with pytest.raises(kind) as caught:
        yield caught
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and all(str(word) in message for word in words), message


def configure(*flags):
    """(flags, configuration, train, test) as trainer.py makes them."""
    parsed, _ = config.parse_training([*map(str, flags)])
    train, test = datasets.create_default_splits(parsed.dataset, parsed.data_dir)
    return parsed, config.derive(parsed, train), train, test


def state_of(*flags):
    """The state of a run with these flags before its first step."""
    _, configuration, train, _ = configure(*flags)
    keras.utils.set_random_seed(configuration.seed)
    return trainer.make_state(create_model(configuration, train.network_shape, train.num_classes), configuration)


def untrained_run(run_dir, *flags, scale=1):
    """A run folder of a network that nothing was taught, whose logits are `scale` times those of a new one."""
    state, (given, configuration, train, test) = state_of(*flags), configure(*flags)
    run_dir.mkdir(parents=True)
    runs.write_config(run_dir, given, configuration, runs.describe_data(train, test))
    kernel = state.model.get_layer("logits").kernel
    kernel.assign(scale * kernel)
    state.open(run_dir, writes=True)
    state.step.assign(7)
    state.save()
    return run_dir


def build(name="resnet8", shape=(32, 32, 3), classes=10, **flags):
    """A new network; the policy of Keras stays what it was."""
    before = keras.config.dtype_policy()
    try:
        return create_model(config.Config(model=name, **{"batch_norm_momentum": 0.9, **flags}), shape, classes)
    finally:
        keras.config.set_dtype_policy(before)


def randomize(model):
    """Draw every weight, also gammas that start at 0 and moving statistics; return the model."""
    rng = np.random.default_rng(0)
    for weight in model.weights:
        shape = weight.shape
        spread = math.sqrt(2 / math.prod(shape[:-1]))
        weight.assign(rng.normal(0, spread, shape) if len(shape) > 1 else rng.uniform(0.5, 1.5, shape))
    return model


def network_of(run_dir):
    """The network of a run, with the weights of its newest checkpoint."""
    configuration, stored = runs.read_config(run_dir)
    data = stored["data"]
    model = create_model(configuration, tuple(data["image_shape"]), data["num_classes"])
    checkpoints.load_weights(model, run_dir)
    return model


def only_run(train_dir):
    (run_dir,) = Path(train_dir).iterdir()
    return run_dir


def metrics(run_dir, without=TIMINGS):
    rows = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in without} for row in rows]


def checkpoint(run_dir, name=None):
    """All tensors of a checkpoint of a run, by name; of the newest one unless named."""
    reader = tf.train.load_checkpoint(str(run_dir / name) if name else tf.train.latest_checkpoint(run_dir))
    skipped = {"_CHECKPOINTABLE_OBJECT_GRAPH", "save_counter/.ATTRIBUTES/VARIABLE_VALUE"}
    return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map().keys() - skipped}


def shown(run_dir, plugin):
    """[(tag, step, value)] of everything of a kind, such as scalars, that TensorBoard shows of a run."""
    found = EventAccumulator(str(run_dir), size_guidance={"tensors": 0})
    found.Reload()
    tags = [tag for tag in found.Tags()["tensors"] if found.SummaryMetadata(tag).plugin_data.plugin_name == plugin]
    return [(tag, event.step, tf.make_ndarray(event.tensor_proto)) for tag in tags for event in found.Tensors(tag)]


def scalars(run_dir):
    """[(tag, step)] of every scalar of a run that TensorBoard shows."""
    return [(tag, step) for tag, step, _ in shown(run_dir, "scalars")]


def assert_same_runs(run_dir, expected_dir):
    """Raise AssertionError unless two finished runs agree in all but their timings."""
    found, expected = checkpoint(run_dir), checkpoint(expected_dir)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert metrics(run_dir) == metrics(expected_dir)
    # images_per_second is missing where a process made its first step, which it does not time
    found, expected = (sorted(p for p in scalars(path) if p[0] not in TIMINGS) for path in (run_dir, expected_dir))
    assert found == expected, "TensorBoard events lost or doubled"
