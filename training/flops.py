"""Multiply-adds of a training run: ``python -m visibench.training.flops --config train.yaml``.

Matrix products, as torch's flop counter sees them: what the vision tower, the projector, the decoder and the head do
forward, and twice that backward, once where only one factor has a gradient. A multiply-add is two FLOPs.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..synthetic.scene import GRID, PATCH
from . import settings
from .batches import Packer, Phase
from .build import vocabulary
from .staged import Staging

TOKENS = GRID * GRID


def sight_macs(model: dict[str, int], images: int) -> int:
    """A step's multiply-adds, forward and backward, up to the projected patches, and for naming what they show."""
    width, words, tokens = model["hidden"], vocabulary(), TOKENS + 1  # CLS
    block = tokens * (4 + 2 * 3) * width**2 + 2 * tokens**2 * width
    blocks = (model["vision_layers"] - 1) * block + 2 * TOKENS * width**2  # and the projector
    # Pixels have no gradient, and neither has the table that the patches are compared with.
    return images * (3 * blocks + 2 * TOKENS * width * (3 * PATCH**2 + words))


def decoder_macs(model: dict[str, int], phase: Phase, staging: Staging | None, before: int, slot: int) -> int:
    """A step's multiply-adds of decoder and head, forward and backward.

    ``before``: tokens before the image. ``slot``: tokens of a question with its answer. Products that the packed
    attention masks afterwards count, for they are done.
    """
    width, in_slots = model["hidden"], phase.questions * slot
    total = in_slots * width * vocabulary()
    for layer in range(model["layers"]):
        common = before + (staging.there(layer, phase.patches) if staging else phase.patches)
        total += (common + in_slots) * width * (4 * width + 3 * model["intermediate"])
        total += 2 * width * (common**2 + in_slots * (common + slot))
    return 3 * phase.images * total


def steps(config: dict[str, Any], every: int = 1) -> Iterator[tuple[int, int, int]]:
    """(number of the phase, tokens before the image, tokens of a slot, as the data has it) of every n-th step."""
    packer, first = Packer(), 0
    for number, phase in enumerate(Phase(**phase) for phase in config["phases"]):
        for step in range(first, first + phase.steps, every):
            slot = packer.batch(phase, config["seed"], step)["ids"].shape[2] if phase.answers else 0
            yield number, len(packer.prefix), slot
        first += phase.steps


def run_macs(config: dict[str, Any], every: int = 1) -> list[tuple[Phase, float, float]]:
    """(phase, multiply-adds up to the projector, those of decoder and head) of every phase; of each n-th step alone."""
    staging, model = Staging(**config["staged"]) if "staged" in config else None, config["model"]
    phases = [Phase(**phase) for phase in config["phases"]]
    sums: list[list[int]] = [[] for _ in phases]
    for number, before, slot in steps(config, every):
        phase = phases[number]
        sums[number].append(decoder_macs(model, phase, staging, before, slot) if phase.answers else 0)
    return [
        (phase, phase.steps * sight_macs(model, phase.images), phase.steps * sum(each) / len(each))
        for phase, each in zip(phases, sums, strict=True)
    ]


def main() -> None:
    """Print, phase by phase, what the run does."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("train.yaml"))
    parser.add_argument("--every", type=int, default=1, help="look at every n-th step of a phase alone")
    arguments = parser.parse_args()
    phases = run_macs(settings.read(arguments.config), arguments.every)
    print("phase steps  10^9 multiply-adds a step: sight, decoder")
    for number, (phase, sight, decoder) in enumerate(phases):
        print(f"{number:5} {phase.steps:5} {sight / phase.steps / 1e9:10.2f} {decoder / phase.steps / 1e9:10.2f}")
    sight, decoder = (sum(column) for column in list(zip(*phases, strict=True))[1:])
    print(f"10^12 multiply-adds of the run: sight {sight / 1e12:.3f}, decoder {decoder / 1e12:.3f}, ", end="")
    print(f"together {(sight + decoder) / 1e12:.3f}")


if __name__ == "__main__":
    main()
