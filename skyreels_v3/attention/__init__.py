"""Attention kernels: one function type, chosen once and handed to the model."""
