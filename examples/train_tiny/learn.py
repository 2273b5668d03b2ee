"""Losses, and the optimiser."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from batches import HEADS, IGNORE, Batch
from models import WIDTH
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


class _HalfLinear(torch.autograd.Function):
    """A linear layer whose matrix products are taken in bfloat16, forwards and backwards; all else is float32.

    On processors with bfloat16 dot products these take less than half the time. Autocast would run attention and
    activations in bfloat16 as well, whose gradients are slower there than in float32.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        flat, half = inputs.flatten(0, -2).bfloat16(), weight.bfloat16()
        ctx.save_for_backward(flat, half)
        ctx.has_bias = bias is not None
        outputs = (flat @ half.T).float()
        return (outputs if bias is None else outputs.add_(bias)).unflatten(0, inputs.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        flat, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        half = rows.bfloat16()
        inputs = (half @ weight).float().unflatten(0, grad.shape[:-1])
        return inputs, (half.T @ flat).float(), rows.sum(0) if ctx.has_bias else None


def _half_linear(layer: nn.Linear, inputs: Tensor) -> Tensor:
    return _HalfLinear.apply(inputs, layer.weight, layer.bias)


class Learner(nn.Module):
    """A stock model with linear heads on its vision encoder, for the dense loss only."""

    class_weight: Tensor

    def __init__(self, model: Any, tokenizer: Any, half_products: bool = False) -> None:
        """Takes a fresh model; ``half_products`` takes the matrix products of its linear layers in bfloat16."""
        super().__init__()
        self.model = model
        self.heads = nn.ModuleDict({name: nn.Linear(WIDTH, classes) for name, classes in HEADS.items()})
        self.register_buffer("class_weight", torch.tensor([0.15] + [1.0] * (HEADS["class"] - 1)), persistent=False)
        self.tokenizer = tokenizer
        base = model.model
        self._llava = model.config.model_type == "llava_onevision"
        last = base.multi_modal_projector if self._llava else base.visual.merger
        for layer in model.modules() if half_products else ():
            if isinstance(layer, nn.Linear):
                layer.forward = partial(_half_linear, layer)  # type: ignore[method-assign]
        self._seen: list[tuple[Tensor, Tensor]] = []
        self.token_heads: nn.ModuleDict | None = None
        last.register_forward_hook(lambda _, args, output: self._seen.append((args[0], output)))

    def add_token_heads(self) -> None:
        """Linear heads behind the projector as well: what they ask for must not get lost in it."""
        self.token_heads = nn.ModuleDict({name: nn.Linear(WIDTH, classes) for name, classes in HEADS.items()})

    def visual_tokens(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Projected visual tokens of all rows, (tokens, width); and in front of and behind the projector.

        The last two are in the encoder's order: (patches, width) and, for Qwen2-VL one for four, (tokens, width).
        """
        self._seen.clear()
        base = self.model.model
        features = (base.get_video_features if batch.video else base.get_image_features)(**batch.pixels)
        pooled = features.pooler_output
        tokens = pooled.flatten(0, -2) if isinstance(pooled, Tensor) else torch.cat(list(pooled))
        patches, projected = self._seen.pop()
        return tokens, (patches.flatten(0, -2), projected.flatten(0, -2))

    def dense_loss(self, seen: tuple[Tensor, Tensor], targets: dict[str, Tensor]) -> Tensor:
        """Sum over the heads of what each patch shows, and with token heads of what each projected token shows."""
        losses = []
        for heads, features in zip((self.heads, self.token_heads), seen, strict=True):
            for name, head in heads.items() if heads is not None else ():
                weight = self.class_weight if name == "class" else None
                wanted = targets[name].view(len(features), -1).amax(1)  # of four patches, one that shows a thing
                wide = features if heads is self.heads else features / features.square().mean().sqrt().detach()
                losses.append(cross_entropy(head(wide), wanted, weight=weight, ignore_index=IGNORE))
        return torch.stack([loss for loss in losses if not loss.isnan()]).sum()

    def answer_loss(self, batch: Batch, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Next-token loss on the answers of a packed batch, and which first words were right.

        One sequence holds the pictures and all their questions: every question sees the pictures and itself, at the
        positions that it would have alone.

        Returns:
            The loss; right or not (questions,); questions in the order of the rows.
        """
        rows, prefix = len(batch.questions), len(batch.prompt)
        pieces = [[self._segment(q.text, q.answer) for q in questions] for questions in batch.questions]
        length = max(sum(map(len, row)) for row in pieces)
        ids = torch.full((rows, length), self.tokenizer.pad_token_id)
        owner = torch.full((rows, length), -1)
        offset = torch.zeros((rows, length), dtype=torch.long)
        answers = torch.zeros((rows, length), dtype=torch.bool)
        for row, segments in enumerate(pieces):
            start = 0
            for number, segment in enumerate(segments):
                part = slice(start, start + len(segment))
                ids[row, part], owner[row, part] = torch.tensor(segment), number + 1
                offset[row, part] = torch.arange(len(segment))
                answers[row, part.stop - 3 : part.stop - 1] = True  # predict the answer and the end
                start = part.stop
        base = self.model.model
        prompt = batch.prompt.expand(rows, -1)
        embeds = base.get_input_embeddings()(torch.cat([prompt, ids], 1))
        image = self.model.config.video_token_id if batch.video else self.model.config.image_token_id
        mask = torch.cat([prompt == image, torch.zeros_like(ids, dtype=torch.bool)], 1)
        embeds = embeds.masked_scatter(mask[..., None], tokens)
        owner = torch.cat([torch.zeros(rows, prefix, dtype=torch.long), owner], 1)
        allowed = torch.ones(owner.shape[1], owner.shape[1], dtype=torch.bool).tril()
        allowed = allowed & ((owner[:, None, :] == 0) | (owner[:, None, :] == owner[:, :, None]))
        bias = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)  # once, not per layer
        hidden = base.language_model(
            inputs_embeds=embeds,
            attention_mask={"full_attention": bias[:, None]},
            position_ids=self._positions(batch, offset),
            use_cache=False,
        ).last_hidden_state[:, prefix:]
        at = answers.nonzero(as_tuple=True)
        logits = self.model.lm_head(hidden[at])
        wanted = ids[at[0], at[1] + 1]
        right = (logits.argmax(-1) == wanted)[::2]
        return cross_entropy(logits, wanted), right, logits

    def _segment(self, question: str, answer: str) -> list[int]:
        text = f"{question} <|im_end|><|im_start|>assistant {answer} <|im_end|>"
        return self.tokenizer(text).input_ids

    def _positions(self, batch: Batch, offset: Tensor) -> Tensor:
        """Positions of the prefix, and of each segment as if it stood alone behind it."""
        prefix = len(batch.prompt)
        if self._llava:
            return torch.cat([torch.arange(prefix).expand(len(offset), -1), prefix + offset], 1)
        first, _ = self.model.model.get_rope_index(batch.prompt[None], **batch.extra)
        after = first.max() + 1 + offset
        return torch.cat([first.expand(-1, len(offset), -1), after.expand(3, -1, -1)], -1)

    @torch.no_grad()
    def shrink_tokens(self, batch: Batch) -> None:
        """Gives the projected visual tokens RMS 1, by the projector's last layer."""
        tokens, _ = self.visual_tokens(batch)
        base = self.model.model
        last = base.multi_modal_projector.linear_2 if self._llava else base.visual.merger.mlp[2]
        for parameter in last.parameters():
            parameter.div_(tokens.square().mean().sqrt())

    @torch.no_grad()
    def match_scales(self, batch: Batch) -> None:
        """Gives text embeddings the RMS of the projected visual tokens, so that neither drowns the other."""
        tokens, _ = self.visual_tokens(batch)
        weight = self.model.model.get_input_embeddings().weight
        weight.mul_(tokens.square().mean().sqrt() / weight.square().mean().sqrt())


def optimizers(learner: Learner, muon_rate: float, adam_rate: float) -> list[torch.optim.Optimizer]:
    """Muon on the matrices of the layers, AdamW on all else."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in learner.named_parameters():
        hidden = parameter.dim() == 2 and (
            ".layers." in name or ".blocks." in name or "projector" in name or "merger" in name
        )
        (matrices if hidden else rest).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=muon_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=adam_rate, betas=(0.9, 0.98), weight_decay=0.01),
    ]
