"""Row attention and the passes between a block's products on a CPU, compiled on this machine from C."""
