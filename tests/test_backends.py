"""Attention back-ends that this machine has no kernel for: flash attention simulated, flex attention unfused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from decode_helpers import SETTINGS
from families import families, families_and, family_of
from helpers import needs_any_head_width
from illava_hooks import patch
from tiny_models import Sample, inputs_for, tiny_model

RAGGED = [
    Sample(text_seed=1, images=((48, 30), (64, 64))),
    Sample(text_seed=2),
    Sample(text_seed=3, images=((32, 90),), videos=(4,)),
]
SAMPLES = {"ragged": RAGGED, "single": RAGGED[:1], "images": [*RAGGED[:2], Sample(text_seed=3, images=((32, 90),))]}


class FlashKernel:
    """What a flash kernel does with what it is given, in plain torch; remembers the masks.

    It takes a 2-D padding mask over the keys or none, is causal from the end of the keys, reads jumps in
    positions as the borders of packed sequences (and is therefore not to see any), and cuts by `cu_seq_lens`.
    """

    def __init__(self, *, has_windows: bool = False) -> None:
        self.masks: list[Tensor | None] = []
        self.has_windows = has_windows

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        is_causal: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        max_length_q: int | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        rows, columns = query.shape[2], key.shape[2]
        causal = module.is_causal if is_causal is None else is_causal
        seen = torch.ones(rows, columns, dtype=torch.bool)
        if cu_seq_lens_q is not None:
            lengths = cu_seq_lens_q.diff()
            # How long windows still are after a merge nobody asks: there an upper bound is allowed.
            longest = int(lengths.max())
            assert cu_seq_lens_q[-1] == rows
            assert max_length_q == longest or (self.has_windows and max_length_q > longest)
            segment = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
            seen = segment[:, None] == segment
        elif causal:
            assert position_ids is None or (position_ids.diff(dim=-1) == 1).all(), "looks like packed sequences"
            self.masks.append(attention_mask)
            seen = seen.tril(columns - rows)
        seen = seen.expand(len(query), 1, rows, columns)
        if attention_mask is not None:
            assert attention_mask.shape == (len(query), columns), "flash attention takes 2-D masks"
            seen = seen & attention_mask.bool()[:, None, None]
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
        logits = (query @ key.transpose(2, 3)) * scaling
        weights = logits.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
        return (weights @ value).transpose(1, 2), None


def generated(model: Any, samples: list[Sample]) -> list[Tensor]:
    """The logits of a prefill (of each row's last token) and of four decode steps."""
    inputs = inputs_for(model, samples)
    done = model.generate(
        **inputs, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    return list(done.logits)


@pytest.mark.parametrize("kernel", ["flash_attention_2", "flash_attention_3"])
@pytest.mark.parametrize(("family", "kind"), families_and(SAMPLES))
def test_flash_attention(family: str, kind: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flash, samples = FlashKernel(has_windows=family_of(family).has_windows), SAMPLES[kind]
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, kernel, flash)
    reference, model = tiny_model(family), tiny_model(family)
    for config in (model.config, model.config.text_config, model.config.vision_config):
        monkeypatch.setattr(config, "_attn_implementation_internal", kernel)
    patch(reference, **SETTINGS[family])
    patch(model, **SETTINGS[family])
    for ours, expected in zip(generated(model, samples), generated(reference, samples), strict=True):
        torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-5)
    assert flash.masks, "the simulated kernel ran"
    if len(samples) == 1:
        assert all(mask is None for mask in flash.masks), "one sample is never padded"


@needs_any_head_width
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # fused needs a compiler
@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask")  # transformers' own call
@pytest.mark.parametrize("family", families(back_end="flex_attention"))
def test_flex_attention(family: str) -> None:
    """Unfused on the CPU."""
    samples = SAMPLES["ragged" if family_of(family).with_videos else "images"]
    with torch.compiler.set_stance("force_eager"):
        model = tiny_model(family, attn_implementation="flex_attention")
        reference = tiny_model(family)
        patch(model, **SETTINGS[family])
        patch(reference, **SETTINGS[family])
        ours, expected = generated(model, samples), generated(reference, samples)
    for step, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(step, wanted, atol=2e-5, rtol=1e-5)
