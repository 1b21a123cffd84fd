"""FINO losses for PyTorch: adapt a vision backbone with the metadata you already have."""

__version__ = "0.1.0"
