"""Text from others, made safe for a terminal."""

__all__ = ["printable"]


def printable(text: str) -> str:
    """Escape what a terminal would obey: names and reasons come from whoever may publish."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
