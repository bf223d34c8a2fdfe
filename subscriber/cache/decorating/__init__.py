"""Functions whose results are cached: keys of calls, and the objects that take the place of the functions."""
