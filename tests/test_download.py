"""download.py against a real server on the loopback, killed, run twice at once, and on a full disk."""

import gzip
import hashlib
import http.server
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
import time

import archives
import h5py
import numpy as np
import pytest
from PIL import Image

import datasets
import download
from command import UserError, run
from datasets import cifar10, digits, hdf5, mnist

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FILE = "cifar-10-python.tar.gz"


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.files; server.faults[path] is a list of what to do wrong, one a request."""

    def do_GET(self):
        server, start = self.server, int(self.headers.get("Range", "bytes=0-")[6:-1])
        server.requests.append((self.path, start))
        fault = server.faults.get(self.path, [])
        fault = fault.pop(0) if fault else None
        if isinstance(fault, int):
            return self.send_error(fault)
        if fault == "redirect":
            self.send_response(302)
            self.send_header("Location", "/elsewhere" + self.path)
            return self.end_headers()
        data = server.files[self.path.removeprefix("/elsewhere")]
        if fault == "html":
            data = b"<html>please accept the cookies</html>"
        if fault == "wrong":
            data = bytes(len(data))
        if fault in ("no range", "no range drop"):
            start = 0
        if start >= len(data):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Type", "text/html" if fault == "html" else "application/octet-stream")
        if fault != "short":  # then only the end of the connection ends the body
            self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        body = data[start:]
        self.wfile.write(body[: len(body) // 2] if fault in ("drop", "stall", "short", "no range drop") else body)
        if fault == "stall":
            self.wfile.flush()
            server.released.wait(30)

    def log_message(self, *_):
        """Nothing on stderr."""


@pytest.fixture
def server(tmp_path):
    """A server with the archives of CIFAR10 and MNIST under /."""
    for name in ("CIFAR10", "MNIST"):
        archives.make(name, tmp_path / "served")
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.daemon_threads, web.faults, web.requests, web.released = True, {}, [], threading.Event()
    web.files = {"/" + file.name: file.read_bytes() for file in (tmp_path / "served").iterdir()}
    web.url = f"http://127.0.0.1:{web.server_port}"
    threading.Thread(target=web.serve_forever, args=(0.02,), daemon=True).start()
    yield web
    web.released.set()
    web.shutdown()
    web.server_close()


@pytest.fixture
def own_mirrors(server, monkeypatch):
    """Let CIFAR10 and MNIST know only this server, as two mirrors, and the hashes of its files."""
    for module in (cifar10, mnist):
        monkeypatch.setattr(module, "MIRRORS", (server.url + "/", server.url.replace("127.0.0.1", "localhost") + "/"))
        monkeypatch.setattr(
            module,
            "FILES",
            {
                file: (len(server.files["/" + file]), kind, hashlib.new(kind, server.files["/" + file]).hexdigest())
                for file, (_, kind, _) in module.FILES.items()
            },
        )
    monkeypatch.setattr(download, "RETRY", download.RETRY.new(backoff_factor=0))


def start(*args, **kwargs):
    """Start download.py, and return the process, whose output can be read."""
    command = [sys.executable, os.path.join(ROOT, "download.py"), *map(str, args)]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)


def call(*args, **kwargs):
    """Run download.py; return (exit code, stdout, stderr)."""
    process = start(*args, **kwargs)
    output = process.communicate(timeout=60)
    return process.returncode, *output


def fails(code, *args, **kwargs):
    """Run download.py, which must fail with `code` and one line on stderr; return that line."""
    found, _, stderr = call(*args, **kwargs)
    assert found == code and stderr.count("\n") == 1 and stderr.startswith("download.py: error: "), stderr
    return stderr


def from_server(server, data_dir):
    """Return the flags that fetch CIFAR10 from the server."""
    return "--dataset", "CIFAR10", "--mirror", server.url, "--no_checksum", "--data_dir", data_dir


def wait_for(condition):
    """Poll until condition() holds."""
    limit = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.005)


@pytest.mark.parametrize(
    "faults, requests",
    [
        ([], 1),
        ([404], 2),
        ([403], 2),
        ([500], 2),
        (["html"], 2),
        (["wrong"], 2),
        (["redirect"], 2),
        (["drop"], 2),
        (["drop", "drop", "drop", "drop"], 5),
        (["short"], 2),
        (["drop", "no range"], 2),
        (["drop", 500], 3),
        (["no range drop", "wrong", "no range"], 3),
        ([404, "drop", "no range drop"], 4),
    ],
)
def test_the_right_file_in_the_end(server, own_mirrors, tmp_path, faults, requests):
    server.faults["/" + FILE] = list(faults)
    download.prepare("CIFAR10", tmp_path / "data", keep_archives=True)
    folder = tmp_path / "data" / "cifar10"
    assert (folder / FILE).read_bytes() == server.files["/" + FILE]
    assert len(server.requests) == requests
    assert sorted(os.listdir(folder)) == [".lock", FILE, "data.hdf5", "id.txt"]


@pytest.mark.parametrize("fault", ["drop", "stall"])
def test_a_lost_connection_continues_where_it_stopped(server, own_mirrors, tmp_path, fault):
    server.faults["/" + FILE] = [fault]
    download.prepare("CIFAR10", tmp_path, timeout=0.3)
    (_, first), (_, second) = server.requests
    assert first == 0 and 0 < second <= len(server.files["/" + FILE]) // 2


def test_a_slow_mirror_is_left_for_the_next_but_taken_if_there_is_no_other(server, own_mirrors, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "SLOW_AFTER", 0.0)
    monkeypatch.setattr(download, "SLOW_RATE", 1e15)
    monkeypatch.setattr(download, "RECEIVED", 4096)
    download.prepare("CIFAR10", tmp_path / "1")
    assert [start for _, start in server.requests] == [0, 4096]
    server.requests.clear()
    server.faults["/gone/" + FILE] = [404] * 9
    monkeypatch.setattr(cifar10, "MIRRORS", (server.url, server.url + "/gone/"))
    download.prepare("CIFAR10", tmp_path / "2")
    assert server.requests == [("/" + FILE, 0), ("/gone/" + FILE, 4096), ("/" + FILE, 4096)]


@pytest.mark.parametrize(
    "fault, said",
    [
        (404, "404"),
        (403, "403"),
        (500, "500"),
        ("html", "a web page"),
        ("wrong", "sha256"),
        ("no range drop", "IncompleteRead"),
    ],
)
def test_no_mirror_has_it(server, own_mirrors, tmp_path, fault, said, capsys):
    server.faults["/" + FILE] = [fault] * 1000
    with pytest.raises(ConnectionError) as error:
        download.prepare("CIFAR10", tmp_path)
    assert FILE in str(error.value) and "--archive_dir" in str(error.value)
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("warning: http://") and said in line for line in lines) and 2 <= len(lines) <= 4
    assert not (tmp_path / "cifar10" / FILE).exists() and not datasets.is_prepared("CIFAR10", tmp_path)


def test_without_a_network_the_error_is_a_short_line(tmp_path):
    """All requests go to a proxy that does not exist."""
    environment = os.environ | {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "all_proxy")}
    line = fails(1, "--dataset", "CIFAR10", "--data_dir", tmp_path, env=environment | {"no_proxy": ""})
    assert len(line) <= 200 and FILE in line and "check the network" in line and "--archive_dir" in line


@pytest.mark.parametrize("kind", ["complete", "of another file", "too long"])
def test_what_an_earlier_run_left(server, own_mirrors, tmp_path, kind, monkeypatch):
    """A complete file is verified, not fetched; another one is replaced, even where there is one mirror only."""
    monkeypatch.setattr(cifar10, "MIRRORS", cifar10.MIRRORS[:1])
    right = server.files["/" + FILE]
    (tmp_path / "cifar10").mkdir()
    left = {"complete": right, "of another file": b"the beginning", "too long": right + b"x"}[kind]
    (tmp_path / "cifar10" / (FILE + ".part")).write_bytes(left)
    download.prepare("CIFAR10", tmp_path, keep_archives=True)
    assert (tmp_path / "cifar10" / FILE).read_bytes() == right
    assert len(server.requests) == {"complete": 0, "of another file": 2, "too long": 2}[kind]


def test_archives_go_unless_kept_and_a_second_run_does_nothing(server, own_mirrors, tmp_path, capsys):
    download.prepare("MNIST", tmp_path)
    assert sorted(os.listdir(tmp_path / "mnist")) == [".lock", "data.hdf5", "id.txt"]
    assert "MNIST: 20 train + 20 test images of 28x28x1 in 10 classes" in capsys.readouterr().out
    fetched = len(server.requests)
    download.prepare("MNIST", tmp_path)
    assert "packed already" in capsys.readouterr().out and len(server.requests) == fetched


@pytest.mark.parametrize("number, code, stderr", [(signal.SIGKILL, -9, ""), (signal.SIGINT, 130, "interrupted")])
def test_a_fetch_that_was_ended_and_started_again(server, tmp_path, number, code, stderr):
    """At once, however long the server takes; the next run continues with the bytes that have come."""
    server.faults["/" + FILE] = ["stall"]
    process = start(*from_server(server, tmp_path))
    folder, part = tmp_path / "cifar10", tmp_path / "cifar10" / (FILE + ".part")
    wait_for(lambda: part.exists() and server.requests)
    time.sleep(0.1)  # until it waits for the bytes that do not come
    process.send_signal(number)
    assert stderr in process.communicate(timeout=2)[1] and process.returncode == code
    have, right = part.stat().st_size, server.files["/" + FILE]
    assert sorted(os.listdir(folder)) == [".lock", FILE + ".part"] and part.read_bytes() == right[:have]
    part.write_bytes(right[:1000])
    assert call(*from_server(server, tmp_path), "--keep_archives")[0] == 0
    assert server.requests[-1] == ("/" + FILE, 1000) and (folder / FILE).read_bytes() == right


def test_two_at_once(server, tmp_path):
    """The second waits for the first, and finds its work done; Ctrl-C ends the waiting."""
    server.faults["/" + FILE] = ["stall"]
    first = start(*from_server(server, tmp_path))
    wait_for(lambda: server.requests)
    others = [start(*from_server(server, tmp_path)) for _ in range(2)]
    assert all("waiting for another process" in other.stdout.readline() for other in others)
    others[0].send_signal(signal.SIGINT)
    assert "interrupted" in others[0].communicate(timeout=2)[1] and others[0].returncode == 130
    server.released.set()
    assert "packed in" in first.communicate(timeout=60)[0]
    assert "packed already" in others[1].communicate(timeout=60)[0]
    assert first.returncode == others[1].returncode == 0
    assert len(server.requests) == 2  # the stalled one and its continuation


def test_archive_dir_with_another_hash(tmp_path):
    archives.make("CIFAR10", tmp_path / "archives" / "cifar10")
    flags = "--archive_dir", tmp_path / "archives", "--data_dir", tmp_path
    line = fails(2, "--dataset", "CIFAR10", *flags)
    found = hashlib.sha256((tmp_path / "archives" / "cifar10" / FILE).read_bytes()).hexdigest()
    assert found in line and cifar10.FILES[FILE][2] in line and "--no_checksum" in line
    code, stdout, _ = call("--datasets", "CIFAR10", "Digits", *flags, "--no_checksum")
    assert code == 0 and "warning" in stdout and found in stdout
    assert os.listdir(tmp_path / "archives" / "cifar10") == [FILE]
    assert datasets.is_prepared("Digits", tmp_path)


@pytest.mark.parametrize(
    "args, said",
    [
        (["--dataset"], "expected at least one"),
        ([], "--dataset"),
        (["--dataset", "cifar10"], "did you mean CIFAR10"),
        (["--dataset", "a/b"], "no slashes"),
        (["--dataset", ".."], "no dots"),
        (["--dataset", "Flowers"], "--image_dir"),
        (["--dataset", "Digits", "Flowers"], "Flowers"),
        (["--data", "Digits"], "--dataset"),
        (["--dataset", "Digits", "--mirror", "http://x"], "no effect"),
        (["--dataset", "MNIST", "--mirror", "ftp://x"], "http://"),
        (["--dataset", "MNIST", "--archive_dir", "none"], "train-images-idx3-ubyte.gz"),
        (["--dataset", "MNIST", "--archive_dir", ".", "--mirror", "http://x"], "not allowed with"),
        (["--dataset", "ImageNet"], "ILSVRC2012_img_val.tar"),
        (["--dataset", "ImageNet"], "image-net.org"),
        (["--dataset", "A", "--test_image_dir", "."], "--image_dir"),
        (["--dataset", "A", "--image_size", "8", "8"], "--image_dir"),
        (["--dataset", "A", "B", "--image_dir", "."], "one dataset"),
        (["--dataset", "MNIST", "--image_dir", "."], "another name"),
        (["--dataset", "A", "--image_dir", ".", "--no_checksum"], "no effect"),
        (["--dataset", "A", "--image_dir", "none"], "none"),
        (["--dataset", "A", "--image_dir", ".", "--image_size", "0", "8"], "not 0"),
        (["--dataset", "Digits", "--timeout", "-1"], "-1"),
        (["--dataset", "Digits", "--data_dir", "/dev/null/data"], "/dev/null/data"),
    ],
)
def test_mistakes_of_the_user(args, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(download.datasets, "DATA_DIR", tmp_path)
    monkeypatch.setattr(sys, "argv", ["download.py", *args])
    with pytest.raises(SystemExit) as end:
        run(download.main)
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.startswith("download.py: error: ") and line.count("\n") == 1 and said in line
    assert not any("data.hdf5" in files for _, _, files in os.walk(tmp_path))


# packing


def big_archives(folder):
    """Write MNIST archives of a size that takes a moment to pack; returns the flags that pack them beside `folder`."""
    archives.make("MNIST", folder)
    for prefix in ("train", "t10k"):
        archives.idx(folder / f"{prefix}-images-idx3-ubyte.gz", np.zeros((40000, 28, 28), np.uint8))
        archives.idx(folder / f"{prefix}-labels-idx1-ubyte.gz", np.arange(40000) % 10)
    return ["--dataset", "MNIST", "--archive_dir", str(folder), "--data_dir", str(folder.parent), "--no_checksum"]


@pytest.mark.parametrize("moment", [0, 1, 2])
def test_killed_while_packing(tmp_path, moment):
    args = big_archives(tmp_path / "archives")
    process = start(*args)
    unfinished = tmp_path / "mnist" / "data.hdf5.unfinished"
    wait_for(lambda: unfinished.exists() and unfinished.stat().st_size >= (0, 1000, 20_000_000)[moment])
    process.kill()
    process.communicate()
    assert unfinished.exists() and not datasets.is_prepared("MNIST", tmp_path)
    with pytest.raises(UserError, match="download.py"):
        datasets.create_default_splits("MNIST", tmp_path)
    assert call(*args)[0] == 0
    assert sorted(os.listdir(tmp_path / "mnist")) == [".lock", "data.hdf5", "id.txt"]
    assert len(datasets.create_default_splits("MNIST", tmp_path)[0]) == 40000


def limit_files(size):
    """Let no file grow beyond `size` bytes: writing more fails as on a full disk (the signal would kill otherwise)."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


