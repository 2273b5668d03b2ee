"""TRL trains a merging model: SFT, DPO with a reference model, GRPO with its own generation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from client_helpers import CLOSE, EMBEDDED, assert_release, client, embedded, forced_logits, picture
from families import family_of
from helpers import assert_differ, under
from illava_hooks import merging, patch, session_of, tiny
from tiny_models import FAMILIES

trl = client("trl")
datasets = client("datasets")
for name in ("sft_trainer", "dpo_trainer", "grpo_trainer"):
    client(f"trl.trainer.{name}")

#: Since 1.15 the trainers replace the head's `forward` by one that takes labels and gives log-probabilities.
TELLS_LABELS = hasattr(client("trl.trainer.utils"), "add_fused_lm_head")
LOSSES = ("nll",) if TELLS_LABELS else ("nll", "chunked_nll")

RATE = 1e-3
ROWS = [
    ("scene.png", "how many triangles are there ?", "3", "red green blue"),
    ("digits.png", "which digit is first ?", "7 2 left", "4"),
]


def test_this_is_the_release_that_is_asked_for() -> None:
    assert_release(trl)


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    """Arguments of every trainer: plain gradient descent in the order of the data."""
    common = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    return common | more


def rows(**columns: int) -> Any:
    """The data: a picture, a question and what else is asked for, by its place in `ROWS`."""
    return datasets.Dataset.from_list(
        [
            {
                "images": [picture(row[0])],
                "prompt": [{"role": "user", "content": row[1]}],
                **{name: [{"role": "assistant", "content": row[place]}] for name, place in columns.items()},
            }
            for row in ROWS
        ]
    )


def logged(trainer: Any, name: str = "loss") -> Tensor:
    """A number of each step."""
    return torch.tensor([float(entry[name]) for entry in trainer.state.log_history if name in entry])


def log_probabilities(model: Any, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Of each labelled token by a plain call; zero elsewhere."""
    shifted = labels[:, 1:]
    logits = model(**inputs, labels=labels).logits[:, :-1].float().log_softmax(-1)
    return logits.gather(-1, shifted.clamp(min=0)[..., None])[..., 0].masked_fill(shifted == -100, 0.0)


# ------------------------------------------------------------------------------------ SFT


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("family", FAMILIES)
def test_sft(family: str, loss: str, checkpointing: bool, tmp_path: Path) -> None:
    """Losses and weights of two steps are a plain loop's."""
    (model, processor), (plain, _) = embedded(family), embedded(family)
    arguments = settings(tmp_path, loss_type=loss, gradient_checkpointing=checkpointing, max_length=None)
    trainer = trl.SFTTrainer(
        model=model, args=trl.SFTConfig(**arguments), train_dataset=rows(completion=2), processing_class=processor
    )
    batches = [trainer._prepare_inputs(batch) for batch in trainer.get_train_dataloader()] * 2
    trainer.train()
    assert model.model.language_model.layers[0].gradient_checkpointing == checkpointing
    optimizer, expected = torch.optim.SGD(plain.parameters(), lr=RATE), []
    for batch in batches[:2]:
        value = plain.train()(**batch).loss
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        expected.append(value.item())
    torch.testing.assert_close(logged(trainer), torch.tensor(expected), **CLOSE)
    for (name, weight), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(weight, other, msg=under(name), **CLOSE)
    assert session_of(model).report.kept_fraction < 0.5
    stock = embedded(family, merged=False)[0](**batches[0]).loss.item()
    assert math.isfinite(stock) and abs(stock - expected[0]) > 1e-3, "the trainer saw no merging"


@pytest.mark.parametrize("family", FAMILIES)
def test_sft_of_adapters(family: str, tmp_path: Path) -> None:
    (model, processor), (plain, _) = embedded(family), embedded(family)
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**settings(tmp_path, max_length=None)),
        train_dataset=rows(completion=2),
        processing_class=processor,
        peft_config=peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj"], task_type="CAUSAL_LM"),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.train()
    torch.testing.assert_close(logged(trainer)[0], plain(**batch).loss.detach(), **CLOSE)
    assert session_of(trainer.model).report.kept_fraction < 0.5


# ------------------------------------------------------------------------------------ DPO


def collator_with_labels(trainer: Any) -> None:
    """Before 1.15 the trainer does not tell the model which tokens are the answer; a collator can."""
    inner = trainer.data_collator

    def collate(examples: list[Any]) -> Any:
        batch = inner(examples)
        batch["labels"] = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        return batch

    trainer.data_collator = collate


def dpo(model: Any, processor: Any, folder: Path, **more: Any) -> Any:
    trainer = trl.DPOTrainer(
        model=model,
        args=trl.DPOConfig(**settings(folder, max_length=None)),
        train_dataset=rows(chosen=2, rejected=3),
        processing_class=processor,
        **more,
    )
    if not TELLS_LABELS:
        collator_with_labels(trainer)
    return trainer


