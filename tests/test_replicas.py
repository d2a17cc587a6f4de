"""Several replicas train as one of their number's batch: on two devices of this process, and in two real workers."""

import json
import os
import signal
import socket
import subprocess

import keras
import norm_oracle
import numpy as np
import pytest
import scripts
import tensorflow as tf

from config import Config, Workers
import layers
import ops
import replicas
import trainer
from model import create_model

FLAGS = "--dataset Digits --model resnet8 --norm_type batch --augment crop --max_batch_size 16 --batch_size 4".split()
FLAGS += "--max_training_step 30 --test_sample_step 10 --log_step 5 --ckpt_save_step 5".split()


def tf_config(index, addresses=("localhost:0", "localhost:1")):
    return json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}})


@pytest.fixture(scope="module")
def two_devices():
    """tests/conftest.py gives TensorFlow two CPU devices."""
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def weights_after(strategy, batch_size, norm_type="group", offset=0.0, **settings):
    """The variables of a small network after 3 steps on 8 random images each, by trainer.py's own step."""
    settings |= dict(model="resnet8", groups=4, batch_norm_momentum=0.5, optimizer="momentum", weight_decay=1e-2)
    settings |= dict(batch_size=batch_size, max_batch_size=8, num_replicas=strategy.num_replicas_in_sync)
    config = Config(norm_type=norm_type, **settings)
    keras.utils.set_random_seed(3)
    with strategy.scope():
        model = create_model(config, (8, 8, 1), 10)
    state = trainer.make_state(model, config, strategy)
    state.optimizer.learning_rate.assign(0.1)
    step = trainer.make_train_step(state)
    rng = np.random.default_rng(0)
    for _ in range(3):
        images = tf.constant(rng.random((8, 8, 8, 1)) + offset, tf.float32)
        finite, _, stop = step(images, tf.constant(rng.integers(0, 10, 8), tf.int32), tf.constant(False))
        assert finite and not stop
    return {variable.path: variable.numpy() for variable in model.variables}, state.totals.numpy()


def test_with_group_norm_two_devices_are_one_of_twice_the_batch(two_devices, monkeypatch):
    monkeypatch.setattr(trainer, "CLIP_NORM", 0.1)  # of the gradient of all devices
    one, sums = weights_after(tf.distribute.get_strategy(), 4)
    two, means = weights_after(two_devices, 2)
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, atol=2e-6, err_msg=name)
    np.testing.assert_allclose(means * 2, sums, rtol=1e-6)  # totals are means over the replicas: their ratios count


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_synchronized_batch_norm_is_that_of_the_whole_batch(offset, two_devices):
    rng = np.random.default_rng(1)
    x, weight = rng.normal(offset, 1.0, (6, 3, 3, 4)), rng.normal(size=(6, 3, 3, 4))
    gamma, beta = rng.normal(size=4), rng.normal(size=4)
    whole, weights = tf.constant(x, tf.float32), tf.constant(weight, tf.float32)

    @tf.function
    def of_replica():
        mine, w = (replicas.part(values, 2) for values in (whole, weights))
        with tf.GradientTape() as tape:
            tape.watch(mine)
            statistics = tf.zeros(4), tf.ones(4)
            y, mean, variance = ops.batch_norm(mine, gamma, beta, *statistics, True, momentum=0.0, synchronized=True)
            loss = tf.reduce_sum(y * w)
        return y, tape.gradient(loss, mine), mean, variance

    results = tf.function(lambda: two_devices.run(of_replica))()
    y, dx, mean, variance = ([v.numpy() for v in two_devices.experimental_local_results(r)] for r in results)
    exact = np.float64(whole.numpy())
    wanted = norm_oracle.oracle(exact, gamma, beta, weight, norm_oracle.batch_sets(x.shape))
    tolerance = 1e-6 * max(1.0, offset)
    np.testing.assert_allclose(np.concatenate(y), wanted["y"], atol=3 * tolerance)
    np.testing.assert_allclose(np.concatenate(dx), wanted["dx"], atol=3 * tolerance)
    for found in mean:
        np.testing.assert_allclose(found, exact.mean((0, 1, 2)), atol=tolerance)
    for found in variance:
        np.testing.assert_allclose(found, exact.var((0, 1, 2), ddof=1), rtol=1e-5 if offset == 0 else 1e-3)


def test_synchronized_batch_norm_trains_as_one_device_with_the_whole_batch(two_devices):
    """In two batches of a step, whose gradients are accumulated."""
    settings = {"norm_type": "batch", "offset": 30.0, "accumulate": True}
    one, _ = weights_after(tf.distribute.get_strategy(), 4, **settings)
    two, _ = weights_after(two_devices, 2, sync_batch_norm=True, **settings)
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, atol=3e-5 * max(1.0, np.abs(value).max()), err_msg=name)


