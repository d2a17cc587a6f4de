"""Evaluate a run on a complete split, in inference mode.

    python evaler.py train_dir/RUN                                      # a run folder
    python evaler.py --dataset CIFAR10                                  # the newest run of CIFAR10 in train_dir
    python evaler.py --dataset CIFAR10 --split train --batch_statistics reestimate
    python evaler.py --dataset CIFAR10 --predict a.png photos/ --output predictions.csv     # classify image files
    python evaler.py --dataset CIFAR10 --export exported                # files that load without this repo: export.py

Prints accuracy, loss and the accuracy of each class, and writes evaluation.json, classes.csv, confusion.png,
mistakes.png and TensorBoard summaries to the run folder. With --predict it prints the most likely classes of each image
file instead, and writes only --output.
"""

import contextlib
import dataclasses
import itertools
import math
import os
import sys

from command import UserError, complain, run, save_figure, start, write_csv
from config import parse_evaluation

FLAGS = start(__name__, parse_evaluation)  # flags first: TensorFlow takes seconds to import

import numpy as np
import tensorflow as tf

import checkpoints
import export
import ops
import replicas
import runs
import summaries
from config import PREDICTED_CLASSES, evaluation_batch
from datasets import folder
from input_ops import create_input_ops, image_of_file
from model import create_model

MANY_CLASSES = 100  # with at least this many, report top-5 accuracy, and print only the worst classes
WORST_CLASSES = 10
SCALARS = ("accuracy", "top5_accuracy", "loss")
REESTIMATION_IMAGES = 10_000  # training images for re-estimating batch norm's statistics


def make_predictor(model, strategy=None):
    """Build a graph from (images [B, h, w, c], labels [B]) to losses, predictions, in_top5 and probabilities, [B] each.

    in_top5 is whether the label is among the five most likely classes, and probabilities are those of the predictions.
    The strategy's replicas in this process share a batch.
    """
    strategy = strategy or tf.distribute.get_strategy()

    def predict(images, labels):
        logits = model(images, training=False)
        loss = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
        best = tf.math.top_k(logits, min(5, logits.shape[1])).indices  # ties go to the lower class, as in argmax
        probability = tf.reduce_max(tf.nn.softmax(logits), axis=1)
        return loss, best[:, 0], tf.reduce_any(best == labels[:, tf.newaxis], axis=1), probability

    @tf.function(autograph=False, reduce_retracing=True)
    def predict_batch(images, labels):
        return replicas.map_parts(strategy, predict, images, labels)

    return predict_batch


def predict_all(predict, batches):
    """losses, predictions, in_top5 and probabilities, [N] each, of batches of (images, labels).

    predict: a graph from make_predictor.
    """
    outputs = [predict(*batch) for batch in batches]
    return [np.concatenate([values.numpy() for values in column]) for column in zip(*outputs)]


def summarize(losses, predictions, in_top5, probabilities, labels, num_classes):
    """Summarize the predictions on a complete split.

    Args:
        losses, predictions, in_top5, probabilities, labels: [N] each, the first four from predict_all.
        num_classes: K.

    Returns:
        dict with accuracy, loss (mean cross entropy, natural logarithm), images (N), per_class_accuracy [K] (None for a
        class without images), confusion [K, K] int (label, prediction), losses, predictions and probabilities [N each].
        With at least MANY_CLASSES classes also top5_accuracy, the share of images whose label is among the five most
        likely classes.
    """
    confusion = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(confusion, (labels, predictions), 1)
    per_class = [int(row[k]) / int(row.sum()) if row.sum() else None for k, row in enumerate(confusion)]
    top5 = {"top5_accuracy": int(in_top5.sum()) / len(labels)} if num_classes >= MANY_CLASSES else {}
    return {
        "accuracy": int(np.trace(confusion)) / len(labels),
        **top5,
        "loss": float(losses.mean(dtype=np.float64)),
        "images": len(labels),
        "per_class_accuracy": per_class,
        "confusion": confusion,
        "losses": losses,
        "predictions": predictions,
        "probabilities": probabilities,
    }


def evaluate(model, split, batch_size=None):
    """summarize() the predictions of a model on a complete split, a datasets.hdf5.Dataset."""
    batches = create_input_ops(split, batch_size or evaluation_batch(split.network_shape), is_training=False)
    return summarize(*predict_all(make_predictor(model), batches), split.labels, split.num_classes)


