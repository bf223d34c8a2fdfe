"""The local cache: what a read may be served."""
