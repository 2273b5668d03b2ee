"""Answers to many rows, without an engine: one class for Ray Data, ``torchrun`` and plain loops.

Columns in, columns out. A row that cannot be read or answered gets an error in its own row; the others of its batch
are answered.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from illava_hooks.api import patch
from illava_hooks.engine.session import MergeSession
from illava_hooks.errors import InputError
from illava_hooks.integrations.arguments import known_method
from illava_hooks.tools.loading import check_question, load_model, quiet
from illava_hooks.tools.media import Media, load_media, to_rgb

__all__ = ["ADDED", "MEDIA", "BatchAnswers"]

#: The columns with pictures; all others go through as they are.
MEDIA = ("image", "images", "video")
#: The columns that are added.
ADDED = ("answer", "visual_tokens", "kept_tokens", "error")


@dataclass(slots=True)
class _Row:
    """One row on its way: what is asked, and what came of it."""

    question: str = ""
    images: Sequence[Any] = ()
    video: Any = None
    answer: str | None = None
    visual_tokens: int | None = None
    kept_tokens: int | None = None
    error: str | None = None

    def fail(self, error: Exception) -> None:
        """Notes why there is no answer, in one line."""
        reason = " ".join(str(error).split())[:500]
        self.error = reason if isinstance(error, InputError) else f"{type(error).__name__}: {reason}"


class BatchAnswers:
    """Greedy answers of a patched model to batches of rows.

    An object is cheap to make and to send to another process: it loads its model when it is first called, once in
    each process.

    Columns in: ``question``; ``image`` or ``images`` and ``video`` where a row has them: a file, its bytes, a
    ``PIL.Image``, an ``(H, W, 3)`` uint8 array, ``{"bytes": ...}`` or ``{"path": ...}`` as datasets store it, or a
    list of these (of a video its frames). A file or bytes under ``image`` that hold a video are one.

    Columns out: all that came in but the pictures; ``answer``, None where there is none; ``visual_tokens`` that the
    unpatched language model would get and ``kept_tokens`` of them at its last layer, None where nothing merges;
    ``error``, one line, None where all went well.

    Example:
        >>> answers = BatchAnswers("tiny", max_new_tokens=4)
        >>> answers({"question": ["how many circles are there ?"], "image": ["scene.png"]})  # doctest: +SKIP
        {'question': [...], 'answer': ['one'], 'visual_tokens': [...], 'kept_tokens': [...], 'error': [None]}
    """

    def __init__(
        self,
        model: str = "tiny",
        *,
        merge: bool = True,
        batch_size: int = 8,
        max_new_tokens: int = 64,
        frames: int = 32,
        device: str = "auto",
        dtype: str = "auto",
        folder: str | Path = ".",
        **settings: Any,
    ) -> None:
        """Only remembers.

        Args:
            model: a key of the embedded models such as "tiny", a folder, or a name on the model hub.
            merge: whether to patch it.
            batch_size: rows that are generated together at most.
            max_new_tokens: length of an answer at most.
            frames: frames taken of a video, evenly spaced.
            device: "auto" (CUDA where there is one), or a torch device.
            dtype: "auto" (the checkpoint's on a GPU, float32 on a CPU), or a torch dtype's name.
            folder: what relative paths are relative to.
            settings: arguments of ``patch``; a method also as ``file.py:NAME``.

        Raises:
            InputError: a number is not positive, or there are settings without merging.
        """
        for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens), ("frames", frames)):
            if value < 1:
                raise InputError(f"{name} is {value}; give 1 or more")
        if settings and not merge:
            raise InputError(f"{next(iter(settings))} is given and merge is False; give merge=True, or no settings")
        self.model, self.merge, self.settings = model, merge, settings
        self.batch_size, self.max_new_tokens, self.frames = batch_size, max_new_tokens, frames
        self.device, self.dtype, self.folder = device, dtype, Path(folder)
        self._loaded: tuple[Any, Any, MergeSession | None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Another process loads a model of its own."""
        return {**self.__dict__, "_loaded": None}

    def load(self) -> tuple[Any, Any, MergeSession | None]:
        """Model, processor and session, loaded when first asked for.

        Raises:
            InputError: the model cannot be loaded.
            UnsupportedModelError: it cannot be patched.
            MergeConfigError: the settings do not fit it.
        """
        if self._loaded is None:
            quiet()
            model, processor = load_model(self.model, self.device, self.dtype)
            processor.tokenizer.padding_side = "left"  # answers are appended on the right
            settings = dict(self.settings)
            if "method" in settings:
                settings["method"] = known_method(settings["method"])
            session = patch(model, **settings) if self.merge else None
            self._loaded = model, processor, session
        return self._loaded

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """Answers a batch.

        Args:
            batch: columns of equal length, as lists or arrays.

        Returns:
            The columns named above, rows in the order in which they came.

        Raises:
            InputError: there is no question column, one has the name of a column that is added, or columns differ in
                length.
        """
        lengths = {name: len(column) for name, column in batch.items()}
        if "question" not in lengths:
            raise InputError(f"columns are {list(batch)}; there must be one named question")
        if taken := [name for name in batch if name in ADDED]:
            raise InputError(f"columns hold {taken[0]!r}, which is one of those that are added; rename it")
        if len(set(lengths.values())) > 1:
            raise InputError(f"columns have {lengths} rows; give as many in each")
        self.load()
        rows = [self._read({name: batch[name][index] for name in batch}) for index in range(lengths["question"])]
        waiting = [row for row in rows if row.error is None]
        # Rows of one kind side by side: text and pictures of other sizes would only be padded to each other.
        waiting.sort(key=lambda row: (row.video is not None, len(row.images)))
        for start in range(0, len(waiting), self.batch_size):
            self._answer(waiting[start : start + self.batch_size])
        columns = {name: _plain(column) for name, column in batch.items() if name not in MEDIA}
        for name in ADDED:
            columns[name] = [getattr(row, name) for row in rows]
        return columns

    def _read(self, given: Mapping[str, Any]) -> _Row:
        row = _Row()
        try:
            if not isinstance(question := given["question"], str) or not question.strip():
                raise InputError(f"question is {question!r}; give a text")
            row.question = question
            named = [name for name in ("image", "images") if not _is_missing(given.get(name))]
            if len(named) == 2:
                raise InputError("image and images are both given; give one of them")
            media = [self._media(part) for part in _parts(given[named[0]])] if named else []
            row.images = [image for one in media if one.kind == "image" for image in one.images]
            videos = [one.frames for one in media if one.kind == "video"]
            if not _is_missing(video := given.get("video")):
                videos.append(self._video(video))
            if len(videos) > 1:
                raise InputError(f"there are {len(videos)} videos in one row; give one")
            row.video = videos[0] if videos else None
        except Exception as error:  # whatever a file does to its reader: the row is lost, not the batch
            row.fail(error)
        return row

    def _video(self, given: Any) -> Any:
        """The frames of a video, (F, H, W, 3)."""
        if isinstance(given, np.ndarray) and given.ndim == 4:
            return given
        frames = [self._media(part) for part in _parts(given)]
        if len(frames) == 1:
            return frames[0].frames
        images = [image for frame in frames for image in frame.images]
        if len({image.size for image in images}) > 1:
            raise InputError("frames of a video have different sizes; give them in one size")
        return np.stack([np.asarray(image) for image in images])

    def _media(self, given: Any) -> Media:
        """One file, or what else may hold a picture."""
        if isinstance(given, Mapping):
            given = given.get("bytes") or given.get("path")
        if isinstance(given, Image.Image):
            return Media("image", ("image",), (to_rgb(given),))
        if isinstance(given, np.ndarray) and given.ndim == 3:
            if given.dtype != np.uint8 or given.shape[2] != 3:
                raise InputError(f"picture is {given.dtype} of shape {given.shape}; give uint8 of shape (H, W, 3)")
            return Media("image", ("image",), (Image.fromarray(given),))
        if isinstance(given, bytes):
            with tempfile.NamedTemporaryFile() as file:
                file.write(given)
                file.flush()
                return load_media(file.name, self.frames)
        if isinstance(given, str | Path):
            return load_media(self.folder / given, self.frames)
        raise InputError(f"picture is a {type(given).__name__}; give a path, bytes, a PIL image or a uint8 array")

    def _answer(self, rows: Sequence[_Row]) -> None:
        """Answers rows together; if that fails in halves, so that only the row that is to blame is lost."""
        try:
            self._generate(rows)
        except Exception as error:
            if len(rows) == 1:
                rows[0].fail(error)
                return
            # The traceback holds what a batch that was too large had computed.
            error.__traceback__ = None
        else:
            return
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        middle = len(rows) // 2
        self._answer(rows[:middle])
        self._answer(rows[middle:])

    def _generate(self, rows: Sequence[_Row]) -> None:
        model, processor, session = self.load()
        inputs = _inputs(processor, rows).to(model.device, model.dtype)
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        texts = processor.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for row, text in zip(rows, texts, strict=True):
            row.answer = text.strip()
        if session is not None and any(row.images or row.video is not None for row in rows):
            _count(session, rows)


def _inputs(processor: Any, rows: Sequence[_Row]) -> Any:
    """A padded batch; rows may differ in their pictures."""
    texts = []
    for row in rows:
        check_question(processor, row.question)
        visuals = [{"type": "image"}] * len(row.images) + [{"type": "video"}] * (row.video is not None)
        message = {"role": "user", "content": [*visuals, {"type": "text", "text": row.question}]}
        texts.append(processor.apply_chat_template([message], add_generation_prompt=True))
    given: dict[str, Any] = {
        "images": [list(row.images) for row in rows if row.images],
        "videos": [row.video for row in rows if row.video is not None],
    }
    given = {name: pictures for name, pictures in given.items() if pictures}
    return processor(text=texts, return_tensors="pt", padding=True, **given)


def _count(session: MergeSession, rows: Sequence[_Row]) -> None:
    """Visual tokens of each row before and after merging; nothing where the settings remove nothing."""
    if not session.report:
        return
    for index, row in enumerate(rows):
        own = [visual for visual in session.report.visuals if visual.sample == index]
        row.visual_tokens = sum(visual.prompt_tokens for visual in own)
        row.kept_tokens = sum(visual.left for visual in own)


def _parts(given: Any) -> list[Any]:
    """Several pictures as a list; arrays of objects, as columns of lists come, and of pictures too."""
    if isinstance(given, list | tuple):
        return list(given)
    if isinstance(given, np.ndarray) and given.ndim != 3:
        return [part.item() if isinstance(part, np.generic) else part for part in given]
    return [given]


def _is_missing(given: Any) -> bool:
    """Whether a row has no such picture: columns have an entry for every row."""
    if given is None or (isinstance(given, float) and given != given):
        return True
    return isinstance(given, list | tuple | np.ndarray | str | bytes) and len(given) == 0


def _plain(column: Any) -> list[Any]:
    """A column as a list; numbers of arrays as Python's."""
    values: list[Any] = column.tolist() if isinstance(column, np.ndarray) else list(column)
    return values
