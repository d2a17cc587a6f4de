"""Draw which entries of a feature map share one mean and variance under batch, layer, instance and group norm.

    python figure/gn.py                 # writes figure/gn.png

After figure 2 of Wu & He, arXiv 1803.08494: the axes are the batch N, the channels C and the positions (H, W).
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
from matplotlib.figure import Figure

from command import ArgumentParser, run, save_figure

N, C, POSITIONS, GROUPS = 5, 6, 5, 2
SHARED, OTHER = "#2f7fc1", "#f2f2f2"


def shared_entries(norm_type):
    """Return [N, C, POSITIONS] bool: the entries normalized together with (0, 0, 0), as defined in section 3."""
    example, channel, _ = np.indices((N, C, POSITIONS))
    group = channel // (C // GROUPS)
    return {
        "batch": channel == 0,
        "layer": example == 0,
        "instance": (example == 0) & (channel == 0),
        "group": (example == 0) & (group == 0),
    }[norm_type]


def draw(figure, column, norm_type):
    axes = figure.add_subplot(1, 4, column, projection="3d")
    # Channels go to the right, the batch to the back (example 0 in front), positions up.
    shared = shared_entries(norm_type).transpose(1, 0, 2)
    colours = np.where(shared, SHARED, OTHER)
    axes.voxels(np.ones(shared.shape, bool), facecolors=colours, edgecolor="#555555", linewidth=0.6, shade=False)
    axes.set_title(f"{norm_type.capitalize()} norm", fontsize=15, y=0.96)
    axes.text(C / 2, -1.2, -0.6, "C", fontsize=13)
    axes.text(C + 0.9, N / 2, -0.6, "N", fontsize=13)
    axes.text(-1.9, 0, POSITIONS / 2, "H, W", fontsize=13)
    axes.set_box_aspect((C, N, POSITIONS))
    axes.set_axis_off()
    axes.view_init(elev=24, azim=-58)
    axes.set_proj_type("ortho")


def main():
    ArgumentParser(description=__doc__).parse_args()
    figure = Figure(figsize=(14, 3.9))
    for column, norm_type in enumerate(("batch", "layer", "instance", "group"), 1):
        draw(figure, column, norm_type)
    figure.subplots_adjust(left=0.01, right=0.98, bottom=0.03, top=0.95, wspace=0.02)
    path = Path(__file__).with_suffix(".png")
    save_figure(figure, path, dpi=110)
    print(f"wrote {path}")


if __name__ == "__main__":
    run(main)
