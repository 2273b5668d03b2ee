"""Answers are compared as the field compares them."""

from __future__ import annotations

import pytest

from illava_hooks.errors import InputError
from illava_hooks.tools.evaluate.matching import MATCHES, find_match, is_right, normal_form

EQUAL = [
    ("White", "white"),
    ("white.", "white"),
    ("A lamp.", "lamp"),
    ("the  red\tcircle", "red circle"),
    ("Two", "2"),
    ("none", "0"),
    ("2.0", "2"),
    ("1,000", "1000"),
    ("1,234.50", "1234.5"),
    ("+3", "3"),
    ("\u22123", "-3"),
    ("it\u2019s", "its"),
    ("ＡＢＣ", "abc"),
    ("A.", "a"),
    ("(B)", "b"),
    ("yes, it is", "yes it is"),
    ("t-shirt", "t shirt"),
    ("STRASSE", "straße"),
    ("两 个", "两 个"),
]
OTHERS = [
    ("-3", "3"),
    ("1.5", "15"),
    ("5%", "5"),
    ("+", "-"),
    ("", "no"),
    ("A", "B"),
    ("white", "off white"),
    ("10", "1"),
    ("3-4", "34"),
    ("bank", "blank"),
]


class TestExact:
    @pytest.mark.parametrize(("said", "wanted"), EQUAL)
    def test_what_means_the_same(self, said: str, wanted: str) -> None:
        assert MATCHES["exact"](said, wanted) and MATCHES["exact"](wanted, said)

    @pytest.mark.parametrize(("said", "wanted"), OTHERS)
    def test_what_does_not(self, said: str, wanted: str) -> None:
        assert not any(MATCHES["exact"](*pair) for pair in ((said, wanted), (wanted, said)))

    @pytest.mark.parametrize("text", [word for pair in EQUAL + OTHERS for word in pair])
    def test_a_normal_form_is_its_own(self, text: str) -> None:
        assert normal_form(normal_form(text)) == normal_form(text)


@pytest.mark.parametrize(
    ("said", "wanted", "right"),
    [
        ("95", "100", True),
        ("94.9", "100", False),
        ("-95", "-100", True),
        ("-100", "100", False),
        ("0", "0", True),
        ("0.01", "0", False),
        ("51%", "0.5", True),
        ("1,040", "1000", True),
        ("ten", "10.2", True),
        ("White", "white", True),
        ("nan", "infinity", False),
        ("3 apples", "3", False),
    ],
)
def test_relaxed_gives_numbers_five_percent(said: str, wanted: str, right: bool) -> None:
    assert MATCHES["relaxed"](said, wanted) is right


@pytest.mark.parametrize(
    ("said", "wanted", "right"),
    [
        ("It is a red lamp.", "Red lamp", True),
        ("There are two dogs", "2", True),
        ("I do not know", "no", False),
        ("12", "2", False),
        ("lamp, red", "red lamp", False),
        ("white", "white", True),
    ],
)
def test_contains_looks_for_whole_words(said: str, wanted: str, right: bool) -> None:
    assert MATCHES["contains"](said, wanted) is right


def test_one_of_several_is_enough_and_nothing_known_is_no_mistake() -> None:
    exact = find_match("exact")
    assert is_right("Two.", ("couple", "2"), exact) is True
    assert is_right("three", ("couple", "2"), exact) is False
    assert is_right("three", (), exact) is None
    with pytest.raises(InputError, match="match is 'fuzzy'; choose one of"):
        find_match("fuzzy")
