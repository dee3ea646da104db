"""A tokenised corpus: how it is built, how it lies on disk, and what is counted of it."""
