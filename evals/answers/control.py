"""Random tokens at a method's own layers and counts: is the method's choice worth anything, or only its schedule?

For every batch the method runs first, prompt alone; how many visual tokens it leaves each sample at the input of each
decoder layer is the plan of the second run, which generates::

    at the input of each layer where the plan falls:  keep a random set of the planned size, drawn from the sample's
                                                      inputs and the seed; positions as under the method

Tokens that a method merges are random tokens here, and images are whole: what changes is which tokens there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...engine import prune
from ...engine.contract import Forward, Keep, Method
from ...engine.vision.features import FeatureStore
from ...methods.base import top
from ...methods.random import draw

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...engine.contract import Geometry, LayerView, TokenLayout
    from ...engine.trace import Trace


@dataclass(frozen=True)
class PlannedRandom(Method):
    """Keep random visual tokens, ``counts`` of them, int (B, layers), at the input of each decoder layer."""

    name = "control"
    title = "Random tokens by plan"
    hook_points = ("decoder",)

    counts: Any = None
    seed: int = 0

    def begin(self, layout: TokenLayout, geometry: Geometry) -> Forward:
        return _PlannedRandomForward(self, layout)


class _PlannedRandomForward(Forward):
    def __init__(self, method: PlannedRandom, layout: TokenLayout) -> None:
        self.counts: Tensor = method.counts.to(layout.device)
        total = torch.tensor(layout.visual_counts, device=layout.device)
        before = torch.cat([total[:, None], self.counts[:, :-1]], dim=1)
        self.falls = (method.counts < before.cpu()).any(0).tolist()
        self.seed, self.most = method.seed, max(layout.visual_counts)

    def layer_input(self, layer: int, view: LayerView) -> Keep | None:
        if not self.falls[layer]:
            return None
        # One draw for all layers: what stays is nested, as under a method that drops ever more.
        scores = draw(view.layout.fingerprint + self.seed, self.most)
        own = view.layout.visual.pick(view.layout.visual_id, 1).clamp(min=0)
        return Keep(top(scores.gather(1, own), self.counts[:, layer], view.present))


class ControlSession:
    """Stands for the session of the control of ``method``: each batch has one of its own, within :meth:`around`.

    ``trace``: of the latest prefill that generated. ``features``: as of a session.
    """

    def __init__(self, model: PreTrainedModel, method: Method, seed: int, features: FeatureStore) -> None:
        self.model, self.method, self.seed, self.features = model, method, seed, features
        prune(model, method)  # checks both
        self.trace: Trace | None = None

    def __enter__(self) -> ControlSession:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing is held between batches."""

    @contextmanager
    def around(self, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Within: the model generates from ``inputs`` with random tokens by the plan of the method for them."""
        with prune(self.model, self.method, features=self.features) as rehearsal:
            self.model(**inputs, use_cache=False, logits_to_keep=1)
            counts = rehearsal.trace.visual_counts()
        plan = PlannedRandom(counts=counts, seed=self.seed, positions=self.method.positions)
        with prune(self.model, plan, features=self.features) as session:
            yield
            self.trace = session.trace
