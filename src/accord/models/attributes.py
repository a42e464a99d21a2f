"""What completions are rated on, and how a reward model scales and weighs it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean, pstdev

from accord.errors import ConfigError, unknown_name
from accord.types import RatedCompletion

__all__ = ["Attribute", "attributes_of"]


@dataclass(frozen=True, slots=True)
class Attribute:
    """One attribute: its mean and standard deviation in the training data, and its weight in the score.

    A network learns standardised ratings, so no attribute counts more than another because its scale is wider.

    Example: ``Attribute("helpfulness", mean=2.7, std=1.2, weight=1.0)``
    """

    name: str
    mean: float
    std: float
    weight: float

    def standardise(self, rating: float) -> float:
        """A rating in standard deviations from the mean."""
        return (rating - self.mean) / self.std

    def restore(self, value: float) -> float:
        """The inverse of `standardise`."""
        return self.mean + self.std * value


def attributes_of(records: Iterable[RatedCompletion], weights: Mapping[str, float]) -> tuple[Attribute, ...]:
    """The attributes to learn from these ratings: those that `weights` names, or all with equal weights.

    Raises:
        ConfigError: a named attribute that the data does not have, or one whose ratings are all the same.
    """
    found: dict[str, list[float]] = {}
    for record in records:
        for name, rating in record.ratings.items():
            found.setdefault(name, []).append(rating)
    for name in weights:
        if name not in found:
            raise ConfigError(unknown_name("attribute", name, list(found)), where="reward_model.attributes")
    named = weights or dict.fromkeys(found, 1 / len(found))
    attributes = [Attribute(name, fmean(found[name]), pstdev(found[name]), weight) for name, weight in named.items()]
    for attribute in attributes:
        if attribute.std == 0:
            fix = "Name the others in reward_model.attributes, e.g. --set reward_model.attributes.helpfulness=1"
            raise ConfigError(f"All ratings of {attribute.name!r} are {attribute.mean:g}.", fix=fix)
    return tuple(attributes)
