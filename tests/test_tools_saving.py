"""What is saved of a patched model: the stock folder, the stock weights, or the whole patched model by pickle."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from decode_helpers import IMAGES, RAGGED, patched, single, stock_keeps_images_apart
from families import family_of
from helpers import assert_differ, assert_same, forward, generate
from illava_hooks import merging, session_of, unpatch
from tiny_models import FAMILIES, inputs_for, tiny_model


def saved_and_loaded(model: Any, folder: Path) -> Any:
    """By `torch.save` and `torch.load`."""
    torch.save(model, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)


#: Run in another process; some stock models must have been built there once, with or without a patch: only then does
#: transformers note down what their towers can record.
ELSEWHERE = """
import sys
import torch
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    model = torch.load(folder + "/model.pt", weights_only=False)
    data = torch.load(folder + "/data.pt")
    if data["records"]:
        with torch.device("meta"):
            type(model)(model.config)
    with torch.no_grad():
        torch.testing.assert_close(model(**data["inputs"]).logits, data["expected"])
    from illava_hooks import session_of, unpatch
    print(session_of(model).report.kept_fraction)
    unpatch(model)
    with torch.no_grad():
        assert not torch.allclose(model(**data["inputs"]).logits, data["expected"], atol=1e-3)
"""

WAYS: dict[str, Callable[[Any, Path], Any]] = {
    "pickle": lambda model, folder: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_and_loaded,
    "deepcopy": lambda model, folder: copy.deepcopy(model),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_patched_model(family: str, way: str, tmp_path: Path) -> None:
    """A patched model of its own, that the first one does not know."""
    model = patched(family, track=True)
    inputs = inputs_for(model, RAGGED)
    twin = WAYS[way](model, tmp_path)
    session, other = session_of(model), session_of(twin)
    assert other is not None and other is not session and other.root is twin and other.config == session.config
    expected = forward(model, inputs)
    stock = forward(tiny_model(family), inputs)
    assert_same(forward(twin, inputs), expected)
    assert_differ(expected["forward.logits"], stock["forward.logits"])
    assert other.report == session.report
    beams = 2 if stock_keeps_images_apart(family) else 1
    assert_same(generate(twin, inputs, num_beams=beams), generate(model, inputs, num_beams=beams))
    with merging(model, False):
        assert_same(forward(model, inputs), stock)
        assert_same(forward(twin, inputs), expected)
    unpatch(twin)
    assert session_of(twin) is None
    assert [type(module) for module in twin.modules()] == [type(module) for module in tiny_model(family).modules()]
    assert_same(forward(twin, inputs), stock)
    assert_same(forward(model, inputs), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_patched_model_that_has_run(family: str, tmp_path: Path) -> None:
    """What the last forward left is not saved; a stock model that was asked for hidden states cannot be pickled."""
    model = patched(family, track=True)
    inputs = single(model, IMAGES)
    with torch.no_grad():
        expected = model(**inputs).logits
    if family_of(family).records_hidden_states:
        stock = tiny_model(family)
        forward(stock, inputs)
        for one in (stock, model):
            with pytest.raises(AttributeError, match="local object 'install_output_capuring_hook"):
                pickle.dumps(one)
        twin = copy.deepcopy(model)
    else:
        twin = saved_and_loaded(model, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(twin(**inputs).logits, expected, atol=0, rtol=0)
    assert session_of(twin).report == session_of(model).report


def test_patched_models_travel_to_another_process(tmp_path: Path) -> None:
    """Which imports nothing of ours by itself."""
    kept = []
    for family in FAMILIES:
        model = patched(family)
        inputs = single(model, IMAGES)
        (tmp_path / family).mkdir()
        torch.save(model, tmp_path / family / "model.pt")
        with torch.no_grad():
            expected = model(**inputs).logits
        data = {"inputs": inputs, "expected": expected, "records": family_of(family).records_hidden_states}
        torch.save(data, tmp_path / family / "data.pt")
        kept.append(session_of(model).report.kept_fraction)
    folders = [str(tmp_path / family) for family in FAMILIES]
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *folders], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [float(line) for line in done.stdout.split()] == kept and max(kept) < 0.5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_folder_is_the_stock_one(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "stock")
    model = patched(family)
    with torch.no_grad():
        model(**single(model, IMAGES))
    model.save_pretrained(tmp_path / "patched")
    stock, ours = ({f.name: f.read_bytes() for f in (tmp_path / kind).iterdir()} for kind in ("stock", "patched"))
    assert ours.keys() == stock.keys() >= {"config.json", "model.safetensors"}
    assert ours == stock
    assert "illava" not in json.dumps(model.config.to_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_state_dicts_are_the_stock_ones(family: str, tmp_path: Path) -> None:
    model, stock = patched(family), tiny_model(family, seed=1)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    weights = torch.load(tmp_path / "weights.pt")  # nothing but tensors
    assert list(weights) == list(stock.state_dict())
    stock.load_state_dict(weights)
    inputs = single(model, IMAGES)
    with merging(model, False):
        assert_same(forward(stock, inputs), forward(model, inputs))
    other = patched(family, seed=1)
    other.load_state_dict(weights)
    assert_same(forward(other, inputs), forward(model, inputs))
