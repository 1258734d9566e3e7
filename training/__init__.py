"""Training of the small models on a drawn world with known ground truth."""
