"""How invalidations travel: one folder for each broker."""
