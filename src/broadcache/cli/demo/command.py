"""`broadcache demo`: shows three replicas that drop a stale entry, and one that is not subscribed."""

import asyncio
import contextlib
import signal
from typing import TYPE_CHECKING, Annotated, Final

import typer

from ..exit_codes import FAILED, OK, TERMINATED

if TYPE_CHECKING:
    from .fleet import Fleet

__all__ = ["demo"]

_SCENE_SECONDS: Final = 2.0


def demo(
    once: Annotated[bool, typer.Option("--once", help="Run the story once, print plain lines, and exit.")] = False,
    port: Annotated[
        int,
        typer.Option(
            min=0, max=65_000, help="The API's port; the replicas use the ports from 101 above it. 0: any free ports."
        ),
    ] = 8000,
) -> None:
    """Start Valkey, a publisher and four replicas on this machine, change a price, and show which replicas drop it.

    One replica deliberately does not subscribe. Then the Valkey server is killed, and the invalidation travels by HTTP.
    """
    raise typer.Exit(asyncio.run(_demo(port, is_live=not once and _is_terminal())))


def _is_terminal() -> bool:
    from rich.console import Console

    console = Console()
    return console.is_terminal and not console.is_dumb_terminal


async def _demo(port: int, *, is_live: bool) -> int:
    from .fleet import running_fleet

    is_terminated = _cancel_when_terminated()
    print("starting Valkey, a publisher, three replicas, and one that does not subscribe …", flush=True)
    try:
        async with running_fleet(port) as fleet:
            code = await (_live(fleet) if is_live else _once(fleet))
    except asyncio.CancelledError:
        if not is_terminated.is_set():
            raise
        code = TERMINATED
    finally:
        with contextlib.suppress(OSError):  # the terminal, or the reader of the output, may be gone
            print("stopped: nothing is left running", flush=True)
    return code


def _cancel_when_terminated() -> asyncio.Event:
    """Cancel the current task once on SIGTERM or SIGHUP; return an event that is set when that has happened."""
    task, loop, is_terminated = asyncio.current_task(), asyncio.get_running_loop(), asyncio.Event()

    def terminate() -> None:
        # Only once: a second signal must not cancel the clean-up.
        if task is not None and not is_terminated.is_set():
            is_terminated.set()
            task.cancel()

    for number in (signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, terminate)
    return is_terminated


async def _once(fleet: "Fleet") -> int:
    from .screen import PlainScreen
    from .story import Story

    story = Story(fleet, PlainScreen())
    await story.run()
    await story.run_outage()
    return FAILED if story.failures else OK


async def _live(fleet: "Fleet") -> int:
    from rich.console import Console

    from .screen import LiveScreen
    from .story import Story

    with LiveScreen(Console(), fleet) as screen:
        story = Story(fleet, screen, pause_seconds=_SCENE_SECONDS)
        await story.run()
        await story.run_outage()
        await story.go_on()
    return OK
