"""A chat about some pictures: its turns, each answered without and with merging, as prompts and as messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["LABELS", "OWN", "Chat", "Turn", "history", "messages"]

#: What stands above an answer, by side.
LABELS = {False: "Without merging", True: "With merging"}

#: What stands below a question that nobody typed.
OWN = "The page's question, as the field was empty."


@dataclass(frozen=True, slots=True)
class Turn:
    """A question and what was answered.

    Attributes:
        question: as it was asked.
        texts: the answers, by side.
        own: whether the page asked it, since the visitor typed none.
    """

    question: str
    texts: dict[bool, str] = field(default_factory=dict)
    own: bool = False


@dataclass(frozen=True, slots=True)
class Chat:
    """What a visitor has asked about the same files.

    Attributes:
        files: what it is about; other files begin another chat.
        turns: in the order of asking.
    """

    files: tuple[str, ...] = ()
    turns: tuple[Turn, ...] = ()


def history(turns: Sequence[Turn], merge: bool) -> list[tuple[str, str]]:
    """Earlier questions with one side's own answers, or the other's where it was not asked: two chats, not one."""
    return [(turn.question, turn.texts.get(merge, next(iter(turn.texts.values())))) for turn in turns if turn.texts]


def messages(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """What the page shows: each question, and below it what each side answered."""
    shown = []
    for turn in turns:
        shown.append({"role": "user", "content": f"{turn.question}\n\n*{OWN}*" if turn.own else turn.question})
        for side, text in sorted(turn.texts.items()):
            between = "\n\n" if "\n" in text else " "  # lists and tables begin on lines of their own
            shown.append({"role": "assistant", "content": f"**{LABELS[side]}:**{between}{text}"})
    return shown