@pytest.mark.parametrize("size", [0, 100, 3000, 200_000, 62_000_000])
def test_a_disk_that_is_full_while_packing(tmp_path, size):
    args = big_archives(tmp_path / "archives")
    fails(1, *args, preexec_fn=limit_files(size))
    assert os.listdir(tmp_path / "mnist") == [".lock"]
    assert call(*args)[0] == 0 and datasets.is_prepared("MNIST", tmp_path)


def test_a_disk_that_is_full_while_fetching(server, tmp_path):
    args = from_server(server, tmp_path)
    fails(1, *args, preexec_fn=limit_files(10_000))
    assert sorted(os.listdir(tmp_path / "cifar10")) == [".lock", FILE + ".part"]
    assert call(*args)[0] == 0 and server.requests[-1] == ("/" + FILE, 10_000)


def test_a_failure_while_packing_keeps_the_old_file(tmp_path):
    download.prepare("Digits", tmp_path)
    before = (tmp_path / "digits" / "data.hdf5").read_bytes()

    def parts():
        yield next(digits.read().parts)
        raise UserError("the archive is broken")

    with pytest.raises(UserError, match="the archive is broken"):
        hdf5.write(tmp_path / "digits", digits.read()._replace(parts=parts()))
    assert (tmp_path / "digits" / "data.hdf5").read_bytes() == before
    assert sorted(os.listdir(tmp_path / "digits")) == [".lock", "data.hdf5", "id.txt"]


