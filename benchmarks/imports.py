"""The time that importing the subscriber adds to the start of a service, compared with libraries it needs anyway.

Each import is timed in a fresh interpreter with warm bytecode: CPU time of the process, within the import statement.
"""

import subprocess
import sys
from functools import partial
from typing import Final

from benchmarks.harness import Effort, Row, compare, take_turns

_OURS: Final = "broadcache.subscriber"
_PEERS: Final = ("redis.asyncio", "asyncio", "cachetools")
_MILLISECONDS_OF: Final = """
import time
began = time.process_time()
import {module}
print((time.process_time() - began) * 1_000)
"""


def run(effort: Effort) -> list[Row]:
    contestants = {module: partial(_milliseconds_of, module) for module in (_OURS, *_PEERS)}
    figures = take_turns(contestants, rounds=effort.pick(full=15, quick=2))
    return [compare(f"import {_OURS}", figures[_OURS], f"import {peer}", figures[peer], unit="ms") for peer in _PEERS]


def _milliseconds_of(module: str) -> float:
    command = [sys.executable, "-c", _MILLISECONDS_OF.format(module=module)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
