"""What is read of a dense prefill, layer by layer: attention, value norms, contributions, and the logit lens.

Shapes: B rows, V visual tokens, H heads, d the head size. Rows of queries are taken in blocks; no L × L map exists.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..engine.contract import Forward, Method
from ..methods.visipruner import contributions

if TYPE_CHECKING:
    from ..engine.contract import AttentionView, Geometry, LayerView, TokenLayout, TokenSet

THRESHOLDS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
"""Of |c_j|; 0.2 is VisiPruner's for LLaVA-1.5-7B."""
CARRIED = 0.9
TOP = 5
Row = dict[str, list[float]]


@dataclass(frozen=True)
class Recorder(Method):
    """Looks at ``looks`` (``attention``, ``values``, ``contributions``, ``lens``) in ``at_layers`` and changes nothing.

    ``seen``: one :class:`Recording` for each prefill, in order.
    """

    name = "recorder"
    title = "Recorder"
    hook_points = ("attention", "decoder")

    looks: tuple[str, ...] = ("attention", "values", "contributions", "lens")
    at_layers: tuple[int, ...] = ()
    seen: list[Recording] = field(default_factory=list, compare=False)

    def begin(self, layout: TokenLayout, geometry: Geometry) -> Forward:
        recording = Recording(self, geometry.layers)
        self.seen.append(recording)
        return recording


class Recording(Forward):
    """One prefill: each quantity by layer, (B,)."""

    def __init__(self, recorder: Recorder, depth: int) -> None:
        self.looks, self.layers, self.depth = recorder.looks, frozenset(recorder.at_layers), depth
        self.quantities: defaultdict[str, list[Tensor]] = defaultdict(list)
        self.logits: defaultdict[str, list[Tensor]] = defaultdict(list)

    def layer_input(self, layer: int, view: LayerView) -> None:
        # The state behind layer l - 1; that behind the last layer is the model's own output.
        if "lens" in self.looks and layer - 1 in self.layers:
            self.logits["hidden"].append(view.read(view.tokens[:, -1:])[:, 0])

    def attention(self, layer: int, view: AttentionView) -> None:
        """Record what is looked at in this layer: shares of attention, value norms, contributions."""
        if layer not in self.layers:
            return
        layout = view.layout
        if "attention" in self.looks:
            self._take("last", attention_on_vision(view, layout.last))
        if "attention" in self.looks or "values" in self.looks:
            by_text = attention_on_vision(view, layout.text)
            if "attention" in self.looks:
                self._take("text", by_text)
            if "values" in self.looks:
                self._take("value", value_norms(view, by_text["token"]))
        if "contributions" in self.looks:
            self._take("contribution", concentration(view))
        if "lens" in self.looks:
            self.logits["visual"].append(view.read(visual_part(view))[:, 0])

    def _take(self, name: str, numbers: dict[str, Tensor]) -> None:
        for key, value in numbers.items():
            self.quantities[f"{name}_{key}"].append(value.double())

    def finish(self, final: Tensor) -> tuple[list[Row], list[dict[str, list[list[int]]]]]:
        """A row for each of B samples: every quantity by layer; and top tokens by kind of logits and layer.

        ``final``: logits (B, vocabulary) of the first token given, which is the answer that ranks are about.
        """
        answer, tops = final.argmax(-1, keepdim=True), {}
        if "lens" in self.looks and self.depth - 1 in self.layers:
            self.logits["hidden"].append(final)
        for kind, by_layer in self.logits.items():
            ranks = [(logits > logits.gather(1, answer)).sum(1).double() + 1 for logits in by_layer]
            self.quantities[f"lens_{kind}_rank"] = ranks
            tops[kind] = torch.stack([logits.topk(TOP).indices for logits in by_layer], dim=1).tolist()
        columns = {name: torch.stack(by_layer, dim=1).tolist() for name, by_layer in self.quantities.items()}
        rows = [{name: column[row] for name, column in columns.items()} for row in range(len(final))]
        return rows, [{kind: of[row] for kind, of in tops.items()} for row in range(len(final))]


def attention_on_vision(view: AttentionView, rows: TokenSet) -> dict[str, Tensor]:
    """How ``rows`` attend to visual tokens, mean over rows and heads, each (B,).

    ``share``: of their attention, on all visual tokens. ``strongest``: on the one that gets most, whose number in the
    prompt is ``token``. ``entropy``: of how it is spread over the visual tokens, as a share of that of an even spread.
    """
    layout, visual = view.layout, view.layout.visual
    total = view.values.new_zeros(layout.rows, layout.width, dtype=torch.float32)
    for weights, present in view.scan(rows):
        total = total + (weights.mean(1) * present[..., None]).sum(1)
    mean = visual.pick(total / rows.device_counts.clamp(min=1)[:, None], 1) * view.present
    share, (strongest, place) = mean.sum(1), mean.max(1)
    spread = mean / share.clamp(min=1e-30)[:, None]
    entropy = -torch.xlogy(spread, spread).sum(1) / visual.device_counts.clamp(min=2).log()
    token = visual.pick(layout.visual_id, 1).gather(1, place[:, None])[:, 0]
    return {"share": share, "strongest": strongest, "token": token, "entropy": entropy}


def value_norms(view: AttentionView, token: Tensor) -> dict[str, Tensor]:
    """L1 norms of value vectors, mean over heads: of visual token ``token``, int (B,), and the mean of the others."""
    visual = view.layout.visual
    norms = visual.pick(view.values, 2).float().abs().sum(-1).mean(1) * view.present
    chosen = visual.pick(view.layout.visual_id, 1) == token[:, None]
    of_token = (norms * chosen).sum(1)
    return {"sink": of_token, "others": (norms.sum(1) - of_token) / (visual.device_counts - 1).clamp(min=1)}


def concentration(view: AttentionView) -> dict[str, Tensor]:
    """Contributions c_j of visual tokens to the last token's attention output a (:mod:`visibench.methods.visipruner`).

    ``cosine``: the least cos(a - c_j, a). ``largest``: the largest |c_j|. ``carrying``: how many tokens, largest first,
    make up 90 % of the sum of all |c_j|. ``above_t``: how many |c_j| exceed t. Each (B,).
    """
    effect, norm = contributions(view)
    norm = norm * view.present
    ordered = norm.sort(dim=1, descending=True).values.cumsum(1)
    numbers = {
        "cosine": torch.where(view.present, effect, torch.inf).amin(1),
        "largest": norm.amax(1),
        "carrying": (ordered < CARRIED * ordered[:, -1:]).sum(1) + 1,
    }
    return numbers | {f"above_{threshold:g}": (norm > threshold).sum(1) for threshold in THRESHOLDS}


def visual_part(view: AttentionView) -> Tensor:
    """What visual tokens add to the last token in this layer, through the output projection: (B, 1, D)."""
    visual = view.layout.visual
    weights = visual.pick(view.weights(), 3) * view.present[:, None, None]
    part = weights.to(view.values.dtype) @ visual.pick(view.values, 2)
    return view.project(part.transpose(1, 2).flatten(2))