# folders of images


def image_folders(folder, sizes=((10, 12),)):
    """Write six images a class, of many kinds."""
    kinds = [("png", "RGB"), ("png", "L"), ("png", "RGBA"), ("png", "P"), ("bmp", "RGB"), ("jpg", "CMYK")]
    for number, name in enumerate(("cat", "dog")):
        os.makedirs(folder / name)
        for i, (suffix, mode) in enumerate(kinds):
            image = Image.new("RGB", sizes[i % len(sizes)][::-1], (40 + 80 * number,) * 3)
            (image.quantize() if mode == "P" else image.convert(mode)).save(folder / name / f"{i}.{suffix}")
    (folder / "cat" / "notes.txt").write_text("no image")


def test_a_folder_of_class_folders(tmp_path):
    image_folders(tmp_path / "images")
    _, stdout, _ = call("--dataset", "Pets", "--image_dir", tmp_path / "images", "--data_dir", tmp_path)
    assert "Pets: 10 train + 2 test images of 10x12x3 in 2 classes" in stdout and "notes.txt" in stdout
    for split in datasets.create_default_splits("Pets", tmp_path):
        assert split.class_names == ["cat", "dog"]
        assert np.abs(split.images().astype(int) - (40 + 80 * split.labels[:, None, None, None])).max() <= 2


