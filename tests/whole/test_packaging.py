"""The folders at the top are one distribution, light to import."""

import ast
import json
import os
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from tests.support.installation import installation_with, run, site_packages_of
from tests.support.paths import ROOT

PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
LINKED_FOLDERS = ("publisher", "shared", "subscriber")
FOLDER_OF_ROOT_PACKAGE = {
    "broadcache": "src/broadcache",
    **{f"broadcache.{name}": name for name in LINKED_FOLDERS},
}
LOCK_FILES = sorted((ROOT / "requirements").glob("*.txt"))

WEB_FRAMEWORKS_AND_TERMINALS = {
    *("aiohttp", "fastapi", "httpx", "httpx2", "pydantic", "requests", "rich", "starlette", "typer", "uvicorn"),
}

IMPORT_EVERY_MODULE = """
import importlib, json, pkgutil, broadcache

packages = pkgutil.walk_packages(broadcache.__path__, "broadcache.")
names = ["broadcache", *(package.name for package in packages)]
print(json.dumps({name: importlib.import_module(name).__file__ for name in names}))
"""

PIN = re.compile(r"[a-z0-9][a-z0-9._-]*==[A-Za-z0-9.+!]+( ; [A-Za-z_ ='\"<>0-9.()!]+)? \\")
HASH = re.compile(r" {4}--hash=sha256:[0-9a-f]{64}( \\)?")
COMMENT = re.compile(r" *#.*")


def test_no_folder_of_modules_is_left_out_of_the_wheel() -> None:
    """A folder without `__init__.py` imports from a checkout, and is missing after `pip install`."""
    folders = {
        Path(folder)
        for root in FOLDER_OF_ROOT_PACKAGE.values()
        for folder, _, files in os.walk(ROOT / root)  # does not follow links
        if any(file.endswith(".py") for file in files)
    }
    assert folders == set(_folder_of_package().values())


def test_the_links_in_the_import_root_lead_to_the_folders_at_the_top() -> None:
    links = {link.name: str(link.readlink()) for link in (ROOT / "src/broadcache").iterdir() if link.is_symlink()}
    assert links == {name: f"../../{name}" for name in LINKED_FOLDERS}


def test_every_folder_of_python_files_is_type_checked() -> None:
    folders = {path.name for path in ROOT.iterdir() if not path.name.startswith(".") and any(path.rglob("*.py"))}
    folders -= {"build", "dist"}
    assert folders - set(LINKED_FOLDERS) == set(PYPROJECT["tool"]["mypy"]["files"])
    assert folders == {folder.split("/")[0] for folder in PYPROJECT["tool"]["pyright"]["include"]}


def test_imports_inside_the_package_are_relative() -> None:
    absolute = [
        f"{module.relative_to(ROOT)}:{line} imports {target}"
        for module in _modules()
        for line, level, target in _imports(module)
        if level == 0 and target.split(".")[0] == "broadcache"
    ]
    assert absolute == []


def test_importing_the_subscriber_loads_no_web_framework_and_no_redis() -> None:
    loaded = _modules_loaded_by("import broadcache.subscriber")
    assert loaded & {*WEB_FRAMEWORKS_AND_TERMINALS, "hiredis", "redis"} == set()


def test_importing_the_publisher_loads_no_web_framework() -> None:
    assert _modules_loaded_by("import broadcache.publisher") & WEB_FRAMEWORKS_AND_TERMINALS == set()


@pytest.mark.parametrize("package", ["publisher", "subscriber", "publisher.telemetry.prometheus", "subscriber.metrics"])
def test_importing_either_side_loads_neither_metrics_nor_traces(package: str) -> None:
    loaded = _modules_loaded_by(f"import broadcache.{package}")
    assert loaded & {"opentelemetry", "prometheus_client"} == set()


def test_importing_discovery_loads_no_resolver_until_names_are_looked_up() -> None:
    unwanted = {*WEB_FRAMEWORKS_AND_TERMINALS, "aiohttp", "dns"}
    assert _modules_loaded_by("import broadcache.publisher.fanout.discovery") & unwanted == set()


def test_importing_the_root_loads_neither_side() -> None:
    loaded = _modules_loaded_by("import broadcache", depth=2)
    assert {name for name in loaded if name.startswith("broadcache")} == {"broadcache"}


@pytest.mark.timeout(180)
def test_a_wheel_built_from_the_source_distribution_installs_and_imports_whole(
    wheel_python: Path, tmp_path: Path
) -> None:
    python = installation_with(["all", "demo", "testing"], wheel_python, tmp_path).python

    files = json.loads(run([str(python), "-I", "-c", IMPORT_EVERY_MODULE], tmp_path))
    assert set(files) == {_module_name(module) for module in _modules()}
    assert [file for file in files.values() if not Path(file).is_relative_to(site_packages_of(wheel_python))] == []

    installed = Path(files["broadcache"]).parent
    assert [path.relative_to(installed) for path in installed.rglob("py.typed")] == [Path("py.typed")]
    for package, folder in _folder_of_package().items():
        patterns = ("*.json", "*.lua", "assets/*.*")
        expected = {file.relative_to(folder) for pattern in patterns for file in folder.glob(pattern)}
        inside = installed.joinpath(*package.split(".")[1:])
        names = {file.relative_to(inside) for file in inside.rglob("*")}
        assert expected <= names, f"{package} lacks {expected - names} in the wheel"
    assert (wheel_python.parent / "broadcache").is_file()


