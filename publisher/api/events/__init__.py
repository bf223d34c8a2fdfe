"""The event stream: `GET /events`."""
