"""The package as a user has it: the wheel, in environments that have some of its extras and nothing else."""

import fcntl
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from .paths import ROOT

__all__ = [
    "PROJECT",
    "Installation",
    "distributions_of",
    "install_built_wheel",
    "installation_with",
    "lend",
    "run",
    "site_packages_of",
]

PROJECT = "broadcache"
LINKED_FOLDERS = ("publisher", "shared", "subscriber")


class Installation(NamedTuple):
    """An environment of its own: its interpreter, and the folder of what it has beside the package."""

    python: Path
    lent: Path

    def has(self, module: str) -> bool:
        """Whether the top-level `module` is installed beside the package."""
        return (self.lent / module).exists()


def install_built_wheel(workspace: Path) -> Path:
    """Build sdist, then from it the wheel; install that alone in a new environment. Returns its interpreter.

    Several processes may ask for it with the same `workspace`: one builds, and the others wait for that.
    Builds a copy, because setuptools leaves files behind where it builds, and takes stale ones from there.
    """
    workspace.mkdir(parents=True, exist_ok=True)
    environment, done = workspace / "environment", workspace / "done"
    python = environment / "bin" / "python"
    with _locked(workspace / "lock"):
        if done.exists():
            return python
        source, wheels = workspace / "source", workspace / "wheels"
        source.mkdir()
        for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, source)
        for name in ("src", *LINKED_FOLDERS):
            ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
        run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(wheels), str(source)], workspace)
        venv.create(environment, symlinks=True)
        [wheel] = wheels.glob("*.whl")
        pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
        run([*pip, "install", "--quiet", "--no-index", "--no-deps", str(wheel)], workspace)
        done.touch()
    return python


def installation_with(extras: Iterable[str], wheel_python: Path, workspace: Path) -> Installation:
    """Make an environment that has the wheel, what it needs, and what it needs with these extras; nothing else.

    Nothing is fetched or copied: the packages are links to those of the environment that runs the tests, and the wheel
    is that of `install_built_wheel`. Compiled files are kept there as well.
    """
    environment, lent = workspace / "environment", workspace / "lent"
    lent.mkdir(parents=True)
    for distribution in distributions_of(wheel_python, extras).values():
        _link(distribution, lent)
    venv.create(environment, symlinks=True)
    lend(environment, lent, site_packages_of(wheel_python))
    return Installation(environment / "bin" / "python", lent)


def lend(environment: Path, *folders: Path) -> None:
    """Have the environment import from these folders, too."""
    python = environment / "bin" / "python"
    (site_packages_of(python) / "lent.pth").write_text("".join(f"{folder}\n" for folder in folders))


def site_packages_of(python: Path) -> Path:
    """The folder of the packages of an environment."""
    [folder] = python.parent.parent.glob("lib/python*/site-packages")
    return folder


def distributions_of(wheel_python: Path, extras: Iterable[str] = ()) -> dict[str, metadata.Distribution]:
    """Each distribution that the wheel needs with these extras, however many requirements away, by its name."""
    wanted = _requirements(_wheel(wheel_python), extras)
    seen: set[tuple[str, frozenset[str]]] = set()
    found: dict[str, metadata.Distribution] = {}
    while wanted:
        requirement = wanted.pop()
        name, its_extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, its_extras) in seen:
            continue
        seen.add((name, its_extras))
        if name == PROJECT:  # an extra that is made of others
            wanted += _requirements(_wheel(wheel_python), its_extras)
        else:
            found[name] = metadata.distribution(name)
            wanted += _requirements(found[name], its_extras)
    return found


def run(command: list[str], folder: Path, variables: Mapping[str, str] | None = None) -> str:
    """Standard output of a command; its failure fails the test with all that it said."""
    finished = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=variables)
    assert finished.returncode == 0, f"{command} ended with {finished.returncode}\n{finished.stdout}{finished.stderr}"
    return finished.stdout


def _wheel(python: Path) -> metadata.Distribution:
    [distribution] = metadata.distributions(name=PROJECT, path=[str(site_packages_of(python))])
    return distribution


def _requirements(distribution: metadata.Distribution, extras: Iterable[str]) -> list[Requirement]:
    """What it needs itself, with these extras and on this platform."""
    return [
        requirement
        for requirement in map(Requirement, distribution.requires or [])
        if (marker := requirement.marker) is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras))
    ]


def _link(distribution: metadata.Distribution, folder: Path) -> None:
    """Link a distribution's files: a package whole, and of one that several distributions share, its own parts."""
    for file in distribution.files or ():
        if file.parts[0] in ("..", "__pycache__"):
            continue
        depth = 1
        while depth < len(file.parts) and _is_shared(distribution, file.parts[:depth]):
            depth += 1
        link = folder.joinpath(*file.parts[:depth])
        if not link.exists():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(Path(str(distribution.locate_file("/".join(file.parts[:depth])))))


def _is_shared(distribution: metadata.Distribution, parts: tuple[str, ...]) -> bool:
    """Whether this is a folder without `__init__.py`, such as `opentelemetry`, where other distributions may be."""
    folder = Path(str(distribution.locate_file("/".join(parts))))
    return not folder.name.endswith(".dist-info") and folder.is_dir() and not (folder / "__init__.py").exists()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
