"""The layers of an encoder replayed as CUDA graphs, by buckets of sizes."""