def test_each_python_that_the_metadata_names_is_tested_where_code_is_hosted() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    classifier = "Programming Language :: Python :: 3."
    named = [name for name in PYPROJECT["project"]["classifiers"] if name.startswith(classifier)]
    tested = workflow["jobs"]["checks-and-tests"]
    assert tested["strategy"]["matrix"]["python"] == [name.rpartition(" ")[2] for name in named]
    assert {"run": ".ci/run"} in tested["steps"]


@pytest.mark.parametrize("lock_file", LOCK_FILES, ids=lambda path: path.name)
def test_a_lock_file_holds_pins_and_hashes_and_no_address(lock_file: Path) -> None:
    lines = lock_file.read_text().splitlines()
    strange = [line for line in lines if line and not any(form.fullmatch(line) for form in (PIN, HASH, COMMENT))]
    assert strange == []
    assert [line for line in lines if "://" in line or re.search(r"(^|[\s=])(/|~|\.\.)", line)] == []
    unhashed = [
        line
        for line, following in zip(lines, [*lines[1:], ""], strict=True)
        if PIN.fullmatch(line) and not HASH.fullmatch(following)
    ]
    assert unhashed == []


def test_the_runtime_lock_satisfies_what_the_package_asks_for() -> None:
    pins = _pins(ROOT / "requirements/runtime.txt")
    project = PYPROJECT["project"]
    wanted = [
        *project["dependencies"],
        # The tools of tests are locked in dev.txt.
        *(line for name, extra in project["optional-dependencies"].items() if name != "testing" for line in extra),
    ]
    for requirement in map(Requirement, wanted):
        if requirement.name != project["name"]:
            version = pins.get(canonicalize_name(requirement.name))
            assert version is not None, f"expected {requirement} in requirements/runtime.txt: run make lock"
            assert requirement.specifier.contains(version), f"{requirement} is locked at {version}: run make lock"


def test_the_lock_files_agree_on_versions() -> None:
    development = _pins(ROOT / "requirements/dev.txt")
    for lock_file in LOCK_FILES:
        if lock_file.name != "floor.txt":
            assert _pins(lock_file).items() <= development.items(), lock_file.name


def test_the_floor_is_the_lowest_version_that_the_package_allows() -> None:
    pins = _pins(ROOT / "requirements/floor.txt")
    project = PYPROJECT["project"]
    lines = [*project["dependencies"], *(line for each in project["optional-dependencies"].values() for line in each)]
    wanted = [
        requirement for requirement in map(Requirement, lines) if requirement.name not in (project["name"], "aiohttp")
    ]
    # Of pytest, what the tests themselves need is more.
    assert {canonicalize_name(each.name) for each in wanted} <= pins.keys()
    for requirement in wanted:
        if requirement.name != "pytest":
            [lowest] = [each.version for each in requirement.specifier if each.operator == ">="]
            pinned = Version(pins[canonicalize_name(requirement.name)])
            assert pinned.release[: len(Version(lowest).release)] == Version(lowest).release, requirement


def _folder_of_package() -> dict[str, Path]:
    """`broadcache.publisher` → `ROOT/publisher`, for each folder on disk that has an `__init__.py`."""
    folders: dict[str, Path] = {}
    for root_package, folder in FOLDER_OF_ROOT_PACKAGE.items():
        for directory, _, files in os.walk(ROOT / folder):  # does not follow links
            if "__init__.py" in files:
                inner = Path(directory).relative_to(ROOT / folder).parts
                folders[".".join((root_package, *inner))] = Path(directory)
    return folders


def _modules() -> list[Path]:
    """Each Python file of the package, where it really stands."""
    return sorted(module for folder in _folder_of_package().values() for module in folder.glob("*.py"))


def _module_name(module: Path) -> str:
    """`ROOT/publisher/api.py` → `broadcache.publisher.api.app`; an `__init__.py` is named like its package."""
    package = next(name for name, folder in _folder_of_package().items() if folder == module.parent)
    return package if module.name == "__init__.py" else f"{package}.{module.stem}"


def _imports(module: Path) -> Iterator[tuple[int, int, str]]:
    """Each import as (line, level, full name); the level is the number of leading dots."""
    name = _module_name(module)
    package = name if module.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(module.read_text(), module.name)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, 0, alias.name
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            origin = (
                [*parts[: len(parts) + 1 - node.level], *filter(None, [node.module])] if node.level else [node.module]
            )
            for alias in node.names:
                yield node.lineno, node.level, ".".join(part for part in (*origin, alias.name) if part)


def _modules_loaded_by(statement: str, *, depth: int = 1) -> set[str]:
    """Names of the modules that a fresh interpreter holds after `statement`, cut to `depth` parts."""
    program = f"{statement}; import json, sys; print(json.dumps(list(sys.modules)))"
    names: list[str] = json.loads(run([sys.executable, "-I", "-c", program], ROOT))
    return {".".join(name.split(".")[:depth]) for name in names}


def _pins(lock_file: Path) -> dict[str, str]:
    """Package name → locked version."""
    lines = lock_file.read_text().splitlines()
    return dict(line.split(" ")[0].split("==") for line in lines if PIN.fullmatch(line))