def test_own_statistics_are_averaged(two_devices):
    with two_devices.scope():
        layer = ops.BatchNorm(momentum=0.0)
        layer.build((None, 2))
        model = keras.Sequential([keras.Input((2,)), layer])
    config = Config(optimizer="momentum", weight_decay=0.0, batch_size=2, max_batch_size=4, num_replicas=2)
    step = trainer.make_train_step(trainer.make_state(model, config, two_devices))
    x = np.float32([[1, 2], [3, 4], [50, 60], [70, 90]])
    step(tf.constant(x), tf.constant([0, 1, 0, 1]), tf.constant(False))
    variances = (x[:2].var(axis=0, ddof=1) + x[2:].var(axis=0, ddof=1)) / 2
    for value in two_devices.experimental_local_results(layer.moving_variance.value):
        np.testing.assert_allclose(value.numpy(), variances, rtol=1e-6)
    for value in two_devices.experimental_local_results(layer.moving_mean.value):
        np.testing.assert_allclose(value.numpy(), x.mean(axis=0), rtol=1e-6)


def test_each_replica_draws_a_dropout_mask_of_its_own(two_devices):
    with two_devices.scope():
        layer = layers.Dropout(0.5, seed=1)
    of_replicas = two_devices.run(tf.function(lambda: layer(tf.ones([4, 50]), training=True)))
    first, second = (value.numpy() for value in two_devices.experimental_local_results(of_replicas))
    assert set(np.unique(first)) == set(np.unique(second)) == {0.0, 2.0}
    assert 0.3 < (first != second).mean() < 0.7
    ours, keras_own = layers.Dropout(0.5, seed=1), keras.layers.Dropout(0.5, seed=1)
    ones = tf.ones([4, 50])
    np.testing.assert_array_equal(ours(ones, training=True), keras_own(ones, training=True))


@pytest.mark.parametrize("images", [1, 7])
def test_devices_share_the_images_of_a_test(images, two_devices):
    """Also where there are fewer images than devices."""
    values = tf.range(images, dtype=tf.float32)

    def of_replica(values):
        return values * 10, tf.fill(tf.shape(values), tf.distribute.get_replica_context().replica_id_in_sync_group)

    tens, places = tf.function(lambda: replicas.map_parts(two_devices, of_replica, values))()
    np.testing.assert_array_equal(tens, 10 * np.arange(images))
    assert list(places.numpy()) == [0] * (images // 2) + [1] * (images - images // 2)


def test_a_worker_tests_alone_what_is_no_run_of_all(monkeypatch):
    """As before training, where the accuracy of converted weights is said: without a strategy it is one device."""
    monkeypatch.setenv("TF_CONFIG", tf_config(1))
    tens = tf.function(lambda: replicas.map_parts(tf.distribute.get_strategy(), lambda v: v * 10, tf.range(5)))()
    np.testing.assert_array_equal(tens, 10 * np.arange(5))


def test_each_worker_makes_its_rows_of_every_update():
    """Two images each; test_input_ops.py has the batches that are made of rows."""
    rows = [list(replicas.rows_of(Workers(("a:1", "b:1"), i), 12, batches=3)) for i in range(2)]
    assert rows == [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11]]


@pytest.mark.parametrize("workers, examples", [(1, 5), (2, 5), (3, 7), (3, 2)])
def test_every_test_image_has_one_worker(workers, examples):
    shares = [replicas.test_share(Workers(("a:1",) * workers, i), examples) for i in range(workers)]
    np.testing.assert_array_equal(np.concatenate(shares), np.arange(examples))


def test_what_two_workers_predict_of_7_images_is_joined(two_devices):
    """4 + 3 without the padding. The devices of this process stand for workers whose first predictions are equal."""
    join = replicas.make_join(two_devices, Workers(("a:1", "b:2"), 0), 7)
    losses, classes = join([np.float32([0.5, 1.5, 2.5, 3.5]), np.arange(4)])
    np.testing.assert_array_equal(losses, np.float32([0.5, 1.5, 2.5, 3.5, 0.5, 1.5, 2.5]))
    np.testing.assert_array_equal(classes, [0, 1, 2, 3, 0, 1, 2])
    assert losses.dtype == np.float32 and classes.dtype == np.arange(4).dtype


def free_addresses():
    """Two addresses of this machine whose ports are free."""
    with socket.create_server(("localhost", 0)) as one, socket.create_server(("localhost", 0)) as two:
        return [f"localhost:{server.getsockname()[1]}" for server in (one, two)]


