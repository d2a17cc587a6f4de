"""Replicas: train on several devices and hosts in parallel, with tf.distribute.

    python trainer.py --dataset CIFAR10 --batch_size 16 --replicas 2        # two devices of this host
    TF_CONFIG='{"cluster": {"worker": ["a:2222", "b:2222"]}, "task": {"type": "worker", "index": 0}}' \
        python trainer.py --dataset CIFAR10 --batch_size 16                 # on host a; on host b with index 1

A replica processes batch_size images per update, and an update uses the mean gradient of all replicas. Every process
makes only its own rows of each batch, which depend on seed and step alone, and each of its replicas takes a part of
them. Within a step, replicas differ only in batch norm's moving statistics and in `totals`, which are averaged at its
end, and with --accumulate in `sums`, which the next step resets. All processes are therefore equal between steps, and
only the chief writes.
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

STARTED = b"+"
PACK_BYTES = 1 << 22  # resnet50's 102 MB between two workers on one machine: 0.13 s, in one piece 0.30 s
HELLO_SECONDS = 5.0  # to wait for the first message after a connection, which may come from another program
ADVICE = "start all workers, or wait longer with --worker_timeout"


def start(here: int, who: Workers):
    """Make the strategy for `here` devices of this process and all workers; call it before other TensorFlow functions.

    A single replica gets TensorFlow's default strategy. Devices are GPUs if there are any, otherwise CPUs.
    """
    several = len(who.addresses) > 1
    if here == 1 and not several:
        return tf.distribute.get_strategy()
    gpus = tf.config.list_physical_devices("GPU")
    if gpus and len(gpus) < here:
        raise UserError(f"--replicas {here}, but this host has {len(gpus)} GPUs: give at most {len(gpus)}")
    if gpus:
        tf.config.set_visible_devices(gpus[:here], "GPU")
    elif several and here > 1:
        raise UserError(f"--replicas {here} with TF_CONFIG needs GPUs: on CPUs start one worker per replica")
    if several:
        return tf.distribute.MultiWorkerMirroredStrategy()
    if not gpus:
        (cpu,) = tf.config.list_physical_devices("CPU")
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * here)
    return tf.distribute.MirroredStrategy([f"{'GPU' if gpus else 'CPU'}:{i}" for i in range(here)])


@contextlib.contextmanager
def all_workers(who: Workers, identity: dict, timeout: float):
    """Wait for all workers and check that their configurations match; start the strategy within the block.

    The chief listens at its own address in TF_CONFIG. Each other worker sends its index and configuration to the chief,
    which answers with an error message, empty if all match. TensorFlow's own start-up waits forever for a lost worker
    and cannot be interrupted. Within the block, a child process therefore watches the connections to the other workers,
    and kills this process if one is lost.

    Raises:
        UserError: in every worker, naming the first difference.
        ExternalError: if a worker does not connect within `timeout` seconds.
    """
    if len(who.addresses) == 1:
        yield
        return
    print(f"worker {who.index} of {len(who.addresses)}: waiting at most {timeout:g} seconds for the others")
    deadline = time.monotonic() + timeout
    others, problem = (receive_all if who.is_chief else report)(who, identity, deadline)
    if problem:
        raise UserError(problem)
    guard = os.fork() or watch(others, os.getppid())
    yield
    for connection in others:
        with contextlib.suppress(OSError):
            connection.sendall(STARTED)
    os.kill(guard, signal.SIGKILL)
    os.waitpid(guard, 0)


def watch(others, parent):
    """Kill the parent, with a line on stderr, if another worker is lost before it has started; never returns."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while others and os.getppid() == parent:
        for connection in select.select(others, [], [], 0.2)[0]:
            with contextlib.suppress(OSError):
                if connection.recv(1) == STARTED:
                    others.remove(connection)
                    continue
            complain("another worker was lost; start all workers again")
            os.kill(parent, signal.SIGKILL)
            os._exit(1)
    os._exit(0)


def receive_all(who, identity, deadline):
    """The chief's part of all_workers: returns the connections to the others, and an error message or ''."""
    others, problem = {}, ""
    with socket.create_server(("", int(who.addresses[0].rsplit(":", 1)[1]))) as server:
        while len(others) < len(who.addresses) - 1:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                missing = (f"{i} ({a})" for i, a in enumerate(who.addresses) if i and i not in others)
                raise ExternalError(f"these workers did not connect: {', '.join(missing)}; {ADVICE}") from None
            connection.settimeout(HELLO_SECONDS)
            try:
                index, theirs = json.loads(connection.makefile().readline())
            except (OSError, ValueError, TypeError):
                continue  # another program connected
            others[index] = connection
            problem = problem or difference(identity, theirs, index)
        for connection in others.values():
            connection.sendall((json.dumps(problem) + "\n").encode())
    return list(others.values()), problem


