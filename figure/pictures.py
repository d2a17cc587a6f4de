"""Pictures of the tables of results.py: accuracy against batch size, and curves over the steps. See compare.py."""

import math
import statistics

from matplotlib.figure import Figure

from command import save_figure
from results import COLOURS, label

NARROW = 10  # the second panel shows at most this many points below the highest accuracy
MANY_ROWS = 6  # with more rows, names are in a legend
MANY_NORMS = 4  # with more norms, batch and group norm are gray, as references


def rows_of(table):
    """Return the rows of a table once each: pictures show the accuracy by moving averages alone."""
    return list(dict.fromkeys(row for row, _ in table.rows))


def line_style(row):
    return "--" if row[0].endswith("+acc") else "-"


def points_of(table, row):
    """Return [(batch size, smallest, median, largest accuracy in %)] of a row of a table."""
    points = []
    for size in table.batch_sizes:
        runs = table.cells.get((row, "accuracy", size), [])
        values = [100 * run.accuracies["accuracy"] for run in runs if "accuracy" in run.accuracies]
        if values:
            points.append((size, min(values), statistics.median(values), max(values)))
    return points


def draw_rows(axes, table):
    """Draw accuracy against batch size: a line and a band per row, or dots if a row has at most two batch sizes.

    Returns [(last median, name, colour)] of the rows that reach the largest batch size; others are named at their ends.
    """
    rows, batch_sizes = rows_of(table), table.batch_sizes
    many = len({norm.removesuffix("+acc") for norm, _ in rows}) > MANY_NORMS
    colours = COLOURS | ({"batch": "#707070", "group": "#b0b0b0"} if many else {})
    ends = []
    for i, row in enumerate(rows):
        points = points_of(table, row)
        if not points:
            continue
        sizes, low, middle, high = zip(*points)
        colour, name = colours[row[0]], label(row)
        if len(sizes) <= 2:
            sizes = [size * 2 ** (0.08 * (i - len(rows) / 2)) for size in sizes]  # side by side
            axes.vlines(sizes, low, high, color=colour)
            axes.plot(sizes, middle, linestyle="none", marker="o", color=colour, label=name)
        else:
            axes.plot(sizes, middle, linestyle=line_style(row), marker="o", markersize=3, color=colour, label=name)
            axes.fill_between(sizes, low, high, color=colour, alpha=0.18, linewidth=0)
        if points[-1][0] == batch_sizes[-1]:
            ends.append((middle[-1], name, colour))
        else:
            at = {"xytext": (5, -8), "ha": "left"} if len(sizes) > 2 else {"xytext": (-6, -3), "ha": "right"}
            axes.annotate(name, (sizes[-1], middle[-1]), textcoords="offset points", color=colour, fontsize=8, **at)
    axes.set_xscale("log", base=2)
    axes.set_xticks(batch_sizes, [str(size) for size in batch_sizes])
    axes.set_xlabel("batch size (images that batch norm sees)")
    axes.grid(alpha=0.3)
    return ends


def name_ends(axes, ends):
    """Write the names of lines beside their ends, without overlap."""
    bottom, top = axes.get_ylim()
    y = -math.inf
    for value, name, colour in sorted(ends):
        y = max((value - bottom) / (top - bottom), y + 0.05, 0)
        axes.text(1.02, y, name, color=colour, fontsize=8, va="center", transform=axes.transAxes)


def draw_batch_sizes(found, path):
    """Draw accuracy against batch size, two panels per table: all accuracies, and at most the upper NARROW points.

    A table with one batch size, or without a finished run, is skipped.
    """
    found = [table for table in found if len(table.batch_sizes) > 1]
    found = [table for table in found if any(points_of(table, row) for row in rows_of(table))]
    if not found:
        return
    figure = Figure(figsize=(9.5, 4.4 * len(found)), layout="constrained")
    parts = figure.subfigures(len(found), 1, squeeze=False)[:, 0]
    for part, table in zip(parts, found):
        part.suptitle(table.short_title, fontsize=10)
        left, right = part.subplots(1, 2)
        draw_rows(left, table)
        ends = draw_rows(right, table)
        top = max(high for row in rows_of(table) for _, _, _, high in points_of(table, row))
        bottom = max(top - NARROW, left.get_ylim()[0])
        right.set_ylim(bottom, top + 0.05 * (top - bottom))
        left.set_ylabel("accuracy (%)")
        right.set_title(f"enlarged: above {bottom:.0f} %", fontsize=9)
        if len(ends) > MANY_ROWS:
            part.legend(*left.get_legend_handles_labels(), loc="outside right center", fontsize=8)
        else:
            name_ends(right, ends)
    if any(table.seeds > 1 for table in found):
        figure.supxlabel("lines: medians; bands: from the smallest to the largest of the seeds", fontsize=8)
    save_figure(figure, path)


def draw_curves(found, path):
    """Draw training (thin) and test (thick) accuracy over steps, medians with bands, in a panel per batch size."""
    figure = Figure(figsize=(8.4, 5.6 * len(found)), layout="constrained")
    parts = figure.subfigures(len(found), 1, squeeze=False)[:, 0]
    for part, table in zip(parts, found):
        batch_sizes = table.batch_sizes
        across = -(-len(batch_sizes) // 2)
        panels = part.subplots(min(2, len(batch_sizes)), across, sharex=True, sharey=True, squeeze=False).ravel()
        for axes, size in zip(panels, batch_sizes):
            axes.set_title(f"batch size {size}", fontsize=9)
            axes.locator_params(axis="x", nbins=5)
            axes.grid(alpha=0.3)
            for row in rows_of(table):
                runs = table.cells.get((row, "accuracy", size), [])
                for key, width in (("loss/accuracy", 0.7), ("test_loss/accuracy", 1.6)):
                    steps, low, middle, high = curve_of(runs, key)
                    name = label(row) if key == "test_loss/accuracy" else None
                    axes.plot(steps, middle, line_style(row), linewidth=width, color=COLOURS[row[0]], label=name)
                    axes.fill_between(steps, low, high, color=COLOURS[row[0]], alpha=0.15, linewidth=0)
        for axes in panels[len(batch_sizes) :]:
            axes.axis("off")
        handles = {name: line for axes in panels for line, name in zip(*axes.get_legend_handles_labels())}
        part.suptitle(f"{table.short_title}; thick: test, thin: training", fontsize=10)
        for axes in panels[::across]:
            axes.set_ylabel("accuracy (%)")
        for axes in panels[len(batch_sizes) - across : len(batch_sizes)]:  # the lowest of each column
            axes.set_xlabel("step")
            axes.tick_params(labelbottom=True)
        part.legend(handles.values(), handles, loc="outside lower center", ncols=4, fontsize=8)
    save_figure(figure, path)


def curve_of(runs, key):
    """Return (steps, smallest, median, largest accuracy in %) of runs, at the steps that any of them logged.

    Training accuracy soon after another row is left out: in the logs of older versions it is that of the steps since
    the row before, which is noisy if these are few. Now it is the mean over the last log_step steps.
    """
    values = {}
    for run in runs:
        for before, row in zip([{"step": 0}, *run.rows], run.rows):
            enough = row["step"] - before["step"] >= min(run.config.log_step, run.config.write_summary_step)
            if key in row and (enough or key.startswith("test_")):
                values.setdefault(row["step"], []).append(100 * row[key])
    steps = sorted(values)
    return steps, *([of(values[step]) for step in steps] for of in (min, statistics.median, max))
