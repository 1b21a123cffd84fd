"""What the demo's measurements say, over its seeds, in numbers and in words."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import t as student_t

from .report import Spread, markdown_table
from .study import ARMS, CONTROL, FINO, FROZEN

CONFIDENCE = 0.95
COLUMNS = {
    "defects, seen cameras": "in domain",
    "defects, unseen cameras": "out of domain",
    "camera leakage": "camera",
    "exposure leakage, R²": "exposure R²",
    "module type": "module type",
}


def gather(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Arm → measurement → its value at each seed, arms and results in order."""
    return {
        arm: {
            key: [float(result["arms"][arm][key]) for result in results]
            for key in results[0]["arms"][arm]
        }
        for arm in ARMS
    }


def table(values: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """The table of the README: a row for each arm, mean (minimum … maximum) over the seeds."""
    rows = [
        [arm, *(str(Spread.of(measured[key])) for key in COLUMNS.values())]
        for arm, measured in values.items()
    ]
    chance = np.mean([measured["camera chance"] for measured in values.values()])
    rows.append(["chance", "0.500", "0.500", f"{chance:.3f}", "0", "0.500"])
    return markdown_table(["arm", *COLUMNS], rows)


def verdicts(values: Mapping[str, Mapping[str, Sequence[float]]]) -> list[str]:
    """FINO against the control and against the frozen backbone, seed by seed, in plain words."""
    lines = []
    for rival in (CONTROL, FROZEN):
        for what, key, lower_is_better in (
            ("defects, unseen cameras", "out of domain", False),
            ("defects, seen cameras", "in domain", False),
            ("camera leakage", "camera", True),
        ):
            name = "the control" if rival == CONTROL else "the frozen backbone"
            comparison = compare(values[FINO][key], values[rival][key], name, lower_is_better)
            lines.append(f"{what}: FINO {comparison}")
    return lines


def compare(
    ours: Sequence[float], theirs: Sequence[float], rival: str, lower_is_better: bool
) -> str:
    """Judge paired measurements of us and a rival.

    "beats" and "does NOT beat … worse" need a paired t interval of `CONFIDENCE` that leaves 0 out;
    a single seed has no interval and gets no judgement beyond its sign.
    """
    differences = np.asarray(ours) - np.asarray(theirs)
    gains = -differences if lower_is_better else differences
    mean = float(differences.mean())
    change = f"{100 * mean:+.1f} points"
    if len(gains) == 1:
        word = "is ahead of" if gains[0] > 0 else "does NOT beat"
        return f"{word} {rival}: {change} on one seed, which decides nothing"
    half = student_t.ppf((1 + CONFIDENCE) / 2, len(gains) - 1) * gains.std(ddof=1)
    half /= np.sqrt(len(gains))
    interval = f"95 % interval {100 * (mean - half):+.1f} … {100 * (mean + half):+.1f}"
    count = f"better in {int((gains > 0).sum())} of {len(gains)} seeds"
    if gains.mean() - half > 0:
        word = f"beats {rival}"
    elif gains.mean() + half < 0:
        word = f"does NOT beat {rival}, it is worse"
    else:
        word = f"does NOT beat {rival}, the difference is within the noise"
    return f"{word}: {change}, {interval}, {count}"


def markdown(
    values: Mapping[str, Mapping[str, Sequence[float]]],
    results: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
) -> str:
    """The whole report as Markdown."""
    seeds = [int(result["seed"]) for result in results]
    samples = results[0]["samples"]
    seconds = [sum(result["seconds"].values()) for result in results]
    steps = -(-samples["adapt"] // settings["batch_size"]) * settings["epochs"]
    return "\n".join(
        [
            "# Demo: solar cells under cameras that were never seen",
            "",
            f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''} "
            f"({', '.join(map(str, seeds))}). Mean (minimum … maximum) over the seeds.",
            "",
            table(values),
            "",
            "Balanced accuracy of linear probes, if nothing else is said. The two tests hold the "
            "same cells, none of which was learned from; only the camera differs. Camera leakage: "
            "how well a probe names the camera of a seen one's image; lower is better.",
            "",
            "## In words",
            "",
            *(f"* {line}." for line in verdicts(values)),
            "",
            "## How",
            "",
            f"* {samples['adapt']} images to adapt and probe on, {samples['test-in']} + "
            f"{samples['test-out']} to test on; both adapted arms: about {steps} steps of "
            f"{settings['batch_size']} images, the same views, optimizer and seed.",
            f"* {np.mean(seconds):.0f} s a seed on this machine.",
            "* Settings: " + ", ".join(f"{name} {value}" for name, value in settings.items()) + ".",
            "",
        ]
    )


def check_arms(results: Sequence[Mapping[str, Any]]) -> None:
    """All results must hold all arms.

    Raises:
        ValueError: one does not.
    """
    for result in results:
        if set(result["arms"]) != set(ARMS):
            raise ValueError(f"seed {result['seed']}: arms {sorted(result['arms'])}")
