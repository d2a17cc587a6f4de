"""Evaluate a run over a whole split, in inference mode.

    python evaler.py --dataset CIFAR10                                  # the newest run of CIFAR10 under train_dir
    python evaler.py --dataset CIFAR10 --train_dir train_dir/RUN        # one run folder
    python evaler.py --dataset CIFAR10 --split train --batch_statistics reestimate

Prints accuracy, loss and the accuracy of each class, and leaves in the run folder evaluation.json, mistakes.png
and TensorBoard summaries (scalars, the confusion matrix as an image).
"""
import json
import os
from pathlib import Path

import numpy as np

import datasets
import model as models
from datasets.errors import ArgumentParser, Later, UserError, run
from input_ops import create_input_ops, network_image_shape

tf, ops = Later("tensorflow"), Later("ops")

TOP5_CLASSES = 100              # from so many classes on, top-5 accuracy stands beside accuracy
EVALUATION_BATCH = 250          # images: fast, and a divisor of most test splits; results do not depend on it
NEEDED = {"flags": ("dataset", "norm_type", "group_size", "weight_standardization", "dtype", "seed"),
          "derived": ("model", "groups", "batch_norm_momentum", "batch_size"), "data": ("train", "test")}
REESTIMATION_IMAGES = 10_000    # training images over which batch norm's statistics are estimated anew


def make_predictor(model):
    """A graph from (images [B, h, w, c], labels [B]) to each example's loss [B], predicted class [B], and whether its
    label is among the five most likely [B]."""
    @tf.function(reduce_retracing=True)
    def predict(images, labels):
        logits = model(images, training=False)
        loss = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
        return loss, tf.argmax(logits, axis=1, output_type=tf.int32), tf.math.in_top_k(labels, logits, 5)
    return predict


def evaluate(predict, batches, labels, num_classes):
    """Evaluate over all of a split, remainder included.

    Args:
        predict: what make_predictor gave.
        batches: tf.data.Dataset of (images, labels), each example once, in order.
        labels: [N] the labels of the split, in the same order.
        num_classes: K.

    Returns:
        dict with accuracy, loss (mean cross entropy, natural logarithm), images (N), per_class_accuracy [K] (None
        for a class without images), confusion [K, K] int (label, prediction), losses [N] and predictions [N]; from
        TOP5_CLASSES classes on top5_accuracy too, the share of images whose label is among the five most likely.
    """
    outputs = [predict(*batch) for batch in batches]
    losses, predictions, in_top5 = (np.concatenate([values.numpy() for values in column]) for column in zip(*outputs))
    confusion = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(confusion, (labels, predictions), 1)
    per_class = [int(row[k]) / int(row.sum()) if row.sum() else None for k, row in enumerate(confusion)]
    top5 = {"top5_accuracy": int(in_top5.sum()) / len(labels)} if num_classes >= TOP5_CLASSES else {}
    return {"accuracy": int(np.trace(confusion)) / len(labels), **top5, "loss": float(losses.mean(dtype=np.float64)),
            "images": len(labels), "per_class_accuracy": per_class,
            "confusion": confusion, "losses": losses, "predictions": predictions}


