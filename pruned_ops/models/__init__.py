"""Hugging Face models whose layers differ in size: padded, trainable, saved and loaded."""