def test_a_test_folder_and_a_size(tmp_path):
    image_folders(tmp_path / "images", ((10, 12), (20, 9)))
    image_folders(tmp_path / "test", ((16, 16),))
    flags = "--image_dir", tmp_path / "images", "--test_image_dir", tmp_path / "test", "--data_dir", tmp_path
    assert "--image_size" in fails(2, "--dataset", "Pets", *flags)
    assert call("--dataset", "Pets", *flags, "--image_size", "8", "6")[0] == 0
    train, test = datasets.create_default_splits("Pets", tmp_path)
    assert train.images().shape == test.images().shape == (12, 8, 6, 3)
    (tmp_path / "test" / "cow").mkdir()
    assert "cow" in fails(2, "--dataset", "Cattle", *flags)


def one_image(folder, image, name="0.png"):
    """Pack `image` (a PIL image, a numpy array or the bytes of a file), and return what became of it.

    It is in both classes of both splits.
    """
    if not isinstance(image, bytes):
        image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        image.save(folder / name)
        image = (folder / name).read_bytes()
    for place in ("train/a", "train/b", "test/a", "test/b"):
        os.makedirs(folder / place)
        (folder / place / name).write_bytes(image)
    download.prepare_folder("One", folder / "train", folder / "test", data_dir=folder)
    train, test = datasets.create_default_splits("One", folder)
    np.testing.assert_array_equal(train.images(), test.images())
    return test.images()[0]


