"""From the schema's factors to the loss's: what the data declare, amended by the configuration."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fino_fast.data.schema import Factor, Schema
from fino_fast.errors import ConfigError
from fino_fast.factors import Activation, Categorical, Continuous, Role

from .config import FactorOverride

# Options that are not the same for every kind of guide.
CATEGORICAL_ONLY = {"head", "label_smoothing", "temperature", "momentum", "concentration"}
CONTINUOUS_ONLY = {"activation"}


@dataclass(frozen=True)
class Statistics:
    """What a continuous factor's targets are scaled by, one number a column."""

    mean: list[float]
    std: list[float]
    low: list[float]
    high: list[float]


def build_factors(
    schema: Schema,
    overrides: Mapping[str, FactorOverride],
    statistics: Mapping[str, Statistics] | None = None,
) -> list[Categorical | Continuous]:
    """The guides of a run: every factor whose role is `preserve` or `suppress`, in schema order.

    A categorical factor has as many classes as its vocabulary. A number is scaled by the schema's
    mean and standard deviation (activation `identity`, the default of `preserve`) or by its bounds
    (`sigmoid`, the default of `suppress`, and `tanh`). Cyclic factors are regressed as (sin, cos)
    by `tanh`, several values in one cell as indicators by `sigmoid`.

    Args:
        schema: of the shards.
        overrides: factor name → what the configuration changes.
        statistics: factor name → what to scale by instead of the schema's statistics.

    Raises:
        ConfigError: an override names no factor of the schema, does not fit the factor's kind, or
            is senseless; the message names the factor.
    """
    for name in overrides:
        if name not in schema.factors:
            raise ConfigError(
                f"factors.{name}: the schema has no such factor; it has "
                f"{', '.join(sorted(schema.factors))}"
            )
    guides = []
    for name, declared in schema.factors.items():
        override = overrides.get(name, FactorOverride())
        options = override.model_dump(exclude_none=True, exclude={"role"})
        role = override.role or declared.role
        if role == "ignore":
            if options and override.role is None:
                raise ConfigError(
                    f"factors.{name}: the schema's role of {name!r} is ignore, so "
                    f"{', '.join(options)} would have no effect; give its role too"
                )
            continue
        try:
            of_images = Statistics(declared.mean, declared.std, declared.low, declared.high)
            scaled_by = (statistics or {}).get(name, of_images)
            guides.append(build_factor(name, declared, role, options, scaled_by))
        except ValueError as error:
            raise ConfigError(f"factors.{name}: {error}") from error
    return guides


def build_factor(
    name: str, declared: Factor, role: Role, options: dict[str, Any], scaled_by: Statistics
) -> Categorical | Continuous:
    categorical = declared.kind == "categorical"
    if misfits := options.keys() & (CONTINUOUS_ONLY if categorical else CATEGORICAL_ONLY):
        raise ValueError(f"{', '.join(sorted(misfits))} does not apply to a {declared.kind} factor")
    if categorical:
        return Categorical(name, len(declared.vocabulary), role=role, **options)
    options.setdefault("activation", default_activation(declared, role))
    if options["activation"] == "identity":
        options |= {"mean": scaled_by.mean, "std": scaled_by.std}
    else:
        options |= {"low": scaled_by.low, "high": scaled_by.high}
    return Continuous(name, declared.width, role=role, **options)


def default_activation(declared: Factor, role: Role) -> Activation:
    if declared.kind == "cyclic":
        return "tanh"
    if declared.kind == "multi" or role == "suppress":
        return "sigmoid"
    return "identity"
