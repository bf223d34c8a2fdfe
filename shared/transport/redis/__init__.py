"""Redis and Valkey: addresses, the link, the log and its channel, and an embedded server."""
