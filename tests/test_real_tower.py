"""The benchmark on a real tower: its parts on a random one, since the real one is no part of this repository."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

import cutouts
import real_tower
from illava_hooks import METHODS
from illava_hooks.errors import InputError
from illava_hooks.tools.evaluate.lines import add_line
from towers import Tower, listened_to


@pytest.fixture(params=[1, 0], ids=["class token", "patches alone"])
def tower(request: pytest.FixtureRequest) -> Tower:
    """A random tower of four blocks, for pictures of 25 patches."""
    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=4, num_attention_heads=3, image_size=20, patch_size=4, mlp_ratio=2
    )
    torch.manual_seed(0)
    return listened_to(Dinov2Model(config).eval(), request.param)


PIXELS = torch.randn(3, 3, 20, 20, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_blocks_without_merging_are_the_stock_ones(tower: Tower) -> None:
    if tower.prefix:
        stock = tower.model(PIXELS, output_hidden_states=True).hidden_states
    else:
        stock = [tower.model.embeddings(PIXELS)[:, 1:]]
        for layer in tower.model.encoder.layer:
            stock.append(layer(stock[-1]))
    torch.testing.assert_close(tower.run(stock[1], range(1, 3)), stock[3])
    torch.testing.assert_close(tower.embed(PIXELS), stock[0])


@pytest.mark.parametrize("name", list(real_tower.methods()))
def test_every_method_leaves_what_is_asked_for(tower: Tower, name: str) -> None:
    method = real_tower.methods()[name]
    first = tower.embed(PIXELS)
    merged = tower.run(first, range(4), method, (1, 2), 0.36)
    assert merged.shape == (3, tower.prefix + 9, 24)  # 25, 15, 9
    alone = torch.cat([tower.run(one[None], range(4), method, (1, 2), 0.36) for one in first])
    torch.testing.assert_close(merged, alone, atol=1e-5, rtol=1e-5)


def test_what_is_dropped_is_gone_and_what_stays_is_stocks(tower: Tower) -> None:
    first = tower.embed(PIXELS)
    kept = tower.run(first, range(1), METHODS["random"], (0,), 0.6)
    whole = tower.run(first, range(1))
    assert kept.shape[1] == tower.prefix + 15
    for ours, theirs in zip(kept, whole, strict=True):
        places = (ours[:, None] - theirs).abs().amax(-1).argmin(1)
        torch.testing.assert_close(ours, theirs[places])
        assert places.tolist() == sorted({*places.tolist()})
        assert not tower.prefix or places[0] == 0, "a class token stays"


def test_a_scene_is_how_often_the_present_beat_the_absent() -> None:
    known = torch.eye(8)
    middle = torch.zeros(8)
    tokens = torch.stack([known[0], known[1], 0.5 * known[2] + 0.5 * known[4], known[5] + 0.1 * known[3]])
    # 0 and 1 beat all four but 5, 2 beats 6 and 7 (as strong as 4), 3 beats 6 and 7.
    best = torch.tensor([1, 1, 2**-0.5, 0.1 / 1.01**0.5, 2**-0.5, 1 / 1.01**0.5, 0, 0])
    wins = sum(float(best[i] > best[j]) for i in range(4) for j in range(4, 8))
    assert real_tower.beats(tokens, known, middle) == pytest.approx(wins / 16)
    assert real_tower.beats(known[:4], known, middle) == 1 and real_tower.beats(known[4:], known, middle) == 0


def test_the_table_pairs_scenes() -> None:
    rng = np.random.default_rng(0)
    right = rng.random(50)
    rows = [
        {"blocks": "2-4", "kept": 0.5, "method": name, "left": 0.5, "right": list(right + lead)}
        for name, lead in (("illava", 0.0), ("novel", 0.1))
    ]
    lines = real_tower.table(rows)
    assert "+10.0 to +10.0" in lines[2] and "novel" in lines[2]
    assert lines[3].endswith("| illava | " + f"{100 * right.mean():.1f} |  | +10.0 to +10.0 |")


def test_cut_outs_that_fill_their_frame_are_none(tmp_path: Any) -> None:
    """A photo pasted whole would be no object in a scene."""
    thing = np.zeros((80, 80, 4), np.uint8)
    thing[20:60, 10:70] = 255
    whole = np.full((80, 80, 4), 255, np.uint8)
    for name, pixels in (("thing", thing), ("whole", whole)):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    found = cutouts.read_cut_outs(tmp_path)
    assert {name: cut.size for name, cut in found.items()} == {"thing": (60, 40)}


def test_a_run_that_was_broken_off_goes_on_and_another_run_is_refused(tmp_path: Any) -> None:
    file = tmp_path / "rows.jsonl"
    settings = {"scenes": 4, "size": 44}
    row = {"blocks": "", "kept": 1.0, "method": "none", "left": 1.0, "right": [0.5] * 4}
    assert real_tower.known_rows(file, settings, "mine") == []
    add_line(file, row)
    with file.open("a") as lines:
        lines.write('{"blocks": "2-4", "ri')
    assert real_tower.known_rows(file, settings, "mine") == [row]
    for other in ({**settings, "scenes": 8}, "mine"), (settings, "another"):
        with pytest.raises(InputError, match="rows of another run"):
            real_tower.known_rows(file, *other)
