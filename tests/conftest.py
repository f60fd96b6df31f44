"""The order of the tests, and what the processes that run them begin with (tests/support/environment.py)."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

# The files that take longest (`pytest --durations=0`), longest first: one that began last would end alone.
LONGEST = [
    Path(__file__).parent / name
    for name in (
        "benchmarks/test_first_contact.py",
        "trainer/jobs/test_resume.py",
        "ops/test_ops.py",
        "ops/test_op_manners.py",
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


def pytest_configure(config: pytest.Config) -> None:
    """A process that only hands tests out to others does without what takes seconds to import. The other
    folders' conftest.py may be read before this is called, and so import none of it either."""
    hands_out = config.getoption("numprocesses", None) and not hasattr(config, "workerinput")
    if not hands_out:
        config.pluginmanager.import_plugin("environment")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {path: number for number, path in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(LONGEST)))


def pytest_collection_finish() -> None:
    """What the imports made lives to the end: no collection of garbage needs to look at it again."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # else libraries say at the end that they leak
