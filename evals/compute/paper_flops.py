"""Compute as papers print it: their formulas, their figures, and what the same settings really execute.

All count visual tokens n at the input of each decoder layer; d is the hidden size, m that of the FFN. The *paper*
convention, PyramidDrop's and most others', is the sum over layers of 4nd² + 2n²d + 3ndm, visual tokens alone.
``paper_flops.yaml`` lists printed figures, each with the formula and the plan of tokens that lead to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ...engine.layout import TokenLayout
from ...engine.trace import Trace
from ...models.adapters import Geometry
from ...models.load import load_model
from .flops import Flops, executed

PREFIX, QUESTION = 35, 25
"""Text tokens in front of the image and behind it, where a formula does not say how many there are."""

DECODER = ("projections", "ffn", "attention", "scoring")
PREFILL = ("vision_tower", "projector", *DECODER, "lm_head")
ATTENTION = ("attention", "scoring")


# ---- formulas -------------------------------------------------------------------------------------------------------


def paper(tokens: np.ndarray, geometry: Geometry, text: Any = 0) -> np.ndarray:
    """MACs (B,) in the paper convention. ``tokens``: (B, layers), visual tokens at each layer's input; no text."""
    return _layers(tokens, geometry, 3).sum(1)


def _layers(n: np.ndarray, geometry: Geometry, ffn_matrices: int) -> np.ndarray:
    d = geometry.hidden
    return 4 * n * d**2 + 2 * n**2 * d + ffn_matrices * n * d * geometry.intermediate


def _sequence(tokens: np.ndarray, geometry: Geometry, text: Any) -> np.ndarray:
    return _layers(tokens + _column(text), geometry, 3).sum(1)


def _fastv(tokens: np.ndarray, geometry: Geometry, text: Any) -> np.ndarray:
    return _layers(tokens + _column(text), geometry, 2).sum(1)


def _visipruner(tokens: np.ndarray, geometry: Geometry, text: Any) -> np.ndarray:
    """Attention is free in the layers that still hold all tokens of a prompt that loses some."""
    shallow = (tokens == tokens[:, :1]) & (tokens < tokens[:, :1]).any(1, keepdims=True)
    return (_layers(tokens, geometry, 3) - shallow * 2 * tokens**2 * geometry.hidden).sum(1)


def _visipruner_attention(tokens: np.ndarray, geometry: Geometry, text: Any) -> np.ndarray:
    """Only layers behind the filter count; text's share has a factor 2 in the dense model alone, as printed."""
    n, t, d = tokens, _column(text), geometry.hidden
    middle = n < n[:, :1]
    filtered = middle * (2 * n**2 + n * t) * d
    return np.where(middle.any(1), filtered.sum(1), (2 * (n**2 + n * t) * d).sum(1))


def _mean_attention(tokens: np.ndarray, geometry: Geometry, text: Any) -> np.ndarray:
    n = tokens.mean(1, keepdims=True)
    return (geometry.layers * 2 * (n**2 + n * _column(text)) * geometry.hidden)[:, 0]


def _column(text: Any) -> np.ndarray:
    return np.asarray(text, dtype=float).reshape(-1, 1)


@dataclass(frozen=True)
class Formula:
    """How a paper counts, in ``words``; ``macs`` maps visual tokens (B, layers), geometry and text tokens to (B,).

    ``parts``: the components of executed compute that it stands for. ``operations`` that it counts a multiply-add.
    """

    words: str
    macs: Callable[[np.ndarray, Geometry, Any], np.ndarray]
    parts: tuple[str, ...] = PREFILL
    operations: int = 1


FORMULAS = {
    "visual": Formula("Σ 4nd² + 2n²d + 3ndm, n visual tokens", paper),
    "sequence": Formula("Σ 4nd² + 2n²d + 3ndm, n all tokens", _sequence),
    "fastv": Formula("mean over layers of 4nd² + 2n²d + 2ndm, n all tokens", _fastv, DECODER),
    "shortv": Formula("2 Σ 4nd² + 2n²d + 3ndm, n all tokens", lambda *a: 2 * _sequence(*a), operations=2),
    "visipruner": Formula("visual, without 2n²d in layers in front of the filter", _visipruner),
    "visipruner attention": Formula(
        "Σ 2n²d + n·t·d behind the filter, against Σ 2(n²d + n·t·d)", _visipruner_attention, ATTENTION
    ),
    "mean attention": Formula("n² + n·t, n the mean over layers", _mean_attention, ATTENTION),
}


