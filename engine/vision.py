"""Decisions after the vision tower: what it computed, and where its images land in the rows."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, UnsupportedModelError
from ..methods.base import Forward, Keep, Merge, Method
from ..models.adapters import Adapter
from .attention import Interception
from .layout import TokenLayout, TokenSet
from .trace import Trace
from .views import VisionView


class VisionTap:
    """While active, asks the method about the images at the projector, and remembers its decision for decoder layer 0.

    Features that a method drops in front of the projector are not projected; zeros take their places until the cut.
    """

    def __init__(self, adapter: Adapter, method: Method) -> None:
        if adapter.vision_tower is None:
            raise UnsupportedModelError(
                f"{method.name} reads the vision tower, and a bare decoder has none: pass the full model"
            )
        self.adapter = adapter
        self.forward = Forward()
        self.decision: Keep | Merge | None = None
        self.macs = 0
        self.projected_tokens: Tensor | None = None
        self._view: VisionView | None = None
        self._kept: TokenSet | None = None
        self._blocks: dict[int, tuple[Tensor, Tensor, float]] = {}
        vision = adapter.geometry.vision
        assert vision is not None
        self.patches = vision.tokens
        self._asked = {name: vision.feature_block + 1 + name for name in method.vision_blocks}
        self._exit = ExitStack()

    def begin(self, forward: Forward) -> None:
        """A prefill starts."""
        self.forward, self.decision, self.macs, self.projected_tokens = forward, None, 0, None

    def __enter__(self) -> VisionTap:
        with ExitStack() as stack:
            projector, blocks = self.adapter.projector, self.adapter.vision_blocks
            stack.callback(projector.register_forward_pre_hook(self._on_features).remove)
            stack.callback(projector.register_forward_hook(self._on_projected).remove)
            observers = {blocks[block].self_attn: partial(self._observe, name) for name, block in self._asked.items()}
            stack.enter_context(Interception(observers))
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._exit.close()

    def _observe(
        self, name: int, kernel: Any, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any
    ) -> Any:
        self._blocks[name] = (q, k, kwargs["scaling"])
        return kernel(module, q, k, v, mask, **kwargs)

    def _on_features(self, module: nn.Module, args: tuple[Tensor]) -> Tensor | None:
        self._view = VisionView(args[0], self._blocks, self)
        self._blocks = {}
        self.decision = self.forward.vision(self._view)
        if self.decision is None:
            self._kept = None
            return None
        merge = as_merge(self.decision)
        source = args[0] if merge.replaced is None else merge.replaced
        self._kept = TokenSet(merge.mask, tuple(merge.mask.sum(1).tolist()))
        kept = self._kept.pick(source, 1)
        added = 0 if merge.added is None else merge.added_mask().sum(1)
        self.projected_tokens = self._kept.total + added
        return kept if merge.added is None else torch.cat([kept, merge.added.to(kept.dtype)], dim=1)

    def _on_projected(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor | None:
        assert self._view is not None
        if self._kept is None:
            self._view.projected = output
            self.decision = self.forward.projected(self._view)
            return None
        merge, count = as_merge(self.decision), self._kept.index.shape[1]
        if merge.added is not None:
            self.decision = replace(merge, replaced=None, added=output[:, count:])
        else:
            self.decision = Keep(merge.mask)
        places = output.new_zeros(output.shape[0], self.patches, output.shape[2])
        return self._kept.place(output[:, :count], places, dim=1)

    def take(self, layout: TokenLayout, trace: Trace) -> Keep | Merge | None:
        """The decision, translated from images (N, P) to the rows (B, V) of the batch."""
        decision, self.decision = self.decision, None
        images = sum(layout.visual_counts) // self.patches
        if decision is None or images == 0:
            return None
        rows = ImageRows(layout, self.patches)
        trace.scored(0, torch.tensor(rows.counts) * self.macs)
        if self.projected_tokens is not None:
            trace.projected = rows.group(self.projected_tokens[:, None]).sum(1).cpu()
        if isinstance(decision, Keep):
            return Keep(rows.group(decision.mask))
        return Merge(
            rows.group(decision.mask),
            None if decision.replaced is None else rows.group(decision.replaced),
            None if decision.added is None else rows.group(decision.added),
            None if decision.added is None else rows.group(decision.added_mask()),
            None if decision.added_positions is None else rows.group(decision.added_positions),
            None if decision.added is None else rows.anchors(decision),
        )


def as_merge(decision: Keep | Merge | None) -> Merge:
    """A Keep as the Merge that only keeps."""
    assert decision is not None
    return decision if isinstance(decision, Merge) else Merge(decision.mask)


class ImageRows:
    """Where the images (N, in row-major order) stand in the rows (B, with up to M images each)."""

    def __init__(self, layout: TokenLayout, patches: int) -> None:
        if any(count % patches for count in layout.visual_counts):
            raise InputError(f"rows of {layout.visual_counts} visual tokens do not consist of images of {patches} patches")
        self.counts = [count // patches for count in layout.visual_counts]
        self.most, self.patches = max(self.counts), patches
        places = [row * self.most + k for row, n in enumerate(self.counts) for k in range(n)]
        self.places = torch.tensor(places, device=layout.device)

    def group(self, images: Tensor) -> Tensor:
        """(N, K, …) → (B, M·K, …), zero where a row has fewer than M images."""
        rows = len(self.counts)
        out = images.new_zeros(rows * self.most, *images.shape[1:])
        out[self.places] = images
        return out.reshape(rows, self.most * images.shape[1], *images.shape[2:])

    def anchors(self, merge: Merge) -> Tensor:
        """Int (B, M·added): for each added token the visual token of the row behind which it goes."""
        assert merge.added is not None
        own = merge.anchors
        if own is None:
            own = torch.full(merge.added.shape[:2], self.patches - 1, device=self.places.device)
        first = torch.arange(self.most, device=self.places.device) * self.patches
        return self.group(own) + first.repeat_interleave(own.shape[1])


def row_hashes(layout: TokenLayout, inputs: dict[str, Any]) -> Tensor:
    """Int (B,): a hash of each row's raw inputs (ids and pixels, or embeddings); integer sums, the same in any batch."""
    pixels, ids = inputs.get("pixel_values"), inputs.get("input_ids")
    if ids is None:
        embeddings = inputs["inputs_embeds"]
        return _hash(embeddings.masked_fill(~layout.valid[..., None].to(embeddings.device), 0).flip(1))
    rows = (ids * layout.valid.to(ids.device)).sum(1)
    counts = layout.visual_counts
    patches = sum(counts) // max(len(pixels), 1) if pixels is not None else 0
    if pixels is not None and patches and not any(count % patches for count in counts):
        rows = rows + ImageRows(layout, patches).group(_hash(pixels)[:, None]).sum(1)
    return rows


def _hash(values: Tensor) -> Tensor:
    bits = (values.detach().double() * 2**20).long().flatten(1)
    weights = torch.arange(bits.shape[1], device=bits.device) * 2654435761 % 4294967291
    return (bits * weights).sum(1)
