"""Audits: whether replicas serve the values of the source."""
