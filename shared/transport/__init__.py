"""The transport of invalidations: one folder for each broker."""
