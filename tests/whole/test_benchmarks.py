"""That every benchmark runs. How fast anything is depends on the machine: see docs/benchmarks.md."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmarks.__main__ import BENCHMARKS
from tests.support.paths import ROOT


@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_yields_ratios_that_are_finite(name: str, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    command = [sys.executable, "-m", "benchmarks", name, "--quick", "--json", str(file)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150, check=False)
    assert run.returncode == 0, run.stderr
    rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"]
    assert rows
    for row in rows:
        figures = [row[field] for field in ("ours", "peer", "ratio", "ratio_low", "ratio_high")]
        assert all(math.isfinite(figure) and figure > 0 for figure in figures), row
        assert row["what"] in run.stdout


def test_an_unknown_benchmark_is_an_error_that_names_the_known_ones() -> None:
    command = [sys.executable, "-m", "benchmarks", "speed"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 2
    known = ", ".join(BENCHMARKS)
    assert f"expected names out of {known}, got speed" in run.stderr
