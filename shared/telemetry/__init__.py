"""Traces, the Prometheus exposition, and histograms."""
