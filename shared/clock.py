"""The replica's own clock: the only time that takes part in the promise."""

import time
from collections.abc import Callable
from functools import partial

__all__ = ["Clock", "monotonic"]

Clock = Callable[[], float]
"""Seconds from an arbitrary start, never going back. An argument everywhere, so that tests tick a fake one."""

# A laptop's or a virtual machine's sleep must count as silence: where the platform has a clock that runs on while the
# machine is suspended it is used, otherwise the ordinary monotonic clock.
monotonic: Clock = (
    partial(time.clock_gettime, time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic
)
