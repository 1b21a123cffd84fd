"""The report of `fino-fast audit`: audit.json, audit.md and audit.png."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from fino_fast.errors import MissingExtraError

from .audit import Audit
from .audit_advice import number, percent, thresholds
from .audit_association import ETA, Association
from .audit_factors import Classes, FactorAudit
from .plots import GREY
from .report import markdown_table, write_report

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise MissingExtraError("matplotlib", "evaluate") from error

_LONGEST = 32  # characters of a value in a table
_ANNOTATED = 16  # factors up to which the heat map has room for numbers


def save_audit(result: Audit, folder: Path) -> None:
    """Write audit.json, audit.md and audit.png into a new folder.

    Raises:
        ConfigError: `folder` exists.
        DiskFullError: no room left; nothing is left of the folder.
    """
    content = asdict(result)
    for key in ("associations", "missingness"):
        pairs = getattr(result, key)
        content[key] = [asdict(pair) | {"strength": pair.strength} for pair in pairs]
    write_report(
        folder,
        "audit",
        content=content,
        markdown=markdown(result),
        figures={"audit": heat_map([f.name for f in result.factors], result.associations)},
    )


def summary(result: Audit) -> list[str]:
    """What a person reads on the terminal: sizes and advice."""
    sizes = ", ".join(f"{count} {split}" for split, count in result.splits.items())
    count = len(result.factors)
    return [
        f"{result.samples} samples: {sizes}; {count} factor{'s' * (count != 1)}",
        *(f"- {advice.topic}: {advice.text}" for advice in result.advice),
        *([] if result.advice else ["nothing to advise against"]),
    ]


def markdown(result: Audit) -> str:
    """The whole report for a person."""
    names = [factor for factor in result.factors if factor.classes is not None]
    numbers = [factor for factor in result.factors if factor.classes is None]
    lines = ["# Audit of the metadata", "", *summary(result)[:1], ""]
    lines += ["## Advice", ""]
    lines += [f"- **{advice.topic}**: {advice.text}" for advice in result.advice] or ["None."]
    lines += ["", "Where advice begins:", "", *thresholds(), ""]
    lines += ["## Factors", "", factor_table(result), ""]
    if names:
        lines += ["## Names", "", name_table(names), ""]
        lines += [
            "Effective: exp of the entropy, as many equally frequent values would be as hard to "
            "guess. Of a factor of several values a sample, each value counts.",
            "",
        ]
    if numbers:
        lines += ["## Numbers", "", number_table(numbers), ""]
        lines += [
            "Outside: of the declared bounds, which ingestion lets nothing pass, or without them "
            "of the adaptation split's range. Cyclic: circular mean and, as concentration, mean "
            "resultant length (1 all the same, 0 evenly spread).",
            "",
        ]
    if result.associations:
        lines += ["## Pairs of factors", "", pair_table(result.associations), ""]
        lines += [
            "On the samples that have both. Corrected: Cramér's V after Bergsma (2013), ε² for "
            f"{ETA}; – where the samples cannot tell. |ρ|: Spearman; with several columns the "
            "first canonical correlation of the ranks; a cyclic factor counts as (sin, cos), the "
            "values of one sample of a multi-valued factor as one combination. λ (Goodman and "
            "Kruskal): share of the errors in guessing one factor that knowing the other avoids.",
            "",
        ]
    if result.missingness:
        lines += ["## Gaps that depend on another factor", ""]
        lines += [gap_table(result.missingness), ""]
    return "\n".join(lines)


def factor_table(result: Audit) -> str:
    splits = list(result.splits)
    rows = [
        [
            factor.name,
            factor.kind,
            factor.role,
            percent(factor.missing),
            *(percent(factor.missing_by_split[split]) for split in splits),
            "yes" if factor.constant else "",
        ]
        for factor in result.factors
    ]
    by_split = [f"in {split}" for split in splits]
    return markdown_table(["factor", "kind", "role", "missing", *by_split, "constant"], rows)


def name_table(factors: Sequence[FactorAudit]) -> str:
    rows = [
        [factor.name, *class_cells(factor.classes)]
        for factor in factors
        if factor.classes is not None
    ]
    header = ["factor", "values seen / vocabulary", "once", "effective", "largest", "smallest"]
    return markdown_table(header, rows)


def class_cells(classes: Classes) -> list[str]:
    ends = [
        f"{shown(end[0])}: {end[1]}" if end else "–" for end in (classes.largest, classes.smallest)
    ]
    seen = f"{classes.seen} / {classes.vocabulary}"
    return [seen, str(classes.once), f"{classes.effective:.2f}", *ends]


def number_table(factors: Sequence[FactorAudit]) -> str:
    rows = [
        [
            factor.name,
            column.column,
            f"{column.minimum:.6g} … {column.maximum:.6g}",
            *("–" if v is None else f"{v:.6g}" for v in (column.mean, column.std)),
            number(column.concentration),
            "–" if column.outside is None else percent(column.outside),
        ]
        for factor in factors
        for column in factor.ranges
    ]
    header = ["factor", "column", "range", "mean", "std", "concentration", "outside"]
    return markdown_table(header, rows)


def pair_table(pairs: Sequence[Association]) -> str:
    """The pairs, strongest first."""
    rows = [
        [
            pair.first,
            pair.second,
            pair.measure,
            number(pair.value),
            number(pair.uncorrected),
            number(pair.lambda_first),
            number(pair.lambda_second),
            str(pair.rows),
        ]
        for pair in strongest_first(pairs)
    ]
    header = ["a", "b", "measure", "corrected", "plain", "λ of a given b", "λ of b given a", "rows"]
    return markdown_table(header, rows)


def gap_table(pairs: Sequence[Association]) -> str:
    rows = [
        [pair.first, pair.second, pair.measure, number(pair.value), str(pair.rows)]
        for pair in strongest_first(pairs)
    ]
    return markdown_table(["missing", "depends on", "measure", "corrected", "rows"], rows)


def strongest_first(pairs: Sequence[Association]) -> list[Association]:
    return sorted(pairs, key=lambda pair: 1.0 if pair.strength is None else -pair.strength)


def shown(value: str) -> str:
    """A value of the table for a person: on one line, not too long."""
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def heat_map(names: Sequence[str], pairs: Sequence[Association]) -> Figure:
    """Strength of every pair on the scale of a correlation; grey where the samples cannot tell."""
    count = len(names)
    strengths = np.full((count, count), np.nan)
    place = {name: i for i, name in enumerate(names)}
    for pair in pairs:
        if pair.strength is not None:
            i, j = place[pair.first], place[pair.second]
            strengths[i, j] = strengths[j, i] = pair.strength
    side = 2.5 + 0.5 * min(count, 60)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor(GREY)
    image = axes.imshow(strengths, cmap="viridis", vmin=0, vmax=1)
    # A name like "$a$" is text, no formula.
    axes.set_xticks(range(count), names, rotation=90, parse_math=False)
    axes.set_yticks(range(count), names, parse_math=False)
    if count <= _ANNOTATED:
        for (i, j), strength in np.ndenumerate(strengths):
            if np.isfinite(strength):
                colour = "black" if strength > 0.6 else "white"
                axes.text(j, i, f"{strength:.2f}", ha="center", va="center", color=colour, size=8)
    figure.colorbar(image, label=f"corrected V, √{ETA} or |ρ|")
    axes.set_title("association of the factors", fontsize=10)
    return figure
