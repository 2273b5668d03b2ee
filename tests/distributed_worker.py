"""One of two processes that train a patched model together; `test_tools_distributed.py` starts them and compares."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from decode_helpers import IMAGE, IMAGES, SETTINGS, single
from families import family_of
from illava_hooks import merging, patch, session_of, unpatch
from tiny_models import FAMILIES, Inputs, tiny_model

SAMPLES = (IMAGE, IMAGES)  # one for each process
ORDERS = ("before", "after")
CPU = torch.device("cpu")


def labelled(model: Any, rank: int) -> Inputs:
    """The sample of one process, with labels on its last three tokens."""
    inputs = single(model, SAMPLES[rank])
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    return {**inputs, "labels": labels}


def layers_of(model: Any) -> list[nn.Module]:
    """The layers of both stages."""
    known = family_of(model)
    return [*known.encoder_layers(model), *known.language(model).layers]


# ------------------------------------------------------------------------------------ the ways


def ddp(model: Any) -> Any:
    """A stock model may leave parameters unused, such as a tower's last norm, which DDP must be told."""
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)


def fsdp1(model: Any) -> Any:
    """Every layer a unit of its own, and the rest another."""
    policy = functools.partial(
        transformer_auto_wrap_policy, transformer_layer_cls={type(layer) for layer in layers_of(model)}
    )
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=CPU)


def fsdp1_whole(model: Any) -> Any:
    """One unit."""
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=CPU)


def fsdp2(model: Any) -> Any:
    """Every layer a unit of its own, and the rest another."""
    mesh = init_device_mesh("cpu", (2,))
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


WAYS: dict[str, Callable[[Any], Any]] = {"ddp": ddp, "fsdp1": fsdp1, "fsdp1 whole": fsdp1_whole, "fsdp2": fsdp2}


def whole_gradients(model: Any) -> dict[str, Any]:
    """The gradients of all parameters, put together from both processes."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return {name.replace("_fsdp_wrapped_module.", ""): gradient for name, gradient in found.items()}
    grads = {n.removeprefix("module."): p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {name: getattr(grad, "full_tensor", lambda grad=grad: grad)() for name, grad in grads.items()}


# ------------------------------------------------------------------------------------ one case


def run(family: str, way: str, order: str, rank: int) -> dict[str, Any]:
    """Losses, gradients and what merged, for one way of sharing the work."""
    model = tiny_model(family)
    inputs = labelled(model, rank)
    if order == "before":
        patch(model, **SETTINGS[family])
    wrapper = WAYS[way](model)
    kinds = [type(layer) for layer in layers_of(model)]
    if order == "after":
        patch(wrapper, **SETTINGS[family])
    output = wrapper(**inputs)
    output.loss.backward()
    session = session_of(wrapper)
    assert session is not None
    found = {"loss": output.loss.detach(), "gradients": whole_gradients(wrapper), "report": str(session.report)}
    found["sharded"] = [sharded(model)]
    with torch.no_grad():
        found["positional"] = wrapper(
            inputs["input_ids"], **{k: v for k, v in inputs.items() if k != "input_ids"}
        ).loss
        with merging(wrapper, False):
            found["off"] = wrapper(**inputs).loss
        unpatch(wrapper)
        found["unpatched"] = wrapper(**inputs).loss
    found["session"] = session_of(wrapper) is None and session_of(model) is None
    found["kinds"] = [kind.__name__ for kind in kinds], [type(layer).__name__ for layer in layers_of(model)]
    found["sharded"].append(sharded(model))
    return found


def sharded(model: Any) -> list[bool]:
    """Which layers are what `fully_shard` makes of a module."""
    return [isinstance(layer, FSDPModule) for layer in layers_of(model)]


def main(rank: int, folder: Path) -> None:
    """Runs every case and leaves what it found, or the error, in one file for each."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")  # torch's own views
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for family in FAMILIES:
        for way in WAYS:
            for order in ORDERS:
                torch.save(run(family, way, order, rank), folder / f"{family} {way} {order} {rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
