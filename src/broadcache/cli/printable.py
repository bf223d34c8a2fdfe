"""Text from the network, made safe for a terminal."""

__all__ = ["printable"]


def printable(text: str) -> str:
    """Escape control characters: any client that may publish chooses names and reasons."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
