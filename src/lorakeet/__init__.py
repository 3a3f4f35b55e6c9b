"""Lorakeet: from a pre-trained model to a verified LoRA adapter, on the hardware at hand."""

__version__ = "0.1.0"

__all__ = ["__version__"]
