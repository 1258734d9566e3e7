"""Generating one video with several processes, by torch.distributed."""
