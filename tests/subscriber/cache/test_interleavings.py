"""Every interleaving of loads, invalidations, sweeps, expiries, evictions and lost connections, against a model."""

import itertools
import math
import textwrap
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeAlias

import pytest
from cachetools import TTLCache
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test
from tests.support.fake_clock import FakeClock
from tests.support.mutated import mutated
from tests.support.promise_model_mutants import a_lease_has_no_end, a_lost_link_goes_unnoticed

from broadcache.shared import Everything, Keys, Prefixes, Tags, Target
from broadcache.subscriber import LoadToken, LocalCache
from broadcache.subscriber.cache import entries as entries_module
from broadcache.subscriber.cache import followed_cache as followed_cache_module
from broadcache.subscriber.cache import local_cache as local_cache_module
from broadcache.subscriber.cache import recent as history_module
from broadcache.subscriber.cache.entries import Entries
from broadcache.subscriber.cache.mapping import expiry as expiry_module
from broadcache.subscriber.cache.mapping import reads as reads_module
from broadcache.subscriber.cache.mapping.reads import Reads
from broadcache.subscriber.cache.recent import History

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
ALL_TARGETS: st.SearchStrategy[Target] = st.one_of(
    st.sampled_from(ALL_KEYS).map(Keys),
    st.sampled_from(ALL_TAGS).map(Tags),
    st.sampled_from(["a", "a:", "b:", "b:1", "c"]).map(Prefixes),
    st.just(Everything()),
)
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
        self.cache = self.cache_type(mapping, clock=self.clock, max_staleness_seconds=5)
        assert (self.cache._source is not mapping) is (self.mapping_type is TTLCache)  # hits look inside, or cannot
        self.see_evictions(mapping)
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

    @rule(named=ALL_TARGETS)
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
    monkeypatch.setattr(followed_cache_module, "_SWEEP_SLICE_ENTRIES", 1)
    monkeypatch.setattr(local_cache_module, "_STORE_SWEEP_ENTRIES", 1)
    monkeypatch.setattr(entries_module, "_DROP_AT_ONCE_MAX", 1)
    monkeypatch.setattr(entries_module, "_INDEX_SLACK", 1)
    monkeypatch.setattr(expiry_module, "_SLICE_ENTRIES", 1)


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


def no_expiry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalCache, "_expiry_of", lambda *_: math.inf)


def no_look_at_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hits that look into the mapping's dictionary are not stopped when its entries expire."""
    monkeypatch.setattr(Reads, "oldest_expiry", math.inf)


def hits_that_nothing_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dead entries stay in the mapping's dictionary until a sweep."""
    monkeypatch.setattr(Entries, "is_settled", True)


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
        a_lost_link_goes_unnoticed,
        a_lease_has_no_end,
        no_expiry,
        no_look_at_the_oldest,
        hits_that_nothing_closes,
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


# --- a mapping that raises, and calls back ---------------------------------------------------------------------------

METHODS = ("__getitem__", "__setitem__", "__delitem__", "__contains__", "__len__")


