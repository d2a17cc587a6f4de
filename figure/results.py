"""Tables of runs: accuracies against batch size, and sentences that the accuracies support. See compare.py.

Runs that differ only in seed share a cell of the table. Its rows differ in the norm, and in the settings they name.
"""

import json
import math
import re
import statistics
from typing import NamedTuple

from command import UserError, write_csv
from runs import MEASURES

COLOURS = {
    "batch": "#d1495b",
    "group": "#2f7fc1",
    "layer": "#66a182",
    "instance": "#8d6a9f",
    "none": "#c2a14d",
    "batch+renorm": "#e0703e",
    "batch+ws": "#8c2f39",
    "group+ws": "#1b4079",
    "layer+ws": "#3b6b4f",
    "instance+ws": "#553f61",
    "none+ws": "#222222",
}
COLOURS = {name: colour for norm, colour in COLOURS.items() for name in (norm, f"{norm}+acc")}
CSV_ORDER = "dataset model norm accumulate batch_size rate groups channels_per_group seed run".split()
LEVEL = 2  # standard errors; smaller differences are called level
SPREAD_SEEDS = 5  # with fewer seeds, ranges mean little: with 3 each, those of equal norms are disjoint 1 time in 10
# the variance between seeds is at least accuracy * (1 - accuracy) / SEED_IMAGES, as in figure/studies/cifar10
SEED_IMAGES = 5300
DERIVED = {"peak_learning_rate", "batch_norm_momentum", "updates_per_step"}  # from the batch size
OF_NORM = {"norm_type", "weight_standardization", "accumulate", "groups", "group_size", "base_learning_rate"}
LENGTH = {"max_training_step", "max_batch_size", "train"}  # the settings that make the number of epochs
SHORT_NAMES = {
    "base_learning_rate": "rate",
    "max_training_step": "steps",
    "learning_rate_scaling": "scaling",
    "group_size": "channels per group",
    "validation": "held out",
}


def as_key(settings):
    return json.dumps(settings, sort_keys=True)


def differing(runs):
    """Return the settings that the names of rows need: those in which the runs of a dataset and model differ.

    Batch size and norm are columns and rows, and each norm may have its own rate and groups.
    """

    def differ(runs, free):
        settings = [run.settings for run in runs]
        names = set().union(*settings) - DERIVED - {"batch_size"} - free
        return {name for name in names if len({as_key(values.get(name)) for values in settings}) > 1}

    names = differ(runs, OF_NORM)
    for norm in {run.norm for run in runs}:
        names |= differ([run for run in runs if run.norm == norm], set())
    return sorted(names)


def row_of(run, names):
    """Return the row of a run, (norm name, text of the settings `names`)."""
    given = [name for name in names if run.settings.get(name) is not None]
    return run.norm, ", ".join(f"{SHORT_NAMES.get(name, name)} {run.settings[name]}" for name in given)


def label(row, measure="accuracy"):
    """Return the name of a row in tables and pictures."""
    return row[0] + MEASURES[measure] + (f" ({row[1]})" if row[1] else "")