def gray(values):
    """uint8 [h, w, 3] of gray values [h, w]."""
    return np.repeat(np.asarray(values, np.uint8)[..., None], 3, axis=-1)


DEEP = {
    "png": Image.fromarray(np.full((3, 4), 300, np.uint16)),
    "tif": Image.fromarray(np.full((3, 4), 300, np.int32)),
    "tiff": Image.fromarray(np.full((3, 4), 0.5, np.float32)),
    "pgm": b"P5 1 1 4095\n\1\1",
    "PNG": archives.png_16(np.full((3, 4, 3), 300)),
}


@pytest.mark.parametrize("suffix", DEEP)
def test_images_of_more_than_8_bits_are_refused(tmp_path, suffix):
    with pytest.raises(UserError) as error:
        one_image(tmp_path, DEEP[suffix], f"0.{suffix}")
    assert f"0.{suffix}" in str(error.value) and "-depth 8" in str(error.value) and "data.hdf5" in str(error.value)


def test_a_bitmap_of_5_6_and_5_bits_a_color_is_not_one_of_16(tmp_path):
    header = struct.pack("<4I2i2H6I3I", 70, 0, 66, 40, 2, 1, 1, 16, 3, 4, 0, 0, 0, 0, 0xF800, 0x7E0, 0x1F)
    bitmap = b"BM" + header + struct.pack("<2H", 0xF800, 0x1F)
    np.testing.assert_array_equal(one_image(tmp_path, bitmap, "0.bmp"), [[[255, 0, 0], [0, 0, 255]]])


