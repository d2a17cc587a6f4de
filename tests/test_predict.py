"""evaler.py --predict: image files are treated as the dataset's images were, and predicted as in evaluation."""

import csv
import io
import os
import tarfile

import archives
import keras
import numpy as np
import pytest
import scripts
from matplotlib.figure import Figure
from PIL import Image, ImageOps

import datasets
import download
import evaler
from command import save_figure
from config import EVALUATION_BATCH
from datasets import folder
from input_ops import create_input_ops, image_of_file

CLASSES = ("ant", "bee", "cat, or kitten", "dog", "eel", "fox")


def make_run(train_dir, name, data_dir, scale=100):
    """A run folder of a network that tells images apart; with the scale 0 it does not."""
    flags = ("--dataset", name, "--data_dir", data_dir, "--model", "resnet8", "--norm_type", "group")
    return scripts.untrained_run(train_dir / name, *flags, scale=scale)


def probabilities(network, images):
    """The softmax in float64 of the logits that a network gives images [N, h, w, c]: [N, classes]."""
    logits = network(images, training=False).numpy().astype(np.float64)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def evaluated(split):
    """The images [N, h, w, c] that evaler.py evaluates a split on."""
    return np.concatenate([images for images, _ in create_input_ops(split, EVALUATION_BATCH, False)])


def predict(run_dir, data_dir, *flags):
    scripts.evaluate(["--dataset", run_dir.name, "--data_dir", data_dir, "--train_dir", run_dir, "--predict", *flags])


def predicted(run_dir, data_dir, *flags):
    """{file: [(class, probability)]} that evaler.py --predict writes."""
    output = os.path.join(run_dir.parent, "predicted.csv")
    predict(run_dir, data_dir, *flags, "--output", output)
    return table(output)


def table(path):
    """{file: [(class, probability)]} of the CSV file, a row for each."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[0][:5] == ["file", "class", "probability", "class_2", "probability_2"]
    assert len({row[0] for row in rows}) == len(rows) and {len(row) for row in rows} == {len(rows[0])}
    return {name: list(zip(best[::2], map(float, best[1::2]))) for name, *best in rows[1:]}


def check(found, class_names, expected):
    """Each file's classes are the most likely ones of the probabilities expected[file], in order."""
    assert list(found) == list(expected)
    assert len({rows[0][1] for rows in found.values()}) > 1  # or any image would do
    for file, rows in found.items():
        best = np.argsort(-expected[file])[:5]
        assert [name for name, _ in rows] == [class_names[i] for i in best]
        np.testing.assert_allclose([probability for _, probability in rows], expected[file][best], rtol=1e-4)


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    """(run folder, data folder, folder of images) of 30 images of many kinds, packed with 12 by 10 pixels."""
    place, rng = tmp_path_factory.mktemp("pets"), np.random.default_rng(0)
    modes = ("RGB", "L", "RGBA", "P", "LA", "RGB", "CMYK")
    suffixes = ("png", "png", "png", "gif", "png", "jpg", "jpg")
    for i in range(30):
        mode, suffix = modes[i % 7], suffixes[i % 7]
        (place / "images" / CLASSES[i % 6]).mkdir(parents=True, exist_ok=True)
        size, coarse = rng.integers(8, 40, 2).tolist(), Image.fromarray(rng.integers(0, 256, (3, 4, 3), np.uint8))
        image = coarse.resize(size, Image.Resampling.BICUBIC)
        if mode in ("RGBA", "LA"):
            image.putalpha(Image.fromarray(rng.integers(0, 256, size[::-1], np.uint8)))
        image.convert(mode).save(place / "images" / CLASSES[i % 6] / f"{i:02d}.{suffix}")
    download.prepare_folder("Pets", place / "images", image_size=(12, 10), data_dir=place)
    return make_run(place / "runs", "Pets", place), place, place / "images"