#: Where the reference model comes from, and how it is patched.
REFERENCES = ("given", "loaded by the trainer", "adapters")


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("family", FAMILIES)
def test_dpo(family: str, reference: str, tmp_path: Path) -> None:
    """The first loss is ln 2, for the policy is its own reference; log-probabilities are those of plain calls."""
    (model, processor), (plain, _) = embedded(family), embedded(family)
    model.config._name_or_path = str(tiny.folder(family))  # TRL loads its reference model from here
    more: dict[str, Any] = {}
    if reference == "given":
        more = {"ref_model": embedded(family)[0]}
    elif reference == "adapters":
        more = {"peft_config": peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")}
    trainer = dpo(model, processor, tmp_path, **more)
    if reference == "loaded by the trainer":
        assert session_of(trainer.ref_model) is None
        patch(trainer.ref_model, **EMBEDDED[family])
    assert (trainer.ref_model is None) == (reference == "adapters")
    batch = dict(trainer.data_collator([trainer.train_dataset[i] for i in range(len(ROWS))]))
    trainer.train()
    losses = logged(trainer)
    torch.testing.assert_close(losses[0].item(), math.log(2), atol=1e-4, rtol=0)
    assert losses[1] < losses[0]

    answers = batch.pop("completion_mask")
    batch.pop("labels", None)
    labels = batch["input_ids"].masked_fill(answers == 0, -100)
    with torch.no_grad():
        expected = log_probabilities(plain, batch, labels).sum(-1).view(2, -1).mean(-1)
        with merging(plain, False):
            stock = log_probabilities(plain, batch, labels).sum(-1).view(2, -1).mean(-1)
    found = torch.stack([logged(trainer, f"logps/{name}")[0] for name in ("chosen", "rejected")])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    assert_differ(found, stock)


@pytest.mark.parametrize("family", FAMILIES)
def test_dpo_of_a_reference_that_does_not_merge(family: str, tmp_path: Path) -> None:
    """Why the recipe is needed."""
    model, processor = embedded(family)
    trainer = dpo(model, processor, tmp_path, ref_model=embedded(family, merged=False)[0])
    trainer.train()
    assert abs(logged(trainer)[0].item() - math.log(2)) > 1e-3


# ------------------------------------------------------------------------------------ GRPO


def log_probabilities_of(answers: Tensor, logits: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, answers[..., None])[..., 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_grpo(family: str, tmp_path: Path) -> None:
    """What the trainer learns from are the log-probabilities of its own generation; so are the reference's."""
    (model, processor), (plain, _) = embedded(family), embedded(family)
    model.config._name_or_path = str(tiny.folder(family))
    beta = 0.0 if family_of(family).with_tiles else 0.1  # with a reference TRL cannot take inputs in tiles
    arguments = settings(tmp_path, per_device_train_batch_size=4, max_steps=1, beta=beta)
    arguments |= {"num_generations": 2, "max_completion_length": 4, "generation_kwargs": {"min_new_tokens": 4}}
    trainer = trl.GRPOTrainer(
        model=model,
        args=trl.GRPOConfig(**arguments),
        train_dataset=rows(),
        processing_class=processor,
        reward_funcs=lambda completions, **_: [float(len(str(text))) for text in completions],
    )
    if beta:
        patch(trainer.ref_model, **EMBEDDED[family])
    calls: list[tuple[Any, dict[str, Any], Tensor]] = []
    inner = trainer._get_per_token_logps_and_entropies

    def spy(called: Any, ids: Tensor, mask: Tensor, answer: int, *args: Any, **kwargs: Any) -> Any:
        result = inner(called, ids, mask, answer, *args, **kwargs)
        given = {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
        calls.append((called, {"input_ids": ids, "attention_mask": mask, **given}, result[0].detach()))
        return result

    trainer._get_per_token_logps_and_entropies = spy
    trainer.train()
    assert {called is trainer.ref_model for called, _, _ in calls} == ({False, True} if beta else {False})
    assert not beta or logged(trainer, "kl")[0].abs() < 1e-5
    for _, inputs, found in calls:
        steps = found.shape[1]
        answers = inputs["input_ids"][:, -steps:]
        per_token = ("input_ids", "attention_mask", "mm_token_type_ids")
        prompt = {name: value[:, :-steps] if name in per_token else value for name, value in inputs.items()}
        expected = log_probabilities_of(answers, forced_logits(plain, prompt, answers))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        with merging(plain, False):
            assert_differ(found, log_probabilities_of(answers, forced_logits(plain, prompt, answers)))
