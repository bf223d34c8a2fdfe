"""The demo: three replicas, one process that does not subscribe, and a server that fails."""
