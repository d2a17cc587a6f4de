"""Draw the test accuracies of runs over their steps, and print their last ones as a table.

    python figure/curves.py --train_dir train_dir --output curves.png
    python figure/curves.py --train_dir train_dir/RUN1 train_dir/RUN2 --output curves.png

Reads metrics.jsonl, config.json and, where evaler.py was run, evaluation.json of each run folder; runs that differ in
their seed alone are one row (smallest ← median → largest) and one colour.
"""
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from matplotlib.figure import Figure

from datasets.errors import ArgumentParser, UserError, run

COLOURS = {"batch": "#d1495b", "group": "#2f7fc1", "layer": "#66a182", "instance": "#8d6a9f", "none": "#777777"}
STYLES = ("-", "--", ":", "-.")


def find_runs(folders):
    """Run folders among `folders` and one level below them, in order of their names."""
    found = []
    for folder in map(Path, folders):
        found += [folder] if (folder / "config.json").exists() else [p.parent for p in folder.glob("*/config.json")]
    return sorted(path for path in found if (path / "metrics.jsonl").exists())


def read_run(path):
    """(settings that tell a run from others, seed, steps, test accuracies, accuracy of evaler.py or None)."""
    try:
        config = json.loads((path / "config.json").read_text())
        rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        evaluation = path / "evaluation.json"
        final = json.loads(evaluation.read_text()) if evaluation.exists() else None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    tested = [(row["step"], row["test_loss/accuracy"]) for row in rows if "test_loss/accuracy" in row]
    flags, derived = config["flags"], config["derived"]
    norm = flags["norm_type"] + (" + WS" if flags["weight_standardization"] else "")
    settings = (flags["dataset"], derived["model"], norm, derived["batch_size"], derived["max_training_step"])
    return settings, flags["seed"], tested, final["accuracy"] if final and final["split"] == "test" else None


def spread(values):
    """'median' of one value, 'smallest ← median → largest' of several, in percent."""
    median = f"{100 * statistics.median(values):.2f}"
    return median if len(values) == 1 else f"{100 * min(values):.2f} ← {median} → {100 * max(values):.2f}"


def print_table(runs):
    print(f"{'dataset':<14}{'model':<10}{'norm':<12}{'batch size':>10}{'steps':>8}{'runs':>6}  "
          f"{'test accuracy %':<28}evaluated anew %")
    for settings in sorted({settings for settings, *_ in runs}):
        alike = [run for run in runs if run[0] == settings]
        dataset, model, norm, batch_size, steps = settings
        last = [tested[-1][1] for _, _, tested, _ in alike if tested]
        again = [final for *_, final in alike if final is not None]
        print(f"{dataset:<14}{model:<10}{norm:<12}{batch_size:>10}{steps:>8}{len(alike):>6}  "
              f"{spread(last) if last else 'not tested yet':<28}{spread(again) if again else 'not yet'}")


def draw(runs, path):
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    batch_sizes = sorted({settings[3] for settings, *_ in runs}, reverse=True)
    labels = set()
    for settings, _, tested, _ in runs:
        dataset, model, norm, batch_size, _ = settings
        label = f"{norm}, batch size {batch_size}"
        axes.plot([step for step, _ in tested], [100 * accuracy for _, accuracy in tested],
                  STYLES[batch_sizes.index(batch_size) % len(STYLES)], color=COLOURS[norm.split()[0]], alpha=0.85,
                  label=None if label in labels else label)
        labels.add(label)
    titles = sorted({f"{dataset}, {model}" for (dataset, model, *_), *_ in runs})
    axes.set(xlabel="step", ylabel="accuracy on the whole test split (%)", title="; ".join(titles))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    figure.savefig(path, dpi=120)


def main():
    parser = ArgumentParser(description="Draw and tabulate the test accuracies of runs.")
    parser.add_argument("--train_dir", nargs="+", default=["train_dir"], help="run folders, or folders of them")
    parser.add_argument("--output", default="curves.png", help="the picture to write")
    flags = parser.parse_args()
    runs = [read_run(path) for path in find_runs(flags.train_dir)]
    if not runs:
        raise UserError(f"no run folder in {', '.join(flags.train_dir)}: name a folder that trainer.py wrote")
    print_table(runs)
    draw(runs, flags.output)
    print(f"wrote {flags.output}")


if __name__ == "__main__":
    run(main)
