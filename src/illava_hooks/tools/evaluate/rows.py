"""What was measured, one row for each method at one budget, and the file that keeps it.

The first line of a file is a header with the fingerprint of the run; every further one is a row. The row of the
unpatched model holds all its answers, each other one those that differ from them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from illava_hooks.errors import InputError
from illava_hooks.tools.evaluate.fingerprint import Fingerprint
from illava_hooks.tools.evaluate.lines import add_line, header_of, is_begun
from illava_hooks.tools.evaluate.statistics import interval

__all__ = ["Key", "Row", "RowFile", "read_header", "read_rows"]

FORMAT, VERSION = "illava-hooks evaluation", 1

#: Method, stage and fraction of a row.
Key = tuple[str, str, float]
Interval = tuple[float, float]
_HITS = {"1": True, "0": False, "-": None}


@dataclass(frozen=True, slots=True)
class Row:
    """One method at one budget.

    Attributes:
        method: its name; "none" is the unpatched model.
        stage: "encoder", "language" or "both".
        kept: fraction of the visual tokens asked for.
        measured: fraction behind the last merging layer, of all tokens of all items; for "downsample" that of the
            prompts. None where it is not known.
        questions: how many.
        labelled: how many of them have a known answer.
        accuracy: share of right answers among those; None where there are none.
        accuracy_interval: 95 % bootstrap; None likewise.
        loyalty: share of answers equal to the unpatched model's.
        loyalty_interval: 95 % bootstrap; None in files of earlier versions.
        divergence: mean KL of the first word's distribution from the unpatched model's, nats.
        by_kind: accuracy by kind of question.
        right: per question, for paired comparisons; None where no answer is known.
        answers: per question, what the model said; empty in files of earlier versions.
        identity: what the method's code is; None where that cannot be told.
    """

    method: str
    stage: str
    kept: float
    measured: float | None
    questions: int
    labelled: int
    accuracy: float | None
    accuracy_interval: Interval | None
    loyalty: float
    loyalty_interval: Interval | None
    divergence: float
    by_kind: dict[str, float]
    right: list[bool | None]
    answers: list[str]
    identity: str | None = None

    @property
    def key(self) -> Key:
        """What tells it from the other rows of a run."""
        return self.method, self.stage, self.kept

    def gains(self, other: Row) -> list[float]:
        """1 where another row over the same questions is wrong and this one right, -1 the other way round, else 0.

        Raises:
            InputError: no answer is known.
        """
        pairs = [(a, b) for a, b in zip(self.right, other.right, strict=True) if a is not None and b is not None]
        if not pairs:
            raise InputError("no question has a known answer, so there is no accuracy to compare; compare loyalty")
        return [float(a) - float(b) for a, b in pairs]

    def lead(self, other: Row) -> Interval:
        """95 % interval of the difference in accuracy to another row over the same questions.

        Raises:
            InputError: no answer is known.
        """
        return interval(self.gains(other))


class RowFile:
    """A file of rows of one run, to which more can be added."""

    def __init__(self, file: Path, mine: Fingerprint, tell: Callable[[str], None]) -> None:
        """Opens or begins it.

        Args:
            file: its path; a last line that an interrupted run left unfinished is taken away.
            mine: the fingerprint of the run that wants to write.
            tell: is told what was taken away.

        Raises:
            InputError: it holds rows of another run, or something else.
        """
        self.file = file
        self.rows: dict[Key, Row] = {}
        if is_begun(file, (FORMAT, VERSION), mine, tell):
            self.rows = {row.key: row for row in read_rows(file)}

    def find(self, key: Key, identity: str | None) -> Row | None:
        """A row that need not be measured again.

        Raises:
            InputError: a method of that name was measured, and its code was another.
        """
        row = self.rows.get(key)
        if row is None or identity is None or row.identity is None:
            return None
        if row.identity != identity:
            raise InputError(
                f"{str(self.file)!r} holds rows of another method that is called {row.method!r}; give the method "
                "another name, give another file, or delete it to measure anew"
            )
        return row

    def add(self, row: Row) -> None:
        """Appends a row; the unpatched model's comes first."""
        body = {**asdict(row), "right": "".join(_MARKS[hit] for hit in row.right)}
        stock = next((known for known in self.rows.values() if known.method == "none"), None)
        if stock is not None:
            said = zip(row.answers, stock.answers, strict=True)
            del body["answers"]
            body["changed"] = {str(index): mine for index, (mine, its) in enumerate(said) if mine != its}
        add_line(self.file, body)
        self.rows[row.key] = row


_MARKS = {hit: mark for mark, hit in _HITS.items()}


def read_header(file: Path) -> dict[str, Any] | None:
    """The fingerprint of the run that wrote a file; None in files of earlier versions.

    Raises:
        InputError: a later version wrote it.
    """
    return header_of(file, (FORMAT, VERSION))


def read_rows(file: Path | None) -> list[Row]:
    """The rows of a file; none where there is no file.

    Files of earlier versions, which have no header, are read as well: without what they did not know (answers) and
    without the measured fraction, which was that of the last batch.

    Raises:
        InputError: the file holds something else.
    """
    if file is None or not file.exists():
        return []
    header = read_header(file)
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    found: dict[Key, Row] = {}
    stock: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or (number == 1 and header is not None):
            continue
        try:
            row = _row(json.loads(line), stock, header is None)
        except (ValueError, KeyError, TypeError, RecursionError, IndexError) as error:
            raise InputError(f"{file.name}, line {number} is no row of an evaluation; give a new file") from error
        if row.method == "none":
            stock = row.answers
        found[row.key] = row  # of a row that was measured twice, the later one
    return list(found.values())


def _row(body: dict[str, Any], stock: Sequence[str], earlier: bool) -> Row:
    right = [_HITS[mark] for mark in body["right"]]
    if earlier:
        body |= {"measured": None, "labelled": len(right), "loyalty_interval": None, "answers": []}
    elif "changed" in body:
        answers = list(stock)
        for index, answer in body.pop("changed").items():
            answers[int(index)] = answer
        body["answers"] = answers
    for name in ("accuracy_interval", "loyalty_interval"):
        body[name] = body[name] and tuple(body[name])
    row = Row(**{**body, "right": right})
    if len(row.right) != row.questions or (not earlier and len(row.answers) != row.questions):
        raise ValueError("answers are missing")
    return row
