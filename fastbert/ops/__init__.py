"""Operators: one a file, each a plain PyTorch body with faster ones behind `fastbert.backend`."""
