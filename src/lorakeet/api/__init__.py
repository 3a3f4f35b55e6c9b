"""The Python API: what `import lorakeet as lk` offers. Each name is imported at its first use (lorakeet/__init__)."""
