"""Parts of texts for people."""

__all__ = ["counted", "host_and_port"]


def counted(number: int, one: str, many: str = "") -> str:
    """Return a number with its noun; the plural is `many`, or `one` with an s."""
    return f"{number} {one}" if number == 1 else f"{number} {many or one + 's'}"


def host_and_port(host: str, port: int) -> str:
    """Return `host:port`, as in a URL: an IPv6 address is in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
