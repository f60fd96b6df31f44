"""What a process that runs tests has before it imports them, and the models that every test of a whole model
runs on: a plugin of pytest's, which conftest.py loads."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import pytest

# Two processes of tests on two cores: threads of one would wait for those of the other at every barrier. The
# tests of threads set their number themselves.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis  # noqa: E402
import torch  # noqa: E402

# Without a GPU Triton's kernels are tested in its interpreter; the switch comes before their import.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A machine that does something else besides is no failure.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

# What this user's GPU was tuned to is neither read nor changed by a test.
os.environ["PRUNED_OPS_CACHE"] = tempfile.mkdtemp(prefix="pruned_ops_cache_")

import harness  # noqa: E402
from gpu_watch import GpuWatch  # noqa: E402
from inputs import MODELS  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    """PRUNED_OPS_TEST_SECONDS: the most that a test may take on a GPU that is there for minutes."""
    if seconds := os.environ.get("PRUNED_OPS_TEST_SECONDS"):
        config.pluginmanager.register(GpuWatch(float(seconds), harness.gpu_is_lost))


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    """A small random question-answering model, stock or pruned with odd shapes, in evaluation mode."""
    return MODELS[request.param]()
