"""Configuration: the shape of a model, and the options of each kind of run."""
