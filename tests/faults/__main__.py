"""`python -m tests.faults [--seconds N] [--faults a,b] [--seed S]`: the long run, as a table.

Ends with 1 when a read broke the promise, a replica did not come back, or a fault broke none of the controls it must.
"""
# ruff: noqa: T201 - it prints a table, and how far it is

import argparse
import asyncio
import secrets
import sys
import time
from collections.abc import Sequence
from typing import Final

import msgspec
from tests.faults.run import COMBINATION, NAMES, Row, render, run

# No two draws are alike, so there is more to see.
COMBINATION_SHARES: Final = 4


def main() -> int:
    arguments = _arguments()
    _say(f"seed {arguments.seed}: the same faults again with --seed {arguments.seed}")
    rows: list[Row] = []
    try:
        asyncio.run(_run_all(arguments.faults, arguments.bound, arguments.seconds, arguments.seed, rows))
    except KeyboardInterrupt:
        _say("stopped")
        return 130
    finally:
        if rows:
            _print_table(rows)
    return 0 if all(row.is_kept and row.is_proven for row in rows) else 1


def _print_table(rows: Sequence[Row]) -> None:
    checked, broken = sum(row.ours.checked for row in rows), sum(row.ours.broken for row in rows)
    print(f"{render(rows)}\n\n{checked:,} reads checked, {broken:,} broken", flush=True)


async def _run_all(names: list[str], bound_seconds: float, seconds: float, seed: int, rows: list[Row]) -> None:
    """Append a row for each fault, as soon as it is finished."""
    shares = {name: COMBINATION_SHARES if name == COMBINATION else 1 for name in names}
    for number, (name, share) in enumerate(shares.items(), 1):
        began = time.monotonic()
        share_seconds = seconds * share / sum(shares.values())
        row = await run(name, bound_seconds=bound_seconds, seed=seed, seconds=share_seconds)
        rows.append(row)
        _say(
            f"[{number}/{len(names)}] {name}: {row.ours.checked:,} reads, {row.ours.broken} broken, "
            f"{time.monotonic() - began:.0f} s"
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
    parser.add_argument("--seconds", type=float, default=480, help="how long in all, about (480)")
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
