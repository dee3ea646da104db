"""Masked language modelling: choosing the tokens to predict, and replacing them in the input."""
