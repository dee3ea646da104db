"""CUDA graphs of an encoder's layers, recorded and replayed for buckets of batch sizes."""
