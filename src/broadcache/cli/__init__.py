"""The command line: `broadcache`. Its exit codes are in exit_codes.py."""

import sys

from .exit_codes import FAILED, USAGE

__all__ = ["main"]

_EXTRA_OF_MODULE = {
    "aiohttp": "demo",
    "dns": "fanout",
    "fastapi": "publisher",
    "h11": "fanout",
    "pydantic": "publisher",
    "rich": "cli",
    "starlette": "publisher",
    "typer": "cli",
    "uvicorn": "publisher",
}


def main() -> None:
    """Run the command line, and say what to do about whatever it cannot do."""
    from ..shared.errors import BroadcacheError, InvalidNamespace, InvalidSettings, InvalidTarget

    try:
        from .app import app

        app()
    except ModuleNotFoundError as error:
        extra = _EXTRA_OF_MODULE.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        _fail(f"this command needs the package {error.name}: pip install 'broadcache[{extra}]'", USAGE)
    except (InvalidNamespace, InvalidSettings, InvalidTarget) as error:
        _fail(str(error), USAGE)
    except BroadcacheError as error:
        _fail(str(error), FAILED)


def _fail(problem: str, code: int) -> None:
    print(f"broadcache: {problem}", file=sys.stderr)
    sys.exit(code)
