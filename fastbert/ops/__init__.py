"""The operators: each has a plain PyTorch body, and faster ones chosen by `fastbert.backend`."""
