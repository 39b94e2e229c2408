"""How values cross between processes: shared memory, the value codec, messages and the channel."""
