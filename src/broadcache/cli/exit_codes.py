"""What a command's exit code tells a script."""

from typing import Final

__all__ = ["FAILED", "INTERRUPTED", "OK", "TERMINATED", "USAGE"]

OK: Final = 0
"""It was done; a service was asked to stop and did."""
FAILED: Final = 1
"""It was not done: the invalidation is not known to be logged, a port is taken, the demo saw a stale read."""
USAGE: Final = 2
"""The command cannot be run as it was typed, or a package it needs is not installed."""
INTERRUPTED: Final = 130
"""Ctrl-C."""
TERMINATED: Final = 143
"""The demo was asked to stop (SIGTERM, or its terminal was closed)."""
