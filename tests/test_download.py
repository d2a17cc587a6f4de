"""download.py against a real server on the loopback, killed, run twice at once, and on a full disk."""

import hashlib
import http.server
import os
import signal
import threading

import archives
import numpy as np
import pytest
import scripts
from PIL import Image

import datasets
import download
from datasets import cifar10, mnist

FILE = "cifar-10-python.tar.gz"
PACKED = [".lock", "data.hdf5", "id.txt"]


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.files; server.faults are what to do wrong with the next requests, one each."""

    def do_GET(self):
        server, start = self.server, int(self.headers.get("Range", "bytes=0-")[6:-1])
        server.requests.append((self.path, start))
        fault = server.faults.pop(0) if server.faults else None
        data = server.files.get(self.path)
        if fault == "busy":
            self.send_response(503)
            self.send_header("Retry-After", "3600")
            return self.end_headers()
        if isinstance(fault, int) or data is None:
            return self.send_error(fault or 404)
        if fault == "wrong":
            data = bytes(len(data))
        if fault == "no range":
            start = 0
        if start >= len(data):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Type", "text/html" if fault == "html" else "application/octet-stream")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        body = data[start:]
        self.wfile.write(body[: len(body) // 2] if fault in ("drop", "stall") else body)
        if fault == "stall":
            self.wfile.flush()
            server.released.wait(30)

    def log_message(self, *_):
        """Nothing on stderr."""


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """{path: bytes} of the archives of CIFAR10 and MNIST."""
    folder = tmp_path_factory.mktemp("served")
    for name in ("CIFAR10", "MNIST"):
        archives.make(name, folder)
    return {"/" + file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def server(served, monkeypatch):
    """A server which CIFAR10 and MNIST know as their only two mirrors, with the hashes of its files."""
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.daemon_threads, web.files, web.faults, web.requests, web.released = True, served, [], [], threading.Event()
    web.url = f"http://127.0.0.1:{web.server_port}"
    threading.Thread(target=web.serve_forever, args=(0.02,), daemon=True).start()
    for module in (cifar10, mnist):
        monkeypatch.setattr(module, "MIRRORS", (web.url + "/", web.url.replace("127.0.0.1", "localhost") + "/"))
        contents = {file: served["/" + file] for file in module.FILES}
        hashes = {file: (len(data), hashlib.sha256(data).hexdigest()) for file, data in contents.items()}
        monkeypatch.setattr(module, "FILES", hashes)
    monkeypatch.setattr(download, "RETRY", download.RETRY.new(backoff_factor=0))
    yield web
    web.released.set()
    web.shutdown()
    web.server_close()


FAULTS = [[404], [500], ["html"], ["wrong"], ["busy"] * 3, ["drop"], ["drop"] * 4, ["drop", "no range"], ["stall"]]


@pytest.mark.parametrize("faults", FAULTS)
def test_the_right_file_in_the_end_and_a_lost_connection_continues_where_it_stopped(server, tmp_path, faults):
    server.faults, right = list(faults), server.files["/" + FILE]
    download.prepare("CIFAR10", tmp_path, timeout=0.3 if "stall" in faults else 60, keep_archives=True)
    assert (tmp_path / "cifar10" / FILE).read_bytes() == right
    assert sorted(os.listdir(tmp_path / "cifar10")) == sorted([*PACKED, FILE])
    first, second, *others = [start for _, start in server.requests]
    assert first == 0 and (0 < second <= len(right) // 2 if faults[0] in ("drop", "stall") else second == 0)
    assert len(others) == len(faults) - 1 - ("no range" in faults)  # which is not a fault of its own


def test_a_slow_mirror_is_left_for_the_next_but_taken_if_there_is_no_other(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "SLOW_AFTER", 0.0)
    monkeypatch.setattr(download, "SLOW_RATE", 1e15)
    monkeypatch.setattr(download, "RECEIVED", 4096)
    download.prepare("CIFAR10", tmp_path / "1")
    assert [start for _, start in server.requests] == [0, 4096]
    server.requests.clear()
    monkeypatch.setattr(cifar10, "MIRRORS", (server.url, server.url + "/gone/"))
    download.prepare("CIFAR10", tmp_path / "2")
    assert server.requests == [("/" + FILE, 0), ("/gone/" + FILE, 4096), ("/" + FILE, 4096)]


@pytest.mark.parametrize("fault, said", [(404, "404"), (500, "500"), ("html", "text/html"), ("wrong", "sha256")])
def test_no_mirror_has_it(server, tmp_path, fault, said, capsys):
    server.faults = [fault] * 1000
    with pytest.raises(ConnectionError) as error:
        download.prepare("CIFAR10", tmp_path)
    assert FILE in str(error.value) and f"put it in {tmp_path}/cifar10" in str(error.value)
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("warning: http://") and said in line for line in lines) and 2 <= len(lines) <= 4
    assert not (tmp_path / "cifar10" / FILE).exists() and not datasets.is_prepared("CIFAR10", tmp_path)


def test_without_a_network_the_error_is_a_short_line(server, tmp_path, monkeypatch, call):
    """All requests go to a proxy that does not exist."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.setenv(name, "" if name == "no_proxy" else "http://127.0.0.1:9")
    line = call(download.main, "--dataset", "CIFAR10", "--data_dir", tmp_path, code=1)
    assert len(line) <= 210 + len(str(tmp_path)) and FILE in line and "download.py --dataset CIFAR10 again" in line
    assert server.requests == []


