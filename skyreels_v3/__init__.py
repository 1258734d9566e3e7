"""Inference for the SkyReels video models."""

__version__ = "0.1.0"
