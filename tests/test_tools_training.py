"""Training with merging on: the Trainer, and the life of a LoRA adapter."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers.integrations.peft
from packaging.version import Version
from torch import Tensor
from transformers import Trainer, TrainingArguments

from decode_helpers import IMAGES, RAGGED, RICHEST, SETTINGS, patched, single
from families import family_of
from helpers import assert_differ, forward, under
from illava_hooks import merging, patch, session_of, unpatch
from tiny_models import FAMILIES, Inputs, inputs_for, tiny_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),  # PEFT's and the Trainer's
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated"),
]

#: Newer releases rename what repeats layers in the backward pass.
FIELDS = {field.name for field in dataclasses.fields(TrainingArguments)}
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in FIELDS else "gradient_checkpointing"

#: Newer releases of transformers want newer releases of PEFT for adapters without a wrapper.
NEEDED = getattr(transformers.integrations.peft, "MIN_PEFT_VERSION", "0")

CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
RATE = 0.01


def labelled(inputs: Inputs) -> Inputs:
    """Labels on the last three tokens."""
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    return {**inputs, "labels": labels}


def batches(family: str) -> list[Inputs]:
    model = tiny_model(family)
    return [labelled(single(model, RICHEST[family])), labelled(inputs_for(model, RAGGED))]


def trained(model: Any, data: list[Inputs], folder: Path, steps: int, **settings: Any) -> tuple[Trainer, list[float]]:
    """A run of the Trainer over batches as they are, and the loss of each step."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=1,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=True,
        train_sampling_strategy="sequential",
        **settings,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data, data_collator=lambda rows: rows[0])
    trainer.train()
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def by_hand(model: Any, data: list[Inputs], steps: int) -> list[float]:
    """The same steps without the Trainer."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    losses = []
    for step in range(steps):
        loss = model(**data[step % len(data)]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def stages(model: Any) -> dict[str, Any]:
    """A weight of each stage."""
    known = family_of(model)
    first: Any = known.encoder_layers(model)[0]
    vision: Tensor = getattr(first.mlp, known.encoder_mlp).weight
    return {"vision": vision, "language": known.language(model).layers[0].mlp.down_proj.weight}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_trainer_trains_a_merging_model(family: str, checkpointing: bool, tmp_path: Path) -> None:
    data, steps = batches(family), 6
    expected_model, model = patched(family), patched(family)
    before = {name: weight.detach().clone() for name, weight in stages(model).items()}
    expected = by_hand(expected_model, data, steps)
    _, losses = trained(model, data, tmp_path, steps, **{CHECKPOINTING: checkpointing})
    assert family_of(model).language(model).layers[0].gradient_checkpointing == checkpointing
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), **CLOSE)
    assert losses[-2] < losses[0] and losses[-1] < losses[1]
    for (name, weight), other in zip(model.named_parameters(), expected_model.parameters(), strict=True):
        torch.testing.assert_close(weight, other, msg=under(name), **CLOSE)
    for name, weight in stages(model).items():
        assert_differ(weight, before[name], by=1e-4)
    assert session_of(model).report.kept_fraction < 0.5
    stock = tiny_model(family)
    assert abs(by_hand(stock, data, 1)[0] - losses[0]) > 1e-3, "the Trainer saw no merging"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_trainer_evaluates_and_saves(family: str, tmp_path: Path) -> None:
    data = batches(family)[:1]
    model = patched(family)
    with torch.no_grad():
        expected = model(**data[0]).loss.item()
        with merging(model, False):
            stock = model(**data[0]).loss.item()
    trainer, _ = trained(model, data, tmp_path, 1)
    with torch.no_grad():
        after = model.eval()(**data[0]).loss.item()
    assert after != pytest.approx(expected, abs=1e-4) and expected != pytest.approx(stock, abs=1e-4)
    found = trainer.evaluate(data, metric_key_prefix="x")
    assert found["x_loss"] == pytest.approx(after, abs=1e-5)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = type(model).from_pretrained(tmp_path / "saved")
    assert session_of(loaded) is None
    patch(loaded, **SETTINGS[family])
    with torch.no_grad():
        assert loaded(**data[0]).loss.item() == pytest.approx(after, abs=1e-5)


# ------------------------------------------------------------------------------------ adapters


def lora(family: str) -> peft.LoraConfig:
    """Adapters in both stages, the projections that score among them."""
    known = family_of(family)
    targets = [*known.adapter_targets, known.encoder_mlp]
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)


@pytest.mark.parametrize("order", ["adapter first", "patch first"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_is_trained_saved_loaded_and_folded_in(family: str, order: str, tmp_path: Path) -> None:
    data = batches(family)
    model = tiny_model(family)
    if order == "patch first":
        patch(model, **SETTINGS[family])
    torch.manual_seed(5)
    wrapper = peft.get_peft_model(model, lora(family))
    if order == "adapter first":
        patch(wrapper, **SETTINGS[family])
    before = {name: weight.detach().clone() for name, weight in wrapper.named_parameters()}
    _, losses = trained(wrapper, data[:1], tmp_path / "run", 3)
    assert losses[2] < losses[0]
    moved = {n for n, weight in wrapper.named_parameters() if not torch.equal(weight, before[n])}
    idle = family_of(family).idle_weights(model)
    assert moved == {n for n, weight in wrapper.named_parameters() if "lora_" in n and id(weight) not in idle}
    wrapper.eval()
    inputs = single(tiny_model(family), IMAGES)
    expected = forward(wrapper, inputs)["forward.logits"]
    assert session_of(wrapper).report.kept_fraction < 0.5

    wrapper.save_pretrained(tmp_path / "adapter")
    for patched_base in (False, True):
        base = tiny_model(family)
        if patched_base:
            patch(base, **SETTINGS[family])
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        if not patched_base:
            assert session_of(loaded) is None
            patch(loaded, **SETTINGS[family])
        torch.testing.assert_close(forward(loaded, inputs)["forward.logits"], expected, **CLOSE)

    with wrapper.disable_adapter():
        plain = forward(wrapper, inputs)["forward.logits"]
    torch.testing.assert_close(plain, forward(patched(family), inputs)["forward.logits"], **CLOSE)
    assert_differ(plain, expected)

    session = session_of(wrapper)
    folded = wrapper.merge_and_unload()
    assert session_of(folded) is session and not [n for n, _ in folded.named_modules() if "lora" in n]
    torch.testing.assert_close(forward(folded, inputs)["forward.logits"], expected, atol=1e-4, rtol=1e-4)
    unpatch(folded)
    assert not [n for n, m in folded.named_modules() if any("illava" in repr(h) for h in m._forward_hooks.values())]
    assert_differ(forward(folded, inputs)["forward.logits"], expected)


@pytest.mark.skipif(Version(peft.__version__) < Version(NEEDED), reason=f"transformers asks for PEFT {NEEDED} here")
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_by_the_model_itself(family: str) -> None:
    """`add_adapter` of transformers puts them into the patched model without a wrapper."""
    model = patched(family)
    inputs = single(model, IMAGES)
    expected = forward(model, inputs)["forward.logits"]
    torch.manual_seed(5)
    model.add_adapter(lora(family), "mine")
    with_adapter = forward(model.eval(), inputs)["forward.logits"]
    other = tiny_model(family)
    torch.manual_seed(5)
    other.add_adapter(lora(family), "mine")
    patch(other.eval(), **SETTINGS[family])
    torch.testing.assert_close(with_adapter, forward(other, inputs)["forward.logits"], **CLOSE)
    assert_differ(with_adapter, expected)
    model.disable_adapters()
    torch.testing.assert_close(forward(model, inputs)["forward.logits"], expected, **CLOSE)
