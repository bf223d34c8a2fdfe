"""`python -m tests.faults [--seconds N] [--faults a,b] [--seed S]`: the long run, as a table.

Ends with 1 when a read broke the promise or a confirmation, a replica did not come back, a fault did not break the
controls that it must, or ended in an error.
"""
# ruff: noqa: T201 - it prints a table, and how far it is

import argparse
import asyncio
import secrets
import sys
import time
import traceback
from typing import Final

import msgspec
from tests.faults.run import COMBINATION, NAMES, Row, render, run
from tests.support.servers import ServerMissing

# No two draws are alike, so there is more to see.
COMBINATION_SHARES: Final = 4


class Course:
    """A run so far: its rows, the faults whose server is not installed, and those that ended in an error."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.skipped: list[str] = []
        self.ended: list[str] = []

    @property
    def is_good(self) -> bool:
        return not self.ended and all(row.is_kept and row.is_proven for row in self.rows)


def main() -> int:
    arguments = _arguments()
    _say(f"seed {arguments.seed}: the same faults again with --seed {arguments.seed}")
    course = Course()
    try:
        asyncio.run(_run_all(arguments.faults, arguments.bound, arguments.seconds, arguments.seed, course))
    except KeyboardInterrupt:
        _say("stopped")
        return 130
    finally:
        if course.rows:
            _print_table(course)
    return 0 if course.is_good else 1


def _print_table(course: Course) -> None:
    rows = course.rows
    checked, broken = sum(row.ours.checked for row in rows), sum(row.ours.broken for row in rows)
    print(f"{render(rows)}\n\n{checked:,} reads checked, {broken:,} broken", flush=True)
    if course.ended:
        print(f"ended in an error: {', '.join(course.ended)}", flush=True)
    if course.skipped:
        print(f"skipped, because a server is not installed: {', '.join(course.skipped)}", flush=True)


async def _run_all(names: list[str], bound_seconds: float, seconds: float, seed: int, course: Course) -> None:
    """Add a row for each fault, as soon as it is finished."""
    shares = {name: COMBINATION_SHARES if name == COMBINATION else 1 for name in names}
    for number, (name, share) in enumerate(shares.items(), 1):
        began = time.monotonic()
        share_seconds = seconds * share / sum(shares.values())
        try:
            row = await run(name, bound_seconds=bound_seconds, seed=seed, seconds=share_seconds)
        except ServerMissing as missing:
            course.skipped.append(name)
            _say(f"[{number}/{len(names)}] {name}: skipped: {missing}")
            continue
        except Exception:  # noqa: BLE001 - the other faults are worth their time all the same
            course.ended.append(name)
            _say(f"[{number}/{len(names)}] {name}: ended in an error", traceback.format_exc())
            continue
        course.rows.append(row)
        _say(
            f"[{number}/{len(names)}] {name}: {row.ours.checked:,} reads, {row.ours.broken} broken, "
            f"{row.ours.misconfirmed} misconfirmed, {time.monotonic() - began:.0f} s"
        )
        if name == COMBINATION:
            _say(*(f"    {what or 'nothing'}" for what in row.described))
        if not row.is_proven:
            _say(f"    expected it to break the controls {', '.join(row.fault.breaks)}, it did not: it proves nothing")
        if not row.has_recovered:
            _say("    our replica has not become coherent again")
        _say(*(f"    broken: {msgspec.json.encode(broken).decode()}" for broken in row.ours.first_broken))


def _say(*lines: str) -> None:
    for line in lines:
        print(line, file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description="Check the promise under faults.")
    parser.add_argument("--seconds", type=float, default=1_200, help="how long in all, about (1200)")
    parser.add_argument("--faults", default="all", metavar="A,B", help=f"which (all): {', '.join(NAMES)}")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1_000_000), help="of all chance (random)")
    parser.add_argument("--bound", type=float, default=2.0, help="max_staleness_seconds (2)")
    arguments = parser.parse_args()
    asked = list(NAMES) if arguments.faults == "all" else [name.strip() for name in arguments.faults.split(",")]
    if unknown := set(asked) - set(NAMES):
        parser.error(f"expected faults out of {', '.join(NAMES)}; got {', '.join(sorted(unknown))}")
    arguments.faults = asked
    return arguments


if __name__ == "__main__":
    sys.exit(main())
