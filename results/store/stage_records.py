"""What ``visibench analyze`` measured: numbers by decoder layer and by window, and the stages found in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from ...errors import DataError
from . import disk
from .records import Environment, Record

STAGES_SCHEMA: Literal[1] = 1
STAGES = "stages.json"
ALL = "all"
"""All tasks together."""
QUANTITIES = {
    "last_share": "attention of the last prompt token on visual tokens, share",
    "last_entropy": "spread of it over visual tokens, entropy / that of an even spread",
    "last_strongest": "attention of the last prompt token on the strongest visual token, share",
    "last_token": "number of that token in the prompt",
    "text_share": "attention of text behind the image on visual tokens, share",
    "text_entropy": "spread of it over visual tokens, entropy / that of an even spread",
    "text_strongest": "attention of text on the strongest visual token (the sink), share",
    "text_token": "number of that token in the prompt",
    "value_sink": "L1 norm of the sink's value vector, mean over heads",
    "value_others": "the same of the other visual tokens, mean",
    "contribution_cosine": "least cos(a - c_j, a)",
    "contribution_largest": "largest |c_j|",
    "contribution_carrying": "visual tokens that carry 90 % of the sum of |c_j|",
    "contribution_above_T": "visual tokens with |c_j| > T",
    "lens_hidden_rank": "rank of the answer's first token, read from the hidden state behind the layer",
    "lens_hidden_first": "share of questions where it is the first",
    "lens_visual_rank": "rank of it, read from what visual tokens add in the layer",
    "lens_visual_first": "share of questions where it is the first",
}
"""What is measured by layer, with its unit; ranks are geometric means."""
EFFECTS = {
    "kl": "KL(dense ‖ without vision in the window) of the next token, nats",
    "agreement": "share of answers that are the dense model's",
    "score": "lmms-eval's headline score",
}


class Mean(Record):
    """A value with its 95 % interval, clustered by image; NaN limits where one image says nothing."""

    value: float
    low: float
    high: float


class Curve(Record):
    """One of :data:`QUANTITIES` on the questions of a task, or of :data:`ALL`; a mean for each of ``layers``."""

    task: str
    quantity: str
    layers: list[int]
    means: list[Mean]


class WindowEffect(Record):
    """Layers ``first`` … ``end`` - 1 without vision. ``effects``: :data:`EFFECTS`, by task or :data:`ALL`.

    ``kind``: text blind, ``masked`` before the softmax or its mass ``moved`` to the first visual token's value; or all
    visual tokens ``dropped``.
    """

    kind: Literal["masked", "moved", "dropped"]
    first: int
    end: int
    effects: dict[str, dict[str, Mean]]

    def lies(self, span: Literal["single", "prefix", "suffix"], depth: int) -> bool:
        """Whether it is one layer, or the first ones, or the last ones, of a decoder of ``depth`` layers."""
        return {"single": self.end == self.first + 1, "prefix": self.first == 0, "suffix": self.end == depth}[span]


class TopTokens(Record):
    """The tokens that most often rank first in the logit lens of a layer, with the number of questions."""

    kind: Literal["hidden", "visual"]
    layer: int
    tokens: list[tuple[str, int]]


class StagesFound(Record):
    """Where fusion begins and ends, by what is called unchanged: ``by`` the next token, or the whole answer.

    ``begin`` and ``end`` are medians over the ``needed`` of ``asked`` questions that need their image, None without
    any; ``begins`` and ``ends`` their quartiles. ``none_because``: why these are no stages; empty where they are.
    """

    by: Literal["next token", "answer"]
    task: str
    begin: int | None
    end: int | None
    begins: tuple[float, float] | None
    ends: tuple[float, float] | None
    needed: int
    asked: int
    none_because: str = ""

    def said(self, depth: int) -> str:
        """In words."""
        if self.none_because:
            return f"no stages found: {self.none_because}"
        parts = (("shallow", 0, self.begin), ("middle", self.begin, self.end), ("deep", self.end, depth))
        return ", ".join(f"{name} {a}–{b - 1}" for name, a, b in parts if a is not None and b is not None and b > a)


class AnalysedTask(Record):
    """Questions of a task: ``asked`` of ``total`` from ``origin``, about so many ``images``."""

    asked: int
    total: int
    origin: str
    images: int


class StageRecord(Record):
    """The outcome of an analysis. ``checkpoint``: hash of a local checkpoint. ``rule``: how stages are found."""

    schema_version: Literal[1] = STAGES_SCHEMA
    model: str
    checkpoint: str
    depth: int
    layers: list[int]
    seed: int
    batch_size: int
    tasks: dict[str, AnalysedTask]
    curves: list[Curve]
    windows: list[WindowEffect]
    top_tokens: list[TopTokens]
    stages: list[StagesFound]
    rule: str
    tolerance_nats: float
    quantities: dict[str, str] = QUANTITIES | EFFECTS
    environment: Environment

    def curve(self, quantity: str, task: str = ALL) -> Curve | None:
        """The curve of a quantity; None if it was not measured."""
        return next((c for c in self.curves if (c.quantity, c.task) == (quantity, task)), None)

    def found(self, by: str = "next token", task: str = ALL) -> StagesFound | None:
        """The stages by one of the two criteria; None if they were not asked for."""
        return next((s for s in self.stages if (s.by, s.task) == (by, task)), None)


def read(file: Path) -> StageRecord:
    """An analysis from its file. Raises :class:`DataError` for what is none."""
    try:
        content: Any = json.loads(disk.read(file))
        return StageRecord.model_validate(content)
    except OSError as error:
        raise DataError(
            f"cannot read {file} ({error.strerror or error}): give a file of `visibench analyze`"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is no file of `visibench analyze`: {str(error).splitlines()[0]}") from error
