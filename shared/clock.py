"""The replica's monotonic clock: the only clock that the staleness bound depends on."""

import time
from collections.abc import Callable
from functools import partial

__all__ = ["Clock", "monotonic"]

Clock = Callable[[], float]
"""Seconds from an arbitrary start, never going back. It is always an argument, so that tests can pass a fake clock."""

# The suspension of a laptop or a virtual machine must count as silence. Where the platform has a clock that runs on
# meanwhile, it is used; elsewhere, the ordinary monotonic clock.
monotonic: Clock = (
    partial(time.clock_gettime, time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic
)
