"""The command line: `broadcache`. Its exit codes are in exit_codes.py."""

import errno
import sys
from typing import Final

from .exit_codes import FAILED, USAGE

__all__ = ["main"]


_NOT_WRITTEN: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG})


def main() -> None:
    """Run the command line, and say what to do about whatever it cannot do."""
    from ..shared.errors import BroadcacheError, InvalidNamespace, InvalidSettings, InvalidTarget
    from ..shared.process.extras import installation_of
    from .printable import escape_unencodable

    escape_unencodable()
    try:
        from .app import app

        app()
    except ModuleNotFoundError as error:
        installation = installation_of(error.name or "")
        if installation is None:
            raise
        _fail(f"this command needs the package {error.name}: {installation}", USAGE)
    except (InvalidNamespace, InvalidSettings, InvalidTarget) as error:
        from .masking import masked

        _fail(masked(str(error), sys.argv[1:]), USAGE)
    except BroadcacheError as error:
        _fail(str(error), FAILED)
    except OSError as error:
        if error.errno not in _NOT_WRITTEN:
            raise
        _fail(f"the output could not be written ({error.strerror}); what it would have said may have been done", FAILED)


def _fail(problem: str, code: int) -> None:
    print(f"broadcache: {problem}", file=sys.stderr)
    sys.exit(code)
