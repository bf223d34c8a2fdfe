"""Receipts of what is known to be logged."""

from broadcache.shared import Position, Receipt


def position_of(receipt: Receipt) -> Position:
    """Where the log holds it. Fails for what was not logged."""
    assert receipt.position is not None, f"expected it to be logged, got {receipt}"
    return receipt.position
