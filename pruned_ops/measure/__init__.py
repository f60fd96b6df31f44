"""Milliseconds: of layers, of models, of launches."""
