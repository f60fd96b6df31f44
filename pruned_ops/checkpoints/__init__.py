"""Checkpoints in and out: folders, other tools' files, ONNX."""
