"""Numbers on the scripts' command lines that would mean something else than they say are refused."""

from __future__ import annotations

import importlib
import sys
from argparse import ArgumentTypeError

import pytest

from option_types import above, at_least, no_less_than

# Scripts, and the options of each that are a time, a number of rounds or a part of the data.
OPTIONS = [
    ("study_squad", "--max-minutes"),
    ("study_tasks", "--minutes"),
    ("study_tasks", "--speedups"),
    ("study_natural_questions", "--steps"),
    ("study_natural_questions", "--every"),
    ("bench_ops", "--minutes"),
    ("bench_ops", "--rounds"),
    ("bench_kernels", "--minutes"),
    ("bench_models", "--minutes"),
    ("bench_models", "--rounds"),
    ("first_contact", "--minutes"),
    ("bench_int8_parts", "--seconds"),
    ("bench_natural_questions", "--documents"),
    ("bench_int8", "--questions"),
    ("bench_family", "--questions"),
    ("bench_ask", "--questions"),
    ("bench_widths", "--rounds"),
    ("bench_serve", "--seconds"),
    ("bench_serve", "--clients"),
    ("bench_sentence_transformers", "--documents"),
]


@pytest.mark.parametrize(("script", "option"), OPTIONS)
def test_nothing_and_less_is_refused(
    script: str, option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main = importlib.import_module(script).main
    for number in ("0", "-3", "nan"):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", option, number])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 2
        assert f"argument {option}: {number!r} is given, and a " in capsys.readouterr().err


def test_what_is_right_is_the_number() -> None:
    assert (above(0)("0.5"), above(1)("2"), no_less_than(0)("0"), at_least(1)("7")) == (0.5, 2.0, 0.0, 7)
    for parsed, text in ((above(1), "1"), (no_less_than(0), "-0.1"), (at_least(2), "2.5"), (above(0), "inf")):
        with pytest.raises(ArgumentTypeError, match=f"'{text}' is given, and a .*number .* is needed"):
            parsed(text)
