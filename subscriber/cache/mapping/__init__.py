"""The wrapped mapping, and the mapping that a cache is."""
