"""`coherent`: caches that serve without Redis, for a test."""

from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Final, TypeAlias
from weakref import WeakKeyDictionary, WeakSet

from ..shared.clock import Clock
from ..shared.errors import InvalidSettings
from ..shared.invalidation import Invalidation
from ..subscriber.cache.local_cache import LocalCache
from ..subscriber.cache.owners import owners
from ..subscriber.following.sequencer import Sequencer
from ..subscriber.mixin import CacheInvalidationMixin
from ..subscriber.subscriber import Subscriber
from .manual_clock import ManualClock, timed_by
from .memory_log import MemoryLog, Reader
from .recording_publisher import RecordingPublisher
from .stand_in import StandIn

__all__ = ["coherent"]


class coherent:  # noqa: N801  (used as a function is)
    """Serve from caches without Redis, in a test: `with coherent(catalogue.cache) as clock: clock.tick(301)`.

    The caches are empty at the start, and coherent until the end. Nothing connects: a subscriber that is entered within
    the block, e.g. by the lifespan of an application, starts no link. What it invalidates is dropped here and recorded
    by `publisher`; what `publisher` publishes is applied to the caches. At the end everything is as it was before;
    what was stored and counted is gone. With a cache alone, its subscriber can invalidate, and not be entered.

    `with` and `async with` do the same. A block of the same caches within another one joins it, with its clock.

    Shape:  a target is a cache, a subscriber (all its caches), or an object of a class with CacheInvalidationMixin,
            which stands for its subscriber. The block yields the clock of the caches, `clock.tick(seconds)`. The
            lifetimes of cachetools mappings go by it; mappings of other kinds keep their own time.
    Raises: InvalidSettings when a target is running, is none of these, or is in two blocks with a clock each.
    """

    def __init__(
        self,
        *targets: LocalCache | Subscriber | CacheInvalidationMixin,
        publisher: RecordingPublisher | None = None,
    ) -> None:
        if not targets:
            raise InvalidSettings("expected a cache or a subscriber, got none, e.g. coherent(catalogue.cache)")
        self._targets: Final = tuple(map(_actor_of, targets))
        self._publisher = publisher
        self._entered: list[ExitStack] = []

    def __enter__(self) -> ManualClock:
        with ExitStack() as leaving:
            scene = _scene_of(self._targets)
            for target in self._targets:
                _join(target, scene)
                leaving.callback(_leave, target)
            if self._publisher is not None:
                leaving.enter_context(self._publisher.recording(scene.log))
            self._entered.append(leaving.pop_all())
        return scene.clock

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered.pop().close()

    async def __aenter__(self) -> ManualClock:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, trace)


class _Scene:
    """The clock and the log of a block, and of those within it."""

    owns_alone: Final = (
        "expected a cache that nothing else keeps coherent, got one of a `coherent` block; to start its subscriber "
        "within the block, hand the block the subscriber: coherent(subscriber)"
    )

    def __init__(self) -> None:
        self.clock: Final = ManualClock()
        self.log: Final = MemoryLog()
        # The caches that a subscriber of the scene has, and which apply only what is for their namespace.
        self.followed: Final[WeakSet[LocalCache]] = WeakSet()


class _Part:
    """The part of a cache or a subscriber in a scene: how many blocks it is in, and how to restore it."""

    def __init__(self, scene: _Scene) -> None:
        self.scene: Final = scene
        self.blocks: int = 0
        self.restoring: Final = ExitStack()


_Actor: TypeAlias = LocalCache | Subscriber
_parts: Final[WeakKeyDictionary[_Actor, _Part]] = WeakKeyDictionary()


def _actor_of(target: object) -> _Actor:
    if isinstance(target, CacheInvalidationMixin):
        # Past the attribute of this name that a class may have itself.
        subscriber: Subscriber = CacheInvalidationMixin.subscriber.__get__(target)
        return subscriber
    if isinstance(target, LocalCache | Subscriber):
        return target
    raise InvalidSettings(
        f"expected a LocalCache, a Subscriber, or an object with CacheInvalidationMixin, got {type(target).__name__}"
    )


