"""The benchmark on a real language model: its parts on random weights, as the real ones are not ours."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM

import real_language
from illava_hooks.tools.items import make_item

SIDE, PATCH, DEPTH = 40, 10, 3


@pytest.fixture
def tower() -> Any:
    """Of one block more than is taken, whose places are those of larger pictures."""
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=4, num_attention_heads=3, image_size=60, patch_size=PATCH, mlp_ratio=2
    )
    model: Any = Dinov2Model(config).eval()
    torch.nn.init.normal_(model.embeddings.position_embeddings)
    for block in model.encoder.layer:
        torch.nn.init.normal_(block.layer_scale1.lambda1)
    return model


@pytest.fixture
def language() -> Any:
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=99, tie_word_embeddings=True, **sizes)).eval()


@torch.no_grad()
def test_the_stock_model_is_both(tower: Any, language: Any) -> None:
    model = real_language.assemble(tower, language, 98, SIDE, DEPTH)
    pixels, ids = torch.randn(2, 3, SIDE, SIDE), torch.randint(0, 90, (2, 7))
    expected = tower(pixels, output_hidden_states=True).hidden_states[DEPTH]
    torch.testing.assert_close(model.model.vision_tower(pixels).last_hidden_state, expected)
    torch.testing.assert_close(model(input_ids=ids).logits, language(input_ids=ids).logits)


@torch.no_grad()
def test_only_answers_are_learned(tower: Any, language: Any) -> None:
    """The loss is that of the stock model, which puts all tokens through its head."""
    model = real_language.assemble(tower, language, 98, SIDE, DEPTH)
    ids = torch.tensor(
        [[5, *[98] * 4, 1, 7, 8, 30, 31, 2, 1, 7, 8, 32, 2], [2, *[98] * 4, 1, 7, 9, 1, 7, 8, 33, 2, 2, 2, 2]]
    )
    labels = real_language.answer_labels(ids, [1, 7, 8], 2)
    assert labels[0].tolist() == [-100] * 8 + [30, 31, 2, -100, -100, -100, 32, 2]
    assert labels[1].tolist() == [-100] * 11 + [33, 2, -100, -100, -100]
    inputs = {"input_ids": ids, "pixel_values": torch.randn(2, 3, SIDE, SIDE)}
    torch.testing.assert_close(real_language.answer_loss(model, inputs, labels), model(**inputs, labels=labels).loss)


@pytest.mark.parametrize(
    ("box", "place"),
    [
        ((10, 20, 50, 40), "top left"),
        ((150, 20, 50, 40), "top right"),
        ((84, 224, 56, 56), "bottom left"),
        ((140, 140, 10, 10), "bottom right"),
    ],
)
def test_places(box: tuple[int, int, int, int], place: str) -> None:
    assert real_language.place_of(box) == place


def test_questions_have_their_answers() -> None:
    things = {"top left": "owl", "top right": "fox", "bottom left": "pig", "bottom right": "corn"}
    places, rng = {name: place for place, name in things.items()}, random.Random(0)
    said = {"yes": 0, "no": 0}
    for _ in range(400):
        kind, question, answer = real_language.new_question(things, rng)
        words = question.rstrip("?").split()
        if kind == "what":
            assert answer == things[" ".join(words[-2:])]
        elif kind == "where":
            assert answer == places[words[-1]]
        else:
            assert answer == ("yes" if words[-1] in places else "no") and words[-1] in real_language.THINGS
            assert words[-2] == ("an" if words[-1] in ("onion", "owl", "elephant") else "a")
            said[answer] += 1
    assert min(said.values()) > 40


@pytest.fixture
def stamps(tmp_path: Path) -> Path:
    """Blots of different colours under the names of things."""
    (tmp_path / "stamps").mkdir()
    for number, name in enumerate(real_language.THINGS):
        pixels = np.zeros((70, 70, 4), np.uint8)
        pixels[10:60, 10:60] = (7 * number, 255 - 7 * number, 40, 255)
        Image.fromarray(pixels).save(tmp_path / "stamps" / f"{name}.png")
    return tmp_path / "stamps"


def test_items_are_those_that_evaluate_reads(stamps: Path, tmp_path: Path) -> None:
    """The colour at the asked place is the thing's; blind ones ask the same about another scene."""
    for output in ("once", "again"):
        real_language.write_items(stamps, tmp_path / output, 12, seed=0)
    rows = [json.loads(line) for line in (tmp_path / "once" / "test.jsonl").read_text().splitlines()]
    assert (tmp_path / "again" / "test.jsonl").read_text() == (tmp_path / "once" / "test.jsonl").read_text()
    asked = 0
    for row in rows:
        item = make_item(row, "here", tmp_path / "once")
        if row["kind"] != "what":
            continue
        down, right = row["question"].rstrip("?").split()[-2:]
        half = real_language.SIDE // 2
        quarter = item.pictures[0][half * (down == "bottom") :, half * (right == "right") :][:half, :half]
        number = real_language.THINGS.index(row["answer"])
        colour = np.array([7 * number, 255 - 7 * number, 40])
        assert (np.abs(quarter.astype(int) - colour).max(-1) < 12).sum() > 300
        asked += 1
    assert asked > 1
    blind = [json.loads(line) for line in (tmp_path / "once" / "blind.jsonl").read_text().splitlines()]
    assert [(row["question"], row["answer"]) for row in blind] == [(row["question"], row["answer"]) for row in rows]
    assert [row["image"] for row in blind] == [f"{(number + 1) % 12}.jpg" for number in range(12)]


def test_missing_cut_outs_are_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"lacks basketball, bear.*tuxpaint"):
        real_language.scene_painter(tmp_path, 0)


def words_of(*more: str) -> Any:
    """A tokenizer of whole words, with the marks of SmolLM2."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    plain = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "\n", "?", "user", "assistant", *more]
    known = [*plain, *real_language.MARKS.values()]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(known)}, unk_token="<|endoftext|>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|\n|\?"), "removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        extra_special_tokens=real_language.MARKS,
    )


def test_training_goes_on_where_it_ended(stamps: Path, tmp_path: Path) -> None:
    """Two calls of two steps each; only projector and language model change."""
    from transformers import AutoModelForImageTextToText

    words = words_of(*real_language.THINGS, *"what where is there a an at the top bottom left right yes no".split())
    processor = real_language.build_processor(words)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 1}
    llama = LlamaConfig(vocab_size=len(words), intermediate_size=12, tie_word_embeddings=True, **sizes)
    eyes = Dinov2Model(Dinov2Config(image_size=280, patch_size=14, mlp_ratio=1, **sizes))
    model = real_language.assemble(eyes, LlamaForCausalLM(llama), processor.image_token_id, 280, 1)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    for steps in (2, 4):
        real_language.train(stamps, tmp_path / "model", steps, minutes=1, batch=2)
        assert len((tmp_path / "model" / "training.jsonl").read_text().splitlines()) == steps
    after = AutoModelForImageTextToText.from_pretrained(tmp_path / "model").state_dict()
    same = {name for name, value in model.state_dict().items() if torch.equal(value, after[name])}
    assert same == {name for name in after if ".vision_tower." in name}
