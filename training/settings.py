"""Settings of a training run, read from YAML.

Two keys beside those of ``train.yaml``: ``base``, a file beside this one whose keys hold where nothing else is said,
and ``stretch: {after: step, factor: f}``, which makes all phases from that step on, and the knots of ``cosine`` in
them, longer by the factor.
"""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml


def read(path: Path) -> dict[str, Any]:
    """The settings in ``path``, with those of its base."""
    config = yaml.safe_load(path.read_text())
    if "base" in config:
        config = read(path.parent / config.pop("base")) | config
    return stretched(config, **config.pop("stretch")) if "stretch" in config else config


def stretched(config: dict[str, Any], after: int, factor: float) -> dict[str, Any]:
    """All that comes behind step ``after``, where a phase begins, made longer by ``factor``."""
    starts = list(accumulate((phase["steps"] for phase in config["phases"]), initial=0))
    if after not in starts:
        raise ValueError(f"stretch: no phase begins at step {after}, but at {starts[:-1]}")
    moved = lambda step: round(after + max(step - after, 0) * factor) if step > after else step  # noqa: E731
    ends = [moved(start) for start in starts]
    phases = [
        phase | {"steps": end - start} for phase, start, end in zip(config["phases"], ends, ends[1:], strict=False)
    ]
    return config | {"phases": phases, "cosine": [[moved(step), value] for step, value in config["cosine"]]}
