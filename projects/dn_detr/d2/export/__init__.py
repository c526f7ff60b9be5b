"""Export to ONNX and torch.export."""
