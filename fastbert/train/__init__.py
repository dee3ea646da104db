"""Training: the pre-training objective, the training loop, and the files of a run."""
