"""For tests of your own code: coherent caches without Redis, a clock to tick, and a publisher that records.

The pytest plugin (`pip install 'broadcache[testing]'`) has the fixtures `broadcache_url` and `recording_publisher`.
"""

from .coherent import coherent
from .manual_clock import ManualClock
from .recording_publisher import RecordedReceipt, RecordingPublisher

__all__ = ["ManualClock", "RecordedReceipt", "RecordingPublisher", "coherent"]
