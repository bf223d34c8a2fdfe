"""The demo's output: live on a terminal, line by line anywhere else."""

from collections import deque
from collections.abc import Iterable
from decimal import Decimal
from types import TracebackType
from typing import Final, Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from .fleet import Fleet
from .story import Row

__all__ = ["LiveScreen", "PlainScreen", "curl_lines"]

_TITLE: Final = "broadcache demo: one publish, every replica forgets"
_NOTE: Final = "dropped in: from sending POST until the entry is dropped, including HTTP"
_COLUMNS: Final = ("replica", "port", "price", "read", "state", "position", "dropped in", "stale reads")
_NARRATION_LINES_MIN: Final = 3


def curl_lines(fleet: Fleet) -> list[str]:
    """Return commands to try on the running fleet, for product 2: the story uses product 1."""
    api, replica = f"127.0.0.1:{fleet.api_port}", f"127.0.0.1:{fleet.replicas[0].port}"
    json = "-H 'Content-Type: application/json'"
    return [
        f"curl {replica}/products/2",
        f"curl -X PUT {replica}/products/2 {json} \\",
        """  -d '{"price": 17.50}'""",
        f"curl {api}/invalidations {json} \\",
        """  -d '{"namespace":"products","keys":["product:2"]}'""",
        f"curl '{api}/invalidations?namespace=products'",
    ]


class PlainScreen:
    """Lines on standard output, for pipes, logs and `--once`."""

    def say(self, text: str) -> None:
        """Print a line."""
        print(text, flush=True)

    def show(self, rows: Iterable[Row], source_price: Decimal) -> None:
        """Print a line for each replica."""
        for row in rows:
            cells = _cells(row)
            print(
                f"  {cells[0]:<9} {cells[2]:>5} {'STALE' if row.is_stale else 'fresh'} {cells[3]:<4} "
                f"{cells[4]:<10} {cells[5]:<3} dropped in {cells[6]:>8} stale reads {cells[7]}",
                flush=True,
            )


class LiveScreen:
    """A table and the latest lines of the narration, drawn in place. On exit the last state stays on the terminal."""

    def __init__(self, console: Console, fleet: Fleet) -> None:
        self._console = console
        self._curl_lines = curl_lines(fleet)
        self._narration: deque[str] = deque(maxlen=console.height)
        self._table: Table | None = None
        self._source_price = Decimal(0)
        # The alternative screen, because resizing the terminal would leave debris in the ordinary one.
        self._live = Live(console=console, screen=True, auto_refresh=False, vertical_overflow="crop")

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()
        self._console.print(Group(*self._lines()))

    def say(self, text: str) -> None:
        """Add a line to the narration, and redraw."""
        self._narration.append(text)
        self._draw()

    def show(self, rows: Iterable[Row], source_price: Decimal) -> None:
        """Redraw the table."""
        self._table, self._source_price = _table(rows), source_price
        self._draw()

    def _draw(self) -> None:
        self._live.update(Group(*self._lines()), refresh=True)

    def _lines(self) -> Iterable[Text | Table]:
        yield _line(_TITLE, "bold")
        yield _line(f"product 1 costs {self._source_price} at its source")
        if self._table is not None:
            yield self._table
        yield _line(_NOTE, "dim")
        yield Text()
        yield from self._latest()
        yield Text()
        yield _line("try in another terminal (with product 2; Ctrl-C here stops everything):", "bold")
        yield from (_line(f"  {text}", "cyan") for text in self._curl_lines)

    def _latest(self) -> Iterable[Text]:
        """Yield the last lines of the narration that fit, the newest one bright."""
        others = 7 + len(self._curl_lines) + (self._table.row_count + 1 if self._table else 0)
        room = max(_NARRATION_LINES_MIN, min(10, self._console.height - others))
        shown = list(self._narration)[-room:]
        yield from (_line(text, "dim") for text in shown[:-1])
        yield from (_line(text) for text in shown[-1:])


def _line(text: str, style: str = "") -> Text:
    return Text(text, style, no_wrap=True, overflow="ellipsis")


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.replica.name,
        str(row.replica.port),
        "–" if row.price is None else str(row.price),
        row.read or "–",
        row.state,
        "–" if row.sequence is None else f"#{row.sequence}",
        "–" if row.dropped_after_ms is None else f"{row.dropped_after_ms:.1f} ms",
        str(row.stale_reads),
    )


def _table(rows: Iterable[Row]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in _COLUMNS:
        is_number = column in ("price", "dropped in", "stale reads", "position")
        table.add_column(column, no_wrap=True, justify="right" if is_number else "left")
    for row in rows:
        cells = [Text(cell) for cell in _cells(row)]
        cells[2].stylize("bold red" if row.is_stale else "green")
        cells[4].stylize("green" if row.state == "coherent" else "yellow")
        cells[7].stylize("bold red" if row.stale_reads else "green")
        table.add_row(*cells)
    return table
