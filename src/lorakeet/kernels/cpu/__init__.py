"""Kernels in C, compiled on this machine: products, attention, elementwise ops, losses, and whole decoder blocks."""
