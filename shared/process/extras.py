"""What is in an extra, and not installed with the base: how a user learns which extra it is."""

from importlib.util import find_spec

from ..errors import InvalidSettings

__all__ = ["check_installed"]


def check_installed(what: str, *modules: str, extra: str) -> None:
    """Check that `modules`, which `what` needs, are installed. Nothing is imported.

    Raises: InvalidSettings, which names the first that is not, and how to install it.
    """
    for module in modules:
        if find_spec(module) is None:
            raise InvalidSettings(
                f"{what} needs the package {module}, which is not installed: pip install 'broadcache[{extra}]'"
            )