def reestimate_batch_statistics(model, train, seed=0):
    """Set the moving statistics of every BatchNorm to those of training images under the present weights.

    Every norm normalizes by its own batch of EVALUATION_BATCH images meanwhile; the mean over the batches, and by
    the law of total variance the variance over all of them, replace what training left. Weights stay as they are.
    """
    norms = [layer for layer in model.layers if isinstance(layer, ops.BatchNorm)]
    size = min(EVALUATION_BATCH, len(train))
    steps = max(1, min(len(train), REESTIMATION_IMAGES) // size)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum, norm.use_batch_statistics = 0.0, True    # the moving statistics become those of the last batch

    @tf.function
    def batch_statistics(images):
        model(images, training=False)                           # dropout stays off

    moments = [[] for _ in norms]
    for images, _ in create_input_ops(train, size, is_training=True, seed=seed, last_step=steps):
        batch_statistics(images)
        for found, norm in zip(moments, norms):
            found.append((norm.moving_mean.numpy(), norm.moving_variance.numpy()))
    for norm, momentum, found in zip(norms, momenta, moments):
        means, variances = (np.array(values, np.float64) for values in zip(*found))
        norm.momentum, norm.use_batch_statistics = momentum, False
        norm.moving_mean.assign(means.mean(axis=0))
        norm.moving_variance.assign(variances.mean(axis=0) + means.var(axis=0))


def evaluate_by_batch(model, split, batch_size, seed=0):
    """evaluate() with every BatchNorm normalizing by the test batch of batch_size images that an image is in.

    What the 2018 repo reported: it tells a network that learned nothing from one whose moving statistics do not stand
    for what it learned. The batches are drawn at random, once; the last may be smaller. Nothing moves.
    """
    norms = [layer for layer in model.layers if isinstance(layer, ops.BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    shuffled = split.subset(np.random.RandomState(seed).permutation(len(split)), is_train=False)
    for norm in norms:
        norm.momentum, norm.use_batch_statistics = 1.0, True
    result = evaluate(make_predictor(model), create_input_ops(shuffled, batch_size, False), shuffled.labels,
                      split.num_classes)
    for norm, momentum in zip(norms, momenta):
        norm.momentum, norm.use_batch_statistics = momentum, False
    return result


# ------------------------------------------------------------------------------------------------- run folders


def check_path(path):
    """Raise UserError for a run folder whose checkpoints TensorFlow could not find: it takes paths for patterns, in
    UTF-8."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"{os.fsencode(path)!r} is not UTF-8: choose a name of letters and digits") from None
    found = sorted(set("*?[]\\") & set(str(path)))
    if found:
        raise UserError(f"{path} has {' '.join(found)} in it: TensorFlow reads the path of a checkpoint as a pattern, "
                        f"and would not find it again; choose a name without * ? [ ] and \\")


def read_config(run_dir):
    """config.json of a run folder, as a dict; UserError if it is not there or not one of trainer.py's."""
    path = Path(run_dir) / "config.json"
    check_path(run_dir)
    try:
        config = json.loads(path.read_text())
        for part, names in NEEDED.items():
            for name in names:
                config[part][name]
    except FileNotFoundError:
        raise UserError(f"{run_dir} is no run folder: it has no config.json, which trainer.py writes") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged: it should be the JSON object that trainer.py wrote") from None
    return config


def write_whole(path, text):
    """Write a file so that it is either there as a whole or not at all."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text)
    part.replace(path)


def run_dir_of(checkpoint):
    """The run folder that a checkpoint lies in; a folder stands for its newest checkpoint."""
    path = Path(checkpoint)
    return path if path.is_dir() else path.parent


def find_run(train_dir, dataset):
    """The run folder of this dataset whose checkpoint is the newest; train_dir may itself be one run folder."""
    train_dir = Path(train_dir)
    if (train_dir / "config.json").exists():
        candidates = [train_dir]
    else:
        candidates = [path.parent for path in train_dir.glob("*/config.json")]
    runs = [path for path in candidates if read_config(path)["flags"]["dataset"] == dataset]
    if not runs:
        names = sorted({read_config(path)["flags"]["dataset"] for path in candidates})
        raise UserError(f"no run of {dataset} in {train_dir}" + (f", only of {', '.join(names)}" if names else "")
                        + f": train one with 'python trainer.py --dataset {dataset}', or name another --train_dir")
    finished = [path for path in runs if tf.train.latest_checkpoint(path)]
    if not finished:
        raise UserError(f"the runs of {dataset} in {train_dir} have no checkpoint yet")
    return max(finished, key=lambda path: (path / "checkpoint").stat().st_mtime_ns)


def build_model(config, image_shape, num_classes):
    """The network of a run, from its config.json, for images of image_shape in num_classes classes."""
    derived = config["derived"]
    policy = {"float32": "float32", "bfloat16": "mixed_bfloat16"}[config["flags"]["dtype"]]
    tf.keras.mixed_precision.set_global_policy(policy)
    try:
        return models.create_model(
            derived["model"], image_shape, num_classes, config["flags"]["norm_type"], derived["groups"],
            config["flags"]["group_size"], config["flags"]["weight_standardization"], derived["batch_norm_momentum"])
    except ValueError as error:
        raise UserError(f"{derived['model']} with --norm_type {config['flags']['norm_type']}: {error}") from error


def weights_of(model):
    """The variables that a checkpoint holds of a model, by name: weights, moving statistics, state of dropout."""
    return {variable.path: variable.value for variable in model.variables}


def load_weights(model, checkpoint):
    """Read a model's variables from a checkpoint (a path, or a run folder: its newest); returns the path and step."""
    path = str(checkpoint)
    if os.path.isdir(path):
        path = tf.train.latest_checkpoint(path) or path
    try:
        reader = tf.train.load_checkpoint(path)
        shapes = reader.get_variable_to_shape_map()
    except (ValueError, tf.errors.OpError):
        raise UserError(f"{checkpoint} is no readable checkpoint: name one as trainer.py writes them, "
                        f"such as RUN_FOLDER/model-1000, or the run folder") from None
    stored = {name: shape for name, shape in shapes.items() if name.startswith("model/")}
    variables = weights_of(model)
    key = "model/{}/.ATTRIBUTES/VARIABLE_VALUE".format
    names = {key(name.replace("/", ".S")): name for name in variables}
    for name in sorted(names.keys() ^ stored.keys()):
        side = "the checkpoint lacks" if name in names else "the model lacks"
        raise UserError(f"checkpoint {path} is of another model or norm: {side} {names.get(name, name)}")
    for name, shape in stored.items():
        wanted = variables[names[name]].shape
        if list(wanted) != list(shape):
            raise UserError(f"checkpoint {path} is of another model or number of classes: {names[name]} has the shape "
                            f"{tuple(shape)} there and {tuple(wanted)} here")
    for name, variable in names.items():
        variables[variable].assign(reader.get_tensor(name))
    return path, int(reader.get_tensor("step/.ATTRIBUTES/VARIABLE_VALUE"))


def check_same_network(config, checkpoint):
    """Raise UserError if the run that a checkpoint lies in had another network; norms can share all their shapes."""
    folder = run_dir_of(checkpoint)
    if not (folder / "config.json").exists():
        return
    other = read_config(folder)
    for part, name in (("derived", "model"), ("flags", "norm_type"), ("flags", "group_size"), ("derived", "groups"),
                       ("flags", "weight_standardization")):
        here, there = config[part][name], other[part][name]
        if here != there and (name not in ("groups", "group_size") or config["flags"]["norm_type"] == "group"):
            raise UserError(f"checkpoint {checkpoint} is of a run with --{name} {there}, not {here}: give the same")


# ---------------------------------------------------------------------------------------------------- pictures


def to_uint8(images):
    """Images of uint8, or of floats of any range, as uint8 for showing."""
    images = np.asarray(images)
    if images.dtype == np.uint8:
        return images
    low, high = min(0.0, float(images.min())), max(1.0, float(images.max()))
    return np.round((images - low) / (high - low) * 255).astype(np.uint8)


def image_grid(images, most=64):
    """The first images of [N, h, w, c] side by side in one picture [1, H, W, 1 or 3], for TensorBoard."""
    images = to_uint8(images[:most])
    images = images if images.shape[-1] in (1, 3) else images[..., :1]
    count, height, width, channels = images.shape
    columns = int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    grid = np.zeros((rows * columns, height, width, channels), np.uint8)
    grid[:count] = images
    grid = grid.reshape(rows, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
    return grid.reshape(1, rows * height, columns * width, channels)


def confusion_image(confusion, class_names):
    """The confusion matrix, each row as shares of its label, as a picture [1, H, W, 3] uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 6.5), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    figure.colorbar(axes.imshow(shares, cmap="Blues", vmin=0, vmax=1), label="share of the label's images")
    axes.set(xlabel="prediction", ylabel="label", title=f"{confusion.sum()} images")
    if len(class_names) <= 20:
        ticks = range(len(class_names))
        axes.set_xticks(ticks, class_names, rotation=45, ha="right")
        axes.set_yticks(ticks, class_names)
        for label, prediction in np.ndindex(*confusion.shape):
            if confusion[label, prediction]:
                axes.text(prediction, label, confusion[label, prediction], ha="center", va="center", fontsize=7,
                          color="white" if shares[label, prediction] > 0.5 else "black")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[None, ..., :3]


def draw_mistakes(path, split, result, most=25):
    """Save the images that were most wrong as a PNG, each with its label, prediction and loss."""
    from matplotlib.figure import Figure
    wrong = np.flatnonzero(result["predictions"] != split.labels)
    worst = wrong[np.argsort(-result["losses"][wrong], kind="stable")][:most]
    figure = Figure(figsize=(10, 11), layout="constrained")
    figure.suptitle(f"{split.name}: the {len(worst)} worst of {len(wrong)} mistakes in {len(split)} images")
    images = split.read(worst) if len(worst) else []
    if split.encoded:
        images = [tf.io.decode_jpeg(jpeg, channels=3).numpy() for jpeg in images]
    for place, (position, image) in enumerate(zip(worst, images), 1):
        axes = figure.add_subplot(5, 5, place)
        shown = to_uint8(image)
        axes.imshow(shown if shown.shape[-1] == 3 else shown[..., 0], cmap="gray")
        label = split.class_names[split.labels[position]]
        prediction = split.class_names[result["predictions"][position]]
        axes.set_title(f"{label:.24}, not\n{prediction:.24} ({result['losses'][position]:.1f})", fontsize=8)
        axes.axis("off")
    figure.savefig(path, dpi=100)


# ------------------------------------------------------------------------------------------------------ script


def parse_flags(argv=None):
    parser = ArgumentParser(description="Evaluate a run over a whole split, in inference mode.")
    parser.add_argument("--dataset", required=True, help="name of the dataset, one of the known or your own")
    parser.add_argument("--train_dir", default="train_dir", help="where the run folders are, or one run folder")
    parser.add_argument("--checkpoint", help="evaluate this checkpoint; by default the newest of the run")
    parser.add_argument("--split", choices=("test", "train"), default="test", help="which split to evaluate")
    parser.add_argument("--batch_size", type=int, default=EVALUATION_BATCH, help="images at a time")
    parser.add_argument("--data_dir", default=datasets.DATA_DIR, help="where the datasets are")
    parser.add_argument("--batch_statistics", choices=("moving", "reestimate", "batch"), nargs="+", default=["moving"],
                        help="of batch norm: those that training left; also those re-estimated over training images; "
                             "also those of the test batch, at the training batch size")
    parser.add_argument("--validation", type=int, metavar="N",
                        help="evaluate on the N training images that the run held out by the same flag")
    config = parser.parse_args(argv)
    if config.batch_size < 1:
        raise UserError(f"--batch_size must be at least 1, not {config.batch_size}")
    if config.validation is not None and config.split == "train":
        raise UserError(f"--validation {config.validation} and --split train contradict each other: give one of them")
    return config


def print_result(title, result, class_names):
    top5 = f"top-5 accuracy {100 * result['top5_accuracy']:.2f} %, " if "top5_accuracy" in result else ""
    print(f"{title}: accuracy {100 * result['accuracy']:.2f} %, {top5}loss {result['loss']:.4f}, "
          f"{result['images']} images")
    for name, accuracy in zip(class_names, result["per_class_accuracy"]):
        print(f"  {name:<24.24} " + ("no images" if accuracy is None else f"{100 * accuracy:6.2f} %"))


def summary_of(result):
    """What evaluation.json holds of a result."""
    return {key: result[key] for key in ("accuracy", "top5_accuracy", "loss", "images", "per_class_accuracy")
            if key in result}


def check_request(flags, run_dir, config):
    """Raise UserError for what does not suit the run."""
    if config["flags"]["dataset"] != flags.dataset:
        raise UserError(f"--dataset {flags.dataset}, but {run_dir} is a run of {config['flags']['dataset']}")
    further = [choice for choice in flags.batch_statistics if choice != "moving"]
    if further and config["flags"]["norm_type"] != "batch":
        raise UserError(f"--batch_statistics {further[0]} is for batch norm, but {run_dir} has --norm_type "
                        f"{config['flags']['norm_type']}")
    held_out = config["flags"].get("validation")
    if flags.validation is not None and flags.validation != held_out:
        raise UserError(f"--validation {flags.validation}, but {run_dir} held out {held_out or 'nothing'}: it was "
                        f"trained on some of these images")


def main(argv=None):
    flags = parse_flags(argv)
    datasets.folder_of(flags.dataset, flags.data_dir)       # a name that can name no dataset ends here
    run_dir = run_dir_of(flags.checkpoint) if flags.checkpoint else find_run(flags.train_dir, flags.dataset)
    config = read_config(run_dir)
    check_request(flags, run_dir, config)
    train, test = datasets.create_default_splits(flags.dataset, flags.data_dir, validation=flags.validation)
    split = test if flags.split == "test" else train
    name = f"{flags.dataset} {'validation' if flags.validation else flags.split}"
    model = build_model(config, network_image_shape(train), train.num_classes)
    checkpoint, step = load_weights(model, flags.checkpoint or run_dir)
    print(f"{checkpoint}: {config['derived']['model']}, {config['flags']['norm_type']} norm, step {step}")

    batches = create_input_ops(split, flags.batch_size, is_training=False)
    result = evaluate(make_predictor(model), batches, split.labels, split.num_classes)
    print_result(name, result, split.class_names)
    record = summary_of(result) | {
        "step": step, "split": "validation" if flags.validation else flags.split, "dataset": flags.dataset,
        "checkpoint": checkpoint, "class_names": split.class_names}
    if "batch" in flags.batch_statistics:
        batch_size = config["derived"]["batch_size"]
        by_batch = evaluate_by_batch(model, split, batch_size, config["flags"]["seed"])
        print_result(f"{name}, statistics of each {batch_size} test images", by_batch, split.class_names)
        record["by_batch"] = summary_of(by_batch) | {"batch_size": batch_size}
    if "reestimate" in flags.batch_statistics:
        reestimate_batch_statistics(model, train, config["flags"]["seed"])
        again = evaluate(make_predictor(model), batches, split.labels, split.num_classes)
        print_result(f"{name}, statistics re-estimated", again, split.class_names)
        record["reestimated"] = summary_of(again)

    tag = f"evaluation_{record['split']}"
    with tf.summary.create_file_writer(str(run_dir), filename_suffix=".evaluation").as_default(step=step):
        tf.summary.scalar(f"{tag}/accuracy", result["accuracy"])
        tf.summary.scalar(f"{tag}/loss", result["loss"])
        tf.summary.image(f"{tag}/confusion", confusion_image(result["confusion"], split.class_names))
    draw_mistakes(run_dir / "mistakes.png", split, result)
    write_whole(run_dir / "evaluation.json", json.dumps(record, indent=1) + "\n")
    print(f"wrote {run_dir / 'evaluation.json'}, mistakes.png and TensorBoard summaries beside it")


if __name__ == "__main__":
    run(main)
