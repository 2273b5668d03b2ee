"""Runs a model with settings on some of the questions: loss, loyalty and FLOPs against the unpatched model's."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from illava_hooks.api import patch, unpatch
from illava_hooks.errors import InputError
from illava_hooks.methods import Method
from illava_hooks.tools.evaluate.fingerprint import fingerprint
from illava_hooks.tools.evaluate.identity import identity
from illava_hooks.tools.evaluate.lines import add_line, is_begun, parsed
from illava_hooks.tools.evaluate.run import Outcome, Prompts, run_items
from illava_hooks.tools.items import Item
from illava_hooks.tools.progress import Progress
from illava_hooks.tools.tune.search import OverError

__all__ = ["Limit", "Meter", "Record", "Sample"]

FORM = "illava-hooks tuning", 1
#: Shapes of pictures that stand for all when a cost is looked for.
_PROBES = 6


@dataclass(frozen=True, slots=True)
class Sample:
    """Settings on some questions.

    Attributes:
        losses: KL of the first word from the unpatched model's, in nats, per question.
        same: whether each answer is the unpatched model's.
        flops: of the prefills, merged and unmerged.
    """

    losses: tuple[float, ...]
    same: tuple[bool, ...]
    flops: tuple[int, int]

    @property
    def loss(self) -> float:
        """The mean."""
        return float(np.mean(self.losses))

    @property
    def loyalty(self) -> float:
        """The share of equal answers."""
        return float(np.mean(self.same))

    @property
    def cost(self) -> float:
        """FLOPs, of the unmerged ones."""
        return self.flops[0] / max(1, self.flops[1])

    def __add__(self, other: Sample) -> Sample:
        """Both, one behind the other."""
        flops = self.flops[0] + other.flops[0], self.flops[1] + other.flops[1]
        return Sample(self.losses + other.losses, self.same + other.same, flops)


class Limit:
    """When a search must end: after some measurements, or when the time for the rest is just left."""

    def __init__(self, minutes: float | None, measurements: int | None) -> None:
        """Nothing is measured yet.

        Args:
            minutes: for all; None: as long as it takes.
            measurements: of a search; None: all that are planned.
        """
        self.seconds = None if minutes is None else 60 * minutes
        self.measurements = measurements
        self.reserved = 0
        self.done = 0
        self.ended: str | None = None
        self._began = time.monotonic()
        self._spent, self._answers = 0.0, 0

    def ask(self, answers: int) -> None:
        """Before a measurement of the search.

        Args:
            answers: that it takes; 0: it is known already.

        Raises:
            OverError: it would be one too many.
        """
        if self.measurements is not None and self.done >= self.measurements:
            self.ended = "measurements"
            raise OverError
        if self.seconds is not None and answers:
            each = self._spent / max(1, self._answers)
            if time.monotonic() - self._began + each * (answers + self.reserved) > self.seconds:
                self.ended = "time"
                raise OverError
        self.done += 1

    @contextmanager
    def timing(self, answers: int) -> Iterator[None]:
        """Learns how long an answer takes, with all that is around it."""
        began = time.monotonic()
        yield
        self._spent, self._answers = self._spent + time.monotonic() - began, self._answers + answers


class Record:
    """What was measured, in a file to which lines are added, so that a killed run goes on.

    Attributes:
        reused: how often something was found that an earlier run had measured, by its kind: "sample" or "cost".
    """

    def __init__(self, file: Path | None, mine: Callable[[], dict[str, Any]], tell: Callable[[str], None]) -> None:
        """Opens or begins it.

        Args:
            file: its path; None: it is kept nowhere.
            mine: makes the fingerprint of the run, where it is needed.
            tell: is told what was taken away.

        Raises:
            InputError: the file is another run's, or holds something else.
        """
        self.file, self.reused = file, Counter[str]()
        self._known: dict[str, Any] = {}
        if file is not None and is_begun(file, FORM, mine(), tell):
            for number, line in enumerate(file.read_text(encoding="utf-8").split("\n")[1:], start=2):
                body = parsed(line) if line else {"key": None, "value": None}
                if not isinstance(body, dict) or not {"key", "value"} <= body.keys():
                    raise InputError(f"{file.name}, line {number} is no measurement of a tuning; give a new file")
                self._known[_canonical(body["key"])] = body["value"]
        self._old = set(self._known)

    def knows(self, key: Any) -> bool:
        """Whether it was measured."""
        return _canonical(key) in self._known

    def fetch(self, key: Sequence[Any], measure: Callable[[], Any]) -> Any:
        """What was measured before, or is measured now; a key begins with its kind."""
        name = _canonical(key)
        if name not in self._known:
            # As the file will give it back: a run that was broken off and one that was not go the same way.
            self._known[name] = json.loads(json.dumps(measure()))
            if self.file is not None:
                add_line(self.file, {"key": key, "value": self._known[name]})
        elif name in self._old:
            self._old.discard(name)
            self.reused[key[0]] += 1
        return self._known[name]


class Meter:
    """One model and its questions."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        items: Sequence[Item],
        methods: Mapping[str, Method],
        lengths: tuple[int, int],
        record: Record,
        limit: Limit,
        progress: Progress,
    ) -> None:
        """Asks the unpatched model.

        Args:
            model: an unpatched model, without dropout.
            processor: its processor.
            items: in the order of the search.
            methods: by their names.
            lengths: prompts in a batch, and length of an answer at most.
            record: keeps what is measured.
            limit: is told how long it takes.
            progress: hears how far it is.

        Raises:
            InputError: the unpatched model's logits are not finite.
        """
        self.model, self.processor, self.items = model, processor, items
        self.methods, self.lengths = methods, lengths
        self.record, self.limit, self.progress = record, limit, progress
        self._prompts = Prompts(processor)
        self._identities = {name: identity(method) or name for name, method in methods.items()}
        with limit.timing(len(items)):
            self.stock = run_items(model, processor, items, *lengths, progress.advance, self._prompts)
        if not np.isfinite(self.stock.log_probs).all():
            raise InputError("the unpatched model's logits are not finite, so nothing can agree with them; check the "
                             "weights, or use another dtype")  # fmt: skip

    @staticmethod
    def fingerprint_of(model: Any, processor: Any, items: Sequence[Item], **settings: Any) -> dict[str, Any]:
        """What a file of measurements is valid for."""
        return fingerprint(model, processor, items, **settings)

    def sample(self, settings: Mapping[str, Any], start: int, stop: int) -> Sample:
        """Settings on the questions from ``start`` to ``stop``.

        Args:
            settings: arguments of ``patch``, with the method's name; empty: its presets.
            start: the first.
            stop: behind the last.
        """
        value = self.record.fetch(self._key("sample", settings, start, stop), lambda: self._run(settings, start, stop))
        return Sample(tuple(value["losses"]), tuple(mark == "1" for mark in value["same"]), tuple(value["flops"]))

    def knows(self, settings: Mapping[str, Any], start: int, stop: int) -> bool:
        """Whether that is measured already."""
        return self.record.knows(self._key("sample", settings, start, stop))

    def cost(self, settings: Mapping[str, Any], seen: int) -> float:
        """FLOPs of the prefill, of the unmerged ones, on few questions that stand for the first ``seen``."""
        found: float = self.record.fetch(self._key("cost", settings, 0, seen), lambda: self._cost(settings, seen))
        return found

    def _key(self, what: str, settings: Mapping[str, Any], start: int, stop: int) -> list[Any]:
        name = settings.get("method")
        return [what, dict(settings), None if name is None else self._identities[name], start, stop]

    @contextmanager
    def patched(self, settings: Mapping[str, Any]) -> Iterator[Any]:
        """The session of the model with these settings."""
        method = {"method": self.methods[settings["method"]]} if "method" in settings else {}
        session = patch(self.model, **{**settings, **method})
        try:
            yield session
        finally:
            unpatch(self.model)

    def _run(self, settings: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
        with self.limit.timing(stop - start), self.patched(settings):
            part, tell = self.items[start:stop], self.progress.advance
            merged = run_items(self.model, self.processor, part, *self.lengths, tell, self._prompts)
        answers = self.stock.answers[start:stop]
        stock = Outcome(answers, self.stock.log_probs[start:stop])
        losses = np.nan_to_num(stock.divergence(merged), nan=np.inf)
        same = "".join("1" if a == b else "0" for a, b in zip(answers, merged.answers, strict=True))
        return {"losses": [float(f"{loss:.6g}") for loss in losses], "same": same, "flops": merged.flops}

    def _cost(self, settings: Mapping[str, Any], seen: int) -> float:
        merged = whole = 0.0
        with self.limit.timing(0), self.patched(settings):
            for item, weight in self._probes(seen):
                flops = run_items(self.model, self.processor, [item], 1, 1, prompts=self._prompts).flops
                merged, whole = merged + weight * flops[0], whole + weight * flops[1]
        return merged / max(1.0, whole)

    def _probes(self, seen: int) -> list[tuple[Item, int]]:
        """Questions of different shapes, evenly over all sizes, each with the number of those it stands for."""
        shapes: dict[Any, list[Item]] = {}
        for item in self.items[:seen]:
            shapes.setdefault((item.video, *(picture.shape for picture in item.pictures)), []).append(item)
        groups = sorted(shapes.values(), key=lambda group: sum(picture.size for picture in group[0].pictures))
        bounds = np.linspace(0, len(groups), min(_PROBES, len(groups)) + 1).round().astype(int)
        parts = [groups[low:high] for low, high in zip(bounds[:-1], bounds[1:], strict=True)]
        return [(part[len(part) // 2][0], sum(len(group) for group in part)) for part in parts]


def _canonical(key: Any) -> str:
    return json.dumps(key, sort_keys=True)
