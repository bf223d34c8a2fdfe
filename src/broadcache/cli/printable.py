"""Texts for a terminal: those from the network made safe, and numbers with their nouns."""

__all__ = ["counted", "printable"]


def printable(text: str) -> str:
    """Escape control characters: any client that may publish chooses names and reasons."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def counted(number: int, one: str, many: str = "") -> str:
    """Return a number with its noun; the plural is `many`, or `one` with an s."""
    return f"{number} {one}" if number == 1 else f"{number} {many or one + 's'}"
