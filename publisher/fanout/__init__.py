"""One HTTP request to every replica of a service."""
