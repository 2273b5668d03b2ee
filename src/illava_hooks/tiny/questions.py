"""Questions about scenes, with one-word answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from illava_hooks.tiny.scenes import COLORS, KINDS, SHAPES, Clip, Scene, Thing

T = TypeVar("T")

__all__ = ["QUESTION_KINDS", "Question", "ask_clip", "ask_pair", "ask_scene", "vocabulary"]


@dataclass(frozen=True, slots=True)
class Question:
    """A question and its answer, in words separated by spaces.

    Attributes:
        kind: what it asks for, such as "color".
        text: the question.
        answer: one word.
    """

    kind: str
    text: str
    answer: str


def _one(rng: np.random.Generator, items: Sequence[T]) -> T:
    return items[int(rng.integers(len(items)))]


def _name(things: Sequence[Thing], thing: Thing) -> str | None:
    """The shortest name that fits no other thing: "star", "red star" or None."""
    if sum(other.kind == thing.kind for other in things) == 1:
        return thing.kind
    if sum((other.kind, other.color) == (thing.kind, thing.color) for other in things) == 1:
        return f"{thing.color} {thing.kind}"
    return None


def _color(rng: np.random.Generator, things: Sequence[Thing]) -> Question | None:
    single = [thing for thing in things if _name(things, thing) == thing.kind]
    if not single:
        return None
    thing = _one(rng, single)
    return Question("color", f"what color is the {thing.kind} ?", thing.color)


def _digit(rng: np.random.Generator, things: Sequence[Thing]) -> Question | None:
    named = [thing for thing in things if thing.kind == "digit" and _name(things, thing)]
    if not named:
        return None
    thing = _one(rng, named)
    text = "which digit is there ?" if _name(things, thing) == "digit" else f"which digit is {thing.color} ?"
    return Question("digit", text, str(thing.digit))


def _count(rng: np.random.Generator, things: Sequence[Thing], place: str = "there") -> Question:
    kind = _one(rng, [*{thing.kind: 0 for thing in things}, *KINDS])
    return Question("count", f"how many {kind}s are {place} ?", str(sum(thing.kind == kind for thing in things)))


def _relation(rng: np.random.Generator, scene: Scene) -> Question | None:
    found = []
    for thing in scene.things:
        name = _name(scene.things, thing)
        for word, step in (("left", -1), ("right", 1)):
            beside = scene.beside(thing, step)
            if name and beside:
                found.append(Question("relation", f"what is {word} of the {name} ?", beside.kind))
    return _one(rng, found) if found else None


def _existence(rng: np.random.Generator, things: Sequence[Thing]) -> Question:
    there = {(thing.color, thing.kind) for thing in things}
    if rng.random() < 0.5:
        color, kind = _one(rng, sorted(there))
        return Question("existence", f"is there a {color} {kind} ?", "yes")
    half = [(c, k) for c in COLORS for k in KINDS if (any(c == d for d, _ in there) or any(k == s for _, s in there))]
    color, kind = _one(rng, [pair for pair in half if pair not in there])
    return Question("existence", f"is there a {color} {kind} ?", "no")


_ASK: dict[str, Callable[[np.random.Generator, Scene], Question | None]] = {
    "color": lambda rng, scene: _color(rng, scene.things),
    "digit": lambda rng, scene: _digit(rng, scene.things),
    "count": lambda rng, scene: _count(rng, scene.things),
    "relation": _relation,
    "existence": lambda rng, scene: _existence(rng, scene.things),
}
QUESTION_KINDS = tuple(_ASK)


def ask_scene(rng: np.random.Generator, scene: Scene, kind: str) -> Question | None:
    """A question of one of ``QUESTION_KINDS``, or None where the scene gives none."""
    return _ASK[kind](rng, scene)


def ask_pair(rng: np.random.Generator, first: Scene, second: Scene) -> Question:
    """A question about two images in one prompt."""
    word, scene = _one(rng, [("first", first), ("second", second)])
    other = second if scene is first else first
    choice = rng.random()
    if choice < 0.5:
        only = sorted({(t.color, t.kind) for t in scene.things} - {(t.color, t.kind) for t in other.things})
        if only:
            color, kind = _one(rng, only)
            return Question("which image", f"which image has a {color} {kind} ?", word)
    question = _count(rng, scene.things, f"in the {word} image")
    return Question("count in one", question.text, question.answer)


def ask_clip(rng: np.random.Generator, clip: Clip) -> Question:
    """A question about a clip: most often, which way its first thing moves."""
    mover = clip.things[0]
    if rng.random() < 0.7:
        return Question(
            "motion", f"which way does the {_name(clip.things, mover) or mover.kind} move ?", clip.direction
        )
    return _color(rng, clip.things) or _existence(rng, clip.things)


def vocabulary() -> list[str]:
    """Every word of the questions and answers, and those of easy-VQA, whose questions the models know as well."""
    grammar = (
        "what color is the which digit there how many are left right of a image has in first second way does move up "
        "down yes no ? shape not contain present two images video picture describe this"
    )
    easy_vqa = "rectangle black gray teal brown"
    words = [*grammar.split(), *COLORS, *KINDS, *(f"{kind}s" for kind in (*SHAPES, "digit")), *easy_vqa.split()]
    return [*dict.fromkeys(words), *map(str, range(10))]
