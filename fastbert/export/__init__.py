"""Exports models to files for other runtimes: ONNX and torch.export programs."""
