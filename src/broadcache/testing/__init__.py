"""For tests of your own code: coherent caches without Redis, a clock to tick, and a publisher that records.

The pytest plugin (`pip install 'broadcache[testing]'`) has the fixtures `broadcache_url` and `recording_publisher`.
Each name is imported on first use: pytest imports this package in each of its runs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from .block import coherent
    from .manual_clock import ManualClock
    from .recording_publisher import RecordedReceipt, RecordingPublisher

__all__ = ["ManualClock", "RecordedReceipt", "RecordingPublisher", "coherent"]

_MODULE_OF: Final = {
    "ManualClock": ".manual_clock",
    "RecordedReceipt": ".recording_publisher",
    "RecordingPublisher": ".recording_publisher",
    "coherent": ".block",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULE_OF[name], __name__), name)
    return value
