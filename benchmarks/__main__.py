"""`python -m benchmarks [names…] [--quick] [--json FILE]`: run the benchmarks and print one table."""

import argparse
import dataclasses
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Final

from benchmarks.harness import Effort, Row
from benchmarks.report import environment, render

BENCHMARKS: Final = (
    "applied",
    "hits",
    "latency",
    "publish",
    "sync_publish",
    "api",
    "stall",
    "memory",
    "imports",
    "idle",
    "echo",
    "fleet",
    "fanout",
    "confirmation",
    "flood",
    "scale",
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure against peers and the floor.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which to run (all): {', '.join(BENCHMARKS)}")
    parser.add_argument("--quick", action="store_true", help="little work: checks that everything runs, not how fast")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, too")
    arguments = parser.parse_args()
    names: list[str] = arguments.names or list(BENCHMARKS)
    if unknown := set(names) - set(BENCHMARKS):
        parser.error(f"expected names out of {', '.join(BENCHMARKS)}, got {', '.join(sorted(unknown))}")

    rows: list[Row] = []
    for name in names:
        began = time.perf_counter()
        # Only the requested ones, one at a time: the children of a benchmark import this module, too.
        rows += importlib.import_module(f"benchmarks.{name}").run(Effort(is_quick=arguments.quick))
        print(f"{name}: measured in {time.perf_counter() - began:.0f} s", file=sys.stderr)

    print(", ".join(f"{name} {value}" for name, value in environment().items()))
    print()
    print(render(rows))
    if arguments.quick:
        print("\nA quick run: the figures only show that everything runs.")
    if arguments.json is not None:
        report = {"environment": environment(), "rows": [dataclasses.asdict(row) | {"met": row.is_met} for row in rows]}
        arguments.json.write_text(json.dumps(report, ensure_ascii=False, indent=2) + "\n")


if __name__ == "__main__":
    main()
