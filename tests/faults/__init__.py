"""The fault suite: real processes under faults, and an oracle that checks every read against the promise.

Quick: `pytest tests/faults`. Long: `make soak`, or `python -m tests.faults --help`. See docs/soak.md.
"""
