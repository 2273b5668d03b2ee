"""The same questions to vLLM and to a patched model of transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import vllm
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.video_utils import VideoMetadata

from illava_hooks import patch, unpatch
from illava_hooks.integrations.vllm import SUPPORTED, version_of
from illava_hooks.tools.items import Item

NEW_TOKENS = 6
TOP = 5


@dataclass(frozen=True)
class Answer:
    """What was said.

    Attributes:
        ids: greedy tokens.
        chances: for each of them, log-probabilities by token: of the likeliest few in vLLM, of all in transformers.
        prompt: tokens of the prompt.
    """

    ids: tuple[int, ...]
    chances: tuple[Mapping[int, float], ...]
    prompt: int


def prompt_of(processor: Any, item: Item) -> str:
    """The question in the model's chat format."""
    parts = [{"type": "video" if item.video else "image"} for _ in item.pictures]
    message = {"role": "user", "content": [*parts, {"type": "text", "text": item.question}]}
    text: str = processor.apply_chat_template([message], add_generation_prompt=True)
    return text


def request_of(processor: Any, item: Item, arguments: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What ``LLM.generate`` takes."""
    if not item.video:
        media: dict[str, Any] = {"image": [Image.fromarray(picture) for picture in item.pictures]}
    else:
        media = {"video": [(frames, clock(frames)) if timed(processor) else frames for frames in item.pictures]}
    request = {"prompt": prompt_of(processor, item), "multi_modal_data": media}
    return request if arguments is None else {**request, "mm_processor_kwargs": dict(arguments)}


def timed(processor: Any) -> bool:
    """Whether a model is told when the frames of a video were taken; Qwen2.5-VL is not in vLLM 0.29."""
    name, oldest = type(processor).__name__, version_of(vllm.__version__) == SUPPORTED[0]
    return name == "Qwen3VLProcessor" or (name == "Qwen2_5_VLProcessor" and not oldest)


def clock(frames: Any) -> dict[str, Any]:
    """When they were taken; at this rate positions of slices are no whole numbers before they are rounded."""
    count = len(frames)
    return {
        "fps": 2.5,
        "duration": count / 2.5,
        "total_num_frames": count,
        "frames_indices": list(range(count)),
        "video_backend": "opencv",
        "do_sample_frames": False,
    }


def ask_engine(engine: Any, requests: Sequence[dict[str, Any]]) -> list[Answer]:
    """Greedy answers of an ``LLM``."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=TOP)
    found = engine.generate(list(requests), sampling, use_tqdm=False)
    return [
        Answer(
            tuple(one.outputs[0].token_ids),
            tuple({token: chance.logprob for token, chance in step.items()} for step in one.outputs[0].logprobs),
            len(one.prompt_token_ids),
        )
        for one in found
    ]


class Reference:
    """Stock transformers on the same checkpoint, patched with what it is asked with."""

    def __init__(self, folder: Path) -> None:
        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype="float32").eval()
        self._given: dict[Any, Answer] = {}

    def ask(self, items: Sequence[Item], settings: Mapping[str, Any] | None) -> list[Answer]:
        """Greedy answers; ``settings`` as ``patch`` takes them, without a language stage; None: unpatched.

        What was asked before is not asked again: many ways through vLLM are compared with the same answers.
        """
        return [self._remembered(item, settings) for item in items]

    def _remembered(self, item: Item, settings: Mapping[str, Any] | None) -> Answer:
        pixels = tuple((picture.shape, picture.tobytes()) for picture in item.pictures)
        key = item.question, pixels, None if settings is None else repr(sorted(settings.items()))
        if key not in self._given:
            self._given[key] = self.answer(item, settings)
        return self._given[key]

    @torch.no_grad()
    def answer(self, item: Item, settings: Mapping[str, Any] | None) -> Answer:
        """Of one question, asked now."""
        inputs = self._inputs(item)
        session = None if settings is None else patch(self.model, **settings, llm_layers=[])
        try:
            out = self.model.generate(
                **inputs,
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
            length = inputs["input_ids"].shape[1]
            chances = [dict(enumerate(step[0].float().log_softmax(-1).tolist())) for step in out.logits]
            visuals = () if session is None else session.report.visuals
            gone = sum(visual.prompt_tokens - visual.language_tokens[0] for visual in visuals)
            return Answer(tuple(out.sequences[0, length:].tolist()), tuple(chances), length - gone)
        finally:
            unpatch(self.model)

    def _inputs(self, item: Item) -> Any:
        media = {"videos": list(item.pictures)} if item.video else {"images": list(item.pictures)}
        if item.video and timed(self.processor):
            clocks = [clock(frames) for frames in item.pictures]
            media["video_metadata"] = [
                VideoMetadata(**{name: value for name, value in told.items() if name != "do_sample_frames"})
                for told in clocks
            ]
        return self.processor(text=prompt_of(self.processor, item), return_tensors="pt", **media)


def largest_difference(found: Sequence[Answer], expected: Sequence[Answer]) -> float:
    """Of log-probabilities, over all tokens that vLLM tells of; the answers and the prompts' lengths are equal."""
    assert len(found) == len(expected) > 0
    for number, (mine, other) in enumerate(zip(found, expected, strict=True)):
        assert mine.ids == other.ids, (number, mine.ids, other.ids)
        assert mine.prompt == other.prompt, (number, mine.prompt, other.prompt)
    return max(
        abs(chance - theirs[token])
        for mine, other in zip(found, expected, strict=True)
        for step, theirs in zip(mine.chances, other.chances, strict=True)
        for token, chance in step.items()
        if token in theirs  # where vLLM is compared with vLLM the last of the few may be another
    )