def drawing(mode):
    """A black stroke, 3 of 4 columns wide at 255, 128 and 255 of 255, on transparent black, in a mode with alpha."""
    alpha = Image.fromarray(np.array([[0, 255, 128, 255]] * 4, np.uint8))
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.putalpha(alpha)
    if mode == "P":
        image = Image.fromarray(np.array([[0, 1, 2, 1]] * 4, np.uint8), "L").convert("P")
        image.putpalette([0] * 9)
        image.info["transparency"] = bytes([0, 255, 128])
        return image
    if mode == "GIF":
        image = Image.fromarray(np.array([[0, 1, 2, 1]] * 4, np.uint8), "L").convert("P")
        image.putpalette([0, 0, 0, 0, 0, 0, 127, 127, 127])
        image.info["transparency"] = 0
        return image
    return image.convert(mode)


@pytest.mark.parametrize(
    "mode, name",
    [("RGBA", "0.png"), ("LA", "0.png"), ("P", "0.png"), ("RGBA", "0.webp"), ("PA", "0.tif"), ("GIF", "0.gif")],
)
def test_transparent_images_lie_on_white(tmp_path, mode, name):
    image = drawing(mode)
    image.save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
    found = one_image(tmp_path, (tmp_path / name).read_bytes(), name)
    np.testing.assert_array_equal(found, gray([[255, 0, 127, 0]] * 4))


def test_a_transparent_color_lies_on_white(tmp_path):
    image = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    image.save(tmp_path / "0.png", transparency=(1, 2, 3))
    found = one_image(tmp_path, (tmp_path / "0.png").read_bytes())
    np.testing.assert_array_equal(found, [[[255, 255, 255], [4, 5, 6]]])