@pytest.mark.parametrize("kind, requests", [("complete", 0), ("of another file", 2), ("too long", 2)])
def test_what_an_earlier_run_left(server, tmp_path, kind, requests, monkeypatch):
    """A complete file is verified, not fetched; another one is replaced, even where there is one mirror only."""
    monkeypatch.setattr(cifar10, "MIRRORS", cifar10.MIRRORS[:1])
    right = server.files["/" + FILE]
    left = {"complete": right, "of another file": b"the beginning", "too long": right + b"x"}[kind]
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "cifar10" / (FILE + ".part")).write_bytes(left)
    download.prepare("CIFAR10", tmp_path, keep_archives=True)
    assert (tmp_path / "cifar10" / FILE).read_bytes() == right and len(server.requests) == requests


def test_archives_go_unless_kept_and_a_second_run_does_nothing(server, tmp_path, capsys):
    download.prepare("MNIST", tmp_path)
    assert sorted(os.listdir(tmp_path / "mnist")) == PACKED
    assert "MNIST: 20 train + 20 test images of 28x28x1 in 10 classes" in capsys.readouterr().out
    fetched = len(server.requests)
    download.prepare("MNIST", tmp_path)
    assert "data.hdf5" in capsys.readouterr().out and len(server.requests) == fetched


@pytest.mark.parametrize("is_archive_dir", [True, False])
@pytest.mark.parametrize("end", [b"", b"\0"])  # gzip ignores zeros at the end, which change the hash
def test_archives_that_the_user_put_there_are_kept(server, tmp_path, is_archive_dir, end):
    folder = tmp_path / "mnist"
    folder.mkdir()
    for file in mnist.FILES:
        (folder / file).write_bytes(server.files["/" + file] + end)
    download.prepare("MNIST", tmp_path, archive_dir=tmp_path if is_archive_dir else None, checksum=not end)
    assert sorted(os.listdir(folder)) == sorted([*PACKED, *mnist.FILES]) and server.requests == []


def test_a_fetch_that_is_ended_is_continued_by_one_of_those_that_wait(server, tmp_path):
    """Ctrl-C ends a fetch at once, however long the server takes, and the waiting for another process. After a kill -9
    one of those that wait continues with the bytes that have come, and the other finds its work done."""
    server.faults = ["stall", "stall"]
    flags = "--dataset", "CIFAR10", "--mirror", server.url, "--no_checksum", "--keep_archives", "--data_dir", tmp_path
    folder, part = tmp_path / "cifar10", tmp_path / "cifar10" / (FILE + ".part")

    def start_fetch(requests):
        before = download.size_of(part)
        process = scripts.start("download.py", *flags)
        scripts.wait_for(lambda: len(server.requests) == requests and download.size_of(part) > before)
        return process

    def interrupt(process):
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=2)[1].count("\n") == 1 and process.returncode == 130

    interrupt(start_fetch(1))
    first = start_fetch(2)
    waiting = [scripts.start("download.py", *flags) for _ in range(3)]
    assert all(str(folder) in process.stdout.readline() for process in waiting)
    interrupt(waiting.pop())
    first.kill()
    first.communicate()
    printed = sorted(process.communicate(timeout=60)[0] for process in waiting)
    assert [process.returncode for process in waiting] == [0, 0]
    assert [len(lines.splitlines()) for lines in printed] == [1, 2]
    starts = [start for _, start in server.requests]
    assert len(starts) == 3 and 0 == starts[0] < starts[1] < starts[2]
    assert (folder / FILE).read_bytes() == server.files["/" + FILE]


