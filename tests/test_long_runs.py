"""Many calls on one patched model: memory stays, hooks stay, threads answer as alone.

The normal run is short; `ILLAVA_LONG_CALLS=500` makes 500 calls, and 50 in each of 8 threads.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from decode_helpers import BOTH, IMAGE, IMAGES, RAGGED, TEXT, VIDEO, patched, stock_keeps_images_apart
from families import family_of
from helpers import assert_differ
from illava_hooks import merging, session_of
from illava_hooks.engine import attention_tap, transport
from illava_hooks.engine import session as sessions
from tiny_models import FAMILIES, Inputs, Sample, inputs_for

CALLS = int(os.environ.get("ILLAVA_LONG_CALLS", "60"))
THREADS = 8
PER_THREAD = max(6, CALLS // 10)
#: Bytes that a process may grow by after its warm-up, whatever the number of calls: the allocator's own spread.
SPREAD = 24 << 20

BATCHES: dict[str, list[Sample]] = {
    "image": [IMAGE],
    "images": [IMAGES],
    "video": [VIDEO],
    "image and video": [BOTH],
    "text": [TEXT],
    "batch": RAGGED,
    "other sizes": [Sample(text_seed=8, images=((96, 64), (40, 24)), text=(3, 2, 4))],
}


def batches(family: str) -> dict[str, list[Sample]]:
    """Those of `BATCHES` that a family takes, and of which its stock model makes no mixture."""
    apart = stock_keeps_images_apart(family)
    taken = {name: batch for name, batch in BATCHES.items() if family_of(family).takes(batch)}
    return {name: batch for name, batch in taken.items() if apart or all(len(s.images) < 2 for s in batch)}


#: Arguments of `generate`, in turn.
WAYS: tuple[dict[str, Any], ...] = (
    {},
    {"num_beams": 2},
    {"cache_implementation": "static"},
    {"do_sample": True, "num_return_sequences": 2},
    {"use_cache": False},
)


def hooks_of(model: nn.Module) -> dict[str, int]:
    """How many entries every dictionary of hooks, and every module's own dictionary, has."""
    counts = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if "hooks" in key and isinstance(value, dict):
                counts[f"{name}.{key}"] = len(value)
        counts[name] = len(vars(module))
    return counts


def context() -> tuple[Any, ...]:
    """What the library has in this context."""
    return (
        transport.running_forward(),
        transport.current_generation(),
        transport.in_features(),
        attention_tap.current_tap(),
        dict(sessions._switched.get()),
    )


def live_tensors() -> int:
    """Tensors that the garbage collector knows of."""
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc, which Linux has")
@pytest.mark.parametrize("track", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_many_generations(family: str, track: bool) -> None:
    model = patched(family, track=track)
    prompts = [inputs_for(model, batch) for batch in batches(family).values()]
    if len(prompts) % len(WAYS) == 0:
        prompts += prompts[:1]  # in turn, each then meets every way

    def call(number: int) -> None:
        way = WAYS[number % len(WAYS)]
        with merging(model, number % 11 != 0):
            model.generate(**prompts[number % len(prompts)], max_new_tokens=2, **way)

    warm_up = len(BATCHES) * len(WAYS)  # every prompt in every way, and some of them switched off
    for number in range(warm_up):
        call(number)
    hooks, tensors, memory = hooks_of(model), live_tensors(), resident()
    for number in range(warm_up, warm_up + (CALLS // 4 if track else CALLS)):
        call(number)
    call(warm_up - 1)  # the report and what stock keeps are of the same prompt again
    assert hooks_of(model) == hooks
    assert context() == (None, None, False, None, {})
    assert live_tensors() == tensors
    assert resident() - memory < SPREAD
    session = session_of(model)
    assert session is not None and len(session._warned) <= 2


def logits_of(model: Any, inputs: Inputs) -> Callable[[bool], Tensor]:
    """A forward; with explicit positions where stock keeps those of its last prompt on the model."""
    where = family_of(model).explicit_positions(model, inputs)

    @torch.no_grad()
    def run(enabled: bool) -> Tensor:
        with merging(model, enabled):
            found: Tensor = model(**inputs, **where).logits
            return found

    return run


@pytest.mark.parametrize("family", FAMILIES)
def test_threads_answer_as_alone(family: str) -> None:
    """Some with merging, some without, on one model at the same time."""
    model, known = patched(family), batches(family)
    runs = [logits_of(model, inputs_for(model, batch)) for batch in known.values()]
    expected = {enabled: [run(enabled) for run in runs] for enabled in (True, False)}
    for name, merged, stock in zip(known, expected[True], expected[False], strict=True):
        if name != "text":
            assert_differ(merged, stock)
    hooks, start = hooks_of(model), Barrier(THREADS)

    def work(thread: int) -> list[str]:
        start.wait()
        wrong = []
        for number in range(PER_THREAD):
            at, enabled = (thread + number) % len(runs), (thread + number // 2) % 3 > 0
            if not torch.equal(runs[at](enabled), expected[enabled][at]):
                wrong.append(f"thread {thread}, call {number}")
        return [*wrong, *(f"thread {thread} left {thing}" for thing in context() if thing)]

    with ThreadPoolExecutor(THREADS) as pool:
        assert sum(pool.map(work, range(THREADS)), []) == []
    assert hooks_of(model) == hooks


@pytest.mark.parametrize("family", FAMILIES)
def test_switching_off_in_one_thread_only(family: str) -> None:
    """Each thread's switch is open while all others are calling."""
    model = patched(family)
    run = logits_of(model, inputs_for(model, [IMAGE]))
    expected = {enabled: run(enabled) for enabled in (True, False)}
    session, step = session_of(model), Barrier(THREADS)
    assert session is not None

    @torch.no_grad()
    def work(thread: int) -> bool:
        off = thread % 2 == 0
        with merging(model, not off):
            step.wait()  # all switches are open
            right = session.active is not off and torch.equal(run(session.active), expected[not off])
            step.wait()
        step.wait()  # all are closed
        return right and session.active

    with ThreadPoolExecutor(THREADS) as pool:
        assert all(pool.map(work, range(THREADS)))
    assert session.active
