"""Batches are what their step says: shuffled, augmented, whole at test time, the same wherever a run starts."""

import io

import archives
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import input_ops
from datasets import hdf5


def first_batch(*arguments, **keywords):
    return next(iter(input_ops.create_input_ops(*arguments, **keywords)))


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """27 training and 5 test images 6×5×3, in which every pixel of image i is i (uint8); its label is i % 3."""
    images = np.ones((32, 6, 5, 3), np.uint8) * np.arange(32, dtype=np.uint8).reshape(-1, 1, 1, 1)
    return archives.open_own(tmp_path_factory.mktemp("numbered"), images, np.arange(32) % 3)


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    return archives.pack("ImageNet", tmp_path_factory.mktemp("imagenet"))[2]


def numbers(batches):
    """The image numbers of each batch, checked against the labels that came with them."""
    found = []
    for images, labels in batches:
        number = np.round(images.numpy()[:, 0, 0, 0] * 255).astype(int)
        np.testing.assert_array_equal(number % 3, labels)
        found.append(number.tolist())
    return found


def test_epochs_are_permutations_of_which_no_two_are_alike():
    """Of 60 examples 1,000 epochs under each of two seeds, in which every example is as often early as late."""
    epochs = [input_ops.shuffled(60, 60, seed, first_step=0).take(1000).as_numpy_iterator() for seed in (0, 1)]
    found = np.stack([*epochs[0], *epochs[1]])
    assert (np.sort(found) == np.arange(60)).all() and len(np.unique(found, axis=0)) == 2000
    error = np.std(np.arange(60)) / np.sqrt(2000)
    assert np.abs(found.mean(axis=0) - 29.5).max() < 5 * error  # the mean of each place
    neighbours = (np.diff(found) == 1).sum()  # how many followers stay behind their neighbour: Poisson
    assert abs(neighbours - 2000 * 59 / 60) < 5 * np.sqrt(2000)


def test_batches_go_over_the_end_of_an_epoch(numbered):
    batches = numbers(input_ops.create_input_ops(numbered[0], 10, True, seed=0, last_step=27))
    assert {len(batch) for batch in batches} == {10}
    for epoch in np.concatenate(batches).reshape(10, 27):
        assert sorted(epoch) == list(range(27))


@pytest.mark.parametrize("name, augment", [("numbered", None), ("numbered", "flip+crop"), ("imagenet", "flip+crop")])
def test_a_run_that_starts_later_and_a_worker_see_the_same_batches(request, name, augment):
    (train, _), rows = request.getfixturevalue(name), np.array([1, 2, 5])
    batches = [
        input_ops.create_input_ops(train, 8, True, augment, seed=5, last_step=6, **keywords)
        for keywords in ({}, {"first_step": 4}, {"first_step": 4, "rows": rows})
    ]
    whole, late, worker = map(list, batches)
    for (images, labels), of_late, of_worker in zip(whole[4:], late, worker, strict=True):
        assert images.shape == (8, *train.network_shape)
        assert 0 <= images.numpy().min() and images.numpy().max() <= 1
        np.testing.assert_array_equal(of_late[0], images)
        np.testing.assert_array_equal(of_late[1], labels)
        np.testing.assert_array_equal(of_worker[0], images.numpy()[rows])
        np.testing.assert_array_equal(of_worker[1], labels.numpy()[rows])


def test_the_test_split_comes_whole_in_order_and_as_it_is(numbered):
    _, test = numbered
    batches = list(input_ops.create_input_ops(test, 2, False, "flip+crop"))
    assert [len(labels) for _, labels in batches] == [2, 2, 1]
    images = np.concatenate([images for images, _ in batches])
    np.testing.assert_array_equal(images, test.images().astype(np.float32) / np.float32(255))


def test_reading_from_the_file_gives_the_same_batches(numbered, monkeypatch):
    train, _ = numbered
    from_memory = numbers(input_ops.create_input_ops(train, 9, True, seed=1, last_step=5))
    monkeypatch.setattr(hdf5, "IN_MEMORY", 0)
    assert numbers(input_ops.create_input_ops(train, 9, True, seed=1, last_step=5)) == from_memory


def test_float_images_are_taken_as_they_are(tmp_path):
    images = np.random.default_rng(0).normal(0, 50, (12, 4, 4, 2)).astype(np.float32)
    _, test = archives.open_own(tmp_path, images, np.arange(12) % 2)
    batch, _ = first_batch(test, 5, False)
    np.testing.assert_array_equal(batch, images[-5:])