def _scene_of(targets: tuple[_Actor, ...]) -> _Scene:
    """Return the scene that one of the targets, or one of its caches, is in; else a new one."""
    actors = [*targets, *(cache for each in targets if isinstance(each, Subscriber) for cache in each.caches)]
    scenes = {_parts[each].scene for each in actors if each in _parts}
    if len(scenes) > 1:
        raise InvalidSettings("expected caches with one clock, got some of two blocks; enter all of them in one block")
    return scenes.pop() if scenes else _Scene()


def _join(actor: _Actor, scene: _Scene) -> None:
    part = _parts.get(actor)
    if part is None:
        part = _Part(scene)
        with ExitStack() as undoing:
            undoing.callback(part.restoring.close)
            if isinstance(actor, LocalCache):
                _stage_cache(actor, scene, part.restoring)
            else:
                _stage_subscriber(actor, scene, part.restoring)
            undoing.pop_all()
        _parts[actor] = part
    part.blocks += 1


def _leave(actor: _Actor) -> None:
    part = _parts[actor]
    part.blocks -= 1
    if not part.blocks:
        del _parts[actor]
        part.restoring.close()


def _stage_cache(cache: LocalCache, scene: _Scene, restoring: ExitStack) -> None:
    if owners.has_owner(cache) or cache.upkeep.is_connected:
        raise InvalidSettings(
            "expected a cache whose subscriber is not running, got one that is kept coherent already: enter the block "
            "first, with the subscriber, and let the application start within it"
        )
    clock, on_bypass, has_left = cache.clock, cache.upkeep.on_bypass, cache.upkeep.has_left

    def restore() -> None:
        _begin_anew(cache, clock)
        cache.upkeep.on_bypass, cache.upkeep.has_left = on_bypass, has_left

    owners.claim(scene, cache)
    restoring.callback(owners.release, cache, scene)
    restoring.callback(restore)
    restoring.enter_context(timed_by(scene.clock, cache._entries.mapping))
    _begin_anew(cache, scene.clock)
    cache.upkeep.on_bypass = None
    cache.enter()
    restoring.callback(scene.clock.abandon, cache)
    scene.clock.adopt(cache)

    home = owners.home_of(cache)
    if isinstance(home, Subscriber):  # what it invalidates needs no link either
        restoring.enter_context(home.publishing_by(scene.log.append))

    def follows(namespace: str) -> bool:
        if cache in scene.followed:
            return False
        if not isinstance(home, Subscriber):
            return True
        sequencer = home.sequencers.get(namespace)
        return sequencer is not None and any(cache is each for each in sequencer.caches)

    reader = Reader(follows, lambda _, invalidation: cache.apply_invalidation(invalidation))
    _read(scene.log, reader, restoring)


def _begin_anew(cache: LocalCache, clock: Clock) -> None:
    """Let a cache go by `clock`, and begin as in a forked child: bypassed, empty, with no load and no count."""
    cache._clock = clock
    cache._start_over()
    while cache.sweep():
        pass


def _stage_subscriber(subscriber: Subscriber, scene: _Scene, restoring: ExitStack) -> None:
    def add(sequencer: Sequencer) -> None:
        for cache in sequencer.caches:
            if cache not in joined:
                joined.add(cache)
                join(cache)
        if sequencer.position is None:
            sequencer.restart(scene.log.head(sequencer.namespace), "subscribed")

    def join(cache: LocalCache) -> None:
        owners.release(cache, subscriber)  # which has claimed it if it attaches the cache now
        _join(cache, scene)
        restoring.callback(_leave, cache)
        owners.release(cache, scene)
        if subscriber.is_running:
            owners.claim(subscriber, cache)
        scene.followed.add(cache)
        restoring.callback(scene.followed.discard, cache)

    joined: set[LocalCache] = set()
    restoring.callback(subscriber.stage(partial(StandIn, add), scene.log.append))

    def deliver(frame: bytes, invalidation: Invalidation) -> None:
        subscriber.sequencers[invalidation.namespace].receive(frame)

    _read(scene.log, Reader(lambda namespace: namespace in subscriber.sequencers, deliver), restoring)


def _read(log: MemoryLog, reader: Reader, restoring: ExitStack) -> None:
    log.readers.append(reader)
    restoring.callback(log.readers.remove, reader)
