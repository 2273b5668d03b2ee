"""Rows in, answers out: as one prompt at a time, whatever a picture comes as and whatever is wrong with the next."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from illava_hooks import InputError, MergeConfigError, UnsupportedModelError, patch, tiny
from illava_hooks.integrations.batch import BatchAnswers
from illava_hooks.tools.loading import build_inputs
from illava_hooks.tools.media import load_media

#: The embedded models: what commands call them, and their families.
MODELS = dict(tiny.ALIASES)
OTHER = list(MODELS)[1]
SCENE, PAIR, CLIP = tiny.media("scene.png"), tiny.media("pair"), tiny.media("clip.gif")
QUESTIONS = {"image": "how many circles are there ?", "video": "which way does the circle move ?"}


def one_by_one(name: str, question: str, media: Any) -> tuple[str, int, int]:
    """The answer to one prompt without any batching, its visual tokens and how many are left."""
    model, processor = tiny.load(MODELS[name])
    session = patch(model)
    inputs = build_inputs(processor, load_media(media), question)
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    text = processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    visuals = session.report.visuals
    return text, sum(v.prompt_tokens for v in visuals), sum(v.left for v in visuals)


def picture() -> Image.Image:
    with Image.open(SCENE) as file:
        return file.copy()


def png(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("name", MODELS)
def test_rows_of_every_kind_answer_as_alone(name: str) -> None:
    """Images, pairs, a clip and text in one batch, in an order that is not theirs when they run."""
    answers = BatchAnswers(name, max_new_tokens=4, batch_size=3)
    pair = [str(file) for file in sorted(PAIR.iterdir())]
    batch: dict[str, Any] = {
        "id": [7, 3, 5, 1, 2],
        "question": [QUESTIONS["video"], *[QUESTIONS["image"]] * 4],
        "images": [None, [str(SCENE)], pair, [], str(SCENE)],
        "video": [str(CLIP), None, None, None, None],
    }
    found = answers(batch)
    assert list(found) == ["id", "question", "answer", "visual_tokens", "kept_tokens", "error"]
    assert found["id"] == batch["id"] and found["error"] == [None] * 5
    for index, media in ((0, CLIP), (1, SCENE), (2, PAIR), (4, SCENE)):
        expected = one_by_one(name, batch["question"][index], media)
        assert (found["answer"][index], found["visual_tokens"][index], found["kept_tokens"][index]) == expected
        assert expected[2] < expected[1]
    assert isinstance(found["answer"][3], str) and (found["visual_tokens"][3] or 0) == 0


@pytest.mark.parametrize(
    "form",
    [
        "path",
        "Path",
        "bytes",
        "PIL",
        "array",
        "dict of bytes",
        "dict of path",
        "list",
        "array of paths",
        "array of one",
    ],
)
def test_forms_of_a_picture(form: str) -> None:
    pixels = np.array(picture().convert("RGB"))
    given: dict[str, Any] = {
        "path": str(SCENE),
        "Path": SCENE,
        "bytes": png(picture()),
        "PIL": picture(),
        "array": pixels,
        "dict of bytes": {"bytes": png(picture()), "path": None},
        "dict of path": {"bytes": None, "path": str(SCENE)},
        "list": [pixels],
        "array of paths": np.array([str(SCENE)]),
        "array of one": pixels[None],
    }
    answers = BatchAnswers("tiny", max_new_tokens=4)
    column = np.empty(1, dtype=object)
    column[0] = given[form]
    batch: dict[str, Any] = {"question": np.array([QUESTIONS["image"]]), "image": column}
    found = answers(batch)
    expected = one_by_one("tiny", QUESTIONS["image"], SCENE)
    assert found["error"] == [None]
    assert (found["answer"][0], found["visual_tokens"][0], found["kept_tokens"][0]) == expected


@pytest.mark.parametrize("form", ["path", "bytes", "frames", "list of frames", "under image"])
def test_forms_of_a_video(form: str) -> None:
    frames = load_media(CLIP).frames
    given = {"frames": frames, "list of frames": list(frames), "bytes": CLIP.read_bytes()}.get(form, str(CLIP))
    column = "image" if form == "under image" else "video"
    found = BatchAnswers("tiny", max_new_tokens=4)({"question": [QUESTIONS["video"]], column: [given]})
    assert found["error"] == [None]
    assert (found["answer"][0], found["visual_tokens"][0], found["kept_tokens"][0]) == one_by_one(
        "tiny", QUESTIONS["video"], CLIP
    )


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "no such file": ({"image": "nothing.png"}, "does not exist"),
    "no picture": ({"image": __file__}, "cannot be read"),
    "half a picture": ({"image": b"\x89PNG\r\n"}, "cannot be read"),
    "no question": ({"question": " "}, "question"),
    "a number": ({"image": 3}, "give a path"),
    "floats": ({"image": np.zeros((4, 4, 3))}, "uint8"),
    "both": ({"image": str(SCENE), "images": [str(SCENE)]}, "both"),
    "two videos": ({"image": str(CLIP), "video": str(CLIP)}, "2 videos"),
    "frames of two sizes": ({"video": [np.zeros((8, 8, 3), np.uint8), np.zeros((9, 8, 3), np.uint8)]}, "sizes"),
    "a placeholder": ({"question": "what is <image> ?"}, ""),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_row_costs_nobody_else_an_answer(what: str) -> None:
    broken, words = BROKEN[what]
    rows = [
        {"question": QUESTIONS["image"], "image": str(SCENE), "images": None, "video": None},
        {"question": QUESTIONS["image"], "image": None, "images": None, "video": None, **broken},
        {"question": QUESTIONS["video"], "image": None, "images": None, "video": str(CLIP)},
        {"question": QUESTIONS["image"], "image": str(SCENE), "images": None, "video": None},
    ]
    found = BatchAnswers("tiny", max_new_tokens=4)({name: [row[name] for row in rows] for name in rows[0]})
    assert found["answer"][1] is None and words in found["error"][1] and "\n" not in found["error"][1]
    assert [found["error"][i] for i in (0, 2, 3)] == [None] * 3
    scene, clip = one_by_one("tiny", QUESTIONS["image"], SCENE), one_by_one("tiny", QUESTIONS["video"], CLIP)
    assert [found["answer"][i] for i in (0, 2, 3)] == [scene[0], clip[0], scene[0]]


def test_what_fails_in_the_model_is_found_by_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory in a batch: smaller batches; in a row alone: that row's error."""
    answers = BatchAnswers("tiny", max_new_tokens=4, batch_size=8)
    model, _, _ = answers.load()
    generate, sizes = model.generate, []

    def scarce(**inputs: Any) -> Any:
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("out of memory")
        return generate(**inputs)

    monkeypatch.setattr(model, "generate", scarce)
    found = answers({"question": [QUESTIONS["image"]] * 5, "image": [str(SCENE)] * 5})
    assert found["error"] == [None] * 5 and len(set(found["answer"])) == 1
    assert sizes == [5, 2, 3, 1, 2]
    monkeypatch.setattr(model, "generate", lambda **_: torch.ones(1) @ torch.ones(2))
    found = answers({"question": [QUESTIONS["image"]] * 2, "image": [str(SCENE)] * 2})
    assert found["answer"] == [None, None] and all(e.startswith("RuntimeError: ") for e in found["error"])


