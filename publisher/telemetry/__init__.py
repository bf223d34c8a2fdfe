"""Observers of a publisher, and its metrics."""