# Rows first, as NumPy has them: what an image [h, w, c] that was stored with an EXIF orientation looks like.
SHOWN = {
    1: lambda image: image,
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: image[::-1].swapaxes(0, 1),
    7: lambda image: image[::-1, ::-1].swapaxes(0, 1),
    8: lambda image: image[:, ::-1].swapaxes(0, 1),
    9: lambda image: image,  # means nothing
}


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
@pytest.mark.parametrize("orientation", SHOWN)
def test_images_are_upright(tmp_path, orientation, suffix):
    image, exif = np.zeros((16, 24, 3), np.uint8), Image.Exif()
    image[:8, :8], image[:8, 8:16], exif[0x0112] = 80, 200, orientation
    Image.fromarray(image).save(tmp_path / f"0.{suffix}", exif=exif)
    found = one_image(tmp_path, (tmp_path / f"0.{suffix}").read_bytes(), f"0.{suffix}")
    np.testing.assert_allclose(found, SHOWN[orientation](image), atol=3)  # JPEG


@pytest.mark.parametrize("orientation, exif", [(6, None), (1, b"Exif\0\0no table")])
def test_broken_exif_spoils_no_photograph(tmp_path, orientation, exif):
    """A tag that Pillow cannot write again beside the orientation, and EXIF that it cannot read."""
    image = np.zeros((16, 24, 3), np.uint8)
    image[:8, :8] = 200
    exif = exif or archives.exif(orientation, struct.pack("<HHII", 0x0100, 9, 1, 0xFFFFFFFF))
    Image.fromarray(image).save(tmp_path / "0.jpg", exif=exif, dpi=(72, 72), quality=95)
    found = one_image(tmp_path, (tmp_path / "0.jpg").read_bytes(), "0.jpg")
    np.testing.assert_allclose(found, SHOWN[orientation](image), atol=3)


@pytest.mark.parametrize("is_adobe", [True, False])
def test_cmyk_is_the_ink_that_lets_white_through(tmp_path, is_adobe):
    """In flat blocks: red is what cyan and black leave, and so on. Adobe alone stores it inverted, and marks it."""
    ink = np.random.default_rng(0).integers(0, 256, (3, 4, 4), np.uint8).repeat(8, 0).repeat(8, 1)
    found = one_image(tmp_path, archives.cmyk_file(ink, is_adobe), "0.jpg")
    left = 255 - ink.astype(np.float64)
    np.testing.assert_allclose(found, left[..., :3] * left[..., 3:] / 255, rtol=0, atol=3)


def many_images(folder, numbers, suffix="png"):
    """Write numbers[i] images of the gray value i, 4 by 5 pixels, into a class folder each."""
    for label, number in enumerate(numbers):
        os.makedirs(folder / f"class{label}")
        for i in range(number):
            Image.new("L", (5, 4), label).save(folder / f"class{label}" / f"{i:03d}.{suffix}")


def test_a_fifth_of_each_class_is_test(tmp_path, capsys):
    numbers = (50, 2, 3, 10, 1, 7, 8)
    many_images(tmp_path / "images", numbers)
    download.prepare_folder("Many", tmp_path / "images", data_dir=tmp_path)
    assert "1 of 7 classes have a single image, which is in train: class4" in capsys.readouterr().out
    train, test = datasets.create_default_splits("Many", tmp_path)
    assert np.bincount(test.labels, minlength=7).tolist() == [10, 1, 1, 2, 0, 1, 2]
    assert (np.bincount(train.labels) + np.bincount(test.labels, minlength=7)).tolist() == list(numbers)
    assert {id.split("/", 1)[1] for id in train.ids} & {id.split("/", 1)[1] for id in test.ids} == set()
    assert test.labels.tolist() == sorted(test.labels) and train.ids == sorted(train.ids)
    positions = (0, 8, 10, 12, 13, 18, 29, 30, 40, 46)  # in every run and every version
    assert [id for id in test.ids if "class0" in id] == [f"test/class0/{position:03d}.png" for position in positions]


@pytest.mark.parametrize(
    "numbers, said", [((1, 1, 1), "no class of"), ((3, 0, 4), "class1"), ((5,), "1 class folder"), ((0, 0), "class0")]
)
def test_folders_that_are_no_dataset(tmp_path, numbers, said):
    many_images(tmp_path / "images", numbers)
    with pytest.raises(UserError) as error:
        download.prepare_folder("Few", tmp_path / "images", data_dir=tmp_path)
    assert said in str(error.value) and str(tmp_path / "images") in str(error.value)
    assert not datasets.is_prepared("Few", tmp_path)


