"""The demo: three replicas, one replica that does not subscribe, and a Valkey server that is killed."""