def natural_key(text):
    """Return a key that sorts 'groups 2' before 'groups 16'."""
    return [float(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+(?:\.\d+)?)", text))]


def spread(values, most=None):
    """Return '59.3' or 'smallest ← median → largest', in percent; the latter with its seeds if they are not `most`."""
    text = f"{100 * statistics.median(values):.1f}"
    if len(values) == 1:
        return text
    text = f"{100 * min(values):.1f} ← {text} → {100 * max(values):.1f}"
    return text if most in (None, len(values)) else f"{text} ({len(values)} seeds)"


class Table(NamedTuple):
    """The runs of a dataset and model by norm, settings, measure and batch size."""

    title: str
    short_title: str  # for pictures
    seeds: int  # the most in a cell
    rows: list  # of (row, measure), where row is (norm name, text of settings)
    batch_sizes: list
    cells: dict  # (row, measure, batch size): [Run]


def tables(runs, called=None):
    """Return a Table for each dataset and model. called: a name of the dataset for the titles."""
    found = []
    for dataset, model in sorted({(run.config.dataset, run.config.model) for run in runs}):
        these = [run for run in runs if (run.config.dataset, run.config.model) == (dataset, model)]
        check_images(these)
        names = differing(these)
        cells = {}
        for run in without_repeats(these):
            for measure in run.accuracies or ["accuracy"]:
                cells.setdefault((row_of(run, names), measure, run.config.batch_size), []).append(run)
        norms, measures = list(COLOURS), list(MEASURES)
        rows = {key[:2] for key in cells}
        rows = sorted(rows, key=lambda row: (norms.index(row[0][0]), natural_key(row[0][1]), measures.index(row[1])))
        batch_sizes = sorted({run.config.batch_size for run in these})
        name = f"{called or dataset}, {model}"
        numbers = {len({run.config.seed for run in alike if run.accuracies}) for alike in cells.values()}
        seeds = max(1, *numbers)
        words = [f"{round(epochs_of(these[0]), 1):g} epochs"] * (not LENGTH & set(names))
        up_to = "up to " * (len(numbers) > 1)
        words.append(f"median and range of {up_to}{seeds} seeds" if seeds > 1 else "one seed")
        short = ", ".join([name, *words])
        found.append(Table(name + shared_settings(these, names), short, seeds, rows, batch_sizes, cells))
    return found


def check_images(runs):
    """Raise UserError if runs with equally large splits have different images or labels. Old logs have no hash."""
    first = {}
    for run in runs:
        data = run.stored["data"]
        if "split" in data:
            other = first.setdefault((run.config.validation, data["train"], data["test"]), run)
            if data["split"] != other.stored["data"]["split"]:
                raise UserError(f"{run.path} and {other.path} have different images or labels: make a table of each")


def preference(run):
    """Return a key that sorts runs with the same settings and seed: the first one counts."""
    return ["finished", "diverged", "unfinished"].index(run.state), -len(run.accuracies), str(run.path)


def without_repeats(runs):
    """Return the runs with one for each seed and settings: a copied folder counts once. Finished runs are preferred."""
    kept = {}
    for run in sorted(runs, key=preference):
        first = kept.setdefault((as_key(run.settings), run.config.seed), run)
        if first is not run:
            print(f"skipped {run.path}: {first.path} has the same settings and seed {run.config.seed}")
    return list(kept.values())


def epochs_of(run):
    """Return the number of passes of a run over its training images."""
    return run.config.max_training_step * run.config.max_batch_size / run.settings["train"]


def shared_settings(runs, names):
    """Return text on the settings of all runs: steps, epochs, optimizer, rate, test images and data."""
    settings, words = runs[0].settings, []
    if not LENGTH & set(names):
        steps, images = settings["max_training_step"], settings["max_batch_size"]
        words.append(f"{steps} steps of {images} images ({epochs_of(runs[0]):.3g} epochs)")
    if not {"optimizer", "base_learning_rate"} & set(names):
        rates = {run.norm: f"{run.config.optimizer} at {run.config.base_learning_rate:g}" for run in runs}
        equal = len(set(rates.values())) == 1
        words += [rates[runs[0].norm]] if equal else [f"{norm}: {rate}" for norm, rate in rates.items()]
    if not {"test", "validation"} & set(names):
        kind = "training images held out" if settings.get("validation") else "test images"
        words.append(f"{settings['test']} {kind}")
    made_from = settings.get("made_from") if "made_from" not in names else None
    return "".join(f", {word}" for word in words) + (f"; data: {made_from}" if made_from else "")


def cell_text(runs, measure, most):
    """Return the text of a cell: accuracies, and the states of runs that have none."""
    values = [run.accuracies[measure] for run in runs if measure in run.accuracies]
    words = [spread(values, most)] if values else []
    diverged = sum(run.state == "diverged" for run in runs)
    waiting = len(runs) - len(values) - diverged
    words += [f"{diverged} diverged"] * (diverged > 0) + [f"{waiting} not finished"] * (waiting > 0)
    return ", ".join(words)


def markdown(table):
    """Return a Table as Markdown."""
    title, _, most, rows, batch_sizes, cells = table
    kind = f"smallest ← median → largest of {most} seeds" if most > 1 else "one seed"
    if most > 1 and any(len(alike) == 1 for alike in cells.values()):
        kind += "; a single number is of one seed"
    lines = []
    for row, measure in rows:
        texts = [cell_text(cells.get((row, measure, size), []), measure, most) for size in batch_sizes]
        lines.append([label(row, measure), *texts])
    columns = ["norm", *(f"batch size {size}" for size in batch_sizes)]
    return f"{title}. Accuracy in %, {kind}:\n\n{as_markdown(columns, lines)}"


def as_markdown(columns, rows):
    """Return texts, a list per row, as a Markdown table."""
    return "\n".join(f"| {' | '.join(texts)} |" for texts in [columns, ["---"] * len(columns), *rows])


def standard_error(first, second, images):
    """Return the standard error of the difference of two norms' accuracies, each a list with a value per seed.

    It has two causes: which test images were chosen, and the seeds of the runs. It is that of two means, and ignores
    that both norms have the same test images.
    """
    variance = 0
    for values in (first, second):
        share = statistics.median(values)
        of_image = share * (1 - share)
        of_seed = max(of_image / SEED_IMAGES, statistics.variance(values) if len(values) > 1 else 0)
        variance += of_image / images + of_seed / len(values)
    return math.sqrt(variance)


def comparison(other, base, images):
    """Return '1.5 points above batch (...)', the accuracies [seeds] of a norm against those of batch norm.

    A difference of less than LEVEL standard errors is called level.
    """
    difference = statistics.median(other) - statistics.median(base)
    error = standard_error(other, base, images)
    counts = " and ".join(map(str, dict.fromkeys([len(other), len(base)])))
    details = [f"{spread(other)} and {spread(base)} %", f"{counts} seed{'s' * (counts != '1')}"]
    verdict = f"{100 * abs(difference):.1f} points {'above' if difference >= 0 else 'below'}"
    if abs(difference) <= LEVEL * error:
        verdict = "level with"
        details.insert(0, f"{round(100 * difference, 1) + 0.0:+.1f} points, standard error {100 * error:.1f}")
    if min(len(base), len(other)) >= SPREAD_SEEDS:
        apart = min(other) > max(base) or min(base) > max(other)
        details.append("the ranges " + ("do not overlap" if apart else "overlap"))
    return f"{verdict} batch ({', '.join(details)})"


def sentences(table):
    """Compare group norm with batch norm in words, at batch size 2 and the smallest and largest batch sizes.

    Only where all runs finished: accuracies without those that diverged would claim too much.
    """
    rows, batch_sizes, cells = table.rows, table.batch_sizes, table.cells

    def values(row, size):
        found = [run.accuracies.get("accuracy") for run in cells.get((row, "accuracy", size), [])]
        return [] if None in found else found

    names = [row for row, measure in rows if measure == "accuracy"]
    if any(settings for _, settings in names):  # rows also differ in settings: no claim about norms
        return []
    found = []
    for size in sorted({batch_sizes[0], min(batch_sizes, key=lambda b: abs(b - 2)), batch_sizes[-1]}):
        base = values(("batch", ""), size)
        for row in names:
            other = values(row, size)
            if not base or not other or not row[0].startswith("group"):
                continue
            images = cells[row, "accuracy", size][0].settings["test"]
            found.append(f"At batch size {size} {row[0]} is {comparison(other, base, images)}.")
    return found


def as_row(run):
    """Return the row of a run in results.csv: accuracies in 0 ... 1, rate at max_batch_size images per update."""
    config, settings, source = run.config, run.settings, run.stored.get("source") or {}  # empty if trained outside git
    speeds = [row["images_per_second"] for row in run.rows if "images_per_second" in row]
    return {
        "dataset": config.dataset,
        "model": config.model,
        "norm": run.norm.removesuffix("+acc"),
        "batch_size": config.batch_size,
        "accumulate": config.accumulate,
        "seed": config.seed,
        "rate": config.base_learning_rate,
        "groups": settings["groups"],
        "channels_per_group": settings["group_size"],
        "epochs": f"{epochs_of(run):.3g}",
        "state": run.state,
        **{measure: run.accuracies.get(measure) for measure in MEASURES},
        "training_accuracy": None if run.training_accuracy is None else f"{run.training_accuracy:.5f}",
        "images_per_second": f"{statistics.median(speeds):.0f}" if speeds else None,
        "commit": (source.get("commit") or "") + "+changed" * bool(source.get("changed")),
        "run": run.path.name,
    }


def write_results(runs, path):
    """Write results.csv, with a row per run sorted by CSV_ORDER."""
    rows = sorted(map(as_row, runs), key=lambda row: [str(row[name]).zfill(9) for name in CSV_ORDER])
    write_csv(path, list(rows[0]), [row.values() for row in rows])
