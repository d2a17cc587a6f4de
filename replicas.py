"""Replicas: the devices and hosts that a run trains on side by side, by tf.distribute.

    python trainer.py --dataset CIFAR10 --batch_size 16 --replicas 2        # two devices of this machine
    TF_CONFIG='{"cluster": {"worker": ["a:2222", "b:2222"]}, "task": {"type": "worker", "index": 0}}' \
        python trainer.py --dataset CIFAR10 --batch_size 16                 # on host a; on b with the index 1

A replica sees batch_size images per update; an update is by the mean of all replicas' gradients. Every process makes
its own rows of each batch, from the same function of seed and step, and each of its replicas takes its share by its
number. Within a step replicas part only in the moving statistics of batch norm and in `totals`, which are averaged at
its end: so what a process reads between two steps is the same in all of them, and the first alone writes it.
"""

import contextlib
import json
import os
import select
import signal
import socket
import time

import numpy as np
import tensorflow as tf

from command import UserError, ExternalError, complain
from config import Workers, workers

HELLO_BYTES = 1 << 20  # more than what a worker says of itself
STARTED = b"+"
PACK_BYTES = 1 << 22  # resnet50's 102 MB between two workers on one machine: 0.13 s, in one piece 0.30 s
HELLO_SECONDS = 5.0  # for what connects and is no worker
ADVICE = "start all of them, or wait longer with --worker_timeout"


# The start.


def start(here: int, who: Workers):
    """The strategy for `here` devices of this process and the other workers; call it before all else of TensorFlow.

    One replica in all is TensorFlow's default strategy. GPUs are used where there are any, else CPU devices.
    """
    several = len(who.addresses) > 1
    if here == 1 and not several:
        return tf.distribute.get_strategy()
    gpus = tf.config.list_physical_devices("GPU")
    if gpus and len(gpus) < here:
        raise UserError(f"--replicas {here}, but this machine has {len(gpus)} GPUs: give at most that")
    if gpus:
        tf.config.set_visible_devices(gpus[:here], "GPU")
    elif several and here > 1:
        raise UserError(f"--replicas {here} with TF_CONFIG is for hosts with GPUs: on CPUs start a worker per replica")
    if several:
        return tf.distribute.MultiWorkerMirroredStrategy()
    if not gpus:
        (cpu,) = tf.config.list_physical_devices("CPU")
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * here)
    return tf.distribute.MirroredStrategy([f"{'GPU' if gpus else 'CPU'}:{i}" for i in range(here)])


@contextlib.contextmanager
def all_workers(who: Workers, identity: dict, timeout: float):
    """Wait for all workers and check that their configurations match; within the block the strategy may start.

    The chief listens at its own address of TF_CONFIG. Each other worker sends it its index and configuration, and
    receives the verdict. TensorFlow's own start-up waits for a lost worker without end and cannot be interrupted: so
    within the block another process watches the other workers, and ends this one if one of them ends.

    Raises:
        UserError: naming the first difference, in every worker.
        ExternalError: if a worker does not come within `timeout` seconds.
    """
    if len(who.addresses) == 1:
        yield
        return
    print(
        f"worker {who.index} of {len(who.addresses)}: waiting for the others, {timeout:g} seconds at most", flush=True
    )
    deadline = time.monotonic() + timeout
    others, verdict = (receive_all if who.is_chief else report)(who, identity, deadline)
    if verdict:
        raise UserError(verdict)
    guard = os.fork() or watch(others, os.getppid())
    yield
    for connection in others:
        with contextlib.suppress(OSError):
            connection.sendall(STARTED)
    os.kill(guard, signal.SIGKILL)
    os.waitpid(guard, 0)


def watch(others, parent):
    """End the parent, with a line on stderr, if one of the others ends before it has started; never returns."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while others and os.getppid() == parent:
        for connection in select.select(others, [], [], 0.2)[0]:
            with contextlib.suppress(OSError):
                if connection.recv(1) == STARTED:
                    others.remove(connection)
                    continue
            complain("another worker was lost; start all again")
            os.kill(parent, signal.SIGKILL)
            os._exit(1)
    os._exit(0)


def receive_all(who, identity, deadline):
    """The chief's side of all_workers: connections to the others, and what is wrong, or ''."""
    others, verdict = {}, ""
    with socket.create_server(("", int(who.addresses[0].rsplit(":", 1)[1]))) as server:
        while len(others) < len(who.addresses) - 1:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                missing = (f"{i} ({a})" for i, a in enumerate(who.addresses) if i and i not in others)
                raise ExternalError(f"these workers did not come: {', '.join(missing)}; {ADVICE}") from None
            connection.settimeout(HELLO_SECONDS)
            try:
                index, theirs = json.loads(connection.makefile().readline(HELLO_BYTES))
            except (OSError, ValueError, TypeError):
                continue  # somebody else
            others[index] = connection
            verdict = verdict or difference(identity, theirs, index)
        for connection in others.values():
            connection.sendall((json.dumps(verdict) + "\n").encode())
    return list(others.values()), verdict


