"""Training of the small models: a drawn world whose truth is known, and what learns to draw it."""
