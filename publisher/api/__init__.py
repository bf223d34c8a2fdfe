"""The HTTP API."""

from typing import TYPE_CHECKING, Any

from ...shared.process.extras import check_installed

if TYPE_CHECKING:
    from .app import create_app

__all__ = ["create_app"]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        # The command line reads documents and settings of this package without a web framework.
        if name == "create_app":
            check_installed("the HTTP API", "fastapi")
            from .app import create_app

            return create_app
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