def test_another_way_of_packing_is_refused(tmp_path, capsys, monkeypatch):
    many_images(tmp_path / "images", (5, 5))
    many_images(tmp_path / "others", (5, 5))

    def again(*args):
        download.prepare_folder("Pets", *args, data_dir=tmp_path)
        return capsys.readouterr().out

    assert "packed in" in again(tmp_path / "images", None, [8, 6])
    assert "packed already" in again(tmp_path / "images", None, [8, 6])
    monkeypatch.chdir(tmp_path)
    assert "packed already" in again("others/../images/", None, (8, 6))  # the same folder
    for args, said in (
        ((tmp_path / "images", None, [16, 6]), "--image_size 8 6, not 16 6"),
        ((tmp_path / "images", None, None), "--image_size 8 6, not none"),
        ((tmp_path / "others", None, [8, 6]), f"--image_dir {tmp_path}/images, not {tmp_path}/others"),
        ((tmp_path / "images", "others", [8, 6]), f"--test_image_dir none, not {tmp_path}/others"),
    ):
        with pytest.raises(UserError) as error:
            again(*args)
        assert said in str(error.value) and f"delete {tmp_path}/Pets/data.hdf5" in str(error.value)
    with h5py.File(tmp_path / "Pets" / "data.hdf5", "r+") as file:  # as it was written before
        del file.attrs["recipe"]
    assert "packed already" in again(tmp_path / "others", None, [16, 6])
    assert datasets.create_default_splits("Pets", tmp_path)[0].image_shape == (8, 6, 3)
    os.remove(tmp_path / "Pets" / "data.hdf5")
    assert "16x6x3" in again(tmp_path / "others", None, [16, 6])


@pytest.mark.parametrize(
    "place",
    ["images/class1/caf\udce9.png", "images/caf\udce9/0.png", "images/class1/\udce9.txt", "images/class1/a\nb.png"],
)
def test_a_name_that_cannot_be_an_id(tmp_path, place):
    many_images(tmp_path / "images", (5, 5))
    os.makedirs(os.path.dirname(tmp_path / place), exist_ok=True)
    Image.new("L", (5, 4)).save(tmp_path / "0.png")
    os.rename(tmp_path / "0.png", tmp_path / place)
    line = fails(2, "--dataset", "Pets", "--image_dir", tmp_path / "images", "--data_dir", tmp_path)
    assert repr(os.fsencode(place.split("/")[1 if "caf" in place.split("/")[1] else 2])) in line and "rename" in line


@pytest.mark.parametrize("name", ["4.bmp", "0.tif"])
def test_an_image_that_does_not_decode_is_named_in_one_line(tmp_path, name):
    """Of 12 samples per pixel, tag 277 of a TIFF file, Pillow would log a line of its own."""
    image_folders(tmp_path / "images")
    path, tag = tmp_path / "images" / "dog" / name, struct.pack("<HHI", 277, 3, 1)
    Image.new("RGB", (12, 10)).save(path)
    path.write_bytes(path.read_bytes().replace(tag + b"\3", tag + b"\14") if name == "0.tif" else b"BM no image")
    assert name in fails(2, "--dataset", "Pets", "--image_dir", tmp_path / "images", "--data_dir", tmp_path)


def test_gzip_of_a_wrong_length_is_named(tmp_path):
    archives.make("MNIST", tmp_path / "archives")
    path = tmp_path / "archives" / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1]))
    flags = "--archive_dir", tmp_path / "archives", "--data_dir", tmp_path, "--no_checksum"
    line = fails(2, "--dataset", "MNIST", *flags)
    assert str(path) in line and "15679" in line
