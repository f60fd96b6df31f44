"""Sets the docstrings for the API reference: what explains an argument, or the errors, begins a paragraph.

The docstrings are plain text, in which such lines follow one another; Markdown would run them together.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

ARGUMENTS = re.compile(r"\n(\w+(?:, \w+)*): ")
ERRORS = re.compile(r"\s+Errors: ")


class Paragraphs(Extension):
    """Applied by mkdocstrings to every object that it reads."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = ERRORS.sub("\n\n**Errors:** ", obj.docstring.value)
            obj.docstring.value = ARGUMENTS.sub(r"\n\n**\1:** ", text)
