"""The transport over Redis or Valkey: address, link, log, channel, registry, and an embedded server."""