def test_archive_dir_with_another_hash(tmp_path, call):
    archives.make("CIFAR10", tmp_path / "archives" / "cifar10")
    flags = "--archive_dir", tmp_path / "archives", "--data_dir", tmp_path
    line = call(download.main, "--dataset", "CIFAR10", *flags, code=2)
    found = hashlib.sha256((tmp_path / "archives" / "cifar10" / FILE).read_bytes()).hexdigest()
    assert found in line and cifar10.FILES[FILE][1] in line
    assert "download.py --dataset CIFAR10 with --no_checksum" in line
    printed = call(download.main, "--datasets", "CIFAR10", "Digits", *flags, "--no_checksum")
    assert "warning" in printed and found in printed
    assert os.listdir(tmp_path / "archives" / "cifar10") == [FILE]
    assert datasets.is_prepared("Digits", tmp_path)


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--dataset Digits cifar10", "CIFAR10"),
        ("--dataset Flowers", "--image_dir"),
        ("--dataset Digits --mirror http://x", "--mirror"),
        ("--dataset MNIST --mirror ftp://x", "http://"),
        ("--dataset MNIST --archive_dir none", "train-images-idx3-ubyte.gz"),
        ("--dataset ImageNet", "https://image-net.org"),
        ("--dataset A --image_size 8 8", "--image_dir"),
        ("--dataset A B --image_dir .", "A B"),
        ("--dataset MNIST --image_dir .", "MNIST"),
        ("--dataset A --image_dir . --no_checksum", "--no_checksum"),
        ("--dataset A --image_dir . --timeout 60", "--timeout"),
        ("--dataset MNIST --archive_dir . --timeout 60", "--timeout"),
        ("--dataset A --image_dir none", "none"),
        ("--dataset A --image_dir . --image_size 0 8", "not 0"),
        ("--dataset Digits --data_dir /dev/null/data", "/dev/null/data"),
    ],
)
def test_mistakes_of_the_user(flags, said, tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    given = flags.split() if "--data_dir" in flags else [*flags.split(), "--data_dir", tmp_path]
    assert said in call(download.main, *given, code=2)
    assert not any("data.hdf5" in files for _, _, files in os.walk(tmp_path))


@pytest.fixture(scope="module")
def big_archives(tmp_path_factory):
    """The folder of MNIST archives of a size that takes a moment to pack."""
    folder = tmp_path_factory.mktemp("big")
    for prefix in ("train", "t10k"):
        archives.idx(folder / f"{prefix}-images-idx3-ubyte.gz", np.zeros((40000, 28, 28), np.uint8))
        archives.idx(folder / f"{prefix}-labels-idx1-ubyte.gz", np.arange(40000) % 10)
    return folder


def test_packing_that_ended_early_is_begun_anew(big_archives, tmp_path, call):
    """On a disk that is full at the first byte, in the middle, and at the end; or killed with -9."""
    flags = "--dataset", "MNIST", "--archive_dir", big_archives, "--data_dir", tmp_path, "--no_checksum"
    for size in (0, 200_000, 62_000_000):
        with scripts.full_disk(size):
            call(download.main, *flags, code=1)
        assert os.listdir(tmp_path / "mnist") == [".lock"]
    process, unfinished = scripts.start("download.py", *flags), tmp_path / "mnist" / "data.hdf5.unfinished"
    scripts.wait_for(lambda: download.size_of(unfinished) > 1000)
    process.kill()
    process.communicate()
    assert unfinished.exists() and not datasets.is_prepared("MNIST", tmp_path)
    call(download.main, *flags)
    assert sorted(os.listdir(tmp_path / "mnist")) == PACKED
    assert len(datasets.create_default_splits("MNIST", tmp_path)[0]) == 40000


def test_a_disk_that_is_full_while_fetching(server, tmp_path, call):
    flags = "--dataset", "CIFAR10", "--data_dir", tmp_path
    with scripts.full_disk(10_000):
        call(download.main, *flags, code=1)
    assert sorted(os.listdir(tmp_path / "cifar10")) == [".lock", FILE + ".part"]
    call(download.main, *flags)
    assert server.requests[-1] == ("/" + FILE, 10_000)


def test_a_folder_of_class_folders(tmp_path, call):
    """Packed by the flags of the command line, with images of several sizes."""
    for i, name in enumerate(("train/cat", "train/dog", "test/cat", "test/dog")):
        os.makedirs(tmp_path / name)
        for height in (10, 11):
            Image.new("RGB", (12, height), (40 + 80 * (i % 2),) * 3).save(tmp_path / name / f"{height}.png")
    flags = ["--image_dir", tmp_path / "train", "--test_image_dir", tmp_path / "test", "--data_dir", tmp_path]
    assert "--image_size" in call(download.main, "--dataset", "Pets", *flags, code=2)
    flags += ["--image_size", 8, 6]
    printed = call(download.main, "--dataset", "Pets", *flags)
    assert "Pets: 4 train + 4 test images of 8x6x3 in 2 classes" in printed
    for split in datasets.create_default_splits("Pets", tmp_path):
        assert split.class_names == ["cat", "dog"] and split.images().shape == (4, 8, 6, 3)
        assert (split.images() == 40 + 80 * split.labels[:, None, None, None]).all()
    (tmp_path / "test" / "cow").mkdir()
    assert "cow" in call(download.main, "--dataset", "Cattle", *flags, code=2)