class Unruly(TTLCache[str, Any]):
    """Raises at chosen calls, before or after it has done what it was asked, and does something else at others."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.broken: frozenset[str] = frozenset()
        self.error: type[Exception] = OSError
        self.is_late = False
        self.meddle: Callable[[str, bool], None] = lambda method, is_late: None

    def around(self, method: str, call: Callable[[], Any]) -> Any:
        self.meddle(method, False)
        if method in self.broken and not self.is_late:
            raise self.error(method)
        outcome = call()
        self.meddle(method, True)
        if method in self.broken and self.is_late:
            raise self.error(method)
        return outcome

    def __getitem__(self, key: str) -> Any:
        return self.around("__getitem__", lambda: TTLCache.__getitem__(self, key))

    def __setitem__(self, key: str, value: Any) -> None:
        self.around("__setitem__", lambda: TTLCache.__setitem__(self, key, value))

    def __delitem__(self, key: str) -> None:
        self.around("__delitem__", lambda: TTLCache.__delitem__(self, key))

    def __contains__(self, key: object) -> bool:
        return bool(self.around("__contains__", lambda: TTLCache.__contains__(self, key)))

    def __len__(self) -> int:
        return int(self.around("__len__", lambda: TTLCache.__len__(self)))


class WithAnUnrulyMapping(Interleavings):
    """Hits of it take no lock, and are served what it holds: what could not be removed must not be found by them."""

    is_exact = False
    mapping_type = Unruly

    def __init__(self) -> None:
        super().__init__()
        self.mapping: Unruly = self.cache._entries.mapping  # type: ignore[assignment]
        self.stamp = self.cache._stamp

    @rule(
        methods=st.sets(st.sampled_from(METHODS), max_size=2).map(frozenset),
        error=st.sampled_from([OSError, KeyError]),
        is_late=st.booleans(),
    )
    def break_mapping(self, methods: frozenset[str], error: type[Exception], is_late: bool) -> None:
        self.mapping.broken, self.mapping.error, self.mapping.is_late = methods, error, is_late

    @rule()
    def mend_mapping(self) -> None:
        self.mapping.broken = frozenset()

    @rule(
        at=st.sampled_from(METHODS),
        is_late=st.booleans(),
        named=st.sampled_from([None, Keys("a:1"), Keys("b:1", "b:2"), Tags("red"), Prefixes("a"), Everything()]),
        place=st.integers(0, 100),
    )
    def meddle_at(self, at: str, is_late: bool, named: Target | None, place: int) -> None:
        """At the next such call of the mapping, apply an invalidation, or store, read and sweep."""

        def meddle(method: str, is_after: bool) -> None:
            if (method, is_after) != (at, is_late):
                return
            self.mapping.meddle = lambda method, is_late: None
            if named is not None:
                self.model.apply(named)
                self.cache.apply(named)
                self.see_stamp()
                return
            for key in ALL_KEYS:
                self.cache.get(key)  # what it finds may be old: the invalidation under way has not been applied yet
            if self.loads:
                self.store(place, None)
            self.cache.sweep()

        self.mapping.meddle = meddle

    def store(self, place: int, ttl_seconds: float | None) -> None:
        token, begun, value, tags = self.loads.pop(place % len(self.loads))
        lifetime = TTL_SECONDS if ttl_seconds is None else ttl_seconds
        before = self.model.entries.get(token.key)
        is_stored = self.cache.store(token, value, tags=tags, ttl_seconds=ttl_seconds)
        if not self.model.may_store(begun, token.key, tags):
            return  # before, or just after it was stored: it must not be found
        if is_stored:
            self.model.entries[token.key] = (value, tags, self.clock.now + lifetime)
        elif self.model.entries.get(token.key) is before:
            self.model.entries.pop(token.key, None)  # it could not be stored, and the older value goes even so

    store = precondition(lambda self: self.loads)(
        rule(place=st.integers(0, 100), ttl_seconds=st.sampled_from([None, 3, 20]))(store)
    )

    @rule(named=st.one_of(ALL_TARGETS, st.permutations(ALL_KEYS).map(lambda keys: Keys(*keys[:3]))))
    def apply(self, named: Target) -> None:
        super().apply(named)
        self.see_stamp()

    def see_stamp(self) -> None:
        assert self.cache._stamp > self.stamp
        self.stamp = self.cache._stamp

    @rule(key=st.sampled_from(ALL_KEYS))
    def read(self, key: str) -> None:
        before, invalidations = self.model.read(key, self.clock.now), len(self.model.invalidations)
        got = self.cache.get(key)
        after = self.model.read(key, self.clock.now)
        # What was stored while it was read may be found or not. What was invalidated then must not be.
        allowed = {None, after, before if len(self.model.invalidations) == invalidations else None}
        assert got in allowed, (key, got, allowed)

    @rule()
    def read_all(self) -> None:
        for key in ALL_KEYS:
            self.read(key)
        shown = list(self.cache)
        self.mapping.meddle = lambda method, is_late: None
        expected = {key for key in ALL_KEYS if self.model.read(key, self.clock.now) is not None}
        assert len(shown) == len(set(shown))
        assert {key for key in ALL_KEYS if key in self.cache} <= expected
        assert set(self.cache) <= expected

    @rule()
    def sweep_all(self) -> None:
        for _ in range(1_000):
            if not self.cache.sweep():
                return
        raise AssertionError("the sweep does not end")

    @rule()
    def disconnect_and_subscribe_anew(self) -> None:
        self.mapping.meddle = lambda method, is_late: None
        super().disconnect_and_subscribe_anew()

    def teardown(self) -> None:
        self.mapping.meddle = lambda method, is_late: None
        for is_broken in (True, False):
            if not is_broken:
                self.mapping.broken = frozenset()
            self.cache.confirm_coherent(self.clock.now)
            self.model.coherent_until = max(self.model.coherent_until, self.clock.now + 5)
            self.sweep_all()
            self.read_all()
            self.clock.now += 1
        super().teardown()


@pytest.fixture
def lock_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reads_module, "_LOCK_FREE_LOOKUPS", frozenset({TTLCache, Unruly}))


@pytest.mark.usefixtures("small_slices", "lock_free")
def test_a_mapping_that_raises_and_calls_back_at_any_point_never_serves_what_was_dropped() -> None:
    run_state_machine_as_test(
        WithAnUnrulyMapping, settings=settings(REPRODUCIBLE, max_examples=100, stateful_step_count=40)
    )


Work: TypeAlias = Callable[[WithAnUnrulyMapping], object]
FAULTS = [
    (frozenset[str](), OSError, False),
    *itertools.product(
        map(frozenset, [{"__delitem__"}, {"__delitem__", "__contains__"}]), (OSError, KeyError), (False, True)
    ),
    *itertools.product(
        map(frozenset, [{"__setitem__"}, {"__setitem__", "__delitem__"}, {"__getitem__"}]), (OSError,), (False, True)
    ),
]
MEDDLINGS = [
    None,
    *itertools.product(METHODS[:4], (False, True), (None, Keys("a:1"), Everything())),
]
WORKS: tuple[Work, ...] = (
    lambda machine: machine.apply(Keys("a:1", "b:1")),
    lambda machine: machine.apply(Keys("a:2", "a:1")),
    lambda machine: machine.apply(Tags("red")),
    lambda machine: machine.apply(Tags("blue")),
    lambda machine: (machine.apply(Prefixes("a")), machine.sweep_all()),
    lambda machine: (machine.apply(Everything()), machine.sweep_all()),
    lambda machine: machine.store(0, None),
    lambda machine: machine.load_many(["b:3"], []),
    lambda machine: machine.read_all(),
    lambda machine: (machine.tick(4, is_proved=True), machine.read_all()),
)


def check_every_fault_at_every_point() -> None:
    """Some entries are there, and some loads under way. The mapping breaks, or calls back, and one thing is done."""
    for work, fault, meddling in itertools.product(WORKS, FAULTS, MEDDLINGS):
        machine = WithAnUnrulyMapping()
        machine.load_many(["a:1", "a:2"], ["red"])
        machine.load_many(["b:1"], ["blue"])
        machine.begin("b:2", ())
        machine.store(0, 3)
        for key in ("a:1", "b:1"):
            machine.begin(key, ("red",))
        machine.break_mapping(*fault)
        if meddling is not None:
            machine.meddle_at(*meddling, 0)
        work(machine)
        machine.read_all()
        machine.mend_mapping()
        machine.apply(Keys(*ALL_KEYS))
        machine.read_all()
        machine.teardown()


@pytest.mark.usefixtures("small_slices", "lock_free")
def test_no_fault_of_a_mapping_at_any_point_serves_what_was_dropped() -> None:
    check_every_fault_at_every_point()


HitBegins = Literal["before the apply", "before the deletion", "after the deletion"]


def hit_across_an_apply(begins: HitBegins, key: str, broken: frozenset[str], *, is_late: bool) -> object:
    """Return what a hit finds which stands still between its look at the lease and its lookup, until an apply is over.

    It runs in a thread of its own, and begins before the apply, or while that is within the mapping.
    """
    mapping = Unruly(maxsize=10, ttl=TTL_SECONDS)
    cache = LocalCache(mapping)
    cache.confirm_coherent(cache.clock() + 3_600)
    for each in ("a", "b", "c"):
        cache.store(cache.begin_load(each), "old")
    stands_still, goes_on = threading.Event(), threading.Event()

    class StandingStill(str):
        __slots__ = ()

        def __hash__(self) -> int:
            stands_still.set()
            assert goes_on.wait(10)
            return str.__hash__(self)

    found: list[object] = []
    reader = threading.Thread(target=lambda: found.append(cache.get(StandingStill(key))))
    look_again = cache._get_checked

    def get_checked(key: str, default: Any) -> Any:
        stands_still.set()  # it is not served without the lock
        return look_again(str.__str__(key), default)

    setattr(cache, "_get_checked", get_checked)  # noqa: B010

    def begin() -> None:
        reader.start()
        assert stands_still.wait(10)

    def meddle(method: str, is_after: bool) -> None:
        is_here = method == "__delitem__" and is_after == (begins == "after the deletion")
        if is_here and begins != "before the apply" and reader.ident is None:
            begin()

    if begins == "before the apply":
        begin()
    mapping.broken, mapping.is_late, mapping.meddle = broken, is_late, meddle
    cache.apply(Keys("a", "b"))
    mapping.broken, mapping.meddle = frozenset(), lambda method, is_late: None
    if reader.ident is None:
        return None
    goes_on.set()
    reader.join()
    return found[0]


def check_hits_across_an_apply() -> None:
    for begins in ("before the apply", "before the deletion", "after the deletion"):
        for key, broken, is_late in itertools.product("abc", (frozenset(), frozenset({"__delitem__"})), (False, True)):
            found = hit_across_an_apply(begins, key, broken, is_late=is_late)
            allowed = {None, "old"} if key == "c" and not broken else {None}
            assert found in allowed, (begins, key, broken, is_late)


@pytest.mark.usefixtures("lock_free")
def test_a_hit_that_an_apply_overtakes_is_not_served_what_that_has_named_or_cleared() -> None:
    check_hits_across_an_apply()


RECORD_NAMES = """\
        for key in keys:
            record(key, stamp)
