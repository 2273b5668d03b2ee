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
    (".5", "0.5"),
    ("$.99", "$0.99"),
    ("-.50", "\u22120.5"),
    (".5%", "0.5 %"),
    ("it is .25.", "it is 0.25"),
    ("5.", "5"),
    ("5 %", "5%"),
    ("12.50\u00a0%", "12.5%"),
    ("-3 % of it", "-3% of it"),
    ("a.m.", "am"),
    ("U.S.", "us"),
    ("U.S.A", "USA"),
    ("10 p.m.", "10 pm"),
    ("Ph.D.", "PhD"),
    ("the U.S. flag.", "us flag"),
    ("No.5", "no 5"),
    ("so ...5", "so 5"),
    ("4th.", "4th"),
    ("white.Then red", "white then red"),
    ("½", "1/2"),
    ("the 3/4.", "3/4"),
    ("3/4/2020", "3-4-2020"),
    ("a", "A"),
    ("an", "An."),
    ("the", "(The)"),
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
    (".5", "5"),
    ("$.99", "99"),
    ("-.5", "-5"),
    (".05", "0.5"),
    (".5", "-.5"),
    ("3/4", "3 4"),
    ("1/2", "12"),
    ("-3/4", "3/4"),
    ("9/11", "9 11"),
    ("U.S.", "u s"),
    ("a.m.", "m"),
    ("1.5", "1 5"),
    ("A", "an"),
    ("A", "the"),
    ("A", "lamp"),
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
        (".5", "5", False),
        ("0.5", ".5", True),
        ("$.99", "1", True),
        ("-.5", "-0.51", True),
        ("-.5", ".5", False),
        ("5 %", ".05", True),
        ("1.05e3", "1050", True),
        ("1E3", "1,040", True),
        ("2e\u22123", ".002", True),
        ("-1.5e+2", "-150", True),
        ("1.05e3", "1.05", False),
        ("1e3 apples", "1000", False),
        ("5", "1e999", False),
        ("1e999", "1e999", True),
        ("9" * 400, "9" * 400, True),
        ("3/4", "3", False),
        ("A", "a", True),
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
        ("It costs $.99.", "99", False),
        ("It costs $.99.", "0.99", True),
        ("At 10 a.m., I think", "AM", True),
        ("In the U.S. alone", "us", True),
        ("About 5 % of them", "5%", True),
        ("It is 3/4 full", "3", False),
        ("It is red...The lamp", "red", True),
    ],
)
def test_contains_looks_for_whole_words(said: str, wanted: str, right: bool) -> None:
    assert MATCHES["contains"](said, wanted) is right


@pytest.mark.parametrize("letter", ["A", "a", "B", "b"])
@pytest.mark.parametrize(
    "said",
    [
        "{}", "({})", "{}.", "**{}**", "The answer is {}", "The answer is {}.", "Answer: {}", "Option {}", "{}: lamp",
        "({}) a lamp", "{}) lamp", "{}. A lamp", "{}.Lamp", "{}, since it is lit", "{} - lamp", "{} (lamp)",
        "{}\nIt is lit", "{} is right", "option {} is right", "{} or C", '"{}" it is',
    ],
)  # fmt: skip
def test_contains_knows_an_article_that_is_an_answer(said: str, letter: str) -> None:
    """Option A is found wherever option B is."""
    for wanted in (letter, letter.swapcase(), f"({letter})", f"{letter}."):
        assert MATCHES["contains"](said.format(letter), wanted), wanted
    assert not MATCHES["contains"](said.format(letter), "D")


@pytest.mark.parametrize("said", ["I take A as it is lit", "Option A seems right", "so A fits"])
def test_contains_knows_a_capital_inside_of_a_sentence(said: str) -> None:
    assert MATCHES["contains"](said, "A") and not MATCHES["contains"](said.replace("A", "a"), "A")


@pytest.mark.parametrize(
    "said",
    [
        "It is a lamp.", "A lamp", "B: a lamp", "B. A lamp", 'a "red" lamp', "a $5 note", "an a-frame house",
        "at 10 a.m.", "U.S.A.", "A.D. 79", "in A.D. 79", "THIS IS A LAMP", "Lamp", "the letter an",
    ],
)  # fmt: skip
def test_contains_takes_no_article_for_an_answer(said: str) -> None:
    assert not MATCHES["contains"](said, "A")


@pytest.mark.parametrize("article", ["an", "the", "The"])
def test_contains_knows_every_article_that_is_an_answer(article: str) -> None:
    for said in (article, f"The word is {article}", f'It says "{article}".', f"{article}: it stands there"):
        assert MATCHES["contains"](said, article)
    assert not MATCHES["contains"](f"This is {article} orange", article)


def test_one_of_several_is_enough_and_nothing_known_is_no_mistake() -> None:
    exact = find_match("exact")
    assert is_right("Two.", ("couple", "2"), exact) is True
    assert is_right("three", ("couple", "2"), exact) is False
    assert is_right("three", (), exact) is None
    with pytest.raises(InputError, match="match is 'fuzzy'; choose one of"):
        find_match("fuzzy")
