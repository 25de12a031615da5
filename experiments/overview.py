"""The picture at the head of README and the card that is shown where the site is linked, from real photos and measured accuracies.

    python experiments/overview.py DATA     # homework_96.zip

Writes nbs/images/overview.jpg and nbs/images/card.jpg. The photos are of the data set named in README (CC BY 4.0); the accuracies are those of
experiments/clean_vs_shifted.csv, with MobileNetV2 on val_96.zip.
"""
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from bloodnb.augmentation import augment
from bloodnb.cleaning import clean
from bloodnb.corruptions import corrupt
from bloodnb.data import CellImages, load, take

ROOT = Path(__file__).resolve().parent.parent
PURPLE, GREY, RED = "#6a3d9a", "#b9b3c4", "#c0392b"
SHOWN = ("hue", "gaussian_noise", "gaussian_blur", "translation", "shot_noise", "channel_shift")
RUNS = {"tuned MobileNetV2": "default", "tuned MobileNetV2, robust": "robust"}


def mosaic(ax, images: np.ndarray, columns: int, gap: int = 6, crossed: tuple[int, ...] = ()) -> None:
    """Pictures in rows, some of them crossed out."""
    side = images.shape[1]
    rows = -(-len(images) // columns)
    canvas = np.full((rows * (side + gap) - gap, columns * (side + gap) - gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * (side + gap), (i % columns) * (side + gap)
        canvas[top : top + side, left : left + side] = image
        if i in crossed:
            for ends in ((left, left + side), (left + side, left)):
                ax.plot(ends, (top, top + side), color=RED, linewidth=2.5)
    ax.imshow(canvas)
    ax.axis("off")


def pictures(cells: CellImages) -> tuple[np.ndarray, tuple[int, ...], np.ndarray, np.ndarray]:
    """Nine photos of which two are junk, six trained-on pictures of one cell, and six shifted ones."""
    kept, findings = clean(cells)
    junk = findings[~findings.kept & (findings.kind == "contaminant")]
    planted = [group["index"].iloc[0] for _, group in junk.groupby("group")][:2]
    of_each = take(kept, kept.index[[np.flatnonzero(kept.labels == label)[3] for label in range(8)]])
    crossed = (2, 6)
    first = list(of_each.images[:7])
    for place, number in zip(crossed, planted):
        first.insert(place, cells.images[np.flatnonzero(cells.index == number)[0]])
    one = take(kept, kept.index[np.flatnonzero(kept.labels == 6)[3:4]])
    altered = np.concatenate([augment(one, "robust", epoch=epoch)[0] for epoch in range(6)])
    shifted = np.concatenate([corrupt(one, "homework", name, 4).images for name in SHOWN])
    return np.array(first[:9]), crossed, altered, shifted


def bars(ax, size: float) -> None:
    table = pd.read_csv(ROOT / "experiments" / "clean_vs_shifted.csv").set_index("run").loc[list(RUNS)]
    columns = {"clean": "as they are", "homework": "shifted as the\nhidden test", "held_out": "shifted\notherwise"}
    for k, (run, colour) in enumerate(zip(table.index, (GREY, PURPLE))):
        x = np.arange(len(columns)) + (k - 0.5) * 0.38
        values = table.loc[run, list(columns)].astype(float)
        ax.bar(x, values, 0.36, color=colour, label=f"trained by recipe {RUNS[run]}")
        for at, value in zip(x, values):
            ax.text(at, value + 0.012, f"{value:.3f}", ha="center", fontsize=size)
    ax.set(xticks=range(len(columns)), ylim=(0, 1.28), yticks=[])
    ax.set_xticklabels(columns.values(), fontsize=size)
    ax.tick_params(length=0)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.legend(loc="upper center", ncols=1, frameon=False, fontsize=size)


def overview(shown: tuple) -> plt.Figure:
    first, crossed, altered, shifted = shown
    fig, axes = plt.subplots(1, 4, figsize=(13, 3.9), width_ratios=[1, 0.68, 0.68, 1.25], layout="constrained")
    mosaic(axes[0], first, 3, crossed=crossed)
    mosaic(axes[1], altered, 2)
    mosaic(axes[2], shifted, 2)
    bars(axes[3], 9)
    for ax, title in zip(axes, ("1  find junk and copies", "2  train on altered\npictures", "3  test on what the\nhidden set does", "4  say how good that is")):
        ax.set_title(title, loc="left", fontsize=12, fontweight="bold", color="#4a2a73")
    plt.close(fig)
    return fig


def card(shown: tuple) -> plt.Figure:
    """1200 x 630 pixels, as pages are shown elsewhere."""
    fig = plt.figure(figsize=(12, 6.3), dpi=100, facecolor="#4a2a73")
    fig.text(0.05, 0.80, "bloodnb", fontsize=54, color="white", fontweight="bold")
    fig.text(0.05, 0.66, "Classify photos of blood cells,\nand know how far to trust it", fontsize=25, color="#e9def5", va="center")
    for left, images in ((0.05, shown[0][[0, 1, 3, 4, 5, 7]]), (0.53, shown[3])):
        ax = fig.add_axes((left, 0.06, 0.43, 0.46))
        mosaic(ax, images, 3)
        ax.set_anchor("SW")
    plt.close(fig)
    return fig


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    shown = pictures(load(sys.argv[1]))
    images = ROOT / "nbs" / "images"
    overview(shown).savefig(images / "overview.jpg", dpi=110, facecolor="white", pil_kwargs={"quality": 88})
    card(shown).savefig(images / "card.jpg", dpi=100, pil_kwargs={"quality": 88})


if __name__ == "__main__":
    main()
