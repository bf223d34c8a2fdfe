"""The promise under faults, each beside what naive pub/sub does: the short form of `make soak`."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

import pytest
from tests.faults.ledger import KEYS, VERSIONS_MAX, Ledger
from tests.faults.messages import ReplicaSettings, Report
from tests.faults.replica import Reader
from tests.faults.run import run
from tests.support.command_line import descendants, is_alive
from tests.support.paths import ROOT
from tests.support.servers import ServerMissing

pytestmark = pytest.mark.anyio

BOUND_SECONDS: Final = 1.0
QUICK: Final = (
    "slow loads",
    "client kill",
    "cut",
    "black hole",
    "delay",
    "loop blocked",
    "replica stopped",
    "tail lost",
    "promoted",
    "log trimmed",
    "tail lost without identity",
    "backlog on a slow link",
    "raising mapping",
    "forged next",
    "forged own ids",
    "posted in advance",
    "head set back",
    "log replaced",
    "registry deleted",
    "cut on redis-6.2",
    "cluster: primary thawed on redis",
    "sentinels: primary thawed",
    "cluster: slot migrated at once",
)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("fault", QUICK)
async def test_no_fault_breaks_the_promise_that_naive_pubsub_breaks(fault: str) -> None:
    try:
        row = await run(fault, bound_seconds=BOUND_SECONDS, seed=1)
    except ServerMissing as missing:
        pytest.skip(str(missing))
    assert row.ours.broken == 0, row.ours.first_broken
    assert row.ours.misconfirmed == 0, "a value was served after a confirmation that every replica had dropped it"
    assert row.ours.checked > 0
    assert row.has_recovered
    assert row.is_proven, f"expected {fault!r} to break the controls {set(row.fault.breaks)}, got {row.reports}"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", [1, 2])
async def test_no_combination_of_faults_breaks_the_promise(seed: int) -> None:
    row = await run("combination", bound_seconds=BOUND_SECONDS, seed=seed)
    assert row.ours.broken == 0, (row.described, row.ours.first_broken)
    assert row.has_recovered, row.described


class Served:
    """A cache that serves the version it was given, for every key or for none."""

    is_coherent = True

    def __init__(self) -> None:
        self.version: int | None = None

    def get(self, key: str, /) -> int | None:
        return self.version

    async def load(self, number: int, from_source: object, seconds: float) -> None: ...

    def post(self, body: bytes) -> None: ...

    async def invalidate(self, key: str) -> None: ...

    def counted(self) -> Report:
        return Report()


async def judged(tmp_path: Path, age_seconds: float | None, *, is_confirmed: bool = False) -> Report:
    """What the oracle says of a served version whose successor was accepted so long ago, or not at all."""
    ledger = Ledger.create(tmp_path / "ledger")
    settings = ReplicaSettings("ours", "", "", bound_seconds=60.0, load_seconds_max=0.0, seed=0)
    served = Served()
    reader = Reader(served, ledger, settings)
    served.version = ledger.change(0)
    if age_seconds is not None:
        ledger.accept(served.version, is_confirmed=is_confirmed)
        ledger.superseded_at[served.version] = time.monotonic() - age_seconds
    reader.read_all()
    return reader.report()


async def test_the_oracle_accuses_who_serves_what_was_invalidated_longer_ago_than_the_bound(tmp_path: Path) -> None:
    report = await judged(tmp_path, 61.0)
    assert (report.checked, report.broken) == (KEYS, KEYS)
    assert report.longest_seconds > 61.0


@pytest.mark.parametrize("age_seconds", [None, 1.0], ids=["not accepted yet", "within the bound"])
async def test_the_oracle_does_not_accuse_who_may_still_serve(tmp_path: Path, age_seconds: float | None) -> None:
    report = await judged(tmp_path, age_seconds)
    assert (report.checked, report.broken) == (KEYS, 0)


async def test_the_oracle_accuses_who_serves_what_all_replicas_were_said_to_have_dropped(tmp_path: Path) -> None:
    report = await judged(tmp_path, 1.0, is_confirmed=True)
    assert (report.reads, report.broken, report.misconfirmed) == (KEYS, 0, KEYS)


async def test_what_was_not_confirmed_may_be_served_within_the_bound(tmp_path: Path) -> None:
    report = await judged(tmp_path, 1.0)
    assert (report.checked, report.misconfirmed) == (KEYS, 0)


def test_versions_of_different_keys_are_never_confused(tmp_path: Path) -> None:
    ledger = Ledger.create(tmp_path / "ledger")
    for number in range(KEYS):
        assert ledger.change(number) == number * VERSIONS_MAX
    assert len(set(ledger.source)) == KEYS


def test_a_second_process_sees_what_the_first_has_noted(tmp_path: Path) -> None:
    ledger, other = Ledger.create(tmp_path / "ledger"), Ledger(tmp_path / "ledger")
    version = ledger.change(7)
    assert other.source[7] == version + 1
    assert other.superseded_at[version] == float("inf")
    ledger.accept(version)
    assert other.superseded_at[version] <= time.monotonic()
    assert other.accepted == 1


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.timeout(120)
def test_a_soak_that_is_interrupted_stops_what_it_has_started() -> None:
    command = [sys.executable, "-m", "tests.faults", "--faults", "nothing", "--seconds", "600"]
    soak = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        # A server, a writer and three replicas.
        while len(started := descendants(soak.pid)) < 5:
            assert soak.poll() is None, soak.communicate()
        soak.send_signal(signal.SIGINT)
        output, errors = soak.communicate()
    finally:
        soak.kill()
        soak.wait()
    assert soak.returncode == 130, (output, errors)
    assert errors.endswith("stopped\n")
    assert "Traceback" not in errors
    assert not any(is_alive(pid) for pid in started)
