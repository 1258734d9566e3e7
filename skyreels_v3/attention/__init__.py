"""Attention kernels: one function type, chosen once and passed to the model."""
