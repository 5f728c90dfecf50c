"""Settings before they are asked: what each leaves of every question, layer by layer, and what that costs.

Where options and prompt decide how many tokens stay, the method says so itself. Where thresholds decide, what they are
compared with is looked at once in each question, and the numbers under any threshold follow from that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..engine.contract import Forward, Method
from ..engine.layout import TokenLayout
from ..evals.compute.prefills import prefills, prompts
from ..methods.readers import taken_up
from ..methods.visipruner import VisiPruner, VisiPrunerForward, cosines
from .bench import Candidate, SettingBench
from .fit import decoder_macs

if TYPE_CHECKING:
    from torch import Tensor

    from ..engine.contract import AttentionView, Geometry, LayerView


class SearchPrompts:
    """The questions of a search, ``visual`` and ``text`` tokens of each, int (questions,), and what settings leave."""

    def __init__(self, bench: SettingBench, fitted_to: int = 16) -> None:
        self.bench, self.loaded, self.fitted_to = bench, bench.asker.loaded, fitted_to
        self.geometry, self.depth = self.loaded.geometry, self.loaded.geometry.layers
        dense = [bench.answers[question] for question in bench.questions]
        self.visual = np.array([one.prompt_visual_tokens for one in dense])
        self.text = np.array([one.prompt_tokens for one in dense]) - self.visual
        # The vision side and the LM head, which no setting changes.
        self._rest = np.array([one.executed_macs for one in dense]) - self._decoder(self.whole)

    @property
    def whole(self) -> np.ndarray:
        """What the dense model leaves, int (questions, layers)."""
        return np.repeat(self.visual[:, None], self.depth, axis=1)

    def planned(self, methods: Iterable[Method]) -> list[Candidate]:
        """Candidates of methods whose options say how many tokens stay."""
        found = []
        for method in methods:
            counts = method.visual_counts(self._layout, self.geometry)
            assert counts is not None
            found.append(self.candidate(method, counts.numpy(), self.scoring(method)))
        return found

    def scoring(self, method: Method) -> float:
        """Multiply-adds that a method spends on choosing, in the first question."""
        return float(prefills(self.loaded, method, self._one)["scoring"].iloc[0])

    def contributions(self, counts: np.ndarray, first: int) -> np.ndarray:
        """Multiply-adds of what the last token takes up in layers from ``first`` on, where there is any vision."""
        lengths = ((counts + self.text[:, None]) * (counts > 0))[:, first:]
        return 2 * self.geometry.heads * self.geometry.head_size * lengths.sum(1)

    @cached_property
    def first(self) -> list[dict[str, Any]]:
        """Model inputs of the first ``fitted_to`` questions of the first task, in batches."""
        (task, *_), batch_size = self.bench.tasks, self.bench.asker.batch_size
        return [{**batch} for batch in prompts(self.loaded, task, self.fitted_to, batch_size)]

    @cached_property
    def _one(self) -> list[dict[str, Any]]:
        return [{**batch} for batch in prompts(self.loaded, self.bench.tasks[0], 1)]

    def candidate(
        self, method: Method, counts: np.ndarray, scoring: np.ndarray | float = 0.0, before: str = ""
    ) -> Candidate:
        """One with what it leaves; ``scoring``: multiply-adds of choosing, of each question."""
        macs = float((self._rest + self._decoder(counts) + scoring).mean())
        same = (counts == self.whole).all(1) & (before == "")
        return Candidate(method, counts.astype(np.int32), macs, before, same)

    def look(self, probe: Any, take: Callable[[Any, int], np.ndarray]) -> np.ndarray:
        """What ``take`` finds in the ``probe``'s forward of each question, given its row there: (questions, …).

        Short ones are filled up with minus infinity.
        """
        found: dict[tuple[str, int], np.ndarray] = {}
        for task in self.bench.tasks:

            def on_first(docs: list[int], logits: Tensor, name: str = task.name) -> None:
                forward = probe.seen.pop()
                found.update({(name, doc): take(forward, row) for row, doc in enumerate(docs)})
                probe.seen.clear()

            self.bench.asker.answers(probe, task, on_first)
        size = np.max([one.shape for one in found.values()], axis=0)
        rows = [
            np.pad(one, [(0, n - have) for n, have in zip(size, one.shape, strict=True)], constant_values=-np.inf)
            for one in (found[question] for question in self.bench.questions)
        ]
        return np.stack(rows)

    @cached_property
    def _layout(self) -> TokenLayout:
        lengths = self.text + self.visual
        before_end = np.arange(lengths.max())[::-1]  # how many tokens stand behind each place
        valid, text = before_end < lengths[:, None], before_end < self.text[:, None]
        return TokenLayout.from_masks(torch.from_numpy(valid & ~text), torch.from_numpy(valid))

    def _decoder(self, counts: np.ndarray) -> np.ndarray:
        return decoder_macs(torch.from_numpy(self.text[:, None] + counts), self.geometry).numpy()


# ---- what thresholds are compared with ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unfiltered(VisiPruner):
    """VisiPruner that looks at contributions in all layers behind the shallow ones, and drops nothing."""

    seen: list[Forward] = field(default_factory=list, compare=False)

    def begin(self, layout: TokenLayout, geometry: Geometry) -> Forward:
        self.seen.append(_UnfilteredForward(self, layout, geometry))
        return self.seen[-1]


class _UnfilteredForward(VisiPrunerForward):
    """By layer: min cos(a - c_j, a), (B,), and |c_j|, (B, V), as the rule reads them."""

    def __init__(self, method: VisiPruner, layout: TokenLayout, geometry: Geometry) -> None:
        super().__init__(method, layout, geometry)
        self.found: list[tuple[np.ndarray, np.ndarray]] = []

    def middle(self, layer: int, view: AttentionView) -> None:
        measured = view.contributions()
        dot, norm, square = measured.of_visual(view.on_host(measured.sums).read()[0])
        there = np.arange(norm.shape[1]) < np.array(view.layout.visual.counts)[:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            weakest = np.where(there, cosines(dot, norm, square), np.inf).min(1)
        self.found.append((weakest, np.where(there, norm, -np.inf)))

    def layer_input(self, layer: int, view: LayerView) -> None:
        return None


@dataclass(frozen=True)
class TakenUp(Method):
    """Looks at what :mod:`~visibench.methods.readers` compares in every layer, and drops nothing."""

    name = "taken_up"
    title = "Taken up"
    hook_points = ("attention",)

    seen: list[Forward] = field(default_factory=list, compare=False)

    def begin(self, layout: TokenLayout, geometry: Geometry) -> Forward:
        self.seen.append(_TakenUpForward())
        return self.seen[-1]


class _TakenUpForward(Forward):
    """By layer: the largest |c_ij|, (B, V)."""

    def __init__(self) -> None:
        self.found: list[np.ndarray] = []

    def attention(self, layer: int, view: AttentionView) -> None:
        self.found.append(taken_up(view).masked_fill(~view.present, -torch.inf).cpu().numpy())


def contributed(forward: Any, row: int) -> np.ndarray:
    """Of a question, by layer that was looked at: min cos(a - c_j, a), and behind it all |c_j|: (layers, 1 + V)."""
    return np.stack([np.append(weakest[row], norm[row]) for weakest, norm in forward.found])


def taken(forward: Any, row: int) -> np.ndarray:
    """Of a question, by layer: the largest |c_ij|, (layers, V)."""
    return np.stack([norm[row] for norm in forward.found])


def left(before: np.ndarray, cut: np.ndarray, kept: np.ndarray, leave: np.ndarray) -> np.ndarray:
    """Int (questions, layers): ``before``, then ``kept`` from layer ``cut`` on, and none from layer ``leave`` on."""
    layers = np.arange(before.shape[1])
    behind = np.where(layers >= cut[:, None], kept[:, None], before)
    return np.where(layers >= leave[:, None], 0, behind)
