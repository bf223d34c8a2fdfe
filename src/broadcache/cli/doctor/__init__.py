"""`broadcache doctor`: the command, and what it prints."""
