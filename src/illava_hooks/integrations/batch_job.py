"""A file of questions answered on one machine, by one process or several, to be started again after whatever ends it.

Every process appends to a file of its own, whole lines only. What a line says is never asked again; a line that was
cut off was never written. When all rows are answered, the parts become one file in the order of the questions.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from illava_hooks.errors import InputError
from illava_hooks.integrations.batch import ADDED, MEDIA, BatchAnswers
from illava_hooks.methods import METHODS
from illava_hooks.tools.evaluate.identity import identity
from illava_hooks.tools.methods import find_method

__all__ = ["RESULT", "BatchJob"]

#: The file in the output folder that holds all answers, once they are all there.
RESULT = "answers.jsonl"
_FINGERPRINT = "job.json"
_PARTS = "part-*.jsonl"


@dataclass(slots=True)
class BatchJob:
    """Questions in a file, answers in a folder.

    Attributes:
        questions: JSON lines, each with ``question`` and, where there are pictures, ``image``, ``images`` or ``video``
            as ``BatchAnswers`` takes them; paths are relative to the file. Other entries go through.
        output: the folder; made if it is not there.
        answers: what answers, not loaded.
        workers: processes; 1: this one.
        retry_errors: whether rows that ended with an error are asked again.
    """

    questions: Path
    output: Path
    answers: BatchAnswers
    workers: int = 1
    retry_errors: bool = False

    def run(self, on_progress: Callable[[int, int], None] = lambda done, of: None) -> Path:
        """Answers what is not answered yet.

        Args:
            on_progress: told how many rows are answered, of how many.

        Returns:
            The file with all answers.

        Raises:
            InputError: the questions cannot be read, the folder holds another job's answers, or processes ended
                without an answer.
        """
        lines = self._lines()
        self._claim(lines)
        if self.retry_errors:
            self._forget_errors()
        todo = sorted(set(range(len(lines))) - self._answered().keys())
        while todo:
            on_progress(len(lines) - len(todo), len(lines))
            if self.workers == 1:
                self._work([(index, lines[index]) for index in todo], 0, on_progress, len(lines))
            else:
                self._share(lines, todo, on_progress)
            left = sorted(set(range(len(lines))) - self._answered().keys())
            if len(left) == len(todo):
                raise InputError(
                    f"workers ended before they answered row {left[0]}, the first of {len(left)} that are left; they "
                    "may have been killed for memory: give fewer --workers or a smaller --batch-size, and start again"
                )
            todo = left
        return self._join(len(lines))

    # ------------------------------------------------------------------ what there is

    def _lines(self) -> list[str]:
        try:
            text = self.questions.read_bytes().decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"input {str(self.questions)!r} cannot be read ({error}); give JSON lines") from error
        lines = [line for line in text.split("\n") if line.strip()]  # never at U+2028, which strings may hold
        if not lines:
            raise InputError(f"input {str(self.questions)!r} is empty; write one JSON object a line")
        for number, line in enumerate(lines):
            if taken := [name for name in _parsed(line) if name in ("row", *ADDED)]:
                raise InputError(
                    f"input {str(self.questions)!r}, row {number} has {taken[0]!r}, which is a name in the answers; "
                    "rename it"
                )
        return lines

    def _claim(self, lines: Sequence[str]) -> None:
        """Notes in the folder whose answers it holds."""
        asked = self.answers
        mine = {
            "questions": hashlib.sha256("\n".join(lines).encode()).hexdigest(),
            "model": [asked.model, *map(list, _files(Path(asked.model)))],
            "merge": asked.merge,
            "settings": json.loads(json.dumps(asked.settings, default=repr)),
            "contents": _contents(asked.settings),
            "max_new_tokens": asked.max_new_tokens,
            "frames": asked.frames,
            "dtype": asked.dtype,
            "illava_hooks": version("illava-hooks"),
            "transformers": version("transformers"),
            "torch": str(torch.__version__),
        }
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            file = self.output / _FINGERPRINT
            if not file.exists():
                _write_whole(file, json.dumps(mine, indent=2) + "\n")
            theirs = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise InputError(f"output {str(self.output)!r} cannot be used ({error}); give a new folder") from error
        differ = sorted(name for name in {*mine, *theirs} if mine.get(name) != theirs.get(name))
        if differ:
            name = differ[0]
            raise InputError(
                f"output {str(self.output)!r} holds answers to another job: {name} is {theirs.get(name)!r} there and "
                f"{mine.get(name)!r} now; give a new folder"
            )

    def _answered(self) -> dict[int, dict[str, Any]]:
        """Rows that need not be asked again."""
        found: dict[int, dict[str, Any]] = {}
        for file in [self.output / RESULT, *sorted(self.output.glob(_PARTS))]:
            if not file.exists():
                continue
            for line in file.read_bytes().split(b"\n")[:-1]:  # behind the last line end: cut off
                try:
                    answer = json.loads(line)
                    row, failed = int(answer["row"]), answer["error"] is not None
                except (ValueError, KeyError, TypeError) as error:
                    raise InputError(
                        f"{str(file)!r} is damaged ({error!r}); remove that file and start again"
                    ) from error
                if not failed or row not in found:
                    found[row] = answer
        return found

    def _forget_errors(self) -> None:
        """Leaves the answers without an error, as one part: the others are to ask, whatever ends this run."""
        answered, files = self._answered(), [self.output / RESULT, *self.output.glob(_PARTS)]
        kept = [row for row in sorted(answered) if answered[row]["error"] is None]
        if len(kept) == len(answered):
            return
        _write_whole(self._new_part(), "".join(_line(answered[row]) for row in kept))
        for file in files:
            file.unlink(missing_ok=True)

    def _new_part(self) -> Path:
        return self.output / f"part-{time.time_ns()}-{os.getpid()}.jsonl"

    def _written(self) -> int:
        """Lines of all parts: cheap enough to be asked while others write them."""
        return sum(file.read_bytes().count(b"\n") for file in self.output.glob(_PARTS))

    def _join(self, count: int) -> Path:
        """All answers in the order of the questions, in place of the parts."""
        answered, parts = self._answered(), list(self.output.glob(_PARTS))
        result = self.output / RESULT
        _write_whole(result, "".join(_line(answered[row]) for row in range(count)))
        for part in parts:
            part.unlink()
        return result

    # ------------------------------------------------------------------ the work

    def _work(
        self,
        asked: Sequence[tuple[int, str]],
        worker: int,
        on_progress: Callable[[int, int], None] = lambda done, of: None,
        count: int = 0,
    ) -> None:
        """Answers rows in this process, a batch at a time."""
        if torch.cuda.is_available() and self.answers.device == "auto":
            self.answers.device = f"cuda:{worker % torch.cuda.device_count()}"
        self.answers.folder = self.questions.parent
        self.answers.load()
        parent, done = multiprocessing.parent_process(), count - len(asked)
        with self._new_part().open("w", encoding="utf-8") as file:
            for start in range(0, len(asked), self.answers.batch_size):
                if parent is not None and not parent.is_alive():
                    return  # whoever starts it again has workers of its own
                batch = asked[start : start + self.answers.batch_size]
                file.writelines(_line(answer) for answer in self._ask(batch))
                file.flush()
                done += len(batch)
                on_progress(done, count)

    def _ask(self, batch: Sequence[tuple[int, str]]) -> Iterator[dict[str, Any]]:
        rows = [_parsed(line) for _, line in batch]
        found = self.answers({name: [row.get(name) for row in rows] for name in ("question", *MEDIA)})
        for number, (index, line) in enumerate(batch):
            answer = {name: found[name][number] for name in ADDED}
            if not rows[number]:
                answer["error"] = f"{line[:80]!r} is no JSON object with a question"
            yield {"row": index, **rows[number], **answer}

    def _share(self, lines: Sequence[str], todo: Sequence[int], on_progress: Callable[[int, int], None]) -> None:
        """Spreads rows over processes and waits for them; one that dies leaves its rows to the next round."""
        spawn = multiprocessing.get_context("spawn")
        shares = [[(index, lines[index]) for index in todo[worker :: self.workers]] for worker in range(self.workers)]
        processes = [
            spawn.Process(target=self._work, args=(share, worker), daemon=True)
            for worker, share in enumerate(shares)
            if share
        ]
        before = len(lines) - len(todo) - self._written()
        try:
            for process in processes:
                process.start()
            while any(process.is_alive() for process in processes):
                time.sleep(0.5)
                on_progress(min(before + self._written(), len(lines)), len(lines))
        finally:
            for process in processes:
                process.kill()
                process.join()


def _parsed(line: str) -> dict[str, Any]:
    """The entries of a row; none where the line is no JSON object."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}


def _files(folder: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of the files of a model in a folder: another model under its name is another job."""
    if not folder.is_dir():
        return []
    facts = ((file.name, file.stat()) for file in sorted(folder.iterdir()) if file.is_file())
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in facts]


def _contents(settings: Mapping[str, Any]) -> dict[str, str]:
    """What stands in the files that settings name, and what a method of the user's own is, as hashes.

    A method about which that cannot be told, such as one with state, is never the same as before.

    Raises:
        InputError: a method's file cannot be run.
        MergeConfigError: there is no such method.
    """
    found = {}
    preset, method = settings.get("preset"), settings.get("method")
    if isinstance(preset, str | Path) and Path(preset).is_file():
        found["preset"] = hashlib.sha256(Path(preset).read_bytes()).hexdigest()
    if method is not None and not (isinstance(method, str) and method in METHODS):
        found["method"] = identity(find_method(method)) or f"unknown, at {time.time_ns()}"
    return found


def _line(answer: dict[str, Any]) -> str:
    return json.dumps(answer, ensure_ascii=False) + "\n"


def _write_whole(file: Path, text: str) -> None:
    """All of it or nothing: a file that is half written never has the name."""
    draft = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, file)
