"""Tests that only `make test-all` runs: a cheaper one beside each finds the same kind of fault."""

from __future__ import annotations

import os

import pytest

EVERYTHING = os.environ.get("PRUNED_OPS_TEST_ALL", "0") != "0"

only_in_test_all = pytest.mark.skipif(not EVERYTHING, reason="runs in make test-all alone, for its minutes")
