"""Plots of the data benchmarks: images a second of every contender, one picture a benchmark."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def plot_data(runs: list[dict[str, Any]], folder: Path) -> None:
    """Write `data_<benchmark>.png` for every benchmark that has peers.

    Args:
        runs: entries of pytest-benchmark's JSON with `images_per_second` in their `extra_info`.
        folder: where to write.
    """
    contested = [run for run in runs if run["extra_info"].get("speedup")]
    for group in sorted({run["name"].split("[")[0] for run in contested}):
        members = [run for run in contested if run["name"].split("[")[0] == group]
        figure, panels = plt.subplots(
            1, len(members), figsize=(5 * len(members), 3), layout="constrained", squeeze=False
        )
        for panel, run in zip(panels[0], members, strict=True):
            rates = run["extra_info"]["images_per_second"]
            names = sorted(rates, key=rates.__getitem__)
            colors = ["tab:orange" if name == "ours" else "tab:gray" for name in names]
            bars = panel.barh(names, [rates[name] for name in names], color=colors)
            panel.bar_label(bars, fmt="%.0f", padding=3)
            panel.margins(x=0.15)
            panel.set(xlabel="images a second", title=run["name"].removeprefix("test_"))
        figure.savefig(folder / f"data_{group.removeprefix('test_')}.png", dpi=120)
        plt.close(figure)
