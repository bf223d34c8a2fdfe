"""Common parts of the benchmarks: rounds in which the contestants take turns, result rows, child processes."""

import asyncio
import importlib.util
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Final, Literal, NamedTuple, TypeAlias, TypeVar

__all__ = [
    "HAS_HIREDIS",
    "Effort",
    "Limit",
    "Measure",
    "Row",
    "Stopwatch",
    "Taken",
    "answer",
    "child",
    "compare",
    "run_async",
    "take_turns",
]

HAS_HIREDIS: Final = importlib.util.find_spec("hiredis") is not None

_CHILD_ANSWER_TIMEOUT_SECONDS: Final = 60.0
_CHILD_EXIT_TIMEOUT_SECONDS: Final = 3.0

Name = TypeVar("Name", bound=str)
Measure: TypeAlias = Literal["CPU", "wall", "memory", "count"]


@dataclass(frozen=True, slots=True)
class Effort:
    """The amount of work: a full run gives reliable figures, a quick run only shows that everything works."""

    is_quick: bool = False

    def pick(self, *, full: int, quick: int) -> int:
        """Return the number for this effort."""
        return quick if self.is_quick else full


@dataclass(frozen=True, slots=True)
class Limit:
    """A target of design.md §11: a bound on the ratio, or on our own figure."""

    sense: Literal["≥", "≤", "<"]
    bound: float
    of: Literal["ratio", "ours"] = "ratio"

    def is_met(self, row: "Row") -> bool:
        """Whether the median of the rounds meets the target."""
        figure = row.ratio if self.of == "ratio" else row.ours
        match self.sense:
            case "≥":
                return figure >= self.bound
            case "≤":
                return figure <= self.bound
            case "<":
                return figure < self.bound


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    Shape:  `ours`, `peer` and `ratio` are medians over the rounds, `ratio` of what was measured side by side in one
            round; `ratio_low` to `ratio_high` is the middle half of the rounds.
    Units:  `unit` is that of `ours` and `peer`; `measure` says what was counted.
    """

    what: str
    measure: Measure
    unit: str
    ours: float
    peer_name: str
    peer: float
    ratio: float
    ratio_low: float
    ratio_high: float
    limit: Limit | None

    @property
    def is_met(self) -> bool | None:
        """Whether the target was met; None when there is none."""
        return None if self.limit is None else self.limit.is_met(self)


def compare(
    what: str,
    ours: Sequence[float],
    peer_name: str,
    peer: Sequence[float],
    *,
    unit: str,
    measure: Measure = "CPU",
    limit: Limit | None = None,
) -> Row:
    """Create a row from both contestants' measurements of each round."""
    ratios = [mine / theirs if theirs else math.inf for mine, theirs in zip(ours, peer, strict=True)]
    low, ratio, high = statistics.quantiles(ratios, method="inclusive") if len(ratios) > 1 else ratios * 3
    return Row(
        what, measure, unit, statistics.median(ours), peer_name, statistics.median(peer), ratio, low, high, limit
    )


def take_turns(contestants: Mapping[Name, Callable[[], float]], rounds: int) -> dict[Name, list[float]]:
    """Run each contestant once a round, starting with another one each time; return the measurements by round."""
    figures: dict[Name, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            figures[name].append(contestants[name]())
    return figures


class Taken(NamedTuple):
    """The time that some work took, in seconds."""

    wall: float
    cpu: float


class Stopwatch:
    """Counts from its creation. CPU time is that of the whole process: on shared cores it is the fairer measure."""

    def __init__(self) -> None:
        self._wall = time.perf_counter()
        self._cpu = time.process_time()

    def read(self) -> Taken:
        """Return the time since its creation."""
        cpu = time.process_time() - self._cpu
        return Taken(time.perf_counter() - self._wall, cpu)


def run_async(main: Callable[..., Coroutine[object, object, None]], pipe: Connection, *arguments: object) -> None:
    """The body of a child process that needs an event loop."""
    asyncio.run(main(pipe, *arguments))


@contextmanager
def child(main: Callable[..., None], *arguments: object) -> Iterator[Connection]:
    """Run `main(pipe, *arguments)` in a fresh interpreter, and yield our end of the pipe.

    Leaving ends the child, whatever it does.
    """
    context = multiprocessing.get_context("spawn")
    ends: tuple[Any, Any] = context.Pipe()  # of another type on Windows, with the same methods
    pipe: Connection = ends[0]
    pipe_of_child: Connection = ends[1]
    process = context.Process(target=main, args=(pipe_of_child, *arguments), daemon=True)
    process.start()
    pipe_of_child.close()
    try:
        yield pipe
    finally:
        pipe.close()
        process.join(_CHILD_EXIT_TIMEOUT_SECONDS)
        process.kill()
        process.join()


def answer(pipe: Connection) -> Any:
    """Return what the child sends next.

    Raises: RuntimeError when it has died, or says nothing for a minute: a benchmark that is broken ends.
    """
    if not pipe.poll(_CHILD_ANSWER_TIMEOUT_SECONDS):
        raise RuntimeError(f"expected an answer of the child within {_CHILD_ANSWER_TIMEOUT_SECONDS:g} s, got none")
    try:
        return pipe.recv()
    except EOFError:
        raise RuntimeError("expected an answer of the child, which has died: see above") from None
