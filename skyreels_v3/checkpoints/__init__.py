"""Where checkpoints come from, what their keys mean, and how they get into models."""