def report(who, identity, deadline):
    """The side of another worker than the chief: a connection to it, and what it finds wrong, or ''."""
    host, port = who.addresses[0].rsplit(":", 1)
    while time.monotonic() < deadline:
        try:
            chief = socket.create_connection((host.strip("[]"), int(port)), timeout=deadline - time.monotonic())
            chief.sendall((json.dumps([who.index, identity]) + "\n").encode())
            return [chief], json.loads(chief.makefile().readline(HELLO_BYTES))
        except (OSError, ValueError):  # not there yet, or not the chief
            time.sleep(0.2)
    raise ExternalError(f"worker 0 ({who.addresses[0]}) did not come, or waits for others; {ADVICE}")


def difference(ours, theirs, index):
    """Words for the first item in which worker `index` differs from the chief; '' if there is none."""
    for name in sorted(ours.keys() | theirs.keys()):
        here, there = json.loads(json.dumps(ours.get(name))), theirs.get(name)
        if here != there:
            return f"worker {index} has {name} {there}, but worker 0 has {here}: start all with the same"
    return ""


# The division.


def rows_of(who: Workers, max_batch_size: int, updates: int):
    """Which rows of a batch of max_batch_size images this worker makes, [rows] int; None: all.

    Update number u is the u-th part of the batch, and each worker's share a part of that: so a row is in the same
    update whatever the number of replicas.
    """
    if len(who.addresses) == 1:
        return None
    return np.arange(max_batch_size).reshape(updates, len(who.addresses), -1)[:, who.index].ravel()


def test_share(who: Workers, examples: int) -> np.ndarray:
    """The positions of the test images that this worker predicts: contiguous, in the order of the workers."""
    return np.array_split(np.arange(examples), len(who.addresses))[who.index]


def make_join(strategy, who: Workers, examples: int):
    """A function from arrays [share] of this worker's test_share to those of all workers, [examples] each.

    With several workers a collective, in which all take part. Values are float32, or integers of less than 2^24.
    """
    if len(who.addresses) == 1:
        return lambda arrays: arrays
    shares = [test_share(Workers(who.addresses, i), examples) for i in range(len(who.addresses))]
    most = -(-examples // len(who.addresses))

    @tf.function
    def gather(values):
        joined = strategy.run(lambda: tf.distribute.get_replica_context().all_gather(tf.identity(values), axis=0))
        return strategy.experimental_local_results(joined)[0]  # [replicas, most, arrays]

    def join(arrays):
        padded = [np.pad(array, (0, most - len(array))).astype(np.float32) for array in arrays]
        joined = gather(tf.constant(np.stack(padded, axis=1)[np.newaxis])).numpy()
        joined = joined[:: len(joined) // len(shares)]  # each replica of a worker gave the same
        joined = np.concatenate([values[: len(share)] for values, share in zip(joined, shares)])
        return [column.astype(array.dtype) for column, array in zip(joined.T, arrays)]

    return join


# Within strategy.run, in a replica.


def part(values, parts: int):
    """This replica's part of the values [B, ...] of its process, whose `parts` replicas share them in order."""
    if parts == 1:
        return values
    place = tf.distribute.get_replica_context().replica_id_in_sync_group % parts
    size = tf.shape(values)[0]
    return values[size * place // parts : size * (place + 1) // parts]


def map_parts(strategy, function, *values):
    """function(*values) of values [B, ...]: each replica of this process does its part, and the results are joined."""
    parts = max(1, strategy.num_replicas_in_sync // len(workers().addresses))  # without a strategy 1, too
    if parts == 1:
        return strategy.run(function, values)
    results = strategy.run(lambda *values: function(*(part(value, parts) for value in values)), values)
    return tf.nest.map_structure(lambda result: tf.concat(strategy.experimental_local_results(result), 0), results)


def mean(values: list) -> list:
    """The means of tensors over all replicas."""
    replica = tf.distribute.get_replica_context()
    if replica.num_replicas_in_sync == 1:
        return values
    options = tf.distribute.experimental.CommunicationOptions(bytes_per_pack=PACK_BYTES)
    return replica.all_reduce(tf.distribute.ReduceOp.MEAN, values, options)
