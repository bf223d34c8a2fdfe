"""Every interleaving of a load, its callers and an invalidation, for each way to load; and loads broken on purpose.

What is checked in each: a caller never gets a value that was invalidated before it came, and an entry never outlives an
invalidation.
"""

import asyncio
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeAlias

import pytest
from tests.support.fake_clock import FakeClock

from broadcache.shared import Everything, Keys, Prefixes, Tags, Target
from broadcache.subscriber import Loaded, LocalCache
from broadcache.subscriber.cache.loading.load import Load
from broadcache.subscriber.cache.loading.loads import Loads
from broadcache.subscriber.cache.loading.many import LoadsOfMany
from broadcache.subscriber.cache.loading.refresh import RefreshedLoads

KEY, OTHER = "p:1", "p:2"
TAG = "shop:7"
TARGETS: tuple[Target, ...] = (Keys(KEY), Tags(TAG), Prefixes("p:"), Everything(), Keys(OTHER))

Kind: TypeAlias = Literal[
    "tags of the call",
    "Loaded",
    "many",
    "many Loaded",
    "many, then single",
    "single, then many",
    "refresh",
    "finished",
]
KINDS: tuple[Kind, ...] = (
    "tags of the call",
    "Loaded",
    "many",
    "many Loaded",
    "many, then single",
    "single, then many",
    "refresh",
    "finished",
)
Step: TypeAlias = Literal["first", "second", "leave", "answer", "apply", "read"]
STEPS: tuple[Step, ...] = ("first", "second", "leave", "answer", "apply", "read")


class Broken(AssertionError):
    """A value was returned, or served, that had been invalidated before."""


def schedules() -> Iterator[tuple[Step, ...]]:
    for order in itertools.permutations(STEPS):
        if order.index("first") < min(order.index("leave"), order.index("second")):
            yield order
            yield tuple(step for step in order if step != "leave")


