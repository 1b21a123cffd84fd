"""What `fino-fast evaluate` measures on one folder of embeddings, and its report."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fino_fast.errors import ConfigError

from .embed import EmbeddingSet
from .leakage import Readout, read_names, read_numbers
from .plots import readout_bars
from .report import markdown_table, write_report


@dataclass(frozen=True)
class Evaluation:
    """The readouts of one folder of embeddings.

    Attributes:
        targets: factor → test split → readout; high is good.
        nuisances: the same; close to chance is good.
        train: split that the probes learned from.
        tests: splits they were scored on.
        about: what the embeddings are of.
    """

    targets: dict[str, dict[str, Readout]]
    nuisances: dict[str, dict[str, Readout]]
    train: str
    tests: list[str]
    about: dict[str, Any]


def evaluate(
    embeddings: EmbeddingSet,
    *,
    targets: Sequence[str],
    nuisances: Sequence[str] | None = None,
    train: str | None = None,
    tests: Sequence[str] | None = None,
    seed: int = 0,
) -> Evaluation:
    """Probe factors of an embedding set.

    Args:
        embeddings: the features with their metadata.
        targets: factors that should be read well.
        nuisances: factors that should not; None: those of role `suppress`.
        train: split that the probes learn from; None: the adaptation split.
        tests: splits they are scored on; None: all others.
        seed: of the probes' cross-validation.

    Raises:
        ConfigError: nothing to probe, nothing to test on, or training rows among the test rows.
        DataError: an unknown factor or split, or a factor that cannot be probed.
    """
    if nuisances is None:
        roles = embeddings.about["roles"]
        nuisances = [name for name in embeddings.factors if roles.get(name) == "suppress"]
        nuisances = [name for name in nuisances if name not in targets]
    if not targets and not nuisances:
        raise ConfigError("nothing to probe: no target is named and no factor is suppressed")
    if both := sorted(set(targets) & set(nuisances)):
        raise ConfigError(f"{both[0]!r} is named as a target and as a nuisance")
    train = train or embeddings.about["adaptation_split"]
    tests = list(tests) if tests is not None else [s for s in embeddings.splits if s != train]
    if train in tests or not tests:
        raise ConfigError(
            f"the probes learn from {train!r} and are tested on {tests}: expected other splits; "
            f"the embeddings hold {embeddings.splits}"
        )

    def readouts(factors: Sequence[str]) -> dict[str, dict[str, Readout]]:
        return {f: read_factor(embeddings, f, train, tests, seed=seed) for f in factors}

    return Evaluation(readouts(targets), readouts(nuisances), train, tests, embeddings.about)


def read_factor(
    embeddings: EmbeddingSet, factor: str, train: str, tests: Sequence[str], *, seed: int = 0
) -> dict[str, Readout]:
    """Fit a probe for `factor` on one split and score it on others; see `leakage`."""
    values = embeddings.values(factor)
    rows = embeddings.of_split(train)
    places = {split: embeddings.of_split(split) for split in tests}
    features = embeddings.features
    if isinstance(values, np.ndarray):
        return read_numbers(
            factor,
            features[rows],
            values[rows],
            {split: (features[at], values[at]) for split, at in places.items()},
        )
    return read_names(
        factor,
        features[rows],
        [values[row] for row in rows],
        {split: (features[at], [values[i] for i in at]) for split, at in places.items()},
        seed=seed,
    )


def save_evaluation(result: Evaluation, folder: Path) -> None:
    """Write evaluation.json, evaluation.md and evaluation.png into a new folder."""
    kinds = {"target": result.targets, "nuisance": result.nuisances}
    table = [
        [
            kind,
            factor,
            readout.split,
            f"{readout.metric} {readout.score:.3f}",
            f"{readout.chance:.3f}",
            f"{readout.train_count} / {readout.test_count}",
        ]
        for kind, factors in kinds.items()
        for factor, splits in factors.items()
        for readout in splits.values()
    ]
    header = ["", "factor", "test split", "linear probe", "chance", "rows learned / tested"]
    text = [
        "# Linear probes",
        "",
        f"Fitted on split `{result.train}` with standardised features, scored on the others. Read "
        "a target well, and a nuisance no better than chance.",
        "",
        markdown_table(header, table),
        "",
    ]
    write_report(
        folder,
        "evaluation",
        content=asdict(result),
        markdown="\n".join(text),
        figures={"evaluation": readout_bars(result.targets, result.nuisances)},
    )