def test_files_that_a_folder_was_packed_of_are_predicted_as_evaluated(pets, capsys):
    """The same pixels, and in batches of 7 the same classes as the evaluation's of 30, and the softmax of its logits.
    The run stays as it is."""
    run_dir, data_dir, images = pets
    before = sorted(os.listdir(run_dir))
    found = predicted(run_dir, data_dir, images, "--batch_size", 7)
    printed = capsys.readouterr().out
    assert sorted(os.listdir(run_dir)) == before
    splits, network = datasets.create_default_splits("Pets", data_dir), scripts.network_of(run_dir)
    files = [os.path.join(images, *id.split("/")[1:]) for split in splits for id in split.ids]
    pictures = np.concatenate([evaluated(split) for split in splits])
    for file, picture in zip(files, pictures, strict=True):
        np.testing.assert_array_equal(image_of_file(file, splits[0]), picture)
    batch = pictures, np.concatenate([split.labels for split in splits])
    _, predictions, *_ = evaler.predict_all(evaler.make_predictor(network), [batch])
    assert {file: rows[0][0] for file, rows in found.items()} == dict(zip(files, np.take(CLASSES, predictions)))
    expected = dict(zip(files, probabilities(network, pictures)))
    check(found, CLASSES, {file: expected[file] for file in sorted(files)})
    first, lines = str(images / "ant" / "00.png"), printed.splitlines()
    start = lines.index(first)
    assert lines[start + 1 : start + 6] == [f"  {100 * chance:6.2f} %  {name}" for name, chance in found[first]]


def test_of_classes_that_are_as_likely_the_lower_comes_first():
    """In accuracy and in top-5 accuracy; a network of constant logits hits 5 classes."""
    logits = np.random.default_rng(0).integers(0, 4, (480, 120)).astype(np.float32)
    logits[:120], labels = 0, np.arange(480, dtype=np.int32) % 120
    model = keras.Sequential([keras.Input((120,)), keras.layers.Activation("linear")])
    ranking = np.argsort(-logits, axis=1, kind="stable")[:, :5]
    losses, predictions, in_top5, probabilities = evaler.predict_all(evaler.make_predictor(model), [(logits, labels)])
    np.testing.assert_array_equal(predictions, ranking[:, 0])
    np.testing.assert_array_equal(in_top5, (ranking == labels[:, None]).any(axis=1))
    assert in_top5[:120].sum() == 5
    hits = predictions == labels
    np.testing.assert_allclose(probabilities[hits], np.exp(-losses[hits]), rtol=1e-5)


def test_of_classes_that_are_as_likely_the_lower_is_named_first(data_dir, tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "0.png")
    run_dir = make_run(tmp_path / "runs", "Digits", data_dir, scale=0)
    (rows,) = predicted(run_dir, data_dir, tmp_path / "0.png").values()
    assert [name for name, _ in rows] == ["0", "1", "2", "3", "4"]
    np.testing.assert_allclose([chance for _, chance in rows], 0.1, rtol=1e-6)


def test_gray_data_sees_the_luminance(data_dir, digits, tmp_path):
    test = digits[1].subset(np.arange(12))
    for i, image in enumerate(test.images()[..., 0]):
        Image.fromarray(image).save(tmp_path / f"{i:02d}.png")
    run_dir = make_run(tmp_path / "runs", "Digits", data_dir)
    files = [str(tmp_path / f"{i:02d}.png") for i in range(12)]
    expected = dict(zip(files, probabilities(scripts.network_of(run_dir), evaluated(test))))
    check(predicted(run_dir, data_dir, *files), [str(digit) for digit in range(10)], expected)
    colours = np.random.default_rng(2).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(colours).save(tmp_path / "colours.png")
    made = image_of_file(tmp_path / "colours.png", test).numpy()
    np.testing.assert_allclose(255 * made, colours @ [[0.299], [0.587], [0.114]], rtol=0, atol=0.51)


