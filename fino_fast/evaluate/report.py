"""Reports that a person and a program can read: JSON, Markdown and PNG in one new folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fino_fast.data.files import committed, committed_folder, write_json
from fino_fast.errors import MissingExtraError

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise MissingExtraError("matplotlib", "evaluate") from error

DPI = 150


@dataclass(frozen=True)
class Spread:
    """Several measurements of one quantity."""

    mean: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Mean, minimum and maximum.

        Raises:
            ValueError: there are no values, or one is not finite.
        """
        if not len(values) or not np.isfinite(values).all():
            raise ValueError(f"expected finite measurements, found {list(values)}")
        return cls(float(np.mean(values)), float(min(values)), float(max(values)), len(values))

    def __str__(self) -> str:
        if self.count == 1:
            return f"{self.mean:.3f}"
        return f"{self.mean:.3f} ({self.low:.3f} … {self.high:.3f})"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns also line up where Markdown is not rendered.

    Raises:
        ValueError: a row is not as long as the header.
    """
    cells = [[cell.replace("|", r"\|") for cell in row] for row in (header, *rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def write_report(
    folder: Path,
    name: str,
    *,
    content: Mapping[str, Any],
    markdown: str,
    figures: Mapping[str, Figure],
) -> None:
    """Write `<name>.json`, `<name>.md` and `<figure>.png`; all of it appears, or nothing.

    Args:
        folder: made here; it must not exist.
        content: plain JSON values; NaN is refused.

    Raises:
        ConfigError: `folder` exists.
        DiskFullError: no room left; nothing is left of the folder.
    """
    with committed_folder(folder) as draft:
        write_json(draft / f"{name}.json", content)
        with committed(draft / f"{name}.md") as file:
            file.write(markdown.encode())
        for title, figure in figures.items():
            with committed(draft / f"{title}.png") as file:
                figure.savefig(file, format="png", dpi=DPI)
