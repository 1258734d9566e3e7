"""Checkpoints: finding or downloading them, translating their keys, loading and saving models."""