def of_a_kind(number, jpeg):
    """A JPEG file as another: 0 to 7 in the EXIF orientations 1 to 8, then gray, in CMYK, with transparent parts."""
    image, file = Image.open(io.BytesIO(jpeg)), io.BytesIO()
    if number in (9, 10):
        return archives.cmyk_file(np.asarray(image.convert("CMYK")), is_adobe=number == 9)
    if number == 11:
        image.putalpha(image.convert("L"))
        image.save(file, "PNG")
    else:
        image = image if number < 8 else image.convert("L")
        exif = Image.Exif()
        exif[0x0112] = number % 8 + 1  # the orientation
        image.save(file, "JPEG", quality=90, subsampling=0, exif=exif)
    return file.getvalue()


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """(run folder, data folder, folder of the test files, test split) of a tiny ImageNet: 12 files of all kinds."""
    place = tmp_path_factory.mktemp("imagenet")
    splits, _ = archives.make("ImageNet", place / "archives", per_class=3)
    (place / "files").mkdir()
    with tarfile.open(place / "archives" / "ILSVRC2012_img_val.tar", "w") as tar:
        for i, jpeg in enumerate(splits["test"][0]):
            archives.add(tar, f"ILSVRC2012_val_{i + 1:08d}.JPEG", of_a_kind(i, jpeg))
            (place / "files" / f"{i:02d}.JPEG").write_bytes(of_a_kind(i, jpeg))
    download.prepare("ImageNet", str(place), archive_dir=str(place / "archives"), checksum=False)
    _, test = datasets.create_default_splits("ImageNet", str(place))
    return make_run(place / "runs", "ImageNet", str(place)), str(place), place / "files", test


def test_photographs_are_predicted_as_they_are_packed_and_evaluated(imagenet):
    """Turned, gray, in CMYK, transparent: the same input of the network, from the file as from the packed archive."""
    run_dir, data_dir, folder_of_files, test = imagenet
    files, images = sorted(folder_of_files.iterdir()), evaluated(test)
    for file, image in zip(files, images, strict=True):
        np.testing.assert_array_equal(image_of_file(file, test), image, file.name)
    found = predicted(run_dir, data_dir, folder_of_files)
    check(found, test.class_names, dict(zip(map(str, files), probabilities(scripts.network_of(run_dir), images))))
    assert all(len(rows) == 4 for rows in found.values())  # there are no more classes


def test_photographs_are_packed_upright_and_as_they_are_where_that_will_do(imagenet):
    _, _, files, test = imagenet
    for file, jpeg in zip(sorted(files.iterdir())[:9], test.read(np.arange(9))):
        assert (file.read_bytes() == jpeg) == (file.name in ("00.JPEG", "08.JPEG"))
        shown, packed = ImageOps.exif_transpose(Image.open(file)), Image.open(io.BytesIO(jpeg))
        assert packed.mode == shown.mode and not packed.getexif().get(0x0112, 1) > 1
        np.testing.assert_allclose(np.asarray(packed, int), np.asarray(shown, int), rtol=0, atol=8, err_msg=file.name)


