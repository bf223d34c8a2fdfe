"""The HTTP endpoint of a replica: its health, and invalidations that arrive by fan-out."""
