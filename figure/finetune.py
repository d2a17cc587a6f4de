"""Compare norms when a trained network is fine-tuned on another task at batch size 2.

    python figure/finetune.py                   # trains the missing runs, then makes the table
    python figure/finetune.py --from_logs       # makes the table from the logs in --train_dir, without training

Networks are trained at batch size 32 on the classes 0 to 4 of CIFAR-10, one for each norm and seed, then fine-tuned on
500 images of each of the classes 5 to 9, in five ways: batch norm, batch norm with frozen statistics, group norm
converted from batch norm, group norm, and group+ws. Each way uses the learning rate (0.02, 0.06, 0.2 or 0.6) that is
best on held-out training images with seed 0, and is tested on the 5,000 test images of its classes. Every run is a run
folder of trainer.py, as for compare.py. Writes table.md to --train_dir.
"""

import functools
from pathlib import Path

import numpy as np

import compare  # first: it finds the modules of the repo
import datasets
import results
from command import ArgumentParser, UserError, run, within, write_atomically
from datasets import create_default_splits, hdf5
from runs import MEASURES, read_run, read_runs

BEFORE, AFTER = "CIFAR10_first", "CIFAR10_last"  # the two tasks, packed like a user's own datasets
CLASSES = {BEFORE: range(5), AFTER: range(5, 10)}
IMAGES_PER_CLASS = {BEFORE: None, AFTER: 500}
BATCH_SIZES = {BEFORE: 32, AFTER: 2}
RATES = (0.02, 0.06, 0.2, 0.6)  # at 64 images per update
HELD_OUT = 500
WAYS = {  # name: (norm of the trained network, norm of the fine-tuned network, more flags)
    "batch": ("batch", "batch", []),
    "batch, moving statistics frozen": ("batch", "batch", ["--freeze_batch_norm"]),
    "group, converted from batch": ("batch", "group", []),
    "group": ("group", "group", []),
    "group+ws": ("group+ws", "group+ws", []),
}


def make_task(name, data_dir):
    """Pack the first images of the task's classes of CIFAR-10 into <data_dir>/<name>, unless it exists."""
    if datasets.is_prepared(name, data_dir):
        return
    splits, classes, most = create_default_splits("CIFAR10", data_dir), CLASSES[name], IMAGES_PER_CLASS[name]
    rows = []
    for split, limit in zip(splits, (most, None)):
        of_classes = [np.flatnonzero(split.labels == label)[:limit] for label in classes]
        rows.append(np.sort(np.concatenate(of_classes)))
    parts = (
        (i, split.read(chosen), split.labels[chosen] - classes[0], [split.ids[row] for row in chosen])
        for i, (split, chosen) in enumerate(zip(splits, rows))
    )
    made_from = f"CIFAR10, classes {classes[0]} to {classes[-1]}" + (f", {most} images of each" if most else "")
    made_from += f": {splits[0].made_from}" if splits[0].made_from else ""
    names = [splits[0].class_names[label] for label in classes]
    folder = Path(datasets.folder_of(name, data_dir))
    folder.mkdir(parents=True, exist_ok=True)
    origin = {"made_from": made_from}
    hdf5.write(str(folder), hdf5.Source(names, splits[0].image_shape, sum(map(len, rows)), parts, origin))


class Task:
    """One of the two tasks: the flags that its runs share, its folder, and its cells."""

    def __init__(self, name, flags, epochs, *more):
        given = ["--dataset", name, "--train_dir", str(Path(flags.train_dir) / name), "--data_dir", flags.data_dir]
        given += ["--jobs", str(flags.jobs), "--model", "resnet8", "--augment", "--epochs", str(epochs), *more]
        self.name = name
        self.flags, self.rest = compare.parse_flags(given)
        self.splits = functools.cache(lambda held_out: create_default_splits(name, flags.data_dir, held_out))

    def cell(self, norm, seed, *more, held_out=None):
        rest = [*self.rest, *more, *(("--validation", str(held_out)) if held_out else ())]
        return compare.Cell(self.flags, rest, norm, BATCH_SIZES[self.name], seed, self.splits(held_out))

    def train(self, cells):
        """Train all cells, and return their runs."""
        waiting = compare.to_do(cells, read_runs([self.flags.train_dir]))
        compare.train_all(waiting, len(cells), self.flags)
        runs = read_runs([self.flags.train_dir])
        return [cell.find(runs) for cell in cells]


def way_of(found):
    """Return the name in WAYS of a run, from its norm and the norm of the run that it started from."""
    more = ["--freeze_batch_norm"] * found.config.freeze_batch_norm
    if found.config.checkpoint:
        source = read_run(found.path.parent.parent / BEFORE / Path(found.config.checkpoint).name)
        for name, way in WAYS.items():
            if way == (source.norm, found.norm, more):
                return name
    raise UserError(f"{found.path} is a run of another kind than those of this table: move it to another folder")


def best_rates(runs):
    """Return {way: the rate with the highest accuracy on the held-out images}."""
    accuracies = {}
    for found in runs:
        if found.config.validation and "accuracy" in found.accuracies:
            rates = accuracies.setdefault(way_of(found), {})
            rates[found.config.base_learning_rate] = found.accuracies["accuracy"]
    return {way: max(rates, key=rates.get) for way, rates in accuracies.items()}


