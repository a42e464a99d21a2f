"""One small registry: built-ins, then the entry points of installed packages (`accord.losses`, ...)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from accord.errors import ConfigError, UnknownNameError, unknown_name

__all__ = ["Registry"]

T = TypeVar("T")


class Registry(Generic[T]):
    """Names to things of one kind.

    Example:
        >>> greetings: Registry[str] = Registry("greeting", "accord.greetings")
        >>> _ = greetings.add("hello", "Hello!")
        >>> greetings["hello"]
        'Hello!'
    """

    def __init__(self, noun: str, group: str) -> None:
        self.noun, self.group = noun, group
        self._rows: dict[str, T] = {}
        self._outside: dict[str, Callable[[], T]] | None = None

    def add(self, name: str, row: T) -> T:
        """Register a built-in; a second row of the same name is an error."""
        if name in self._rows:
            raise ConfigError(f"The {self.noun} {name!r} is registered twice.", fix="Choose another name.")
        self._rows[name] = row
        return row

    def __getitem__(self, name: str) -> T:
        if name in self._rows:
            return self._rows[name]
        outside = self._entry_points()
        if name in outside:
            return self.add(name, outside[name]())
        fix = f"To add one: docs/extending.md#{self.noun.replace(' ', '-')}"
        raise UnknownNameError(unknown_name(self.noun, name, list(self)), fix=fix)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self._rows, *self._entry_points()}))

    def __contains__(self, name: object) -> bool:
        return name in self._rows or name in self._entry_points()

    def _entry_points(self) -> dict[str, Callable[[], T]]:
        if self._outside is None:
            self._outside = {point.name: point.load for point in entry_points(group=self.group)}
        return self._outside
