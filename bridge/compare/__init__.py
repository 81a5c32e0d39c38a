"""Two checkpoints, weight by weight."""
