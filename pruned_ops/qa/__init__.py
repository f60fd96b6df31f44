"""From a question and a text of any length to an answer."""
