"""What callers of one load share."""
