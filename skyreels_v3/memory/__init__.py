"""Where weights live during a run: memory modes, offloading, block streaming and FP8."""
