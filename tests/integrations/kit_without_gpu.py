"""Runs VLMEvalKit with merged models on a CPU; started by ``test_vlmevalkit.py`` with the kit's own Python.

The kit asks for CUDA and flash attention by name in its model classes. Nothing of it is changed: what it asks torch
and transformers for is answered by a CPU. Argument: a JSON list of command lines, which run one after the other.
"""

import json
import runpy
import sys
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel


class OnCpu(TorchFunctionMode):
    """Tensors that are sent to CUDA stay on the CPU."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = {name: self.here(value) for name, value in (kwargs or {}).items()}
        return function(*map(self.here, args), **named)

    @staticmethod
    def here(value: Any) -> Any:
        return "cpu" if isinstance(value, str | torch.device) and str(value).startswith("cuda") else value


def without_flash_attention() -> None:
    """Loads what is to use flash attention, which has no CPU kernels, with SDPA."""
    stock = PreTrainedModel.from_pretrained.__func__

    def from_pretrained(cls: Any, *given: Any, **arguments: Any) -> Any:
        if arguments.get("attn_implementation") == "flash_attention_2":
            arguments["attn_implementation"] = "sdpa"
        return stock(cls, *given, **arguments)

    PreTrainedModel.from_pretrained = classmethod(from_pretrained)


if __name__ == "__main__":
    torch.set_num_threads(1)
    program = sys.argv[0]
    without_flash_attention()
    with OnCpu():
        for line in json.loads(sys.argv[1]):
            sys.argv = [program, *line]
            runpy.run_module("illava_hooks.integrations.vlmevalkit", run_name="__main__", alter_sys=True)
