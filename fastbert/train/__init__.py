"""Training: the pre-training objective, the loop around it, and what a run leaves on disk."""
