"""Types, as mypy and pyright see them: what they infer, and what they refuse."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
INFERRED = (HERE / "inferred.py").read_text()
REFUSED = (HERE / "refused.txt").read_text()  # not a module: the checks of this repository would refuse it
LINES_REFUSED = [number for number, line in enumerate(REFUSED.splitlines(), 1) if line.endswith("# error")]


def lines_refused_by_mypy(program: str, folder: Path) -> list[int]:
    """The lines of errors, with the settings of a user of `mypy --strict`."""
    (folder / "program.py").write_text(program)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--output=json", "program.py"]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert ran.returncode in (0, 1), ran.stderr
    errors = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    assert {error["file"] for error in errors} <= {"program.py"}, ran.stdout
    return sorted({error["line"] for error in errors if error["severity"] == "error"})


def lines_refused_by_pyright(program: str, folder: Path) -> list[int]:
    (folder / "program.py").write_text(program)
    (folder / "pyrightconfig.json").write_text(json.dumps({"typeCheckingMode": "standard", "include": ["program.py"]}))
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(folder)]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    errors = json.loads(ran.stdout)["generalDiagnostics"]
    return sorted({error["range"]["start"]["line"] + 1 for error in errors if error["severity"] == "error"})


@pytest.mark.timeout(240)
@pytest.mark.parametrize("lines_refused", [lines_refused_by_mypy, lines_refused_by_pyright])
@pytest.mark.parametrize(("program", "expected"), [(INFERRED, []), (REFUSED, LINES_REFUSED)], ids=["in", "out"])
def test_type_checkers_infer_and_refuse_what_they_should(
    lines_refused: Callable[[str, Path], list[int]], program: str, expected: list[int], tmp_path: Path
) -> None:
    assert lines_refused(program, tmp_path) == expected
