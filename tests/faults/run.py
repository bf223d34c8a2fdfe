"""A run: one stage, one fault as often as time allows, and what came of it as one row of the table."""

import random
import time
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from tests.faults.catalogue import FAULTS, combination, nothing
from tests.faults.fault import SOME_WRITES, Breaks, Fault, Inject
from tests.faults.messages import Kind, Report
from tests.faults.stage import Stage, StageSettings
from tests.faults.stages import stage_of

COMBINATION: Final = "combination"
NAMES: Final = (*FAULTS, COMBINATION)
CONTROLS: Final[tuple[Kind, ...]] = ("naive", "clearing")

_HEADINGS: Final = (
    "fault",
    "servers",
    "times",
    "reads",
    "local",
    "broken",
    "misconfirmed",
    "longest / bound, s",
    "recovery, s",
    "replayed",
    "gaps",
    "clears",
    "bypassed",
    "naive broken",
    "clearing broken",
)


class Row(NamedTuple):
    """What came of one fault. `has_recovered`: our replica became coherent again each time."""

    fault: Fault
    server: str
    bound_seconds: float
    times: int
    has_recovered: bool
    reports: dict[Kind, Report]
    described: tuple[str, ...] = ()

    @property
    def ours(self) -> Report:
        return self.reports["ours"]

    @property
    def is_kept(self) -> bool:
        """Whether our replica kept the promise, confirmed nothing that was not so, and came back."""
        ours = self.ours
        return ours.broken == ours.misconfirmed == 0 and ours.checked > 0 and self.has_recovered

    @property
    def is_proven(self) -> bool:
        """Whether the controls broke it where they must: else the fault did not take place, and proves nothing."""
        return all(self.reports[kind].broken for kind in self.fault.breaks)


async def run(name: str, *, bound_seconds: float, seed: int, seconds: float = 0.0) -> Row:
    """Bring a fault about at least once, and again until `seconds` have passed."""
    ends_at = time.monotonic() + seconds
    fault = FAULTS.get(name) or Fault(COMBINATION, nothing, settings=StageSettings(is_persistent=True))
    draws = _draws(fault, seed)
    described: list[str] = []
    async with stage_of(fault.settings._replace(bound_seconds=bound_seconds, seed=seed)) as stage:
        server = f"{fault.settings.topology}, {await stage.version()}"
        while not described or time.monotonic() < ends_at:
            what, inject = next(draws)
            described.append(what)
            await _endure(stage, inject, fault.breaks)
        reports = await stage.reports()
        return Row(fault, server, bound_seconds, len(described), stage.has_recovered, reports, tuple(described))


async def _endure(stage: Stage, inject: Inject, breaks: Breaks) -> None:
    """Bring a fault about once, and wait until its traces have shown."""
    try:
        await inject(stage)
    finally:
        await stage.heal()
    await stage.recovered()
    await stage.writes(SOME_WRITES)
    # From now on nothing hides that an invalidation was lost: what is stale stays so, and grows old enough to be seen.
    await stage.pause_writes()
    await stage.outlast_bound()
    await stage.broken_by(breaks)
    await stage.resume_writes()


def _draws(fault: Fault, seed: int) -> Iterator[tuple[str, Inject]]:
    chance = random.Random(seed)
    while True:
        yield combination(chance) if fault.name == COMBINATION else (fault.name, fault.inject)


def render(rows: Sequence[Row]) -> str:
    """The table, in Markdown."""
    lines = [_HEADINGS, ("---", "---") + ("--:",) * (len(_HEADINGS) - 2), *(_cells(row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(row: Row) -> tuple[str, ...]:
    ours = row.ours
    return (
        row.fault.name,
        row.server,
        str(row.times),
        f"{ours.checked:,}",
        f"{ours.checked / ours.reads:.0%}",
        str(ours.broken),
        str(ours.misconfirmed),
        f"{ours.longest_seconds:.2f} / {row.bound_seconds:g}",
        f"{ours.recovered_seconds:.2f}" if row.has_recovered else "never",
        f"{ours.replayed:,}",
        f"{ours.gaps:,}",
        ", ".join(f"{reason} {count}" for reason, count in sorted(ours.clears.items())),
        f"{ours.bypassed:,}",
        *(f"{row.reports[kind].broken:,}" for kind in CONTROLS),
    )
