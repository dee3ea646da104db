"""Masked language modelling: which tokens are to be predicted, and what stands in their place."""
