"""Hugging Face models of uneven layers: padded, trainable, saved and loaded."""
