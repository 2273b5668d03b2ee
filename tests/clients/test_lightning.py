"""Lightning trains a merging model as a plain loop does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from client_helpers import CLOSE, client, labelled
from decode_helpers import IMAGES, RICHEST, SETTINGS, patched, single
from helpers import assert_differ, forward, under
from illava_hooks import patch, session_of, unpatch
from tiny_models import FAMILIES, Inputs, tiny_model

lightning = client("lightning")
RATE = 0.01


class Module(lightning.LightningModule):  # type: ignore[name-defined]
    """What a user would write."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.losses: list[float] = []

    def training_step(self, batch: Inputs, index: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=RATE)


def trainer(folder: Path, steps: int) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return lightning.Trainer(accelerator="cpu", devices=1, max_steps=steps, default_root_dir=folder, **quiet)


@pytest.mark.parametrize("order", ["before", "inside"])
@pytest.mark.parametrize("family", FAMILIES)
def test_training(family: str, order: str, tmp_path: Path) -> None:
    """Losses and weights of two steps; the checkpoint is that of an unpatched model."""
    plain = patched(family)
    batches = [labelled(single(plain, sample)) for sample in (IMAGES, RICHEST[family])]
    model = tiny_model(family) if order == "inside" else patched(family)
    module = Module(model)
    if order == "inside":
        patch(module.model, **SETTINGS[family])
    fit = trainer(tmp_path, len(batches))
    rows: Any = batches
    fit.fit(module.train(), torch.utils.data.DataLoader(rows, batch_size=None))
    optimizer, expected = torch.optim.SGD(plain.train().parameters(), lr=RATE), []
    for batch in batches:
        loss = plain(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    torch.testing.assert_close(module.losses, expected, **CLOSE)
    for (name, weight), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(weight, other, msg=under(name), **CLOSE)
    assert session_of(model).report.kept_fraction < 0.5
    stock = tiny_model(family)
    assert abs(stock(**batches[0]).loss.item() - expected[0]) > 1e-3, "the trainer saw no merging"

    fit.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    Module(stock).load_state_dict(saved)
    inputs = single(plain, IMAGES)
    merged = forward(plain.eval(), inputs)["forward.logits"]
    assert_differ(forward(stock, inputs)["forward.logits"], merged)
    patch(stock, **SETTINGS[family])
    torch.testing.assert_close(forward(stock, inputs)["forward.logits"], merged, **CLOSE)
    unpatch(model)