def start_worker(index, addresses, flags):
    environment = os.environ | {"TF_CONFIG": tf_config(index, addresses)}
    return scripts.start("trainer.py", *flags, stderr=subprocess.STDOUT, env=environment)


def start_workers(flags):
    """Two trainer.py processes on free ports of this machine."""
    addresses = free_addresses()
    return [start_worker(index, addresses, flags) for index in range(2)]


def end(workers, seconds=120):
    """[(exit code, last line)] of the workers."""
    printed = [worker.communicate(timeout=seconds)[0] for worker in workers]
    return [(worker.returncode, ["", *text.splitlines()][-1]) for worker, text in zip(workers, printed)]


def test_two_workers_are_two_devices_also_when_they_are_killed_resumed_and_stopped(data_dir, tmp_path):
    """Bitwise. kill -9 of the chief ends the other in one line within 30 seconds; SIGTERM to one worker stops both."""
    flags = [*FLAGS, "--data_dir", data_dir]
    scripts.run("trainer.py", *flags, "--replicas", 2, "--train_dir", tmp_path / "devices")
    workers = start_workers([*flags, "--train_dir", tmp_path / "workers"])
    scripts.read_until(workers[0], "step 10/")
    run_dir = scripts.only_run(tmp_path / "workers")  # the chief alone makes one
    workers[0].kill()
    (code0, _), (code1, line1) = end(workers, seconds=30)
    assert code0 == -signal.SIGKILL and code1 == 1
    assert line1.startswith("trainer.py: error: ") and "--resume RUN_FOLDER_OF_WORKER_0" in line1

    resume = ["--resume", run_dir, "--data_dir", data_dir]
    workers = start_workers(resume)
    scripts.read_until(workers[0], "step 20/")
    workers[1].send_signal(signal.SIGTERM)
    (code0, line0), (code1, line1) = end(workers)
    assert code0 == code1 == 143 and f"--resume {run_dir}" in line0 and f"--resume {run_dir}" in line1
    expected = scripts.only_run(tmp_path / "devices")
    found, wanted = (scripts.checkpoint(path, "model-20") for path in (run_dir, expected))
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    rows, wanted = ([row for row in scripts.metrics(path) if row["step"] <= 20] for path in (run_dir, expected))
    for row, other in zip(rows, wanted, strict=True):  # the images of a test lie in other batches
        assert row == pytest.approx(other, rel=1e-6)

    with scripts.refused(run_dir, "2 replicas", "--replicas"):
        scripts.run_here(*resume)


def test_each_worker_needs_a_test_image(data_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", tf_config(0))
    with scripts.refused("1 test images", "2 workers"):
        scripts.run_here(*FLAGS, "--data_dir", data_dir, "--train_dir", tmp_path / "runs", "--validation", 1)


def test_workers_must_resume_from_the_same_checkpoint(data_dir, tmp_path):
    """A worker may see an old copy of the run folder."""
    _, config, *splits = scripts.configure("--dataset", "Digits", "--data_dir", data_dir)
    settings = []
    for run_dir in (tmp_path / "here" / "RUN", tmp_path / "there" / "RUN"):
        run_dir.mkdir(parents=True)
        (run_dir / "checkpoint").write_text(f'model_checkpoint_path: "model-{len(settings)}"\n')
        settings.append(json.loads(json.dumps(trainer.shared_settings(config, *splits, run_dir))))
    assert "newest checkpoint" in replicas.difference(*settings, 1)


def test_workers_that_differ_are_refused_by_name(data_dir, tmp_path, monkeypatch):
    """The chief, here this process, and the other worker."""
    flags, addresses = [*FLAGS, "--data_dir", data_dir, "--train_dir", tmp_path / "runs"], free_addresses()
    other = start_worker(1, addresses, [*flags, "--seed", 2])
    monkeypatch.setenv("TF_CONFIG", tf_config(0, addresses))
    with scripts.refused("worker 1 has seed 2", "worker 0 has 1"):
        scripts.run_here(*flags, "--seed", 1)
    ((code, line),) = end([other])
    assert code == 2 and "worker 1 has seed 2" in line and "worker 0 has 1" in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("index", [0, 1])
def test_a_worker_that_does_not_come_is_named(index, data_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", tf_config(index))
    with scripts.refused(f"{1 - index} (localhost:{1 - index})", "--worker_timeout", kind=trainer.ExternalError):
        scripts.run_here(*FLAGS, "--data_dir", data_dir, "--train_dir", tmp_path, "--worker_timeout", 1)
    assert not list(tmp_path.iterdir())
