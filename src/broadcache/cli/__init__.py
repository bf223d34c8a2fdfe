"""The command line: `broadcache`."""

__all__ = ["main"]


def main() -> None:
    """Run the command line."""
