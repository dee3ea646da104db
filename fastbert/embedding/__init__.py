"""Embeddings of corpora larger than memory, in shards."""
