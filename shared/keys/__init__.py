"""The grammar of keys: templates whose values cannot be confused with each other."""
