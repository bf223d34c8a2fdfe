"""Every interleaving of loads, invalidations, sweeps, expiries, evictions and lost connections, against a model."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest
from cachetools import TTLCache
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from broadcache.shared import Everything, Keys, Prefixes, Tags, Target
from broadcache.subscriber import LoadToken, LocalCache
from broadcache.subscriber import entries as entries_module
from broadcache.subscriber import history as history_module
from broadcache.subscriber import local_cache as local_cache_module
from broadcache.subscriber.entries import Entries
from broadcache.subscriber.history import History

KEY = "product:42"
TAG = "catalogue"
TARGETS: tuple[Target, ...] = (Keys(KEY), Tags(TAG), Prefixes("product:"), Everything())
REPRODUCIBLE = settings(
    derandomize=True,
    database=None,
    deadline=None,
    print_blob=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


class FakeClock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


def kind_of(target: Target) -> str:
    return type(target).__name__.lower()


# --- every small schedule --------------------------------------------------------------------------------------------

Step = Literal["begin", "apply", "store", "read", "sweep", "second begin", "second store"]
STEPS: tuple[Step, ...] = ("begin", "apply", "store", "read", "sweep", "second begin", "second store")


def schedules() -> Iterator[tuple[Step, ...]]:
    for order in itertools.permutations(STEPS):
        if order.index("begin") < order.index("store") and order.index("second begin") < order.index("second store"):
            yield order


@pytest.mark.parametrize("target", TARGETS, ids=kind_of)
def test_no_order_of_two_loads_and_an_invalidation_serves_what_it_dropped(target: Target) -> None:
    for order in schedules():
        cache = LocalCache({})
        cache.confirm_coherent(cache.clock() + 3_600)
        source = "old"
        loads: dict[str, tuple[LoadToken, str]] = {}
        expected: str | None = None
        for step in order:
            match step:
                case "begin" | "second begin":
                    loads[step.replace("begin", "store")] = (cache.begin_load(KEY), source)
                case "store" | "second store":
                    token, value = loads[step]
                    is_current = value == source
                    assert cache.store(token, value, tags=(TAG,)) is is_current, order
                    expected = value if is_current else expected
                case "apply":
                    source, expected = "new", None
                    cache.apply(target)
                case "read":
                    assert cache.get(KEY) == expected, order
                case "sweep":
                    cache.sweep()
        assert cache.get(KEY) == expected, order


# --- every interleaving, against a model -----------------------------------------------------------------------------

ALL_KEYS = ("a:1", "a:2", "b:1", "b:2", "b:3")
ALL_TAGS = ("red", "blue")
TTL_SECONDS = 50


class Model:
    """What may be served, said without stamps, sweeps or leases: a list of invalidations and a dictionary."""

    def __init__(self) -> None:
        self.invalidations: list[Target] = []
        self.entries: dict[str, tuple[object, tuple[str, ...], float]] = {}
        self.coherent_until = -math.inf

    @staticmethod
    def concerns(target: Target, key: str, tags: tuple[str, ...]) -> bool:
        match target:
            case Keys(names):
                return key in names
            case Tags(names):
                return bool(set(tags) & set(names))
            case Prefixes(names):
                return key.startswith(names)
            case Everything():
                return True

    def begin(self) -> int:
        return len(self.invalidations)

    def may_store(self, begun: int, key: str, tags: tuple[str, ...]) -> bool:
        return not any(self.concerns(target, key, tags) for target in self.invalidations[begun:])

    def apply(self, target: Target) -> None:
        self.invalidations.append(target)
        for key, (_, tags, _) in list(self.entries.items()):
            if self.concerns(target, key, tags):
                del self.entries[key]

    def read(self, key: str, now: float) -> object:
        if now >= self.coherent_until or key not in self.entries:
            return None
        value, _, expires_at = self.entries[key]
        return None if now >= expires_at else value


class Interleavings(RuleBasedStateMachine):
    """Drives a cache and the model through one schedule, and compares every answer.

    The constants that decide when something is done in slices are made small in `small_slices`, so that few entries
    reach every state that many would.
    """

    cache_type = LocalCache
    is_exact = True  # whether the cache must store and serve all that it may
    maxsize = 100
    mapping_type: type[TTLCache[str, Any]] = TTLCache

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        mapping = self.mapping_type(maxsize=self.maxsize, ttl=TTL_SECONDS, timer=self.clock)
        self.model = Model()
        self.see_evictions(mapping)
        self.cache = self.cache_type(mapping, clock=self.clock, max_staleness_seconds=5)
        self.loads: list[tuple[LoadToken, int, int, tuple[str, ...]]] = []
        self.values = itertools.count(1)
        self.confirm(0)

    def see_evictions(self, mapping: TTLCache[str, Any]) -> None:
        pop = mapping.popitem

        def popitem() -> tuple[str, Any]:
            key, value = pop()
            self.model.entries.pop(key, None)
            return key, value

        setattr(mapping, "popitem", popitem)  # noqa: B010  (the exact type has lookups without a lock; keep it)

    @rule(key=st.sampled_from(ALL_KEYS), tags=st.lists(st.sampled_from(ALL_TAGS), unique=True).map(tuple))
    def begin(self, key: str, tags: tuple[str, ...]) -> None:
        self.loads.append((self.cache.begin_load(key), self.model.begin(), next(self.values), tags))

    @precondition(lambda self: self.loads)
    @rule(place=st.integers(0, 100), ttl_seconds=st.sampled_from([None, 3, 20]))
    def store(self, place: int, ttl_seconds: float | None) -> None:
        token, begun, value, tags = self.loads.pop(place % len(self.loads))
        may_store = self.model.may_store(begun, token.key, tags)
        is_stored = self.cache.store(token, value, tags=tags, ttl_seconds=ttl_seconds)
        assert is_stored is may_store or (not self.is_exact and not is_stored), (token, tags)
        if is_stored:
            lifetime = TTL_SECONDS if ttl_seconds is None else ttl_seconds
            self.model.entries[token.key] = (value, tags, self.clock.now + lifetime)

    @rule(keys=st.lists(st.sampled_from(ALL_KEYS), min_size=1), tags=st.lists(st.sampled_from(ALL_TAGS), unique=True))
    def load_many(self, keys: list[str], tags: list[str]) -> None:
        for key in keys:
            self.begin(key, tuple(tags))
            self.store(-1, None)

    @rule(
        named=st.one_of(
            st.sampled_from(ALL_KEYS).map(Keys),
            st.sampled_from(ALL_TAGS).map(Tags),
            st.sampled_from(["a", "a:", "b:", "b:1", "c"]).map(Prefixes),
            st.just(Everything()),
        )
    )
    def apply(self, named: Target) -> None:
        self.model.apply(named)
        self.cache.apply(named)

    @rule(key=st.sampled_from(ALL_KEYS))
    def read(self, key: str) -> None:
        expected = self.model.read(key, self.clock.now)
        got = self.cache.get(key)
        assert got == expected or (not self.is_exact and got is None), (key, got, expected)

    @rule()
    def read_all(self) -> None:
        for key in ALL_KEYS:
            self.read(key)
        expected = {key for key in ALL_KEYS if self.model.read(key, self.clock.now) is not None}
        shown = list(self.cache)
        assert set(shown) == expected or (not self.is_exact and set(shown) <= expected)
        assert len(shown) == len(set(shown))
        assert all((key in self.cache) == (key in shown) for key in ALL_KEYS)

    @rule()
    def sweep(self) -> None:
        self.cache.sweep()

    @rule(seconds=st.sampled_from([1, 4, 10]), is_proved=st.booleans())
    def tick(self, seconds: float, is_proved: bool) -> None:
        self.clock.now += seconds
        if is_proved:
            self.confirm(0)

    @rule(age_seconds=st.sampled_from([0, 0, 2]))
    def confirm(self, age_seconds: float) -> None:
        self.cache.confirm_coherent(self.clock.now - age_seconds)
        self.model.coherent_until = max(self.model.coherent_until, self.clock.now - age_seconds + 5)

    @rule()
    def disconnect_and_subscribe_anew(self) -> None:
        self.cache.disconnect()
        assert [self.cache.get(key) for key in ALL_KEYS] == [None] * len(ALL_KEYS)
        self.apply(Everything())
        self.cache.confirm_coherent(self.clock.now)
        self.model.coherent_until = self.clock.now + 5

    def teardown(self) -> None:
        for seconds in (0, 3, 17, 30):
            self.tick(seconds, is_proved=True)
            self.read_all()


class WithEvictions(Interleavings):
    maxsize = 2


class WithLockedLookups(Interleavings):
    class Mapping(TTLCache[str, Any]):
        """A subclass: its lookups may do anything, so hits take the lock and always judge the entry."""

    mapping_type = Mapping


class WithForgetfulHistory(Interleavings):
    is_exact = False


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_cache_module, "_SWEEP_SLICE_ENTRIES", 1)
    monkeypatch.setattr(local_cache_module, "_STORE_SWEEP_ENTRIES", 1)
    monkeypatch.setattr(entries_module, "_DROP_AT_ONCE_MAX", 1)
    monkeypatch.setattr(entries_module, "_INDEX_SLACK", 1)


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize("machine", [Interleavings, WithEvictions, WithLockedLookups])
def test_every_read_of_every_schedule_is_what_the_model_says(machine: type[Interleavings]) -> None:
    run_state_machine_as_test(machine, settings=settings(REPRODUCIBLE, max_examples=100, stateful_step_count=40))


@pytest.mark.usefixtures("small_slices")
def test_a_history_that_overflows_costs_loads_and_never_serves_what_was_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for limit in ("_KEYS_MAX", "_TAGS_MAX", "_PREFIXES_MAX"):
        monkeypatch.setattr(history_module, limit, 1)
    run_state_machine_as_test(
        WithForgetfulHistory, settings=settings(REPRODUCIBLE, max_examples=60, stateful_step_count=40)
    )


def never_void(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalCache, "is_void", lambda *_: False)


def no_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Entries, "kill_older", lambda *_: None)


def no_tag_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Entries, "drop_tag", lambda *_: 0)


def no_doom(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = History.concerns_entry

    def is_live(self: Entries, key: str) -> bool:
        stamp = self._stamps.get(key) or self._unswept.get(key)
        return stamp is not None and not judge(self._history, stamp, key)

    monkeypatch.setattr(Entries, "is_live", is_live)


def sweep_that_spares_the_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Entries, "_sweep_one", lambda self, stamp: self._stamps.update([self._unswept.popitem()]) or 0)


def sweep_of_one_rule_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep that ends believes that it has seen to rules which came while it was under way."""
    begin = Entries._next_sweep

    def next_sweep(self: Entries, stamp: int) -> bool:
        self._sweep_stamp = stamp
        return begin(self, stamp)

    monkeypatch.setattr(Entries, "_next_sweep", next_sweep)


def no_disconnect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalCache, "disconnect", lambda _: None)


def no_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    renew = LocalCache._renew

    def for_ever(self: LocalCache) -> None:
        renew(self)
        self._serve_until = math.inf if self._is_connected else self._serve_until
        self._refresh()

    monkeypatch.setattr(LocalCache, "_renew", for_ever)


def no_expiry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalCache, "_expiry_of", lambda *_: math.inf)


def forgets_all_for_a_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(History, "concerns_entry", lambda *_: True)


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize(
    "break_it",
    [
        never_void,
        no_rules,
        no_tag_index,
        no_doom,
        sweep_that_spares_the_dead,
        sweep_of_one_rule_at_a_time,
        no_disconnect,
        no_lease,
        no_expiry,
        forgets_all_for_a_prefix,
    ],
)
def test_the_model_catches_a_cache_that_is_broken_on_purpose(
    break_it: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    break_it(monkeypatch)
    only_generate = settings(
        REPRODUCIBLE, max_examples=3_000, stateful_step_count=40, phases=[Phase.generate], report_multiple_bugs=False
    )
    with pytest.raises(AssertionError):
        run_state_machine_as_test(Interleavings, settings=only_generate)
