"""The order of the tests, and the models that every test of a whole model runs on."""

from __future__ import annotations

import gc
import os
import tempfile
from pathlib import Path
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

from inputs import MODELS  # noqa: E402

# The files that take longest (`pytest --durations=0`), longest first: one that began last would end alone.
LONGEST = [
    Path(__file__).parent / name
    for name in (
        "benchmarks/test_first_contact.py",
        "trainer/jobs/test_resume.py",
        "ops/test_ops.py",
        "trainer/jobs/test_nothing_is_lost.py",
        "runtime/test_optimize.py",
        "trainer/test_cli.py",
        "models/test_families.py",
        "ops/test_cuda_faults.py",
        "trainer/training/test_processes.py",
        "ops/test_triton_compiled.py",
        "trainer/jobs/test_paper_recipe.py",
        "trainer/jobs/test_recipes.py",
        "trainer/jobs/test_natural_questions_job.py",
        "benchmarks/test_study.py",
        "trainer/jobs/test_roberta_whole_way.py",
        "ops/test_cuda_build.py",
        "ops/test_cuda.py",
        "trainer/training/test_trainer.py",
    )
]
assert all(path.exists() for path in LONGEST), "a file of tests has another name now: change it here, too"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {path: number for number, path in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(LONGEST)))


def pytest_collection_finish() -> None:
    """What the imports made lives to the end: no collection of garbage needs to look at it again."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # else libraries say at the end that they leak


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    """A small random question-answering model, stock or pruned with odd shapes, in evaluation mode."""
    return MODELS[request.param]()
