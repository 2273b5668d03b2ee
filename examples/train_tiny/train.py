"""Trains one tiny model: the vision encoder on what every patch shows, all of it on answers, then pairs and clips.

    python examples/train_tiny/train.py llava_onevision --output runs/llava_onevision

Interrupt it as you like: the same command goes on where the last checkpoint was written. A step's data follow from
the seed and the step's number alone, so a resumed run equals an uninterrupted one.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batches import KINDS_ASKED, SIZES, Batch, clip_batch, image_batch, pair_batch, picture_batch
from easy import easy_questions
from learn import Learner, optimizers
from models import FAMILIES, build_model, build_processor
from tqdm import tqdm

from illava_hooks.tiny.questions import QUESTION_KINDS

PHASES = ("encoder", "answers", "pairs and clips")
#: Kinds of batches in the second and the third phase.
SHARES = {
    "answers": {"image": 0.64, "pair": 0.12, "clip": 0.12, "easy": 0.12},
    "pairs and clips": {"image": 0.4, "pair": 0.35, "clip": 0.17, "easy": 0.08},
}
_STREAMS = {"encoder": 1, "answers": 0, "pairs and clips": 2}
SIZE_SHARES = (0.2, 0.4, 0.2, 0.2)
CHECKPOINT_EVERY, VALIDATE_EVERY = 200, 800


def step_batch(processor: Any, seed: int, step: int, phase: str) -> Batch:
    """The data of one step."""
    rng = np.random.default_rng([seed, _STREAMS[phase], step])
    size = SIZES[int(rng.choice(len(SIZES), p=SIZE_SHARES))]
    if phase == "encoder":
        return image_batch(processor, rng, 24, size, asked=0, digit_share=0.6 if rng.random() < 0.5 else None)
    kind = str(rng.choice(list(SHARES[phase]), p=list(SHARES[phase].values())))
    if kind == "pair":
        return pair_batch(processor, rng, 16)
    if kind == "clip":
        return clip_batch(processor, rng, 16)
    if kind == "easy":
        return picture_batch(processor, *easy_questions(rng, 16))
    return image_batch(processor, rng, 16, size, kinds=KINDS_ASKED if phase == "answers" else QUESTION_KINDS)


def rate(phase: str, step: int, steps: int, last: float = 0.7) -> float:
    """Learning rate over its peak: a short warm-up, then constant; the second and the third phase go down to 0.

    Args:
        phase: one of ``PHASES``.
        step: of the phase.
        steps: of the phase in all.
        last: where the third phase starts.
    """
    left = (steps - step) / steps
    return min(1.0, (step + 1) / 50) * {"encoder": 1.0, "answers": min(1.0, 2 * left)}.get(phase, last * left)


def validate(learner: Learner, processor: Any, batches: int = 12) -> dict[str, float]:
    """Share of right first words per kind of question, on validation scenes and digits."""
    right: dict[str, list[bool]] = {}
    learner.eval()
    with torch.no_grad():
        for index in range(batches):
            rng = np.random.default_rng([10_001, index])
            size = SIZES[index % 4]
            make = pair_batch if index == 8 else clip_batch if index == 9 else None
            batch = (
                make(processor, rng, 16, "validation")
                if make
                else image_batch(processor, rng, 16, size, "validation", asked=18)
            )
            tokens, _ = learner.visual_tokens(batch)
            _, hits, _ = learner.answer_loss(batch, tokens)
            for question, hit in zip([q for row in batch.questions for q in row], hits.tolist(), strict=True):
                right.setdefault(question.kind, []).append(hit)
    learner.train()
    return {kind: sum(hits) / len(hits) for kind, hits in sorted(right.items())}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--output", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--encoder-steps", type=int, default=1800)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--cut", type=int, help="end the second phase at this step, with its rates unchanged")
    parser.add_argument("--last-steps", type=int, default=1200)
    parser.add_argument("--last-rate", type=float, default=0.7, help="where the third phase starts, of the peak")
    parser.add_argument("--token-heads", action="store_true", help="third phase: dense loss behind the projector too")
    parser.add_argument("--phases", type=int, default=len(PHASES), help="stop after so many")
    parser.add_argument("--validation-batches", type=int, default=12)
    parser.add_argument("--muon-rate", type=float, default=4e-3)
    parser.add_argument("--adam-rate", type=float, default=2e-3)
    parser.add_argument("--half-products", action="store_true", help="bfloat16 matrix products: faster on some CPUs")
    parser.add_argument("--dense-weight", type=float, default=0.15, help="of the dense loss in the second phase")
    parser.add_argument("--last-dense-weight", type=float, default=0.15, help="in the third phase")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / "checkpoint.pt"

    processor = build_processor(arguments.family)
    learner = Learner(build_model(arguments.family, arguments.seed), processor.tokenizer, arguments.half_products)
    history: list[dict[str, Any]] = []
    phase, first = 0, 0
    algorithms = optimizers(learner, arguments.muon_rate, arguments.adam_rate)
    if file.exists():
        state = torch.load(file, weights_only=True)
        if arguments.token_heads and state["phase"] > 1:
            learner.add_token_heads()
            algorithms = optimizers(learner, arguments.muon_rate, arguments.adam_rate)
        learner.load_state_dict(state["learner"])
        for algorithm, saved in zip(algorithms, state["optimizers"], strict=True):
            algorithm.load_state_dict(saved)
        phase, first, history = state["phase"], state["step"], json.loads(state["history"])
    peaks = [arguments.muon_rate, arguments.adam_rate]

    def save(phase: int, step: int) -> None:
        state = {
            "learner": learner.state_dict(),
            "optimizers": [a.state_dict() for a in algorithms],
            "phase": phase,
            "step": step,
            "history": json.dumps(history),
        }
        torch.save(state, file.with_suffix(".new"))
        file.with_suffix(".new").replace(file)

    while phase < arguments.phases:
        steps, name = (arguments.encoder_steps, arguments.steps, arguments.last_steps)[phase], PHASES[phase]
        if phase == 1 and first == 0:
            learner.match_scales(step_batch(processor, arguments.seed, 0, PHASES[0]))
            algorithms = optimizers(learner, arguments.muon_rate, arguments.adam_rate)
        if phase == 2 and first == 0 and arguments.token_heads:
            learner.add_token_heads()
            learner.shrink_tokens(step_batch(processor, arguments.seed, 0, PHASES[0]))
            algorithms = optimizers(learner, arguments.muon_rate, arguments.adam_rate)
        end = arguments.cut if phase == 1 and arguments.cut else steps
        bar = tqdm(range(first, end), initial=first, total=end, desc=name, mininterval=5)
        averages: dict[str, float] = {}
        began = time.process_time()
        for step in bar:
            batch = step_batch(processor, arguments.seed, step, name)
            for algorithm, peak in zip(algorithms, peaks, strict=True):
                for group in algorithm.param_groups:
                    group["lr"] = peak * rate(name, step, steps, arguments.last_rate)
                algorithm.zero_grad()
            tokens, shown = learner.visual_tokens(batch)
            seen: dict[str, float] = {}
            loss = torch.zeros(())
            if batch.targets:
                dense = learner.dense_loss(shown, batch.targets)
                loss = loss + dense * (1.0, arguments.dense_weight, arguments.last_dense_weight)[phase]
                seen["dense"] = dense.item()
            if phase > 0:
                answer, hits, _ = learner.answer_loss(batch, tokens)
                loss = loss + answer
                seen |= {"answer": answer.item(), "right": hits.float().mean().item()}
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
            for algorithm in algorithms:
                algorithm.step()
            for key, value in seen.items():
                averages[key] = 0.98 * averages.get(key, value) + 0.02 * value
            if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == end:
                row = {"phase": phase, "step": step + 1, "cpu_s": round(time.process_time() - began), **averages}
                if phase > 0 and ((step + 1) % VALIDATE_EVERY == 0 or step + 1 == end):
                    row |= validate(learner, processor, arguments.validation_batches)
                history.append({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
                (arguments.output / "history.json").write_text(json.dumps(history, indent=0))
                save(phase, step + 1)
                tqdm.write(json.dumps(history[-1]))
        phase, first = phase + 1, 0
        save(phase, first)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from the last checkpoint")
