"""Masked language modelling: which tokens are predicted, and what replaces them in the input."""