def test_augmentation_is_drawn_anew_by_seed_and_step(tmp_path):
    """A dataset of one image many times: all crops of an eighth of a side at most, each flipped too with 'flip+crop',
    and no others."""
    image = np.random.default_rng(0).integers(1, 256, (16, 8, 1), dtype=np.uint8)
    train, _ = archives.open_own(tmp_path, [image] * 37, np.arange(37) % 2)
    padded = np.pad(image, [(2, 2), (1, 1), (0, 0)])
    crops = [padded[row : row + 16, column : column + 8] for row in range(5) for column in range(3)]
    flipped = {crop[:, ::-1].tobytes() for crop in crops}
    crops = {crop.tobytes() for crop in crops}

    def pictures(augment, seed=0, step=0):
        images, _ = first_batch(train, 640, True, augment, seed, first_step=step)
        return [picture.tobytes() for picture in np.round(images.numpy() * 255).astype(np.uint8)]

    assert set(pictures(None)) == {image.tobytes()}
    assert set(pictures("crop")) == crops
    assert set(pictures("flip+crop")) == crops | flipped
    assert 256 < sum(picture in flipped for picture in pictures("flip+crop")) < 384  # 5 standard deviations
    assert pictures("crop") == pictures("crop") != pictures("crop", seed=1)
    assert pictures("crop") != pictures("crop", step=1)


def test_what_a_seed_draws_is_the_same_in_every_version(numbered, imagenet, tmp_path):
    """The order of images, the crops and mirror images of a picture whose pixels count up, the crops of photographs."""
    order = numbers(input_ops.create_input_ops(numbered[0], 9, True, seed=3, last_step=1))
    assert order == [[16, 23, 19, 7, 2, 18, 6, 13, 3]]
    image = np.arange(64, dtype=np.uint8).reshape(8, 8, 1)
    train, _ = archives.open_own(tmp_path, [image] * 17, np.arange(17) % 2)
    images, _ = first_batch(train, 6, True, "flip+crop", seed=1, first_step=2)
    middles = [[27, 28], [28, 29], [34, 35], [28, 27], [44, 45], [44, 45]]  # the fourth is flipped
    assert np.round(images[:, 4, 3:5, 0] * 255).astype(int).tolist() == middles
    photographs, _ = first_batch(imagenet[0], 3, True, "crop", seed=1, first_step=2)
    np.testing.assert_allclose(np.mean(photographs, axis=(1, 2, 3)), [0.397, 0.701, 0.710], rtol=0, atol=0.002)


def test_encoded_images_are_cut_from_the_centre(imagenet):
    _, test = imagenet
    images, labels = first_batch(test, len(test), False)
    assert images.shape == (len(test), 224, 224, 3)
    np.testing.assert_array_equal(labels, test.labels)
    assert test.network_shape == (224, 224, 3)
    for image, jpeg in zip(images, test.read(np.arange(len(test))), strict=True):
        np.testing.assert_array_equal(image, input_ops.centre_crop(jpeg) / 255)


def photograph(height, width, mode="RGB", seed=0):
    """A JPEG file of a picture both smooth and noisy, with colours at half the resolution, as cameras write them."""
    rng = np.random.default_rng(seed)
    row, column = np.meshgrid(np.linspace(0, 3, height), np.linspace(0, 4, width), indexing="ij")
    waves = np.stack([np.sin(row * k + column * (4 - k)) for k in (1, 2, 3)], axis=-1)
    pixels = np.clip(128 + 80 * waves + rng.normal(0, 25, waves.shape), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "JPEG", quality=90)
    return file.getvalue()


def triangle(size, new_size):
    """The matrix [new_size, size] that resizes an axis with antialiasing: a triangle, wide as the larger pixel."""
    step = size / new_size
    centre, pixel = (np.arange(new_size)[:, None] + 0.5) * step, np.arange(size) + 0.5
    weights = np.maximum(0, 1 - np.abs(pixel - centre) / max(step, 1))
    return weights / weights.sum(axis=1, keepdims=True)


def bilinear(size, new_size):
    """The matrix [new_size, size] that resizes an axis by interpolation between the two nearest pixels."""
    place = np.clip((np.arange(new_size) + 0.5) * size / new_size - 0.5, 0, size - 1)
    return np.maximum(0, 1 - np.abs(np.arange(size) - place[:, None]))


