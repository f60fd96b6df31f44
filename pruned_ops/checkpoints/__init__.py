"""Checkpoints in and out: folders, imports, ONNX."""
