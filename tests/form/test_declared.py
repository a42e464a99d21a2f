"""What the package declares at run time: settings classes, recipes and registry rows."""

from __future__ import annotations

import importlib
import tomllib
from collections.abc import Iterator
from typing import Annotated

import pytest
from pydantic import TypeAdapter

from accord.config import Config
from accord.registry import Registry

SETTINGS_FIELDS = 21


@pytest.fixture(scope="module")
def modules(package) -> list:
    return [importlib.import_module(source.module) for source in package if source.path.name != "__main__.py"]


def subclasses(cls: type) -> Iterator[type]:
    for child in cls.__subclasses__():
        yield child
        yield from subclasses(child)


def test_settings_classes_are_small(modules):
    ours = {module.__name__ for module in modules}
    large = {
        f"{cls.__module__}.{cls.__name__}: {len(cls.model_fields)} settings"
        for cls in subclasses(Config)
        if cls.__module__ in ours and len(cls.model_fields) > SETTINGS_FIELDS
    }
    assert not large, f"over {SETTINGS_FIELDS}: {sorted(large)}"


def test_defaults_are_valid_settings(modules):
    """`Config.build` checks what is given; what is not given is checked here, once."""
    ours = {module.__name__ for module in modules}
    for cls in subclasses(Config):
        for name, field in cls.model_fields.items():
            if cls.__module__ in ours and not field.is_required():
                default = field.get_default(call_default_factory=True, validated_data={})
                checked = TypeAdapter(Annotated[field.annotation, field]).validate_python(default, strict=True)
                assert checked == default, f"{cls.__name__}.{name}"


def test_every_recipe_parses(repository):
    recipes = sorted((repository / "src" / "accord").rglob("recipes/*.toml"))
    empty = [path.name for path in recipes if not tomllib.loads(path.read_text(encoding="utf-8"))]
    assert not empty, f"recipes without a setting: {empty}"


@pytest.fixture(scope="module")
def registries(modules) -> list[Registry]:
    found = {id(value): value for module in modules for value in vars(module).values() if isinstance(value, Registry)}
    return list(found.values())


def test_every_registry_says_how_to_add_a_row(registries, repository):
    """The error for an unknown name points to a heading of docs/extending.md."""
    page = (repository / "docs" / "extending.md").read_text(encoding="utf-8").lower()
    missing = [registry.noun for registry in registries if f"\n## {registry.noun}\n" not in page]
    assert not missing, f"docs/extending.md has no heading for: {missing}"


def test_every_registry_row_is_documented(registries, repository):
    pages = [path.read_text(encoding="utf-8") for path in sorted((repository / "docs").glob("**/*.md"))]
    missing = [
        f"{registry.noun} `{name}`"
        for registry in registries
        for name in registry
        if not any(f"`{name}`" in page for page in pages)
    ]
    assert not missing, f"no page of docs/ mentions: {', '.join(missing)}"
