"""easy-VQA (Victor Zhou, MIT): pictures of one shape with questions, from the package ``easy-vqa``."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from illava_hooks.tiny.questions import Question


@cache
def easy_split(split: str) -> tuple[Path, dict[int, list[Question]]]:
    """Folder of the images, and the questions by image; ``split`` is "train" or "test"."""
    import easy_vqa

    folder = Path(easy_vqa.__file__).parent / "data" / split
    questions: dict[int, list[Question]] = {}
    for text, answer, image in json.loads((folder / "questions.json").read_text()):
        questions.setdefault(image, []).append(Question("easy-VQA", text, answer))
    return folder / "images", questions


def easy_questions(rng: np.random.Generator, rows: int) -> tuple[list[Any], list[list[Question]]]:
    """Some pictures of the train split with all their questions."""
    folder, questions = easy_split("train")
    chosen = [int(i) for i in rng.choice(sorted(questions), rows, replace=False)]
    pictures = [np.asarray(Image.open(folder / f"{image}.png").convert("RGB")) for image in chosen]
    return pictures, [questions[image][:10] for image in chosen]