class Scene:
    """A source whose rows have versions. A load reads them when it begins, and returns them when it is let go."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.clock = FakeClock()
        self.cache: LocalCache[int] = LocalCache(
            {},
            clock=self.clock,
            max_staleness_seconds=1_000,
            finish_loads=kind == "finished",
            refresh_after_seconds=60 if kind == "refresh" else None,
        )
        self.cache.confirm_coherent(self.clock())
        self.versions = {KEY: 1, OTHER: 1}
        self.gate = asyncio.Event()
        self.callers: list[tuple[asyncio.Future[Any], dict[str, int]]] = []
        self.is_many = itertools.cycle([kind != "single, then many", kind == "single, then many"])

    async def _rows(self, keys: list[str]) -> dict[str, Any]:
        rows: dict[str, Any] = {key: self.versions[key] for key in keys}
        await self.gate.wait()
        if self.kind not in ("tags of the call", "many"):
            return {key: Loaded(version, tags=(TAG,)) for key, version in rows.items()}
        return rows

    async def _row(self) -> Any:
        return (await self._rows([KEY]))[KEY]

    async def _call(self) -> dict[str, int]:
        tags = () if "Loaded" in self.kind else (TAG,)
        if self.kind in ("many", "many Loaded") or (", then " in self.kind and next(self.is_many)):
            return await self.cache.get_or_load_many([KEY, OTHER], self._rows, tags=tags)
        return {KEY: await self.cache.get_or_load(KEY, self._row, tags=tags)}

    async def prepare(self) -> None:
        if self.kind == "refresh":
            self.gate.set()
            await self._call()
            self.gate.clear()
            self.clock.now += 61

    async def settle(self) -> None:
        for _ in range(12):
            await asyncio.sleep(0)

    async def do(self, step: Step, target: Target) -> None:
        match step:
            case "first" | "second":
                self.callers.append((asyncio.ensure_future(self._call()), dict(self.versions)))
            case "leave":
                self.callers.pop(0)[0].cancel()
            case "answer":
                self.gate.set()
            case "apply":
                for key in self.versions:
                    if target not in (Keys(KEY), Keys(OTHER)) or target == Keys(key):
                        self.versions[key] += 1
                self.cache.apply(target)
            case "read":
                self.check_entries()
        await self.settle()

    def check_entries(self) -> None:
        for key, version in self.cache.items():
            if version != self.versions[key]:
                raise Broken(f"{key} is served in version {version}, not {self.versions[key]}")

    async def check(self) -> None:
        self.gate.set()
        await self.settle()
        for caller, versions in self.callers:
            for key, version in (await caller).items():
                if version < versions[key]:
                    raise Broken(f"a caller that came at version {versions[key]} of {key} got {version}")
        await self.settle()
        self.check_entries()


async def run(kind: Kind, order: tuple[Step, ...], target: Target) -> None:
    scene = Scene(kind)
    await scene.prepare()
    try:
        for step in order:
            await scene.do(step, target)
        await scene.check()
    except Broken as broken:
        raise Broken(f"{kind}, {target}, {order}: {broken}") from None


async def run_all(kinds: tuple[Kind, ...]) -> int:
    count = 0
    for kind in kinds:
        for target in TARGETS:
            for order in schedules():
                await run(kind, order, target)
                count += 1
    return count


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", KINDS)
def test_no_interleaving_returns_or_serves_what_was_invalidated(kind: Kind) -> None:
    assert asyncio.run(run_all((kind,))) == len(TARGETS) * len(list(schedules()))


async def values(kind: Kind) -> tuple[list[int], int]:
    """What a scene without an invalidation returns, and stores: it would break no promise to store nothing."""
    scene = Scene(kind)
    await scene.prepare()
    for step in STEPS[:2]:
        await scene.do(step, Everything())
    await scene.check()
    return [(await caller)[KEY] for caller, _ in scene.callers], scene.cache.stats().loads


@pytest.mark.parametrize("kind", KINDS)
def test_the_load_is_shared_and_stored_when_nothing_is_invalidated(kind: Kind) -> None:
    assert asyncio.run(values(kind)) == ([1, 1], 2 if kind in ("refresh", "single, then many") else 1)


# --- broken on purpose -----------------------------------------------------------------------------------------------

Mutant: TypeAlias = Callable[[pytest.MonkeyPatch], None]


def late_callers_take_what_they_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Loads, "_is_no_result", lambda *_, **__: False)


def a_load_is_stored_with_a_token_of_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    fill = Loads._fill

    def fill_late(loads: Any, load: Load, value: Any) -> Any:
        load.token = loads._cache.begin_load(load.token.key)
        return fill(loads, load, value)

    monkeypatch.setattr(Loads, "_fill", fill_late)


def the_tags_of_a_value_are_not_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Loads, "_fill", lambda loads, load, value: _stored(loads, load, getattr(value, "value", value)))


def _stored(loads: Any, load: Load, value: Any) -> Any:
    loads._cache.store(load.token, value, tags=load.tags)
    return value


def void_loads_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Loads, "_is_joinable", lambda *_, **__: True)


def the_keys_of_a_query_take_their_tokens_when_it_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    fill_many = LoadsOfMany._fill_many

    def fill_late(loads: Any, batch: Load, loaded: Any) -> Any:
        for part in batch.parts:
            part.token = loads._cache.begin_load(part.token.key)
        return fill_many(loads, batch, loaded)

    monkeypatch.setattr(LoadsOfMany, "_fill_many", fill_late)


def the_keys_of_a_query_have_the_token_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    fill_many = LoadsOfMany._fill_many

    def fill_first(loads: Any, batch: Load, loaded: Any) -> Any:
        if not loads._cache.is_void(batch.parts[0].token, batch.tags):
            for part in batch.parts:
                part.token = loads._cache.begin_load(part.token.key)
        return fill_many(loads, batch, loaded)

    monkeypatch.setattr(LoadsOfMany, "_fill_many", fill_first)


def a_refresh_takes_its_token_when_it_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    fill = Loads._fill

    def fill_late(loads: Any, load: Load, value: Any) -> Any:
        if load.is_kept:
            load.token = loads._cache.begin_load(load.token.key)
        return fill(loads, load, value)

    monkeypatch.setattr(Loads, "_fill", fill_late)


def a_refresh_stores_whatever_it_has_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    finish = RefreshedLoads._finish_refresh

    def finish_and_store(loads: Any, load: Load, task: "asyncio.Task[Any]") -> None:
        finish(loads, load, task)
        loads._cache[load.token.key] = task.result()

    monkeypatch.setattr(RefreshedLoads, "_finish_refresh", finish_and_store)


MUTANTS: dict[Mutant, tuple[Kind, ...]] = {
    late_callers_take_what_they_joined: ("Loaded", "many Loaded"),
    a_load_is_stored_with_a_token_of_its_end: KINDS,
    the_tags_of_a_value_are_not_stored: ("Loaded", "many Loaded"),
    void_loads_are_joined: ("tags of the call", "many"),  # elsewhere, the rule for late callers covers it
    the_keys_of_a_query_take_their_tokens_when_it_returns: ("many", "many Loaded", "many, then single"),
    the_keys_of_a_query_have_the_token_of_the_first: ("many", "many Loaded", "many, then single"),
    a_refresh_takes_its_token_when_it_returns: ("refresh", "finished"),
    a_refresh_stores_whatever_it_has_loaded: ("refresh",),
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("mutant", "kind"), [(mutant, kind) for mutant, kinds in MUTANTS.items() for kind in kinds])
def test_a_load_that_is_broken_on_purpose_is_caught(
    mutant: Mutant, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutant(monkeypatch)
    with pytest.raises(Broken):
        asyncio.run(run_all((kind,)))
