"""Folders of the repository."""

from pathlib import Path
from typing import Final

__all__ = ["GOLDEN", "ROOT"]

ROOT: Final = Path(__file__).resolve().parents[2]
GOLDEN: Final = ROOT / "tests" / "golden"