def test_without_merging_it_is_stock() -> None:
    model, processor = tiny.load(MODELS[OTHER])
    inputs = build_inputs(processor, load_media(SCENE), QUESTIONS["image"])
    ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    expected = processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    answers = BatchAnswers(OTHER, merge=False, max_new_tokens=4)
    found = answers({"question": [QUESTIONS["image"]], "image": [str(SCENE)]})
    assert found["answer"] == [expected] and found["kept_tokens"] == [None]
    assert answers.load()[2] is None


def test_it_travels_without_its_model_and_loads_once(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = BatchAnswers("tiny", max_new_tokens=4, vit_layers=[3], vit_r=8, llm_layers=[2], llm_ratio=0.5)
    batch = {"question": [QUESTIONS["image"]], "image": [str(SCENE)]}
    expected = answers(batch)
    packed = pickle.dumps(answers)
    assert len(packed) < 2000
    copy = pickle.loads(packed)
    assert copy.load() is copy.load() and copy.load()[0] is not answers.load()[0]
    assert copy(batch) == expected


def test_relative_paths(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    found = BatchAnswers("tiny", max_new_tokens=4, folder=tmp_path)(
        {"question": [QUESTIONS["image"]], "image": ["a.png"]}
    )
    assert found["error"] == [None]


def test_no_rows() -> None:
    found = BatchAnswers("tiny")({"question": [], "image": []})
    assert found == {"question": [], "answer": [], "visual_tokens": [], "kept_tokens": [], "error": []}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"frames": 0}, "frames is 0"),
        ({"merge": False, "vit_r": 3}, "merge=True"),
    ],
)
def test_refused_when_made(given: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        BatchAnswers("tiny", **given)


def test_settings_that_cannot_work_are_refused_for_the_whole_batch() -> None:
    batch = {"question": ["what ?"]}
    with pytest.raises(MergeConfigError, match="llm_layers"):
        BatchAnswers("tiny", llm_layers=[99])(batch)
    with pytest.raises(InputError, match="cannot be loaded"):
        BatchAnswers("no-such-folder")(batch)
    with pytest.raises(InputError, match="named question"):
        BatchAnswers("tiny")({"image": []})
    with pytest.raises(InputError, match="as many in each"):
        BatchAnswers("tiny")({"question": ["a", "b"], "image": [None]})
    assert issubclass(UnsupportedModelError, Exception)
