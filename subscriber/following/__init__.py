"""Following a namespace: the link, the order of messages, and the proof that keeps a cache coherent."""