def by_formula(trace: Trace, geometry: Geometry, formula: str = "visual") -> np.ndarray:
    """What a paper would count for one traced prefill: MACs, or its own unit of half of that, (B,)."""
    tokens = trace.visual_counts().double().numpy()
    text = np.array(trace.prompt.lengths) - np.array(trace.prompt.visual_counts)
    return FORMULAS[formula].macs(tokens, geometry, text)


# ---- what a plan executes -------------------------------------------------------------------------------------------


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Work(_Record):
    """What a method computes beyond a plain prefill of its tokens, as decoder layers (from 0) in which it does so.

    ``last_row``: attention weights of the last token. ``contributions``: these, and its output times the value of every
    token. ``text_rows``: weights of all text behind the image. ``ahead``: weights of the last token that the layer
    would compute on the tokens in front of its cut. The keys of all of them are projected for it, and the layer takes
    over those of the tokens that stay; queries and values are the last token's alone. ``raters``: products of visual
    with text states. ``clusters``: (layer, tokens, clusters), distances among tokens and to the centres.
    ``text_edits``: attention of all text behind the image once more, over other values.
    """

    last_row: tuple[int, ...] = ()
    contributions: tuple[int, ...] = ()
    text_rows: tuple[int, ...] = ()
    ahead: tuple[int, ...] = ()
    raters: tuple[int, ...] = ()
    clusters: tuple[tuple[int, int, int], ...] = ()
    text_edits: tuple[int, ...] = ()


def planned(tokens: Tensor, prompt: int, work: Work, g: Geometry, prefix: int = PREFIX, text: int = QUESTION) -> Trace:
    """The trace of a prefill that never ran: ``prompt`` visual tokens between ``prefix`` and ``text`` text tokens.

    ``tokens``: int (B, layers), visual tokens at each layer's input.
    """
    layout = lambda counts: TokenLayout.batch([_row(n, prefix, text) for n in counts])  # noqa: E731
    trace = Trace(layout([prompt] * len(tokens)), g.layers)
    for counts in tokens.T.tolist():
        trace.enter(layout(counts))
    length = tokens + prefix + text
    before = torch.cat([torch.full_like(length[:, :1], prompt + prefix + text), length], dim=1)
    heads, kv_heads = g.heads * g.head_size, g.kv_heads * g.head_size
    for layer in work.last_row:
        trace.scored(layer, length[:, layer] * heads)
    for layer in work.contributions:
        trace.scored(layer, 2 * length[:, layer] * heads)
    for layer in work.text_rows:
        trace.scored(layer, text * length[:, layer] * heads)
    for layer in work.ahead:
        gone = before[:, layer] - length[:, layer]
        trace.scored(layer, g.hidden * (gone * kv_heads + heads + kv_heads) + before[:, layer] * heads)
    for layer in work.raters:
        trace.scored(layer, tokens[:, layer] * text * g.hidden)
    for layer, count, clusters in work.clusters:
        trace.scored(layer, torch.full_like(tokens[:, 0], count * (count + clusters) * g.hidden))
    for layer in work.text_edits:
        trace.attended(layer, text * length[:, layer])
    return trace


@cache
def _row(count: int, prefix: int, text: int) -> TokenLayout:
    return TokenLayout.from_spans(prefix + count + text, [(prefix, prefix + count)] if count else [])


# ---- printed figures ------------------------------------------------------------------------------------------------

UNITS: dict[str, Callable[[float, float, int], float]] = {
    "TFLOPs": lambda macs, dense, layers: macs * 1e-12,
    "GFLOPs a layer": lambda macs, dense, layers: macs * 1e-9 / layers,
    "% of dense": lambda macs, dense, layers: 100 * macs / dense,
    "% less": lambda macs, dense, layers: 100 * (1 - macs / dense),
}
Agreement = Literal["rounded", "cut", "differs"]


