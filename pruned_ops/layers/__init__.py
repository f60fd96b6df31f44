"""Layers as modules over packed tokens, without Hugging Face."""