def resized(pixels, matrix, sizes):
    """pixels [h, w, 3] resized to `sizes`, in float64."""
    rows, columns = (matrix(old, new) for old, new in zip(pixels.shape, sizes))
    return np.einsum("yh,hwc,xw->yxc", rows, pixels.astype(np.float64), columns, optimize=True)


@pytest.mark.parametrize(
    "height, width", [(501, 333), (400, 400), (97, 131), (240, 1001), (257, 256), (1201, 1599), (209, 575)]
)
def test_the_test_crop_is_that_of_the_whole_picture_resized(height, width):
    """Shorter side to 256 with antialiasing, then the centre. Of 209 x 575 the decoded part ends where colours lack."""
    jpeg = photograph(height, width, "L" if height == width else "RGB")
    sizes = [round(side * 256 / min(height, width)) for side in (height, width)]
    whole = resized(tf.io.decode_jpeg(jpeg, channels=3).numpy(), triangle, sizes)
    top, left = ((side - 224) // 2 for side in sizes)
    exact = whole[top : top + 224, left : left + 224]
    np.testing.assert_allclose(input_ops.centre_crop(jpeg), exact, rtol=0, atol=0.02)  # of 255


@pytest.mark.parametrize(
    "height, width, numbers, ratios", [(1000, 1400, (3, 11, 0, 1, 6, 23), {1, 2, 4}), (2000, 2000, (17,), {8})]
)
def test_a_training_crop_is_its_window_interpolated(height, width, numbers, ratios):
    """Element by element, against the window of the picture that was decoded whole at the same ratio."""
    pixels = np.asarray(Image.open(io.BytesIO(photograph(height, width))))
    jpeg, found = archives.picture_file(pixels), set()  # with all its colours
    for number in numbers:
        seed = tf.constant([3, number], tf.int64)
        window = input_ops.random_window(tf.constant([height, width, 3]), tf.random.split(seed, 2)[0]).numpy()
        ratio = max(ratio for ratio in (1, 2, 4, 8) if ratio == 1 or min(window[2:]) >= ratio * 224)
        top, left, rows, columns = window // ratio
        whole = tf.io.decode_jpeg(jpeg, channels=3, ratio=ratio).numpy()
        exact = resized(whole[top : top + rows, left : left + columns], bilinear, (224, 224))
        made = input_ops.random_resized_crop(tf.constant(jpeg), seed, flip=False)
        np.testing.assert_allclose(made, exact, rtol=0, atol=0.02)
        found.add(ratio)
    assert found == ratios


def test_encoded_images_are_flipped_half_of_the_time(imagenet):
    def made(augment):
        batches = input_ops.create_input_ops(imagenet[0], 8, True, augment, seed=1, last_step=8)
        return np.concatenate([images for images, _ in batches])

    number = 0
    for plain, flipped in zip(made("crop"), made("flip+crop"), strict=True):
        same = np.array_equal(flipped, plain)
        assert same or np.array_equal(flipped, plain[:, ::-1])
        number += not same
    assert 12 <= number <= 52  # 5 standard deviations of 64 draws


def test_encoded_images_are_cropped_anew_in_every_place_and_by_the_seed(tmp_path):
    """One JPEG file 8 times: no two of 24 places share a crop, nor do two seeds."""
    jpeg = archives.picture_file(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    parts = [(split, [jpeg] * 8, [0, 1] * 4, None) for split in (0, 1)]
    hdf5.write(tmp_path, hdf5.Source(["a", "b"], None, None, iter(parts)))
    train, _ = hdf5.open_packed(tmp_path, "SAME")
    seeds = [input_ops.create_input_ops(train, 4, True, "crop", seed, last_step=6) for seed in (0, 1)]
    crops = [image.tobytes() for batches in seeds for images, _ in batches for image in images.numpy()]
    assert len(crops) == len(set(crops)) == 48


def test_encoded_images_are_crops_of_8_to_100_percent_of_the_area():
    shape = tf.constant([256, 256, 3])
    windows = np.array([input_ops.random_window(shape, tf.constant([7, number])) for number in range(200)])
    assert (windows[:, :2] >= 0).all() and (windows[:, :2] + windows[:, 2:] <= 256).all()
    area, aspect = windows[:, 2] * windows[:, 3] / 256**2, windows[:, 3] / windows[:, 2]
    assert 0.07 < area.min() < 0.15 and 0.8 < area.max() <= 1  # in whole pixels
    assert 0.3 < np.mean(area < 0.5) < 0.7
    assert 0.72 < aspect.min() < 0.8 and 1.25 < aspect.max() < 1.39
