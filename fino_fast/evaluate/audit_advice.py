"""What the counts of an audit mean for a training: one sentence for each thing to look at."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from .audit_association import ETA, Association
from .audit_factors import FactorAudit

# Where advice begins. Strengths are on the scale of a correlation (`Association.strength`).
CONFOUNDED = 0.9
MISSING = 0.5
ONCE = 0.5
MISSINGNESS = 0.5


@dataclass(frozen=True)
class Advice:
    """One thing to look at before training.

    Attributes:
        topic: `confounded`, `missing`, `constant`, `once`, `splits` or `missingness`.
        factors: whom it is about.
        text: the numbers, and what they mean.
    """

    topic: str
    factors: list[str]
    text: str


def advise(
    factors: Sequence[FactorAudit],
    associations: Sequence[Association],
    missingness: Sequence[Association],
    adaptation_split: str,
) -> list[Advice]:
    """All advice, the gravest topic first.

    Args:
        missingness: of whether the first factor is missing, with the second factor.
    """
    by_name = {factor.name: factor for factor in factors}
    return [
        *confounded(by_name, associations),
        *(advice for factor in factors for advice in alone(factor, adaptation_split)),
        *linked_gaps(missingness),
    ]


def confounded(
    factors: Mapping[str, FactorAudit], associations: Sequence[Association]
) -> Iterator[Advice]:
    """Preserved factors that go with suppressed ones."""
    for pair in associations:
        roles = {factors[name].role: name for name in (pair.first, pair.second)}
        if set(roles) != {"preserve", "suppress"}:
            continue
        strengths = (pair.strength, pair.lambda_first, pair.lambda_second)
        if max((value for value in strengths if value is not None), default=0) < CONFOUNDED:
            continue
        yield Advice(
            "confounded",
            [roles["preserve"], roles["suppress"]],
            f"preserved {roles['preserve']!r} and suppressed {roles['suppress']!r} are confounded: "
            f"{describe(pair)}. What removes one removes the other. Give one of them the role "
            "ignore, or add samples in which they do not go together.",
        )


def describe(pair: Association) -> str:
    """The numbers of a pair in words."""
    parts = [f"{pair.measure} {number(pair.value)} on {pair.rows} rows"]
    for value, wanted, known in (
        (pair.lambda_first, pair.first, pair.second),
        (pair.lambda_second, pair.second, pair.first),
    ):
        if value is not None:
            parts.append(
                f"{known!r} tells {wanted!r} with {percent(value)} fewer errors than guessing"
            )
    return ", ".join(parts)


def alone(factor: FactorAudit, adaptation_split: str) -> Iterator[Advice]:
    """What is to be said of a factor by itself.

    Ingestion refuses guides that are constant or wholly missing in the adaptation split, so that
    those two say something of ignored factors, which probes read.
    """
    name = repr(factor.name)
    if factor.missing == 1:
        yield Advice("missing", [factor.name], f"{name} is missing in every sample.")
        return
    if factor.missing > MISSING:
        yield Advice(
            "missing",
            [factor.name],
            f"{name} is missing in {percent(factor.missing)} of the samples: a batch holds few "
            "rows that it can guide.",
        )
    if factor.constant:
        yield Advice(
            "constant",
            [factor.name],
            f"{name} has the same value wherever it is observed: a probe has nothing to learn.",
        )
    classes = factor.classes
    if (
        classes is not None
        and factor.kind == "categorical"
        and factor.role != "ignore"
        and classes.adapt_once > ONCE * classes.adapt_seen
    ):
        yield Advice(
            "once",
            [factor.name],
            f"{name}: {classes.adapt_once} of its {classes.adapt_seen} values in the split "
            f"{adaptation_split!r} occur in one sample only. A linear or prototype head learns a "
            "class each and would tell single images apart. Use a coarser factor.",
        )
    if factor.only_split is not None:
        yield Advice(
            "splits", [factor.name], f"{name} is observed in the split {factor.only_split!r} only."
        )
    for split in factor.disjoint:
        yield Advice(
            "splits",
            [factor.name],
            f"{name}: the split {split!r} shares no value with {adaptation_split!r}. That is right "
            "for a test on unseen values; a probe of this factor cannot be scored there.",
        )


def linked_gaps(missingness: Sequence[Association]) -> Iterator[Advice]:
    """Factors whose gaps depend on another factor."""
    for pair in missingness:
        if pair.strength is not None and pair.strength >= MISSINGNESS:
            yield Advice(
                "missingness",
                [pair.first, pair.second],
                f"whether {pair.first!r} is missing depends on {pair.second!r} ({pair.measure} "
                f"{number(pair.value)} on {pair.rows} rows): its guide sees only a part of the "
                f"values of {pair.second!r}.",
            )


def thresholds() -> list[str]:
    """Where each kind of advice begins, for the report."""
    return [
        f"- confounded: a preserved and a suppressed factor with V, √{ETA}, |ρ| or Goodman and "
        f"Kruskal's λ of {CONFOUNDED:g} or more",
        f"- missing: in more than {percent(MISSING)} of the samples",
        f"- once: more than {percent(ONCE)} of the values have one sample in the adaptation split",
        f"- missingness: V or √{ETA} of {MISSINGNESS:g} or more",
    ]


def percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
