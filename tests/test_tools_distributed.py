"""Two processes on one machine train a patched model: DDP, FSDP and FSDP2 give what one process gives."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from filelock import FileLock
from torch.utils import _pytree

from decode_helpers import RICHEST, SETTINGS, patched, single
from distributed_worker import ORDERS, WAYS, labelled
from families import family_of
from helpers import RECORDS, assert_differ, forward, under
from illava_hooks import merging, patch, session_of
from tiny_models import FAMILIES, tiny_model

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="this build of torch has no gloo"),
    pytest.mark.slow,
]

SECONDS = 240
CLOSE: dict[str, Any] = {"atol": 1e-6, "rtol": 1e-5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both processes left what they found; they run once, not once in each of pytest-xdist's workers."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    if run is None:
        place = tmp_path_factory.mktemp("distributed")
        run_both(place)
        return place
    place = tmp_path_factory.getbasetemp().parent / f"distributed-{run}"
    with FileLock(f"{place}.lock"):
        if not place.exists():
            place.mkdir()
            run_both(place)
    return place


def run_both(place: Path) -> None:
    """A process that hangs is ended, and its case fails."""
    worker = str(Path(__file__).with_name("distributed_worker.py"))
    processes = []
    for rank in range(2):
        with (place / f"{rank}.log").open("w") as log:
            processes.append(
                subprocess.Popen([sys.executable, worker, str(rank), str(place)], stdout=log, stderr=subprocess.STDOUT)
            )
    end = time.monotonic() + SECONDS
    try:
        while any(process.poll() is None for process in processes) and time.monotonic() < end:
            if any(process.poll() for process in processes):  # the other one would wait for it
                break
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def found(folder: Path, family: str, way: str, order: str) -> list[dict[str, Any]]:
    """What the two processes found in one case."""
    files = [folder / f"{family} {way} {order} {rank}.pt" for rank in range(2)]
    logs = "\n".join((folder / f"{rank}.log").read_text()[-3000:] for rank in range(2))
    assert all(file.exists() for file in files), f"the processes did not come this far in {SECONDS} s\n{logs}"
    return [torch.load(file, weights_only=False) for file in files]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """The same in this process: the gradient of the mean of both losses."""
    expected: dict[str, Any] = {}
    for family in FAMILIES:
        model = tiny_model(family)
        stock = [model(**labelled(model, rank)).loss.detach() for rank in range(2)]
        session = patch(model, **SETTINGS[family])
        losses, reports = [], []
        for rank in range(2):
            losses.append(model(**labelled(model, rank)).loss)
            reports.append(str(session.report))
        torch.stack(losses).mean().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        expected[family] = {"stock": stock, "losses": losses, "reports": reports, "gradients": gradients}
    return expected


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_two_processes_give_what_one_gives(
    family: str, way: str, order: str, folder: Path, alone: dict[str, Any]
) -> None:
    expected = alone[family]
    for rank, here in enumerate(found(folder, family, way, order)):
        torch.testing.assert_close(here["loss"], expected["losses"][rank].detach(), **CLOSE)
        torch.testing.assert_close(here["positional"], here["loss"], **CLOSE)
        assert here["report"] == expected["reports"][rank]
        for without in ("off", "unpatched"):
            torch.testing.assert_close(here[without], expected["stock"][rank], **CLOSE)
        assert_differ(here["loss"], here["off"])
        gradients = here["gradients"]
        assert expected["gradients"].keys() <= gradients.keys()
        for name, gradient in gradients.items():  # FSDP has zeros where nothing came
            one = expected["gradients"].get(name, torch.zeros_like(gradient))
            torch.testing.assert_close(gradient, one, atol=1e-5, rtol=1e-5, msg=under(name))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_wrappers_classes_stay(family: str, way: str, order: str, folder: Path) -> None:
    """`fully_shard` makes a subclass of the class that it finds, which must stay when ours comes or goes."""
    for here in found(folder, family, way, order):
        assert here["session"]
        before, after = here["kinds"]
        assert after == before
        assert here["sharded"] == [[way == "fsdp2"] * len(before)] * 2


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_go_through_pytrees(family: str, return_dict: bool) -> None:
    """DDP takes outputs apart and puts them together again, by their stock classes."""
    model = patched(family)
    inputs = single(model, RICHEST[family])
    with torch.no_grad():
        output = model(**inputs, return_dict=return_dict)
        rebuilt = _pytree.tree_map(lambda leaf: leaf, output)
        with merging(model, False):
            stock = model(**inputs, return_dict=return_dict)
    assert type(rebuilt) is type(output) is type(stock)
    torch.testing.assert_close(rebuilt[0], output[0])
    if return_dict:
        assert list(rebuilt) == list(output) == list(stock)
        for name in ("image_outputs", "video_outputs"):  # as from 5.24 on
            if name in stock:
                assert set(rebuilt[name]) == set(output[name]) == set(stock[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_features_of_a_forward_serve_another(family: str) -> None:
    """What merged in them is known, although no key says so."""
    model = patched(family, track=True)
    inputs = single(model, RICHEST[family])
    with torch.no_grad():
        output = model(**inputs)
    if "image_outputs" not in output:
        pytest.skip("this release has no feature outputs in the outputs of a forward")
    session = session_of(model)
    report, expected = session.report, forward(model, inputs)["forward.logits"]
    ready = {kind: output[f"{kind}_outputs"] for kind in family_of(family).modalities}
    assert not any(RECORDS in features for features in ready.values())
    rest = family_of(family).beside_features(inputs)
    with torch.no_grad():
        again = model(**rest, mm_encoder_outputs=ready)
    torch.testing.assert_close(again.logits, expected, **CLOSE)
    assert session.report == report
    assert RECORDS not in again.image_outputs
