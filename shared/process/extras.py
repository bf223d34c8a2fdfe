"""The packages of the extras, which the base install does not have: what a user reads where one is missing."""

from importlib.util import find_spec
from typing import Final

from ..errors import InvalidSettings

__all__ = ["EXTRA_OF_MODULE", "MissingPackage", "check_installed", "installation_of"]

EXTRA_OF_MODULE: Final = {
    "aiohttp": "demo",
    "dns": "fanout",
    "fastapi": "publisher",
    "h11": "fanout",
    "hiredis": "hiredis",
    "opentelemetry": "tracing",
    "prometheus_client": "metrics",
    "pydantic": "publisher",
    "pytest": "testing",
    "rich": "cli",
    "starlette": "publisher",
    "typer": "cli",
    "uvicorn": "publisher",
}
"""The extra that installs each top-level module which some module of ours imports, and the base install lacks."""


class MissingPackage(InvalidSettings):
    """A package of an extra is not installed. No setting is wrong: errors of settings pass it through as it is."""


def installation_of(module: str) -> str | None:
    """Return the command that installs `module`, or the package that it is in; None when it is in no extra."""
    extra = EXTRA_OF_MODULE.get(module.partition(".")[0])
    return None if extra is None else f"pip install 'broadcache[{extra}]'"


def check_installed(what: str, *modules: str) -> None:
    """Check that `modules`, which `what` needs, are installed. Nothing is imported.

    Raises: MissingPackage, which names the first that is not, and how to install it.
    """
    for module in modules:
        if find_spec(module) is None:
            raise MissingPackage(
                f"{what} needs the package {module}, which is not installed: {installation_of(module)}"
            )
