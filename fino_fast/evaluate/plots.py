"""The figures of the reports."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fino_fast.errors import MissingExtraError

from .leakage import R2, Readout

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:
    raise MissingExtraError("matplotlib", "evaluate") from error

# Okabe & Ito: told apart with any colour vision.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#6E6E6E"
BAR = 0.36


def readout_bars(
    targets: Mapping[str, Mapping[str, Readout]], nuisances: Mapping[str, Mapping[str, Readout]]
) -> Figure:
    """Score and chance of every factor, one bar a test split; targets left, nuisances right."""
    panels = [
        (title, [readout for splits in factors.values() for readout in splits.values()])
        for title, factors in (
            ("to be read (higher is better)", targets),
            ("to be forgotten (chance is better)", nuisances),
        )
        if factors
    ]
    counts = [max(len(readouts), 1) for _, readouts in panels]
    figure = Figure(figsize=(1.6 + 1.3 * sum(counts), 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=counts, sharey=True)[0]
    for axis, (title, readouts) in zip(axes, panels, strict=True):
        places = np.arange(len(readouts))
        scores = [readout.score for readout in readouts]
        axis.bar(places, scores, width=0.6, color=BLUE)
        for place, readout in zip(places, readouts, strict=True):
            label_bar(axis, float(place), readout.score)
            chance_line(axis, place - 0.4, place + 0.4, readout.chance)
        units = ["R²" if readout.metric == R2 else "bal. acc." for readout in readouts]
        axis.set_xticks(
            places,
            [f"{r.factor}\n{r.split}\n({unit})" for r, unit in zip(readouts, units, strict=True)],
        )
        axis.set_title(title, fontsize=10)
        axis.set_xlim(-0.6, len(readouts) - 0.4)
        finish(axis)
    axes[0].set_ylabel("score of a linear probe")
    lowest = min(0.0, *(r.score for _, readouts in panels for r in readouts), 0.0)
    axes[0].set_ylim(lowest - 0.1 * (lowest < 0), 1.15)
    axes[-1].legend(loc="upper right", fontsize=8, frameon=False)
    return figure


def arms_figure(
    arms: Sequence[str],
    accuracy: Mapping[str, Mapping[str, Sequence[float]]],
    leakage: Mapping[str, Sequence[float]],
    chance: float,
    subtitle: str,
) -> Figure:
    """The demo's result: what each arm reads of the defects, and what of the camera.

    Args:
        arms: names, in the order of the axis.
        accuracy: arm → `in domain`, `out of domain` → balanced accuracy of each seed.
        leakage: arm → balanced accuracy of the camera probe of each seed.
        chance: of the camera probe.
        subtitle: seeds and budget.
    """
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    places = np.arange(len(arms), dtype=np.float64)
    for shift, (domain, colour) in zip(
        (-0.5, 0.5), (("in domain", BLUE), ("out of domain", ORANGE)), strict=True
    ):
        values = [accuracy[arm][domain] for arm in arms]
        seed_bars(left, places + shift * (BAR + 0.03), values, colour, domain)
    chance_line(left, -0.5, len(arms) - 0.5, 0.5)
    left.set_title("defects: higher is better", fontsize=10)
    left.set_ylabel("balanced accuracy of a linear probe")
    seed_bars(right, places, [leakage[arm] for arm in arms], GREEN, None)
    chance_line(right, -0.5, len(arms) - 0.5, chance)
    right.set_title("camera: lower is better", fontsize=10)
    for axis in (left, right):
        axis.set_xticks(places, arms)
        axis.set_ylim(0, 1.15)  # room for the legend above bars that may reach 1
        finish(axis)
    left.legend(loc="upper right", fontsize=8, frameon=False, ncols=3)
    right.legend(loc="upper right", fontsize=8, frameon=False)
    figure.suptitle(subtitle, fontsize=10, color=GREY)
    return figure


def camera_sheet(rows: Sequence[tuple[str, NDArray[np.uint8]]], columns: Sequence[str]) -> Figure:
    """What the cameras make of the same scenes.

    Args:
        rows: label and pictures [cameras, H, W] of each scene.
        columns: a title for each camera.
    """
    figure = Figure(
        figsize=(1.3 * len(columns) + 0.5, 1.45 * len(rows) + 0.5), layout="constrained"
    )
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    for line, (label, pictures) in zip(grid, rows, strict=True):
        line[0].set_ylabel(label, fontsize=8)
        for axis, picture in zip(line, pictures, strict=True):
            axis.imshow(picture, cmap="gray", vmin=0, vmax=255)
            axis.set_xticks([])
            axis.set_yticks([])
    for axis, title in zip(grid[0], columns, strict=True):
        axis.set_title(title, fontsize=8)
    return figure


def seed_bars(
    axis: Axes,
    places: NDArray[np.floating[Any]],
    values: Sequence[Sequence[float]],
    colour: str,
    label: str | None,
) -> None:
    """Bars of the means, a dot for each seed where there are several."""
    means = [float(np.mean(seeds)) for seeds in values]
    axis.bar(places, means, width=BAR, color=colour, label=label)
    for place, mean, seeds in zip(places, means, values, strict=True):
        if len(seeds) > 1:
            spread = np.linspace(-0.3, 0.3, len(seeds)) * BAR
            axis.plot(place + spread, seeds, "o", color="black", markersize=3, alpha=0.7)
        label_bar(axis, place, max(mean, *seeds), text=f"{mean:.3f}")


def label_bar(axis: Axes, place: float, height: float, text: str | None = None) -> None:
    above = 4 if height >= 0 else -12
    axis.annotate(
        text or f"{height:.3f}",
        (place, height),
        xytext=(0, above),
        textcoords="offset points",
        ha="center",
        fontsize=8,
    )


def chance_line(axis: Axes, start: float, end: float, chance: float) -> None:
    known = axis.get_legend_handles_labels()[1]
    label = None if "chance" in known else "chance"
    axis.plot([start, end], [chance, chance], "--", color=GREY, linewidth=1.2, label=label)


def finish(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.tick_params(axis="x", length=0, labelsize=9)
