"""Search the specification exhaustively with spin, and compare each result with what is expected.

Run as `python docs/specification/check.py`, or `make model`. Needs spin and gcc. README.md explains the scenes.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ["RUNS", "Result", "Run", "missing_tools", "search"]

HERE = Path(__file__).resolve().parent
DEPTH_MAX = 1_000_000
MEMORY_MIB_MAX = 8_000
SECONDS_MAX = 900.0

Expected = Literal["holds", "fails", "reachable"]


@dataclass(frozen=True, slots=True)
class Run:
    """One search: a scene, the rules that are taken out or put back, and the expected result.

    Shape: `expected` is `holds` (no read breaks the promise), `fails` (one does) or `reachable` (a hit is served under
           a lease younger than the fault). `scope` and `small_scope` are the defines that set how much may happen.
    """

    scene: str
    switches: str
    expected: Expected
    file: str
    scope: str
    small_scope: str

    @property
    def name(self) -> str:
        """The scene and its switches, as the table shows them."""
        return f"{self.scene} {self.switches}".rstrip()

    def defines(self, *, is_small: bool) -> list[str]:
        """Return the arguments of spin."""
        words = f"{self.small_scope if is_small else self.scope} {self.switches}".split()
        return [f"-D{word}" for word in words]


@dataclass(frozen=True, slots=True)
class Result:
    """What a search found. `trail` is the counterexample, one event a line; empty when there is none.

    Units:  `seconds` of one processor: other work on the machine does not change them.
    """

    run: Run
    found: Expected | Literal["incomplete"]
    states: int
    depth: int
    seconds: float
    trail: str

    @property
    def is_expected(self) -> bool:
        """Whether the search was complete, and found what was expected."""
        return self.found == self.run.expected


def _scene(
    name: str,
    file: str,
    scope: str,
    small_scope: str,
    *,
    holds: Sequence[str] = (),
    fails: Sequence[str] = (),
    faults: Sequence[str] = (),
) -> list[Run]:
    """Build the runs of one scene: clean, still clean (`holds`), broken (`fails`), and each of `faults` survived.

    Only the clean search uses the full scope: a counterexample in a small scope is one in every scope.
    """
    runs = [Run(name, "", "holds", file, scope, small_scope)]
    runs += [Run(name, switches, "holds", file, small_scope, small_scope) for switches in holds]
    runs += [Run(name, switches, "fails", file, small_scope, small_scope) for switches in fails]
    runs += [Run(name, f"REACH={fault}", "reachable", file, small_scope, small_scope) for fault in faults]
    return runs


RUNS: tuple[Run, ...] = (
    *_scene(
        "bus",
        "promise.pml",
        "QUEUED=2 ACCEPTS=3 SEQUENCES=3",
        "QUEUED=1 ACCEPTS=2 SEQUENCES=3",
        fails=["OLD_SKIP", "TWO_PRIMARIES"],
        faults=["A_FAILOVER", "A_THAW", "A_SPLIT"],
    ),
    *_scene(
        "forger",
        "promise.pml",
        "FORGED=2 CUTS=1 ACCEPTS=3 SEQUENCES=3",
        "FORGED=1 CUTS=1 ACCEPTS=2 SEQUENCES=2",
        fails=[
            "OLD_C2 WITHOUT_PROVEN",
            "OLD_SKIP",
            "WITHOUT_PROVEN",
            "WITHOUT_CURSOR",
            "WITHOUT_VOIDED_LOADS",
            "WITHOUT_T0",
        ],
        faults=["A_CUT", "A_FORGED_FRAME", "A_REPLAY"],
    ),
    *_scene(
        "posts",
        "promise.pml",
        "POSTS=2 SAME_IDS=1 CUTS=1 ACCEPTS=3 SEQUENCES=3",
        "POSTS=1 SAME_IDS=1 ACCEPTS=2 SEQUENCES=2",
        fails=["OLD_C3", "WITHOUT_SCOPED_IDS"],
        faults=["A_POST", "A_SAME_ID"],
    ),
    *_scene(
        "recovery",
        "promise.pml",
        "TRIMS=1 RESTARTS=1 FLUSHES=1 CUTS=1 ACCEPTS=3 SEQUENCES=3",
        "TRIMS=1 RESTARTS=1 FLUSHES=1 ACCEPTS=2 SEQUENCES=2",
        fails=["WITHOUT_TRIM CUTS=1", "WITHOUT_IDENTITY", "WITHOUT_EPOCH CUTS=1", "WITHOUT_CREATED_HEAD CUTS=1"],
        faults=["A_TRIM", "A_RESTART", "A_FLUSH", "A_CLEAR"],
    ),
    *_scene(
        "unknown",
        "promise.pml",
        "UNKNOWN_IDENTITY RESTARTS=1 CUTS=1 TRIMS=1 ACCEPTS=3 SEQUENCES=3",
        "UNKNOWN_IDENTITY RESTARTS=1 CUTS=1 ACCEPTS=2 SEQUENCES=2",
        fails=["WITHOUT_DOUBT"],
        faults=["A_RESTART"],
    ),
    *_scene(
        "hand",
        "promise.pml",
        "HANDS=2 CUTS=1 ACCEPTS=4 SEQUENCES=3",
        "HANDS=1 CUTS=1 ACCEPTS=3 SEQUENCES=3",
        holds=["WITHOUT_DIGEST_ON_RESUME"],
        fails=["WITHOUT_HEAD_DOUBT", "WITHOUT_NEW_EPOCH", "WITHOUT_DIGEST_ON_RESUME WITHOUT_NEW_EPOCH"],
        faults=["A_HAND"],
    ),
    *_scene(
        "promotion",
        "promise.pml",
        "BLIPS=1 LOST_TWICE FORGED=1 ACCEPTS=3 SEQUENCES=3",
        "BLIPS=1 LOST_TWICE ACCEPTS=3 SEQUENCES=3",
        fails=["WITHOUT_IDENTITY_IN_ECHO", "UNKNOWN_IDENTITY"],
        faults=["A_BLIP"],
    ),
    *_scene(
        "second-line",
        "promise.pml",
        "BLIPS=1 UNKNOWN_IDENTITY QUIET_AFTER_BLIP CUTS=1 ACCEPTS=4 SEQUENCES=4",
        "BLIPS=1 UNKNOWN_IDENTITY QUIET_AFTER_BLIP ACCEPTS=4 SEQUENCES=4",
        fails=[
            "WITHOUT_DIGEST_AT_HEAD",
            "WITHOUT_BEHIND",
            "WITHOUT_DIGEST_IN_LOG",
            "WITHOUT_AHEAD",
            "WITHOUT_CAPTURE",
            "FORGED=1",
        ],
        faults=["A_BLIP"],
    ),
    *_scene(
        "own",
        "promise.pml",
        "OWNS=1 CUTS=1 ACCEPTS=3 SEQUENCES=3",
        "OWNS=1 CUTS=1 ACCEPTS=2 SEQUENCES=2",
        holds=["WITHOUT_OWN_TARGETS"],
        fails=["WITHOUT_OWN_RESET", "WITHOUT_OWN_ONCE", "FORESEEN_OWN_ID"],
        faults=["AN_OWN"],
    ),
    *_scene(
        "raising",
        "cache.pml",
        "MESSAGES=2",
        "MESSAGES=1",
        holds=["WITHOUT_FINALLY", "NAMES_LAST", "NAME_BY_NAME"],
        fails=["OLD_C4", "OLD_C4 NAME_BY_NAME WITHOUT_FINALLY WITHOUT_CLEAR", "WITHOUT_CLEAR", "WITHOUT_OTHER_CACHES"],
        faults=["A_RAISE", "A_CLEAR"],
    ),
    *_scene(
        "threads",
        "cache.pml",
        "THREADS MESSAGES=2",
        "THREADS MESSAGES=1",
        fails=["STAMP_FIRST", "CLOSED_LAST", "WITHOUT_STAMP_CHECK"],
        faults=["A_RAISE", "A_FAST_HIT"],
    ),
    *_scene(
        "confirmation",
        "confirmation.pml",
        "",
        "",
        fails=[
            "WITHOUT_REPORT_DIGEST",
            "WITHOUT_EACH_PART",
            "WITHOUT_PROVEN",
            "WITHOUT_REGISTRY_AGE",
            "WITHOUT_EXPECTED",
        ],
        faults=["A_FORGED_REPORT", "A_LOST_REGISTRY"],
    ),
    *_scene(
        "combined",
        "promise.pml",
        "CUTS=1 FORGED=1 TRIMS=1 RESTARTS=1 POSTS=1 ACCEPTS=2 SEQUENCES=2",
        "CUTS=1 FORGED=1 TRIMS=1 POSTS=1 ACCEPTS=1 SEQUENCES=1",
    ),
)


def missing_tools() -> str | None:
    """Return one line that names what to install, or None when spin and gcc are there."""
    missing = [tool for tool in ("spin", "gcc") if shutil.which(tool) is None]
    if not missing:
        return None
    return f"{' and '.join(missing)} not found: install the Debian packages spin and gcc (apt-get install spin gcc)"


def search(run: Run, *, is_small: bool, is_shortest: bool) -> Result:
    """Search one configuration. `is_shortest` finds the shortest counterexample, which takes more time and memory."""
    with tempfile.TemporaryDirectory(prefix="broadcache-model-") as folder:
        return _search(run, Path(folder), is_small=is_small, is_shortest=is_shortest and run.expected != "holds")


def _search(run: Run, folder: Path, *, is_small: bool, is_shortest: bool) -> Result:
    defines = run.defines(is_small=is_small)
    model = str(shutil.copy(HERE / run.file, folder))
    _run(["spin", "-a", *defines, model], folder)
    options = ["-DSAFETY", f"-DMEMLIM={MEMORY_MIB_MAX}"]
    if run.file != "cache.pml":
        options.append("-DNOREDUCE")  # one process: there is no order to reduce
    if is_shortest:
        options.append("-DBFS")
    _run(["gcc", "-O1" if is_small else "-O2", "-w", *options, "-o", "pan", "pan.c"], folder)
    output = _run(["sh", "-c", f"./pan -m{DEPTH_MAX} -E -n; status=$?; times >times; exit $status"], folder)
    seconds = _cpu_seconds(folder)
    errors, is_whole = _number(r"errors: (\d+)", output), "Search not completed" not in output
    found: Expected | Literal["incomplete"]
    if errors and "assertion violated" in output:
        found = "reachable" if run.expected == "reachable" else "fails"
    elif errors or not is_whole or "max search depth too small" in output:
        found = "incomplete"
    else:
        found = "holds"
    trail = _trail_of(defines, model, folder) if errors else ""
    return Result(
        run=run,
        found=found,
        states=_number(r"([\d.e+]+) states, stored", output),
        depth=_number(r"depth reached (\d+)", output),
        seconds=seconds,
        trail=trail,
    )


def _run(command: Sequence[str], folder: Path) -> str:
    done = subprocess.run(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS_MAX,
        check=False,
    )
    if done.returncode and "errors:" not in done.stdout:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}")
    return done.stdout


def _cpu_seconds(folder: Path) -> float:
    """Read how much time of a processor the search took: the last line of the shell's `times`, like `1m2.5s 0m0.1s`."""
    file = folder / "times"
    if not file.exists():
        return 0.0
    spans = re.findall(r"(\d+)m([\d.]+)s", file.read_text().splitlines()[-1])
    return sum(60 * int(minutes) + float(seconds) for minutes, seconds in spans)


