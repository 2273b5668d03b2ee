"""Pipelines, chat templates and streamed text, with the embedded models and their own processors."""

from __future__ import annotations

from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from torch import Tensor
from transformers import LogitsProcessor, TextIteratorStreamer, pipeline

from families import families
from helpers import assert_differ
from illava_hooks import merging, patch, session_of, tiny

CLOSE: dict[str, Any] = {"atol": 2e-5, "rtol": 1e-5}
#: Another padding is another width of the same products.
PADDED: dict[str, Any] = {"atol": 2e-4, "rtol": 0.0}
QUESTION = "how many triangles are there ?"

Message = dict[str, Any]


class Scores(LogitsProcessor):
    """Keeps the scores of every step, whoever calls `generate`."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps.append(scores.clone())
        return scores


@pytest.fixture(params=families(embedded=True))
def patched(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """An embedded model that merges by its preset, fresh, and its processor."""
    model, processor = tiny.load(request.param)
    patch(model)
    return model, processor


def picture(name: str = "scene.png") -> Image.Image:
    return Image.open(tiny.media(name)).convert("RGB")


def chat(question: str, *images: Image.Image) -> list[Message]:
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def film() -> np.ndarray[Any, Any]:
    """The frames of the bundled clip ``(T, H, W, 3)``."""
    with Image.open(tiny.media("clip.gif")) as opened:
        return np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(opened)])


def templated(processor: Any, messages: Any, **kwargs: Any) -> dict[str, Tensor]:
    """Everything in one call of the chat template."""
    wanted = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return dict(processor.apply_chat_template(messages, **wanted, **kwargs))


def by_hand(processor: Any, messages: list[Message]) -> dict[str, Tensor]:
    """The same in two steps: the text, then text and pictures."""
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    images = [part["image"] for part in messages[0]["content"] if part["type"] == "image"]
    return dict(processor(text=[text], images=[images], return_tensors="pt"))


def answered(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Any]:
    """The new ids, the scores of each step, and the cache."""
    done = model.generate(
        **inputs, max_new_tokens=4, min_new_tokens=4, output_logits=True, return_dict_in_generate=True
    )
    return done.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(list(done.logits)), done.past_key_values


# ------------------------------------------------------------------------------------------ pipelines


@pytest.mark.parametrize("task", ["image-text-to-text", "any-to-any"])
def test_pipeline(patched: tuple[Any, Any], task: Any) -> None:
    model, processor = patched
    scores = Scores()
    ask = pipeline(task, model=model, processor=processor)
    kwargs = {"max_new_tokens": 4, "generate_kwargs": {"logits_processor": [scores]}, "return_full_text": False}
    (said,) = ask(text=chat(QUESTION, picture()), **kwargs)
    report = session_of(model).report
    assert report.kept_fraction < 0.5
    ids, expected, cache = answered(model, by_hand(processor, chat(QUESTION, picture())))
    assert session_of(model).report == report
    assert cache.layers[-1].keys.shape[-2] < cache.get_seq_length()
    assert said["generated_text"].split() == processor.batch_decode(ids, skip_special_tokens=True)[0].split()[:1]
    assert len(scores.steps) >= 2
    torch.testing.assert_close(torch.stack(scores.steps), expected[: len(scores.steps)], **CLOSE)
    with merging(model, False):
        assert_differ(answered(model, by_hand(processor, chat(QUESTION, picture())))[1][0], scores.steps[0])


def test_pipeline_of_a_batch(patched: tuple[Any, Any]) -> None:
    """Equal sizes: not every stock pipeline stacks pictures of several."""
    model, processor = patched
    scores = Scores()
    ask = pipeline("image-text-to-text", model=model, processor=processor)
    questions = [QUESTION, "is there a red circle in the image ?"]
    images = [picture(), picture().transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    kwargs = {"max_new_tokens": 4, "generate_kwargs": {"logits_processor": [scores]}}
    ask(text=[chat(*pair) for pair in zip(questions, images, strict=True)], batch_size=2, **kwargs)
    assert len(session_of(model).report.visuals) == 2 and session_of(model).report.kept_fraction < 0.5
    for row, pair in enumerate(zip(questions, images, strict=True)):
        _, alone, _ = answered(model, by_hand(processor, chat(*pair)))
        torch.testing.assert_close(scores.steps[0][row], alone[0, 0], **PADDED)


# ------------------------------------------------------------------------------------- chat templates


def test_chat_template_in_one_call(patched: tuple[Any, Any]) -> None:
    model, processor = patched
    messages = chat("how many circles are there ?", picture("pair/first.png"), picture("pair/second.png"))
    inputs = templated(processor, messages)
    ids, scores, cache = answered(model, inputs)
    assert len(session_of(model).report.visuals) == 2
    assert cache.layers[-1].keys.shape[-2] < inputs["input_ids"].shape[1] < cache.get_seq_length()
    expected_ids, expected, _ = answered(model, by_hand(processor, messages))
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(scores, expected, **CLOSE)


def test_chat_templates_of_a_padded_batch(patched: tuple[Any, Any]) -> None:
    """One picture, another of other size, two pictures, and none."""
    model, processor = patched
    rows = [
        chat(QUESTION, picture()),
        chat("which digit is there in the image ?", picture("digits.png")),
        chat("how many circles are there ?", picture("pair/first.png"), picture("pair/second.png")),
        chat("how many circles are there ?"),
    ]
    inputs = templated(processor, rows, processor_kwargs={"padding": True})
    assert inputs["attention_mask"].sum(1).unique().numel() > 2
    ids, scores, _ = answered(model, inputs)
    assert len(session_of(model).report.visuals) == 4 and session_of(model).report.kept_fraction < 0.5
    for row, messages in enumerate(rows):
        alone_ids, alone, _ = answered(model, templated(processor, messages))
        assert torch.equal(ids[row], alone_ids[0])
        torch.testing.assert_close(scores[:, row], alone[:, 0], **PADDED)


def test_chat_template_with_a_video(patched: tuple[Any, Any]) -> None:
    model, processor = patched
    question = {"type": "text", "text": "which way does the circle move ?"}
    frames = film()
    inputs = templated(
        processor,
        [{"role": "user", "content": [{"type": "video", "video": frames}, question]}],
        processor_kwargs={"do_sample_frames": False},
    )
    _, scores, cache = answered(model, inputs)
    assert [visual.modality for visual in session_of(model).report.visuals] == ["video"]
    assert cache.layers[-1].keys.shape[-2] < inputs["input_ids"].shape[1] < cache.get_seq_length()
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "video"}, question]}], add_generation_prompt=True
    )
    by_two_steps = processor(text=[text], videos=[frames], do_sample_frames=False, return_tensors="pt")
    torch.testing.assert_close(scores, answered(model, dict(by_two_steps))[1], **CLOSE)


# --------------------------------------------------------------------------------------- streamed text


def test_text_streamed_from_a_thread(patched: tuple[Any, Any]) -> None:
    model, processor = patched
    inputs = by_hand(processor, chat(QUESTION, picture()))
    scores = Scores()
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, timeout=60.0)
    kwargs = {**inputs, "streamer": streamer, "min_new_tokens": 4, "max_new_tokens": 4, "logits_processor": [scores]}
    thread = Thread(target=model.generate, kwargs=kwargs)
    thread.start()
    said = "".join(streamer)
    thread.join()
    assert session_of(model).report.kept_fraction < 0.5
    ids, expected, _ = answered(model, inputs)
    assert said == processor.tokenizer.decode(ids[0]) and said
    steps = torch.stack(scores.steps)
    allowed = steps.isfinite()  # the end token is not, for so many tokens
    torch.testing.assert_close(steps[allowed], expected[allowed], **CLOSE)
