"""The faults of `make mutants` fit the code as it is: each is planted in one place, and changes it."""

from __future__ import annotations

import pytest

from mutants import MUTANTS, PACKAGE, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_each_fault_has_its_place(mutant: Mutant) -> None:
    source = (PACKAGE / mutant.file).read_text(encoding="utf-8")
    assert source.count(mutant.old) == 1 and mutant.old != mutant.new
