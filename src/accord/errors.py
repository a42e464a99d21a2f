"""One exception tree. Every message says what is wrong, where, why, and what to do next.

AccordError                   shown to the user as one message, never as a traceback
├── ConfigError               unknown key, wrong type, value out of range, setting that would be ignored
│   └── UnknownNameError      a name that no registry row has ("did you mean")
├── DataError                 a file or a row that cannot be used; carries file:line
│   ├── MissingDataError      no such file, directory or data set
│   ├── EmptyDataError        readable, but holds no row
│   └── RowError              one row: wrong type, empty text, chosen equal to rejected, over the limit
├── ModelError                a model that cannot be found, loaded or used as asked
│   └── ChatTemplateError     messages given to a model that has no chat template
├── SamplerError              a sampler's server that cannot be reached, or answers what cannot be used
│   └── StaleWeightsError     it serves other weights than those it was given
├── RunError                  a run directory that is taken, unfinished, or belongs to another configuration
└── ResourceError             disk full, out of memory, missing optional package
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

__all__ = [
    "AccordError",
    "ChatTemplateError",
    "ConfigError",
    "DataError",
    "EmptyDataError",
    "MissingDataError",
    "ModelError",
    "ResourceError",
    "RowError",
    "RunError",
    "SamplerError",
    "StaleWeightsError",
    "UnknownNameError",
    "unknown_name",
]


class AccordError(Exception):
    """Base of every error that Accord raises on purpose.

    `what` says what is wrong, `where` names the place (``file:line``, a key, a path), `fix` says what to do.
    """

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        place = f"{where}: " if where else ""
        advice = f"\n  → {fix}" if fix else ""
        super().__init__(f"{place}{what}{advice}")


class ConfigError(AccordError, ValueError):
    """A setting is unknown, has the wrong type, is out of range, or would have no effect."""


class UnknownNameError(ConfigError):
    """A name that no registry row has."""


class DataError(AccordError, ValueError):
    """Data that cannot be used."""


class MissingDataError(DataError):
    """No such file, directory or data set."""


class EmptyDataError(DataError):
    """The data was readable and holds no row."""


class RowError(DataError):
    """One row cannot be used; `where` is its file and line."""


class ModelError(AccordError, ValueError):
    """A model cannot be found, loaded or used as asked."""


class ChatTemplateError(ModelError):
    """Messages were given to a model that has no chat template."""


class SamplerError(AccordError, RuntimeError):
    """The server of a sampler cannot be reached, refuses a request, or answers what cannot be used."""


class StaleWeightsError(SamplerError):
    """A sampler serves other weights than those it was given."""


class RunError(AccordError, RuntimeError):
    """A run directory is taken, unfinished, or belongs to another configuration."""


class ResourceError(AccordError, RuntimeError):
    """The machine lacks something: disk, memory, an optional package."""


def unknown_name(noun: str, name: str, known: Sequence[str]) -> str:
    """The sentence for an unknown name: what, the nearest known name, and all known names.

    Example:
        >>> unknown_name("loss", "dpoo", ["dpo", "ipo"])
        "Unknown loss 'dpoo'. Did you mean 'dpo'? Known: dpo, ipo."
    """
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"Unknown {noun} {name!r}.{hint} Known: {', '.join(known) or 'none'}."
