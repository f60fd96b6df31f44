"""Labels of rows among a model's: by name, by number, and by names that are numbers."""

from __future__ import annotations

import unicodedata

import pytest

from pruned_trainer.tasks.faults import FormatError
from pruned_trainer.tasks.texts.examples import read_class
from pruned_trainer.tasks.texts.labels import Labels


@pytest.mark.parametrize(
    "values", [[-1, 0, 1], ["-1", "0", "1"], [1, 2, "other"], ["low", "high"], [0, 2], ["3", 1, "1"]]
)
def test_labels_that_are_found_are_each_row_s_own(values: list[str | int]) -> None:
    """Whatever their type: a new head tells all of them apart, and as the file has them."""
    labels = Labels.found_in(values)
    numbers = {str(value): labels.number(value, "row") for value in values}
    assert len(set(numbers.values())) == len(numbers) and labels.fit(values)
    if labels.are_named:
        assert all(labels.names[number] == name for name, number in numbers.items())
    else:
        assert all(number == int(name) for name, number in numbers.items())


def test_a_name_that_is_a_number_is_no_place() -> None:
    """Text and number of a CSV and a JSON file are the same label."""
    stars = Labels(("1", "2", "3"))
    assert [stars.number(value, "row") for value in (1, "1", 3, "3")] == [0, 0, 2, 2]
    for value in (0, "0", 4):
        with pytest.raises(FormatError, match="row: label .* is none of the model's: '1', '2', '3'"):
            stars.number(value, "row")


def test_numbers_are_places_where_no_name_is_one() -> None:
    for labels in (Labels(("LABEL_0", "LABEL_1")), Labels(("low", "high"))):
        assert [labels.number(value, "row") for value in (0, "1", 1)] == [0, 1, 1]
    named = Labels(("low", "high"))
    assert named.number(0, "row", ["high", "low"]) == 1  # by the name that the source gives to it
    with pytest.raises(FormatError, match="label 'warm' is none"):
        named.number(0, "row", ["warm", "cold"])
    assert Labels(("LABEL_0", "LABEL_1")).number(1, "row", ["warm", "cold"]) == 1


def test_a_number_that_can_be_no_label_is_refused() -> None:
    """A head of ten million rows would be made for it."""
    assert len(Labels.found_in(["0", "99999"]).names) == 100_000
    with pytest.raises(ValueError, match="a label is 9999999, .* number the 3 labels from 0 on"):
        Labels.found_in([0, 1, 9999999])


def test_false_and_true_are_names_before_they_are_numbers() -> None:
    assert [Labels(("True", "False")).number(value, "row") for value in (True, False)] == [0, 1]
    assert [Labels(("true", "false")).number(value, "row") for value in (True, False)] == [0, 1]
    for names in (("LABEL_0", "LABEL_1"), ("low", "high")):
        assert [Labels(names).number(value, "row") for value in (True, False)] == [1, 0]
    assert Labels.found_in([True, False, True]).names == ("False", "True")
    with pytest.raises(FormatError, match="label 1 is none of the model's: '3', '4'"):
        Labels(("3", "4")).number(True, "row")


def test_a_column_of_numbers_with_gaps_holds_whole_numbers() -> None:
    """A library that reads one makes 1.0 of 1, and NaN of nothing."""
    assert [read_class(value, "row") for value in (1.0, 0.0, 2, True, "1.0")] == [1, 0, 2, True, "1.0"]
    assert type(read_class(1.0, "row")) is int
    for value in (float("nan"), 0.5, None):
        with pytest.raises(FormatError, match="row: the label is .*; a name or a whole number is needed"):
            read_class(value, "row")
    with pytest.raises(FormatError, match="row: the label is -100, which stands for none"):
        read_class(-100.0, "row")


def test_a_label_in_other_unicode_characters_is_told_apart() -> None:
    """The two look the same on a screen."""
    name = unicodedata.normalize("NFC", "très bon")
    with pytest.raises(FormatError, match="model's: 'très bon', 'non' .which has the one that looks"):
        Labels((name, "non")).number(unicodedata.normalize("NFD", name), "row")
    with pytest.raises(FormatError, match="none of the model's: 'très bon', 'non'$"):
        Labels((name, "non")).number("tres bon", "row")