@contextlib.contextmanager
def by_batch(model, momentum):
    """Make every BatchNorm use the statistics of its batch in inference too; yields these layers.

    momentum: of the moving statistics, which are still updated: 0 sets them to the batch's, 1 leaves them unchanged.
    """
    norms = [layer for layer in model.layers if isinstance(layer, ops.BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum, norm.use_batch_statistics = momentum, True
    try:
        yield norms
    finally:
        for norm, before in zip(norms, momenta):
            norm.momentum, norm.use_batch_statistics = before, False


def reestimate_batch_statistics(model, train, batch_size, augment=None, seed=0):
    """Set the moving statistics of every BatchNorm to those of training images with the current weights.

    Meanwhile each norm normalizes by its batch. The moving mean becomes the mean over all batches, and the moving
    variance the mean of the batches' (biased) variances plus the variance of their means: by the law of total variance
    these are the moments of all values. Weights do not change.

    Args:
        model: the model to change.
        train: the training split, of which REESTIMATION_IMAGES are used.
        batch_size: images per batch, at most all of `train`.
        augment, seed: those of the run, so that the images are like those in training.
    """
    size = min(batch_size, len(train))
    steps = max(1, min(len(train), REESTIMATION_IMAGES) // size)

    @tf.function(autograph=False)
    def batch_statistics(images):
        model(images, training=False)  # without dropout
        return [(norm.moving_mean.value.read_value(), norm.moving_variance.value.read_value()) for norm in norms]

    batches = create_input_ops(train, size, True, augment, seed, last_step=steps)
    with by_batch(model, momentum=0.0) as norms:  # each batch overwrites the moving statistics
        moments = [batch_statistics(images) for images, _ in batches]
    for norm, found in zip(norms, zip(*moments)):
        means, variances = (np.array([tensor.numpy() for tensor in tensors], np.float64) for tensors in zip(*found))
        norm.moving_mean.assign(means.mean(axis=0))
        count = size * math.prod(norm.input.shape[1:-1])  # values per channel; ops.batch_norm divides by count - 1
        norm.moving_variance.assign(variances.mean(axis=0) * (count - 1) / count + means.var(axis=0))


def evaluate_by_batch(model, split, batch_size, seed=0):
    """evaluate() with every BatchNorm normalizing by the statistics of its test batch of batch_size images.

    The 2018 repo reported this accuracy. If it is high while accuracy with moving statistics is low, the network has
    learned, but its moving statistics do not fit single batches. The images are shuffled once into batches; the last
    batch may be smaller. The moving statistics do not change.
    """
    shuffled = split.subset(np.random.RandomState(seed).permutation(len(split)))
    with by_batch(model, momentum=1.0):
        return evaluate(model, shuffled, batch_size)


def read_images(files, dataset):
    """Yield (file, image) of each image file; skip a file that cannot be read, with a line on stderr."""
    for file in files:
        try:
            folder.check_name(file, os.curdir)
            image = image_of_file(file, dataset)
        except (UserError, OSError) as error:
            complain(error)
        else:
            yield file, image


def predict_files(model, dataset, files, batch_size):
    """Yield (file, [(class name, probability), ...]) of each image file: its most likely classes, the best first.

    Args:
        dataset: the data that the model was trained on; files are preprocessed like its images.
        files: paths; a file that cannot be read is skipped, with a line on stderr.
        batch_size: files in memory at once; results do not depend on it.
    """
    count = min(PREDICTED_CLASSES, dataset.num_classes)

    @tf.function(autograph=False, reduce_retracing=True)
    def classify(images):
        return tf.math.top_k(tf.nn.softmax(model(images, training=False)), count)

    images = read_images(files, dataset)
    while batch := list(itertools.islice(images, batch_size)):
        probabilities, classes = (values.numpy() for values in classify(tf.stack([image for _, image in batch])))
        for (file, _), best, numbers in zip(batch, probabilities, classes):
            yield file, [(dataset.class_names[number], probability) for probability, number in zip(best, numbers)]


def check_images(dataset):
    """Raise UserError if an image file cannot be converted to images like those of the dataset."""
    channels = dataset.image_shape[2]
    if channels not in (1, 3):
        raise UserError(f"--predict needs a dataset of 1 or 3 channels, but images of {dataset.name} have {channels}")
    if dataset.dtype == np.float32:
        low, high = dataset.images().min(), dataset.images().max()
        if low < 0 or high > 1:
            raise UserError(
                f"--predict converts image files to floats from 0 to 1, but images of {dataset.name} range from "
                f"{low:g} to {high:g}: pack them as 0 to 1 or as uint8, and train a new run"
            )


def check_output(path, files):
    """Raise UserError if no file can be written to `path`, or it would overwrite one of `files`."""
    target = os.path.realpath(path)
    if os.path.exists(target) and not os.path.isfile(target):
        raise UserError(f"--output {path!r} is a folder or no regular file: give a file, such as predictions.csv")
    if any(os.path.realpath(file) == target for file in files):
        raise UserError(f"--output {path} is one of the images to predict: give another file, such as predictions.csv")
    if not (os.path.isdir(os.path.dirname(target)) and os.access(os.path.dirname(target), os.W_OK)):
        raise UserError(f"--output {path}: {os.path.dirname(target)} is not a writable folder: create it first")


def write_predictions(path, rows):
    """Write rows of predict_files as a CSV file, one row per image file."""
    names = ["class", "probability"]
    for rank in range(2, len(rows[0][1]) + 1):
        names += [f"class_{rank}", f"probability_{rank}"]
    write_csv(os.path.realpath(path), ["file", *names], [[file, *itertools.chain(*best)] for file, best in rows])
    print(f"wrote {path}")


def print_result(title, result, class_names):
    accuracy, top5 = 100 * result["accuracy"], ""
    if "top5_accuracy" in result:
        share = 100 * result["top5_accuracy"]
        top5 = f"top-5 accuracy {share:.2f} % (errors {100 - accuracy:.2f} and {100 - share:.2f} %), "
    print(f"{title}: accuracy {accuracy:.2f} %, {top5}loss {result['loss']:.4f}, {result['images']} images")
    classes = list(zip(class_names, result["per_class_accuracy"]))
    if len(classes) >= MANY_CLASSES:
        classes = sorted((row for row in classes if row[1] is not None), key=lambda row: row[1])[:WORST_CLASSES]
        print(f"the {WORST_CLASSES} worst classes; evaluation.json has all:")
    for name, accuracy in classes:
        print(f"  {name:<24.24} " + ("no images" if accuracy is None else f"{100 * accuracy:6.2f} %"))


def summary_of(result):
    """The part of a result that evaluation.json stores."""
    names = (*SCALARS, "images", "batch_size", "augment", "per_class_accuracy")
    return {name: result[name] for name in names if name in result}


def check_request(flags, run_dir, config):
    """Raise UserError for flags that do not fit the run."""
    if flags.dataset not in (None, config.dataset):
        raise UserError(f"--dataset {flags.dataset}, but {run_dir} is a run of {config.dataset}: remove --dataset")
    further = [choice for choice in flags.batch_statistics if choice != "moving"]
    if further and config.norm_type != "batch":
        raise UserError(f"{run_dir} has --norm_type {config.norm_type}: remove --batch_statistics {further[0]}")
    if flags.validation is not None and flags.validation != config.validation:
        held_out = config.validation or 0
        remedy = f"give --validation {held_out}" if held_out else "evaluate on the test split"
        raise UserError(f"--validation {flags.validation}, but {run_dir} held out {held_out} images: {remedy}")


def print_predictions(flags, files, model, dataset):
    """Print the most likely classes of each file and write them to --output; exit code 1 if a file cannot be read."""
    rows = []
    batch_size = flags.batch_size or evaluation_batch(dataset.network_shape)
    for file, best in predict_files(model, dataset, files, batch_size):
        print(file, *(f"  {100 * probability:6.2f} %  {name}" for name, probability in best), sep="\n")
        rows.append((file, best))
    if flags.output is not None and rows:
        write_predictions(flags.output, rows)
    if len(rows) < len(files):
        sys.exit(1)


def measure_all(flags, config, model, train, split, name):
    """Evaluate with each of the --batch_statistics and print the results; returns {measure: result}."""
    measured = {"accuracy": evaluate(model, split, flags.batch_size)}
    print_result(name, measured["accuracy"], split.class_names)
    small = config.batch_size * (config.num_replicas if config.sync_batch_norm else 1)  # images that batch norm saw
    if "batch" in flags.batch_statistics:
        measured["by_batch"] = evaluate_by_batch(model, split, small, config.seed) | {"batch_size": small}
        print_result(f"{name}{runs.MEASURES['by_batch']} ({small} images)", measured["by_batch"], split.class_names)
    for choice, measure, size in (
        ("reestimate", "reestimated", evaluation_batch(train.network_shape)),
        ("reestimate_small", "reestimated_small", small),
    ):
        if choice in flags.batch_statistics:
            reestimate_batch_statistics(model, train, size, config.augment, config.seed)
            how = {"batch_size": size, "augment": config.augment}
            measured[measure] = evaluate(model, split, flags.batch_size) | how
            print_result(f"{name}{runs.MEASURES[measure]}", measured[measure], split.class_names)
    return measured


def main(flags):
    tf.get_logger().setLevel("ERROR")  # no warnings about a graph for each of --batch_statistics
    files = folder.find_images(flags.predict or [])
    if flags.output is not None:
        check_output(flags.output, files)
    if flags.export is not None:
        export.check_folder(flags.export)
    run_dir = runs.run_dir_of(flags.checkpoint) if flags.checkpoint else runs.find_run(flags.train_dir, flags.dataset)
    config, stored = runs.read_config(run_dir)
    check_request(flags, run_dir, config)
    data = run_dir, config, stored["data"], flags.data_dir
    train, test = runs.open_data(*data, config.validation)  # train: the images that the run trained on
    if config.validation and not flags.validation:
        _, test = runs.open_data(*data, None)
    if flags.predict:
        check_images(train)
    elif not os.access(run_dir, os.W_OK):
        raise UserError(f"{run_dir} is not writable, but holds the results: change its permissions, or copy it")
    model = create_model(config, train.network_shape, train.num_classes)
    checkpoint, step = checkpoints.load_weights(model, flags.checkpoint or run_dir)
    print(f"{checkpoint}: {config.model}, {config.norm.removesuffix('+acc')} norm, step {step}")
    if flags.predict:
        print_predictions(flags, files, model, train)
        return

    split = test if flags.split == "test" else train
    split_name = "validation" if flags.validation else flags.split
    measured = measure_all(flags, config, model, train, split, f"{config.dataset} {split_name}")
    result = measured["accuracy"]
    with tf.summary.create_file_writer(str(run_dir), filename_suffix=".evaluation").as_default(step=step):
        tf.summary.scalar(f"evaluation_{split_name}/accuracy", result["accuracy"])
        tf.summary.scalar(f"evaluation_{split_name}/loss", result["loss"])
        confusion = summaries.draw_confusion(result["confusion"], split.class_names)
        tf.summary.image(f"evaluation_{split_name}/confusion", summaries.as_pixels(confusion))
    suffix = "" if split_name == "test" else f"_{split_name}"
    save_figure(confusion, run_dir / f"confusion{suffix}.png", dpi=200)
    summaries.draw_mistakes(run_dir / f"mistakes{suffix}.png", split, result)
    classes = zip(split.class_names, result["confusion"].sum(axis=1), result["per_class_accuracy"])
    write_csv(run_dir / f"classes{suffix}.csv", ("class", "images", "accuracy"), classes)
    results = {measure: summary_of(found) for measure, found in measured.items()}
    runs.write_evaluation(run_dir, split_name, step, checkpoint, split.class_names, results)
    written = f"classes{suffix}.csv, confusion{suffix}.png, mistakes{suffix}.png"
    print(f"wrote evaluation.json, {written} and TensorBoard summaries to {run_dir}")
    if flags.export is not None:  # in float32: in bfloat16 no two implementations agree within export.TOLERANCES
        network = create_model(dataclasses.replace(config, dtype="float32"), train.network_shape, train.num_classes)
        network.set_weights(model.get_weights())
        accuracy = result["accuracy"] if config.dtype == "float32" else evaluate(network, test)["accuracy"]
        export.write(network, test, flags.export, run_dir, step, accuracy)


if __name__ == "__main__":
    run(lambda: main(FLAGS))
