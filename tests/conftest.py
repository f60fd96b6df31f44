"""The models that every test of a whole model runs on."""

from __future__ import annotations

from typing import Any

import pytest
from inputs import MODELS


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    """A small random question-answering model, stock or pruned with odd shapes, in evaluation mode."""
    return MODELS[request.param]()