class Claim(_Record):
    """A printed figure; ``paper_flops.yaml`` says what the fields mean. ``method``: this package's, by its spec."""

    paper: str
    where: str
    setting: str
    model: str = "llava-1.5-7b"
    formula: str
    prompt: int = 576
    text: int = 0
    tokens: tuple[tuple[int, float], ...]
    printed: str
    unit: str
    agrees: Agreement = "rounded"
    method: str = "none"
    executed: Work | None = None
    note: str = ""

    @property
    def prompt_text(self) -> int:
        """Text tokens of the prompt for which executed compute is stated: as many as the formula counts, if it does."""
        return self.text or PREFIX + QUESTION

    @property
    def plan(self) -> np.ndarray:
        """Visual tokens at the input of each decoder layer (layers,)."""
        layers, counts = zip(*self.tokens, strict=True)
        return np.repeat(np.array(counts, dtype=float), layers)


@dataclass(frozen=True)
class Reproduction:
    """A claim, what its formula gives and what its setting executes, in the claim's unit (None: not known)."""

    claim: Claim
    recomputed: float
    executed: float | None

    @property
    def agreement(self) -> Agreement:
        """Whether the formula gives the printed figure by rounding, by cutting digits off, or not at all."""
        digits = len(self.claim.printed.partition(".")[2])
        if f"{self.recomputed:.{digits}f}" == self.claim.printed:
            return "rounded"
        cut = np.floor(self.recomputed * 10**digits) / 10**digits
        return "cut" if f"{cut:.{digits}f}" == self.claim.printed else "differs"

    @property
    def ratio(self) -> float | None:
        """Executed over printed compute; None for shares."""
        shared = self.claim.unit.startswith("%")
        return None if self.executed is None or shared else self.executed / float(self.claim.printed)


def claims() -> list[Claim]:
    """All printed figures of ``paper_flops.yaml``."""
    return [Claim(**entry) for entry in _file()["claims"]]


def reproduce(claim: Claim) -> Reproduction:
    """Recompute a printed figure by its paper's formula, and what the setting executes on the stated prompt."""
    geometry, formula = sizes(claim.model), FORMULAS[claim.formula]
    plan, dense = claim.plan[None], np.full((1, geometry.layers), float(claim.prompt))

    def printed(tokens: np.ndarray, work: Work) -> float:
        return float(formula.macs(tokens, geometry, claim.text)[0])

    def ran(tokens: np.ndarray, work: Work) -> float:
        flops = run(tokens, claim.prompt, work, geometry, claim.prompt_text - PREFIX)
        return formula.operations * float(np.mean(sum(getattr(flops, part) for part in formula.parts)))

    def figure(count: Callable[[np.ndarray, Work], float], work: Work) -> float:
        return UNITS[claim.unit](count(plan, work), count(dense, Work()), geometry.layers)

    return Reproduction(claim, figure(printed, Work()), None if claim.executed is None else figure(ran, claim.executed))


def run(tokens: np.ndarray, prompt: int, work: Work, geometry: Geometry, question: int = QUESTION) -> Flops:
    """Executed MACs of a plan (1, layers) of visual tokens; tenths of a token are that share of ten prompts."""
    prompts = 10 if (tokens % 1).any() else 1
    rows = np.floor(tokens + np.arange(prompts)[:, None] / prompts + 1e-9)
    return executed(planned(torch.from_numpy(rows).long(), prompt, work, geometry, text=question), geometry)


def arxiv(name: str) -> str:
    """arXiv number of a paper."""
    return _file()["papers"][name]


@cache
def sizes(model: str) -> Geometry:
    """Sizes of a model in ``paper_flops.yaml`` or among the published ones."""
    listed = _file()["models"].get(model)
    return Geometry(**listed) if listed else load_model(model, weights="meta").geometry


@cache
def _file() -> dict[str, Any]:
    return yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