@pytest.mark.parametrize(
    "name, words", [("deep.png", ["I;16", "-depth 8"]), ("cut.jpg", []), ("new\nline.png", ["rename"])]
)
def test_each_kind_of_broken_file_is_a_line_and_the_others_go_on(name, words, pets, imagenet, tmp_path, capsys):
    run_dir, data_dir, images = pets
    good, last, bad = images / "ant" / "00.png", images / "bee" / "01.png", tmp_path / name
    if name == "deep.png":
        Image.fromarray(np.zeros((12, 10), np.uint16)).save(bad)
    else:
        whole = (imagenet[2] / "00.JPEG" if name == "cut.jpg" else good).read_bytes()
        bad.write_bytes(whole[: len(whole) // 2] if name == "cut.jpg" else whole)
    with pytest.raises(SystemExit, match="^1$"):
        predict(run_dir, data_dir, good, tmp_path, last, "--output", tmp_path / "out.csv")
    (line,) = capsys.readouterr().err.splitlines()
    assert all(word in line for word in [bad.stem.split()[-1], *words]), line
    assert list(table(tmp_path / "out.csv")) == [str(good), str(last)]


def test_folders_are_searched_and_files_are_taken_as_named(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("b/x.PNG", "b/a/y.jpg", "a.gif", "notes.txt", ".hidden.png", ".cache/z.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    os.symlink(tmp_path, tmp_path / "b" / "loop")
    found = folder.find_images([str(tmp_path / "notes.txt"), str(tmp_path)])
    assert [os.path.relpath(path, tmp_path) for path in found] == ["notes.txt", "a.gif", "b/a/y.jpg", "b/x.PNG"]
    said = capsys.readouterr().out
    assert "3 files (1 .png, 1 .txt, 1 link to a folder)" in said and f"{tmp_path}/b/loop" in said


def test_paths_that_cannot_be_predicted(pets, tmp_path):
    run_dir, data_dir, images = pets
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("")
    for path in (tmp_path / "missing.png", tmp_path / "empty"):
        with scripts.refused(path, "image"):
            predict(run_dir, data_dir, images / "ant", path)
    (tmp_path / "photo.png").symlink_to(images / "ant" / "00.png")
    for output in (tmp_path, tmp_path / "none" / "out.csv", tmp_path / "photo.png"):
        with scripts.refused("--output", output):
            predict(run_dir, data_dir, images / "ant", "--output", output)


def test_a_table_goes_where_a_link_leads_and_a_table_or_picture_is_not_half_written(pets, tmp_path, capsys):
    run_dir, data_dir, images = pets  # capsys: what is printed must need no disk
    (tmp_path / "real.csv").write_text("old")
    (tmp_path / "link.csv").symlink_to(tmp_path / "real.csv")
    with scripts.full_disk(0), pytest.raises(OSError, match="too large"):
        predict(run_dir, data_dir, images / "ant", "--output", tmp_path / "link.csv")
    with scripts.full_disk(0), pytest.raises(OSError, match="too large"):
        save_figure(Figure(), tmp_path / "real.csv")
    assert (tmp_path / "real.csv").read_text() == "old" and len(os.listdir(tmp_path)) == 2
    predict(run_dir, data_dir, images / "ant" / "00.png", "--output", tmp_path / "link.csv")
    assert (tmp_path / "link.csv").is_symlink()
    assert list(table(tmp_path / "real.csv")) == [str(images / "ant" / "00.png")]


def own_run(place, dtype, channels, scale):
    """A run on own data of 8 by 8 pixels, whose values of `dtype` lie in 0 to 255 * scale."""
    archives.make_own(place / "Mine", shape=(8, 8, channels), dtype=dtype, scale=scale)
    return make_run(place / "runs", "Mine", place)


def test_own_float_data_sees_floats_from_0_to_1(tmp_path):
    run_dir = own_run(tmp_path, np.float32, 3, 1 / 255)
    values = np.random.default_rng(3).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(values).save(tmp_path / "0.png")
    chances = probabilities(scripts.network_of(run_dir), values[None].astype(np.float32) / 255)[0]
    (rows,) = predicted(run_dir, tmp_path, tmp_path / "0.png").values()
    assert [name for name, _ in rows] == [str(i) for i in np.argsort(-chances)]
    np.testing.assert_allclose([chance for _, chance in rows], np.sort(chances)[::-1], rtol=1e-4)


@pytest.mark.parametrize(
    "dtype, channels, said", [(np.uint8, 2, ("1 or 3 channels", "have 2")), (np.float32, 3, ("0 to 255", "0 to 1"))]
)
def test_images_that_no_file_can_be_made_into(tmp_path, dtype, channels, said):
    run_dir = own_run(tmp_path, dtype, channels, 1)
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    with scripts.refused("Mine", *said):
        predict(run_dir, tmp_path, tmp_path / "0.png")