def report(who, identity, deadline):
    """Another worker's part of all_workers: returns [the connection to the chief], and its error message or ''."""
    host, port = who.addresses[0].rsplit(":", 1)
    while time.monotonic() < deadline:
        try:
            chief = socket.create_connection((host.strip("[]"), int(port)), timeout=deadline - time.monotonic())
            chief.sendall((json.dumps([who.index, identity]) + "\n").encode())
            return [chief], json.loads(chief.makefile().readline())
        except (OSError, ValueError):  # the chief does not listen yet, or another program answered
            time.sleep(0.2)
    raise ExternalError(f"worker 0 ({who.addresses[0]}) did not answer, or waits for other workers; {ADVICE}")


def difference(ours, theirs, index):
    """A message about the first setting in which worker `index` differs from the chief; '' if they are equal."""
    for name in sorted(ours.keys() | theirs.keys()):
        here, there = json.loads(json.dumps(ours.get(name))), theirs.get(name)
        if here != there:
            return f"worker {index} has {name} {there}, but worker 0 has {here}: start all workers with the same"
    return ""


def rows_of(who: Workers, max_batch_size: int, batches: int):
    """The rows [n] int that this worker makes of the max_batch_size images of a step; None for all.

    Batch number b of a step uses the b-th part of these images, and each worker makes a share of each part. A row thus
    belongs to the same batch for any number of workers.
    """
    if len(who.addresses) == 1:
        return None
    return np.arange(max_batch_size).reshape(batches, len(who.addresses), -1)[:, who.index].ravel()


def test_share(who: Workers, examples: int) -> np.ndarray:
    """The positions of the test images that this worker predicts: contiguous, in the order of the workers."""
    return np.array_split(np.arange(examples), len(who.addresses))[who.index]


def make_join(strategy, who: Workers, examples: int):
    """Make a function that joins the arrays [share] of each worker's test_share to arrays [examples].

    All workers must call it together. Values must be float32 or integers below 2^24, since float32 carries them.
    """
    if len(who.addresses) == 1:
        return lambda arrays: arrays
    shares = [test_share(Workers(who.addresses, i), examples) for i in range(len(who.addresses))]
    most = -(-examples // len(who.addresses))

    @tf.function(autograph=False)
    def gather(values):
        joined = strategy.run(lambda: tf.distribute.get_replica_context().all_gather(tf.identity(values), axis=0))
        return strategy.experimental_local_results(joined)[0]  # [replicas, most, arrays]

    def join(arrays):
        padded = [np.pad(array, (0, most - len(array))).astype(np.float32) for array in arrays]
        joined = gather(tf.constant(np.stack(padded, axis=1)[np.newaxis])).numpy()
        joined = joined[:: len(joined) // len(shares)]  # one of each worker's replicas, which gather equal values
        joined = np.concatenate([values[: len(share)] for values, share in zip(joined, shares)])
        return [column.astype(array.dtype) for column, array in zip(joined.T, arrays)]

    return join


def part(values, parts: int):
    """This replica's part of its process's values [B, ...], which `parts` replicas share; call it in strategy.run."""
    if parts == 1:
        return values
    index = tf.distribute.get_replica_context().replica_id_in_sync_group % parts
    size = tf.shape(values)[0]
    return values[size * index // parts : size * (index + 1) // parts]


def map_parts(strategy, function, *values):
    """Return function(*values) of values [B, ...]: each replica of this process computes a part of the results."""
    parts = max(1, strategy.num_replicas_in_sync // len(workers().addresses))  # the default strategy has one replica
    results = strategy.run(lambda *values: function(*(part(value, parts) for value in values)), values)
    return tf.nest.map_structure(lambda result: tf.concat(strategy.experimental_local_results(result), 0), results)


def mean(values: list) -> list:
    """The means of tensors over all replicas; call it in strategy.run."""
    replica = tf.distribute.get_replica_context()
    if replica.num_replicas_in_sync == 1:
        return values
    options = tf.distribute.experimental.CommunicationOptions(bytes_per_pack=PACK_BYTES)
    return replica.all_reduce(tf.distribute.ReduceOp.MEAN, values, options)
