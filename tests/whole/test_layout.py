"""The house: no folder is crowded, no module is long, and no import leads back to where it began."""

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path

import grimp
from tests.support.paths import ROOT

PACKAGE = "broadcache"
FOLDERS = ("publisher", "shared", "src/broadcache", "subscriber")
LINES_MAX = 450
MODULES_MAX = 12
MODULES_MAX_OF = {
    "shared/process": 14,  # small helpers that do not know each other: a backoff, a fork, a token, a log format
    "src/broadcache/cli": 14,  # one module a command, all at one level; what only one of them prints is beside it
}
"""Folders that may hold up to 14 modules; the reason stands beside each."""
OLD_PATHS = {"publisher/diagnosis.py", "publisher/metrics.py", "shared/logs.py"}
"""Modules that only lead to where their content is now, until 0.2."""


def test_no_import_leads_back_to_where_it_began() -> None:
    """Imports inside functions, and those for types only, count as well: they hide a circle, and do not undo it."""
    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    assert graph.modules == {_name_of(module) for module in _modules()}, (
        "expected grimp to see each module, and no other"
    )
    imported = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    circles = [sorted(circle) for circle in _circles(imported)]
    assert circles == [], f"each of these imports itself, by way of the others: {circles}"


def test_no_folder_holds_more_than_12_modules() -> None:
    held = Counter(str(module.parent.relative_to(ROOT)) for module in _modules() if module.name != "__init__.py")
    assert all(most <= 14 for most in MODULES_MAX_OF.values())
    assert {folder for folder, most in MODULES_MAX_OF.items() if held[folder] <= MODULES_MAX} == set(), "no exception"
    assert {folder: many for folder, many in held.items() if many > MODULES_MAX_OF.get(folder, MODULES_MAX)} == {}


def test_no_module_has_more_than_450_lines() -> None:
    lines = {str(module.relative_to(ROOT)): len(module.read_text().splitlines()) for module in _modules()}
    assert {module: many for module, many in lines.items() if many > LINES_MAX} == {}


def test_the_architecture_names_each_module_or_its_folder_and_nothing_that_is_gone() -> None:
    named = {*_named_in_the_architecture()}
    assert {name for name in named if not (ROOT / name).exists()} == set()
    modules = {str(module.relative_to(ROOT)) for module in _modules() if not module.name.startswith("__")}
    folders = tuple(name for name in named if name.endswith("/"))
    assert {module for module in modules - named - OLD_PATHS if not module.startswith(folders)} == set()


def test_circles_are_found_where_there_are_some() -> None:
    imported = {"a": {"b", "d"}, "b": {"c"}, "c": {"b", "e"}, "d": {"e"}, "e": set[str]()}
    assert list(_circles(imported)) == [{"b", "c"}]


def _named_in_the_architecture() -> Iterator[str]:
    """The paths in the table "Where to look"; a name without a folder is in the folder of the one before it."""
    table = (ROOT / "ARCHITECTURE.md").read_text().partition("\n## Where to look\n")[2].partition("\n## ")[0]
    for cell in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE):
        folder = ""
        for name in re.findall(r"`([^`]+)`", cell):
            if "/" in name.rstrip("/"):
                folder = name.rstrip("/").rpartition("/")[0]
                yield name
            else:
                yield f"{folder}/{name}"


def _modules() -> Iterator[Path]:
    """Each Python file of the package, where it really stands."""
    for top in FOLDERS:
        for folder, _, files in os.walk(ROOT / top):  # does not follow links
            yield from (Path(folder, file) for file in files if file.endswith(".py"))


def _name_of(module: Path) -> str:
    parts = module.relative_to(ROOT / "src" if module.is_relative_to(ROOT / "src") else ROOT).with_suffix("").parts
    return ".".join(part for part in (PACKAGE, *parts) if part != "__init__").replace(f"{PACKAGE}.{PACKAGE}", PACKAGE)


def _circles(imported: Mapping[str, AbstractSet[str]]) -> Iterator[set[str]]:
    """The largest sets of modules each of which is reached from all others of its set."""
    reached = {module: _reached_from(module, imported) for module in imported}
    left = {module for module in imported if module in reached[module]}
    while left:
        module = min(left)
        circle = {other for other in reached[module] if module in reached[other]}
        left -= circle
        yield circle


def _reached_from(module: str, imported: Mapping[str, AbstractSet[str]]) -> set[str]:
    reached: set[str] = set()
    following = {*imported[module]}
    while following:
        reached |= following
        following = {further for each in following for further in imported[each]} - reached
    return reached
