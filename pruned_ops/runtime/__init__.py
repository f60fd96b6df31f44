"""Packed execution inside a Hugging Face model: `optimize`, CUDA graphs, streams of texts."""
