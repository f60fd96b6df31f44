"""Packed execution inside somebody's Hugging Face model."""
