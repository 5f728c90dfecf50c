"""What settings will cost, before any is asked: from what one pass without them shows of every layer.

The multiply-adds of a prefill are those of the dense model, less what visual tokens take there, plus what those take
that stay (:func:`~.fit.visual_macs`). Which tokens thresholds cut is counted in that pass, from |c_j|, cos(a - c_j, a)
and |c_ij|: until tokens leave they are those of the method itself. Left out are a method's own scoring, and text that
attends to fewer tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..engine.contract import Forward, Method
from ..engine.layout import TokenLayout
from ..evals.tasks.tasks import Task
from ..methods.readers import taken_up
from ..methods.visipruner import contributions
from ..results.store.samples import Answer
from .asking import Asker
from .fit import visual_macs

if TYPE_CHECKING:
    from ..engine.contract import AttentionView, Geometry

Look = Callable[["AttentionView"], tuple[Tensor, Tensor]]
# Of |c_j|, least first: five a decade, over what models of widths 128 to 4096 show.
MAGNITUDES = tuple(float(f"{10 ** (step / 5):.2g}") for step in range(-15, 4))


class Priced(NamedTuple):
    """A setting, and the multiply-adds of a prefill that it is expected to cost."""

    price: float
    method: Method


class Prices:
    """Prices in multiply-adds, mean over the questions that ``asker`` asks of ``tasks``.

    ``dense``: answers of the dense model, by task and doc_id.
    """

    def __init__(self, asker: Asker, tasks: Sequence[Task], dense: dict[str, dict[int, Answer]]) -> None:
        self.asker, self.tasks, self.geometry = asker, tasks, asker.loaded.geometry
        records = [one for answers in dense.values() for one in answers.values()]
        self.prompts = torch.tensor([one.prompt_visual_tokens for one in records])
        self.visual = self._visual(self.prompts[:, None].expand(-1, self.geometry.layers))
        self.others = sum(one.executed_macs for one in records) / len(records) - self.visual
        self._looks: dict[tuple[Look, str], Tensor] = {}

    def _visual(self, counts: Tensor) -> float:
        return float(visual_macs(counts, self.geometry).mean())

    def spared(self, share: float) -> float:
        """Where so large a share of what visual tokens take is spared."""
        return self.others + (1 - share) * self.visual

    def planned(self, methods: Iterable[Method]) -> list[Priced]:
        """Methods whose options alone say how many tokens stay."""
        sizes, which = self.prompts[self.prompts > 0].unique(return_inverse=True)
        layouts = [TokenLayout.from_spans(size + 2, [(1, size + 1)]) for size in sizes.tolist()]
        found = []
        for method in methods:
            counts = [method.visual_counts(layout, self.geometry) for layout in layouts]
            by_size = torch.cat([one for one in counts if one is not None])
            found.append(Priced(self.others + self._visual(by_size[which]), method))
        return found

    def thresholds(self, look: Look, under: Method, first: int, cosine: float = 1.0) -> list[float]:
        """For each of :data:`MAGNITUDES`: what exceeds it stays from behind the first layer where ``look`` acts.

        It acts from layer ``first`` on, where the least cosine falls below ``cosine``. ``under``: what acts besides.
        """
        weakest, there, *above = self._seen(look, under).unbind(-1)
        acts = weakest < cosine
        acts[:, :first] = False
        last = torch.where(acts.any(1), acts.int().argmax(1), self.geometry.layers)
        behind = torch.arange(self.geometry.layers) > last[:, None]
        kept = (number.gather(1, last.clamp(max=self.geometry.layers - 1)[:, None]) for number in above)
        return [self.others + self._visual(torch.where(behind, number, there)) for number in kept]

    def _seen(self, look: Look, under: Method) -> Tensor:
        """(questions, layers, 2 + magnitudes): what ``look`` gives in each layer, fp32."""
        key = look, str(under)
        if key not in self._looks:
            counter = Counter(look, under)
            for task in self.tasks:
                self.asker.answers(counter, task)
            self._looks[key] = torch.cat([torch.stack(layers, 1) for layers in counter.seen])
        return self._looks[key]


@dataclass(frozen=True)
class Counter(Method):
    """Counts how many visual tokens exceed thresholds in each layer, while ``under`` acts; ``seen``: by prefill."""

    name = "counter"
    title = "Counts above thresholds"
    hook_points = ("attention",)

    look: Look
    under: Method
    seen: list[list[Tensor]] = field(default_factory=list, compare=False)

    def begin(self, layout: TokenLayout, geometry: Geometry) -> Forward:
        self.seen.append([])
        return _Counting(self.look, self.under.begin(layout, geometry), self.seen[-1])


class _Counting(Forward):
    def __init__(self, look: Look, under: Forward, seen: list[Tensor]) -> None:
        self.look, self.under, self.seen = look, under, seen

    def attention(self, layer: int, view: AttentionView) -> Tensor | None:
        weakest, norm = self.look(view)
        norm = norm.masked_fill(~view.present, -torch.inf)
        above = [(norm > threshold).sum(1) for threshold in (-1.0, *MAGNITUDES)]
        self.seen.append(torch.stack([weakest, *above], dim=1).cpu())
        return self.under.attention(layer, view)


def last_reads(view: AttentionView) -> tuple[Tensor, Tensor]:
    """What VisiPruner asks: the least cos(a - c_j, a), (B,), and |c_j|, (B, V)."""
    effect, norm = contributions(view)
    return effect.masked_fill(~view.present, torch.inf).amin(1), norm


def text_reads(view: AttentionView) -> tuple[Tensor, Tensor]:
    """What readers ask: the largest |c_ij|, (B, V), whatever its cosine."""
    norm = taken_up(view)
    return torch.full_like(norm[:, 0], -torch.inf), norm