def _number(pattern: str, output: str) -> int:
    found = re.search(pattern, output)
    return int(float(found[1])) if found else 0


def _trail_of(defines: Sequence[str], model: str, folder: Path) -> str:
    lines = _run(["spin", "-t", "-T", *defines, model], folder).splitlines()
    return "\n".join(line.strip() for line in lines if re.match(r"\s*[a-z ]+: ", line) and not line.startswith("spin:"))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Search the specification with spin.")
    parser.add_argument("--small", action="store_true", help="the small scope, as `make test` runs it")
    parser.add_argument("--scene", action="append", default=[], help="only this scene; may be repeated")
    parser.add_argument("--trails", action="store_true", help="print each counterexample, also the expected ones")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="searches at the same time")
    return parser.parse_args()


def main() -> int:
    """Search, print the table; return 1 when a result is not the expected one, 2 when a tool is missing."""
    arguments = _arguments()
    if (missing := missing_tools()) is not None:
        print(missing, file=sys.stderr)
        return 2
    runs = [run for run in RUNS if not arguments.scene or run.scene in arguments.scene]

    def search_one(run: Run) -> Result:
        return search(run, is_small=arguments.small, is_shortest=arguments.trails)

    wrong = 0
    print(f"{'configuration':<58} {'expected':<10} {'result':<11} {'states':>11} {'depth':>6} {'seconds':>8}")
    with ThreadPoolExecutor(max_workers=arguments.jobs) as executor:
        for result in executor.map(search_one, runs):
            run = result.run
            print(
                f"{run.name:<58} {run.expected:<10} {result.found:<11} {result.states:>11,} {result.depth:>6,}"
                f" {result.seconds:>8.1f}{'' if result.is_expected else '  NOT EXPECTED'}",
                flush=True,
            )
            wrong += not result.is_expected
            if result.trail and (arguments.trails or not result.is_expected):
                print("\n".join(f"    {line}" for line in result.trail.splitlines()), flush=True)
    print(f"{len(runs)} searches, {wrong} not as expected")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
