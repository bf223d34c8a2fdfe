"""The exit codes of the commands."""

from typing import Final

__all__ = ["FAILED", "INTERRUPTED", "OK", "TERMINATED", "USAGE"]

OK: Final = 0
"""Success; of a service, also an orderly stop on a signal."""
FAILED: Final = 1
"""Failure, e.g. the invalidation is not known to be logged, a port is in use, or the demo saw a stale read."""
USAGE: Final = 2
"""The arguments or settings are wrong, or a package that the command needs is not installed."""
INTERRUPTED: Final = 130
"""Ctrl-C."""
TERMINATED: Final = 143
"""The demo was stopped by SIGTERM, or its terminal was closed."""
