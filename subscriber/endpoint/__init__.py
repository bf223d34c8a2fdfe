"""The HTTP endpoint of a replica: its health, its metrics, and invalidations that arrive by fan-out."""
