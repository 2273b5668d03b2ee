"""Whether an answer is right: in normal form, exactly, with room for numbers, or as a part of what was said."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from illava_hooks.errors import InputError

__all__ = ["MATCHES", "find_match", "is_right", "normal_form"]

_ARTICLES = ("a", "an", "the")
_NUMBERS = "zero one two three four five six seven eight nine ten".split()
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
#: Signed numbers with their decimals and thousands, then words; all else separates.
_TOKENS = re.compile(r"(?:(?<!\w)[-+\u2212])?\d+(?:[.,]\d+)*%?(?!\w)|[\w']+")
_THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?")

Match = Callable[[str, str], bool]


def normal_form(text: str) -> str:
    """Lower case, single spaces, no punctuation, no articles, number words as digits, as VQA's evaluation has it.

    A sign, a decimal point and a percent sign of a number stay. Where nothing else would be left, articles (a
    choice "A") and punctuation (a choice "+") stay.

    Args:
        text: an answer.
    """
    plain = unicodedata.normalize("NFKC", text).casefold().strip()
    words = [_word(token) for token in _TOKENS.findall(plain.replace("\u2019", "'"))]
    words = [word for word in words if word]
    return " ".join([word for word in words if word not in _ARTICLES] or words) or plain


def _word(token: str) -> str:
    """One token: its number in one spelling, or its letters."""
    if not any(character.isdecimal() for character in token):
        word = token.replace("'", "")
        return _DIGITS.get(word, word)
    sign, digits = ("-", token[1:]) if token[0] in "-\u2212" else ("", token.lstrip("+"))
    whole = digits.removesuffix("%")
    if _THOUSANDS.fullmatch(whole):
        whole = whole.replace(",", "")
    if re.fullmatch(r"\d+\.\d+", whole):
        whole = whole.rstrip("0").rstrip(".")
    return sign + whole + digits[len(digits.removesuffix("%")) :]


def exact(said: str, wanted: str) -> bool:
    """The same in normal form."""
    return normal_form(said) == normal_form(wanted)


def relaxed(said: str, wanted: str) -> bool:
    """A number within 5 % of the wanted one (ChartQA's relaxed accuracy); anything else exactly."""
    numbers = _number(said), _number(wanted)
    if numbers[0] is None or numbers[1] is None:
        return exact(said, wanted)
    return abs(numbers[0] - numbers[1]) <= 0.05 * abs(numbers[1])


def contains(said: str, wanted: str) -> bool:
    """The wanted words stand one behind the other in what was said."""
    return f" {normal_form(wanted)} " in f" {normal_form(said)} "


def _number(text: str) -> float | None:
    word = normal_form(text)
    if not re.fullmatch(r"-?\d+(?:\.\d+)?%?", word):
        return None
    return float(word[:-1]) / 100 if word.endswith("%") else float(word)


#: How answers can be compared, by name.
MATCHES: Mapping[str, Match] = MappingProxyType({"exact": exact, "relaxed": relaxed, "contains": contains})


def find_match(name: str) -> Match:
    """A comparison by name.

    Raises:
        InputError: there is none of that name.
    """
    if name not in MATCHES:
        raise InputError(f"match is {name!r}; choose one of {list(MATCHES)}")
    return MATCHES[name]


def is_right(said: str, accepted: Sequence[str], match: Match) -> bool | None:
    """Whether an answer is one of the accepted ones; None where none is known."""
    return any(match(said, wanted) for wanted in accepted) if accepted else None
