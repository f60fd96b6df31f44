"""The layers as modules over packed tokens; no Hugging Face."""
