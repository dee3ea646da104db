"""Models as files that other runtimes run: ONNX, and programs of torch.export."""
