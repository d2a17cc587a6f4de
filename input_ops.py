"""From a Dataset to batches: shuffle, decode, augment, batch, prefetch.

    for images, labels in create_input_ops(train, 64, is_training=True, seed=0, first_step=0, last_step=100): ...

The batch of step s depends on the seed and s alone: order, flips and crops come from counter-based generators whose
keys are hashed from both, so a run can be continued exactly from any step. TensorFlow's threads make complete batches,
without a Python call per example.
"""

import numpy as np
import tensorflow as tf

from command import reading
from datasets import hdf5
from datasets.hdf5 import IMAGENET_SIZE
from datasets.images import as_jpeg, load_image

ORDER, AUGMENTATION = 0, 1  # purposes of random draws, each with its own keys
CROP_PADDING = 1 / 8  # of the side: 4 pixels around a 32-pixel image, as in arXiv 1512.03385, section 4.2
IMAGENET_RESIZE = 256  # pixels of the shorter side before the centre crop at test time
RATIOS = (1, 2, 4, 8)  # by which the JPEG decoder can shrink an image
DECODER_MARGIN = 2  # pixels at the edge of a decoded window whose colours lack the neighbours outside


@tf.autograph.experimental.do_not_convert  # which takes seconds
def create_input_ops(
    dataset: hdf5.Dataset,
    batch_size: int,
    is_training: bool,
    augment: str | None = None,
    seed: int = 0,
    first_step: int = 0,
    last_step: int | None = None,
    rows: np.ndarray | None = None,
):
    """Make a tf.data.Dataset of (images [B, h, w, c] float32, labels [B] int32).

    Args:
        dataset: a datasets.hdf5.Dataset.
        batch_size: B.
        is_training: True: batches first_step ... last_step - 1 of an endless sequence of shuffled epochs, all of B
            images. False: each example once, in order; the last batch may be smaller.
        augment: None, 'crop' (random crops), or 'flip+crop' (also random horizontal flips). Training only.
        seed: of shuffling and augmentation.
        first_step, last_step: the training batches to make; last_step None is endless.
        rows: int [rows], the positions in each training batch of the images to make; None: all B.

    Returns:
        tf.data.Dataset. uint8 images are scaled to 0 ... 1, float images are unchanged.
    """
    augment = augment if is_training else None
    if is_training:
        steps = tf.data.Dataset.range(first_step, np.iinfo(np.int64).max if last_step is None else last_step)
        positions = shuffled(len(dataset), batch_size, seed, first_step)
    else:
        steps = tf.data.Dataset.range(-(-len(dataset) // batch_size))
        positions = tf.data.Dataset.range(len(dataset)).batch(batch_size)
    steps = tf.data.Dataset.zip(steps, positions)
    if dataset.encoded:
        batches = decoded_batches(steps, dataset, batch_size, augment, is_training, seed, rows)
    else:
        read = reader(dataset)

        def make_batch(step, positions):
            images, labels = read(positions if rows is None else tf.gather(positions, rows))
            if augment:
                draws = tf.random.stateless_uniform([3, batch_size, 1], key(AUGMENTATION, seed, step))
                chosen = draws if rows is None else tf.gather(draws, rows, axis=1)
                images = flip_and_crop(images, chosen, flip=augment == "flip+crop")
            return to_float(images), labels

        batches = steps.map(make_batch, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    options = tf.data.Options()
    options.experimental_optimization.apply_default_optimizations = False  # these copy the images in the graph
    options.experimental_optimization.map_and_batch_fusion = dataset.encoded  # JPEG files are not in the graph
    return batches.prefetch(tf.data.AUTOTUNE).with_options(options)


def key(purpose, seed, number):
    """Return the random key [2] for a purpose and a number (a step or an epoch), hashed from both and the seed."""
    return tf.random.fold_in(tf.cast(tf.stack([seed, purpose]), tf.int64), number)


def shuffled(examples: int, batch_size: int, seed: int, first_step: int):
    """Return a tf.data.Dataset of the example positions [batch_size] of steps first_step, first_step + 1, ...

    Each epoch is a new permutation, all equally likely; a batch may begin in one epoch and end in the next.
    """
    start = first_step * batch_size  # in the endless sequence of epochs

    def epoch_order(epoch):
        order = tf.random.experimental.stateless_shuffle(
            tf.range(examples, dtype=tf.int64), key(ORDER, seed, epoch), alg="philox"
        )
        return tf.data.Dataset.from_tensor_slices(order[tf.maximum(start - epoch * examples, 0) :])

    epochs = tf.data.Dataset.range(start // examples, np.iinfo(np.int64).max)
    return epochs.flat_map(epoch_order).batch(batch_size, drop_remainder=True)


def reader(dataset):
    """Return a TensorFlow function from positions [B] to (images, labels), which reads from memory or from the file."""
    labels = tf.constant(dataset.labels)
    if dataset.in_memory:
        array = shared(dataset.images())
        return lambda positions: (tf.gather(array, positions), tf.gather(labels, positions))

    def from_file(positions):
        images = tf.numpy_function(dataset.read, [positions], dataset.dtype)
        return tf.ensure_shape(images, (None, *dataset.image_shape)), tf.gather(labels, positions)

    return from_file


def shared(array: np.ndarray):
    """Return a NumPy array as a tensor that shares its memory: tf.constant copies it, and once more in a graph."""
    if array.ctypes.data % 64 or not (array.flags.c_contiguous and array.flags.writeable):  # see datasets.hdf5.empty
        return tf.constant(array)
    return tf.experimental.dlpack.from_dlpack(array.__dlpack__())


def to_float(images):
    return tf.cast(images, tf.float32) / 255 if images.dtype == tf.uint8 else images


def flip_and_crop(images, draws, flip=True):
    """Mirror each image with probability 1/2, pad it with zeros, and crop it at random to its original size.

    Args:
        images: [B, h, w, c], any type.
        draws: [3, B, 1] random numbers, uniform in 0 ... 1, which choose the rows, the columns and the mirroring.
        flip: False: crop only.

    Returns:
        [B, h, w, c]. One gather of rows and one of columns crop and mirror at once.
    """
    height, width = images.shape[1], images.shape[2]

    def indices(size, draw):  # [B, size], in the padded image
        padding = max(1, round(size * CROP_PADDING))
        return tf.range(size) + tf.cast(draw * (2 * padding + 1), tf.int32), padding

    rows, row_padding = indices(height, draws[0])
    columns, column_padding = indices(width, draws[1])
    if flip:
        columns = tf.where(draws[2] < 0.5, columns, tf.reverse(columns, [1]))
    padded = tf.pad(images, [[0, 0], [row_padding] * 2, [column_padding] * 2, [0, 0]])
    return tf.gather(tf.gather(padded, rows, batch_dims=1), columns, axis=2, batch_dims=1)


def decoded_batches(steps, dataset, batch_size, augment, is_training, seed, rows):
    """create_input_ops for a dataset of JPEG files."""

    def decode(jpeg, label, number):
        if augment:
            image = random_resized_crop(jpeg, key(AUGMENTATION, seed, number), flip=augment == "flip+crop")
        else:
            image = centre_crop(jpeg)
        return image / 255, label

    examples = jpeg_files(steps, dataset, batch_size, rows).map(decode, num_parallel_calls=tf.data.AUTOTUNE)
    return examples.batch(batch_size if rows is None else len(rows), drop_remainder=is_training)


def jpeg_files(steps, dataset, batch_size, rows=None):
    """Return a tf.data.Dataset of (JPEG file, label, running number), from one of (step, positions [batch_size])."""
    labels = tf.constant(dataset.labels)

    def read(step, positions):
        number = step * batch_size + tf.range(tf.size(positions), dtype=tf.int64)
        if rows is not None:
            positions, number = tf.gather(positions, rows), tf.gather(number, rows)
        jpeg = tf.numpy_function(lambda p: np.array(dataset.read(p), dtype=object), [positions], tf.string)
        jpeg = tf.ensure_shape(jpeg, [None])
        return jpeg, tf.gather(labels, positions), number

    return steps.map(read, num_parallel_calls=1).prefetch(2).unbatch()


def random_resized_crop(jpeg, seed, flip=True):
    """Crop 8 to 100 % of the area at an aspect of 3/4 to 4/3, resize it, and mirror it at random (arXiv 1409.4842).

    Bilinear interpolation without antialiasing, as in TensorFlow's model garden: a crop that is shrunk is a little
    sharper than at test time.

    Args:
        jpeg: the file, a string.
        seed: [2] integers.
        flip: False: never mirror.

    Returns:
        [224, 224, 3] float32, 0 ... 255.
    """
    crop_seed, flip_seed = tf.unstack(tf.random.split(seed, 2))
    image = decode_window(jpeg, random_window(tf.io.extract_jpeg_shape(jpeg), crop_seed))
    image = tf.image.resize(image, [IMAGENET_SIZE, IMAGENET_SIZE])
    return tf.image.stateless_random_flip_left_right(image, flip_seed) if flip else image


def random_window(shape, seed):
    """Draw the window [4] (row, column, height, width) of a random crop of an image of `shape` [3]."""
    begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
        shape,
        tf.zeros([1, 0, 4]),
        seed,
        min_object_covered=0.0,
        aspect_ratio_range=(3 / 4, 4 / 3),
        area_range=(0.08, 1.0),
        max_attempts=10,
        use_image_if_no_bounding_boxes=True,
    )
    return tf.concat([begin[:2], size[:2]], axis=0)


def decode_window(jpeg, window):
    """Decode a window [4] of a JPEG file: uint8 [height / ratio, width / ratio, 3].

    ratio is the largest of RATIOS that leaves at least 224 pixels on the shorter side, or 1. The decoder shrinks by
    ratio: a pixel is about the mean of ratio × ratio pixels, and edges move by less than `ratio` pixels.
    """

    def decode(ratio):
        return tf.io.decode_and_crop_jpeg(jpeg, window // ratio, channels=3, ratio=ratio)

    halvings = tf.reduce_sum(
        tf.cast(tf.reduce_min(window[2:]) >= [ratio * IMAGENET_SIZE for ratio in RATIOS[1:]], tf.int32)
    )
    return tf.switch_case(halvings, [lambda ratio=ratio: decode(ratio) for ratio in RATIOS])


def centre_crop(jpeg):
    """Resize the shorter side to 256 pixels and crop the central 224 × 224 (arXiv 1803.08494, section 4.1).

    Decodes and resizes only the part of the picture in the crop; the result differs from resizing the complete
    picture by rounding alone (0.01 of 255).

    Returns:
        [224, 224, 3] float32, 0 ... 255.
    """
    size = tf.io.extract_jpeg_shape(jpeg)[:2]
    resized = tf.round(tf.cast(size, tf.float32) * IMAGENET_RESIZE / tf.cast(tf.reduce_min(size), tf.float32))
    scale = resized / tf.cast(size, tf.float32)
    begin = tf.floor((resized - IMAGENET_SIZE) / 2) / scale
    margin = tf.maximum(1 / scale, 1) + DECODER_MARGIN
    first = tf.cast(tf.maximum(begin - margin, 0), tf.int32)
    last = tf.minimum(tf.cast(begin + IMAGENET_SIZE / scale + margin, tf.int32) + 1, size)
    image = tf.io.decode_and_crop_jpeg(jpeg, tf.concat([first, last - first], axis=0), channels=3)
    return resample(image, begin - tf.cast(first, tf.float32), scale)


def resample(image, begin, scale):
    """Resize a window of an image to 224 × 224 by the triangle kernel, as tf.image.resize does with antialias=True.

    Resize rows, transpose, resize columns. TensorFlow's kernel gets an image of one column whose channels are a
    complete row, so it reads memory in order, in one thread, and takes a quarter of the time of tf.image.resize.

    Args:
        image: [h, w, 3], uint8 or float32.
        begin: [2] float32, the first row and column of the window, in pixels of the image.
        scale: [2] float32, pixels of the result per pixel of the image.

    Returns:
        [224, 224, 3] float32, in the image's units.
    """

    def resize_rows(image, axis):  # [n, m] to [224, m]
        out = tf.raw_ops.ScaleAndTranslate(
            images=image[tf.newaxis, tf.newaxis],
            size=[1, IMAGENET_SIZE],
            scale=tf.stack([1.0, scale[axis]]),
            translation=tf.stack([0.0, -begin[axis] * scale[axis]]),
            kernel_type="triangle",
            antialias=True,
        )
        return out[0, 0]

    height, width = tf.unstack(tf.shape(image)[:2])
    image = tf.transpose(resize_rows(tf.reshape(image, [height, width * 3]), 0))  # [w * 3, 224]
    image = resize_rows(tf.reshape(image, [width, 3 * IMAGENET_SIZE]), 1)  # [224, 3 * 224]
    image = tf.transpose(tf.reshape(image, [IMAGENET_SIZE * 3, IMAGENET_SIZE]))  # [224, 224 * 3]
    return tf.reshape(image, [IMAGENET_SIZE, IMAGENET_SIZE, 3])


def image_of_file(path, dataset: hdf5.Dataset):
    """Read an image file of any size and mode as a network trained on `dataset` (of 1 or 3 channels) expects it.

    If the dataset stores JPEG files, the file is converted as for packing and cropped by centre_crop. Otherwise it is
    converted to RGB or gray, like the dataset's images, and resized to their height and width.

    Returns:
        [h, w, c] float32, 0 ... 1.

    Raises:
        UserError, OSError: if the file cannot be read.
    """
    if not dataset.encoded:
        height, width, channels = dataset.image_shape
        return to_float(tf.constant(load_image(path, path, (height, width), channels)))
    with reading(path), open(path, "rb") as file:
        return centre_crop(as_jpeg(file.read(), path)) / 255
