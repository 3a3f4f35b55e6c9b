"""Row attention, passes between products and whole blocks that write tokens, compiled on this machine from C."""
