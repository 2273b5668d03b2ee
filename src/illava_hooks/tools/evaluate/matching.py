"""Whether an answer is right: in normal form, exactly, with room for numbers, or as a part of what was said."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from illava_hooks.errors import InputError

__all__ = ["MATCHES", "find_match", "is_right", "normal_form"]

_ARTICLES = ("a", "an", "the")
_NUMBERS = "zero one two three four five six seven eight nine ten".split()
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
#: Signs that have a look-alike on the keyboard; the fraction bar is what NFKC leaves of "½".
_PLAIN = str.maketrans("\u2019\u2212\u2044", "'-/")
#: With sign; a fraction (and no date), or with its decimals, thousands, exponent and percent sign.
_NUMBER = re.compile(
    r"""
    (?: (?<!\w) [-+] )?
    (?: (?<![\w/]) \d+/\d+ (?! \w | [/.,]\d )
      | (?: \d+ | (?<![\w.]) \.\d+ ) (?: [.,]\d+ )* (?: e[-+]?\d+ )? (?: \s*% )? (?!\w) )
    """,
    re.VERBOSE,
)
#: Numbers, then words with the points of their abbreviations ("U.S.", no "B.Lamp"); all else separates.
_TOKENS = re.compile(_NUMBER.pattern + r"| [\w'] (?: [\w'] | \. (?! [.\d] | \w{3} ) )*", re.VERBOSE)
_THOUSANDS = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?%?")
#: An article that is no article: no word that it could belong to follows, or it is a capital inside of a sentence.
_NAMED = re.compile(
    r"""
    (?<! [\w.'-] ) (?: an? | the ) (?! ['-]?\w | \.\w\b )
    (?: (?-i: (?<= [a-z]\ A ) ) | (?! [ \t]+ (?! (?: is | and | or ) \b ) [^\w(]?\w ) )
    """,
    re.VERBOSE | re.IGNORECASE,
)

Match = Callable[[str, str], bool]


def normal_form(text: str) -> str:
    """Lower case, single spaces, no punctuation, no articles, number words as digits, as VQA's evaluation has it.

    A sign, a decimal point, a percent sign and the bar of a fraction stay with their number; the points of an
    abbreviation go without a gap. Where nothing else would be left, articles (a choice "A") and punctuation (a choice
    "+") stay.

    Args:
        text: an answer.
    """
    plain = _plain(text).casefold().strip()
    words = [_word(token) for token in _TOKENS.findall(plain)]
    words = [word for word in words if word]
    return " ".join([word for word in words if word not in _ARTICLES] or words) or plain


def _plain(text: str) -> str:
    """One spelling of each character."""
    return unicodedata.normalize("NFKC", text).translate(_PLAIN)


def _word(token: str) -> str:
    """One token: its number in one spelling, or its letters."""
    if not _NUMBER.fullmatch(token):
        word = re.sub("['.]", "", token)
        return _DIGITS.get(word, word)
    number = "".join(token.split()).removeprefix("+")
    if _THOUSANDS.fullmatch(number):
        number = number.replace(",", "")
    number = re.sub(r"^(-?)\.", r"\g<1>0.", number)
    if decimal := re.fullmatch(r"(-?\d+\.\d+)(%?)", number):
        number = decimal[1].rstrip("0").rstrip(".") + decimal[2]
    return number


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
    """The wanted words stand one behind the other in what was said.

    Where an article alone is wanted (a choice "A"), it has to be found where it is none: "(A) lamp", not "a lamp".
    """
    word = normal_form(wanted)
    if word in _ARTICLES and word in map(str.casefold, _NAMED.findall(_plain(said))):
        return True
    return f" {word} " in f" {normal_form(said)} "


def _number(text: str) -> float | None:
    word = normal_form(text)
    if not re.fullmatch(r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?%?", word):
        return None
    number = float(word[:-1]) / 100 if word.endswith("%") else float(word)
    return number if math.isfinite(number) else None  # infinity is near to everything


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
