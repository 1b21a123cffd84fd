"""What `fino-fast audit` finds in the metadata of a sealed set; no image is read."""

from dataclasses import dataclass
from itertools import combinations

import numpy as np

from fino_fast.data import ShardSet

from .audit_advice import Advice, advise
from .audit_association import Association, associate
from .audit_factors import FactorAudit, Names, Numbers, audit_factor, read_factor


@dataclass(frozen=True)
class Audit:
    """The metadata of a sealed set.

    Attributes:
        samples: of the set.
        splits: samples of each split that has any.
        manifest: hash of the set's manifest.
        schema: hash of its schema.
        factors: each by itself, by name.
        associations: of each pair of factors.
        missingness: of whether the first factor is missing, with the second one's values; for
            first factors that are missing in some samples but not in all.
        advice: what to look at before training.
    """

    samples: int
    splits: dict[str, int]
    manifest: str
    schema: str
    factors: list[FactorAudit]
    associations: list[Association]
    missingness: list[Association]
    advice: list[Advice]


def audit(shards: ShardSet) -> Audit:
    """Count every factor and compare every pair.

    Takes the metadata of all factors into memory, 8 bytes a sample and column (24 for names), and
    for each pair of factors a sort of the rows.

    Raises:
        DataError: the set's metadata are damaged.
    """
    values = [read_factor(shards, name) for name in shards.schema.factors]
    factors = [audit_factor(shards, factor) for factor in values]
    associations = [associate(first, second) for first, second in combinations(values, 2)]
    missingness = [
        associate(gaps(first), second)
        for first, found in zip(values, factors, strict=True)
        if 0 < found.missing < 1
        for second in values
        if second is not first
    ]
    sizes = np.bincount(shards.index["split"], minlength=len(shards.schema.splits))
    return Audit(
        len(shards),
        {name: int(n) for name, n in zip(shards.schema.splits, sizes, strict=True) if n},
        shards.manifest_hash,
        shards.schema_hash,
        factors,
        associations,
        missingness,
        advise(factors, associations, missingness, shards.schema.declaration.adaptation_split),
    )


def gaps(factor: Names | Numbers) -> Names:
    """Whether a factor is missing, as a factor of two names."""
    codes = (~factor.observed).astype(np.int64)
    return Names(factor.name, codes, codes, np.arange(len(codes)))