def table(runs):
    """Return the runs as a Markdown table, with a row for each way and measure."""
    rows = {}
    for found in runs:
        measures = ["accuracy"] if found.config.freeze_batch_norm else found.accuracies or ["accuracy"]
        for measure in measures:
            rows.setdefault((way_of(found), measure), []).append(found)
    cells = []
    for way, measure in sorted(rows, key=lambda key: (list(WAYS).index(key[0]), list(MEASURES).index(key[1]))):
        alike = rows[way, measure]
        rate = alike[0].config.base_learning_rate
        cells.append([way + MEASURES[measure], f"{rate:g}", results.cell_text(alike, measure, None)])
    return results.as_markdown(["way", "rate", "accuracy"], cells)


def table_of_rates(runs):
    """Return the accuracies by which the rates were chosen as a Markdown table."""
    found = {(way_of(run), run.config.base_learning_rate): [run] for run in runs}
    rates = sorted({rate for _, rate in found})
    cells = []
    for way in WAYS:
        texts = [results.cell_text(found.get((way, rate), []), "accuracy", None) for rate in rates]
        cells.append([way, *texts])
    return results.as_markdown(["way", *(f"rate {rate:g}" for rate in rates)], cells)


def check_alike(runs):
    """Raise UserError if runs of a way repeat a seed, or differ in more than seed, source and (held out) rate."""
    first, seen = {}, {}
    for found in runs:
        way, validation, rate = way_of(found), found.config.validation, found.config.base_learning_rate
        other = first.setdefault((way, validation), found)
        free = {"checkpoint"} | ({"base_learning_rate", "peak_learning_rate"} if validation else set())
        names = {name for name, value in found.settings.items() if value != other.settings.get(name)} - free
        if names:
            raise UserError(f"{found.path} and {other.path} differ in {min(names)}: move one of them to another folder")
        twin = seen.setdefault((way, validation, rate, found.config.seed), found)
        if twin is not found:
            raise UserError(f"{found.path} repeats {twin.path}: move one of them to another folder")


def text_of(runs):
    """Return the text of table.md."""
    check_alike(runs)
    held_out = [found for found in runs if found.config.validation]
    tested = [found for found in runs if not found.config.validation]
    return (
        f"Accuracy in % on the test split, each way at its best rate, smallest ← median → largest over seeds:\n\n"
        f"{table(tested)}\n\nOn {HELD_OUT} training images held out, seed 0:\n\n{table_of_rates(held_out)}\n"
    )


def main():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=within(int, low=1), default=3, help="runs per way, with the seeds 0, 1, ...")
    parser.add_argument("--epochs", type=within(int, low=1), default=8, help="epochs on the first five classes")
    last = "epochs on the last five classes"
    parser.add_argument("--finetune_epochs", type=within(int, low=1), default=20, help=last)
    parser.add_argument("--train_dir", default="studies/finetune", help="folder of the run folders")
    parser.add_argument("--data_dir", default=datasets.DATA_DIR, help="folder of CIFAR10, and of its two halves")
    jobs = "processes to run at the same time"
    parser.add_argument("--jobs", type=within(int, low=1), default=len(compare.available_cores()), help=jobs)
    parser.add_argument("--from_logs", action="store_true", help="make the table from the logs, without training")
    flags = parser.parse_args()
    folder = Path(flags.train_dir) / AFTER
    if flags.from_logs:
        useless = [name for name in parser.names_given() if name not in ("from_logs", "train_dir")]
        if useless:
            raise UserError(f"--from_logs trains nothing, so --{useless[0]} has no effect: omit it")
        found = read_runs([folder])
        if not found:
            raise UserError(f"no run folder in {folder}: give the --train_dir of figure/finetune.py")
    else:
        for name in CLASSES:
            make_task(name, flags.data_dir)
        before = Task(BEFORE, flags, flags.epochs)
        after = Task(AFTER, flags, flags.finetune_epochs, "--test_sample_step", "200")
        sources = {
            (norm, seed): before.cell(norm, seed)
            for seed in range(flags.seeds)
            for norm in dict.fromkeys(source for source, _, _ in WAYS.values())
        }
        trained = before.train(list(sources.values()))

        def cell(way, seed, rate, held_out=None):
            source, norm, options = WAYS[way]
            options = ["--checkpoint", str(sources[source, seed].find(trained).path), *options]
            made = after.cell(norm, seed, "--learning_rate", str(rate), *options, held_out=held_out)
            made.name = f"{way}, rate {rate}, seed {seed}" + ", held out" * bool(held_out)
            return made

        found = after.train([cell(way, 0, rate, HELD_OUT) for way in WAYS for rate in RATES])
        rates = best_rates(found)
        found += after.train([cell(way, seed, rates[way]) for seed in range(flags.seeds) for way in WAYS])
    text = text_of(found)
    print(text)
    write_atomically(Path(flags.train_dir) / "table.md", text)


if __name__ == "__main__":
    run(main)
