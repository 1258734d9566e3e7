"""Where weights live, and how much room a run needs."""