"""
MOVE_STAMP = "self._issued = self._stamp = self._issued + 1"
MUTANTS = {
    "names after the mapping": mutated(
        LocalCache,
        "apply_invalidation",
        (textwrap.indent(RECORD_NAMES, "    "), ""),
        ("        except BaseException", textwrap.indent(RECORD_NAMES, "    ") + "        except BaseException"),
    ),
    "no clear after an error": mutated(LocalCache, "apply_invalidation", ("self._clear_after(error)", "pass")),
    "the stamp goes back": mutated(LocalCache, "apply_invalidation", (MOVE_STAMP, "self._stamp = stamp")),
    "no stamp after an error": mutated(
        LocalCache, "apply_invalidation", ("finally:", "else:"), ("self._clear_after(error)", "pass")
    ),
    "a clear that leaves hits open": mutated(LocalCache, "_clear_after", ("self._refresh()", "pass")),
    "a clear that kills nothing": mutated(LocalCache, "_clear_after", ("self._history.restart(stamp)", "pass")),
    "removals that fail are forgotten": mutated(Entries, "_handle_unremoved", ("self.stuck[key] = None", "pass")),
    "removals that fail again are forgotten": mutated(Entries, "_remove_stuck", ("self.stuck[key] = None", "pass")),
    "any KeyError is an entry that is gone": mutated(
        Entries, "_handle_unremoved", ("not self._has(key, in_doubt=True)", "isinstance(error, KeyError)")
    ),
    "a sweep that only forgets": mutated(
        Entries, "_sweep_one", ("return self.discard(key)", "return self._checked.pop(key, 0) and 0")
    ),
    "what is voided while it is stored stays": mutated(
        LocalCache, "_put", ("self._issued != issued and ", "False and ")
    ),
    "loads see the shown stamp": mutated(
        LocalCache, "is_void", ("token.stamp == self._issued", "token.stamp == self._stamp")
    ),
    "a store that fails leaves what it has stored": mutated(
        Entries, "put", ("self._stamps[key] = stamp", "pass"), ("self.discard(key)", "pass")
    ),
    "a read does not look whether it was overtaken": mutated(
        LocalCache, "_get_checked", ("if self._issued == issued:", "if True:")
    ),
}


@pytest.mark.usefixtures("small_slices", "lock_free")
@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_faults_catch_a_cache_that_handles_an_unruly_mapping_wrongly(
    mutant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    MUTANTS[mutant](monkeypatch)
    with pytest.raises((AssertionError, OSError, KeyError)):  # a wrong answer, or the mapping's error gets out
        check_every_fault_at_every_point()


@pytest.mark.usefixtures("lock_free")
@pytest.mark.parametrize(
    "break_it",
    [
        mutated(
            LocalCache,
            "apply_invalidation",
            (MOVE_STAMP, "pass"),
            ("self._issued = stamp = self._issued + 1", "self._issued = self._stamp = stamp = self._issued + 1"),
        ),
        MUTANTS["no clear after an error"],
    ],
    ids=["stamp first", "no clear after an error"],
)
def test_hits_across_an_apply_catch_a_cache_that_moves_the_stamp_too_early_or_clears_nothing(
    break_it: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    break_it(monkeypatch)
    with pytest.raises(AssertionError):
        check_hits_across_an_apply()
