"""Decisions after the vision tower: what it computed, and where its images land in the rows."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, UnsupportedModelError
from ..methods.base import Forward, Keep, Merge, Method
from ..models.adapters import Adapter
from .attention import Interception
from .layout import TokenLayout
from .views import VisionView


class VisionTap:
    """While active, keeps the latest output of the vision tower and projector, and q and k of the asked blocks.

    A method names the blocks it reads in ``vision_blocks``, counted back from the feature block (-1: that block).
    """

    def __init__(self, adapter: Adapter, method: Method) -> None:
        if adapter.vision_tower is None:
            raise UnsupportedModelError(f"{method.name} reads the vision tower, and a bare decoder has none: pass the full model")
        self.adapter = adapter
        self.features: Tensor | None = None
        self.projected: Tensor | None = None
        self.blocks: dict[int, tuple[Tensor, Tensor, float]] = {}
        self._taps = {name: adapter.geometry.vision.feature_block + 1 + name for name in method.vision_blocks}  # type: ignore[union-attr]
        self._exit = ExitStack()

    def __enter__(self) -> VisionTap:
        with ExitStack() as stack:
            stack.callback(self.adapter.projector.register_forward_hook(self._on_projector).remove)
            modules = {
                self.adapter.vision_blocks[block].self_attn: self._observer(name) for name, block in self._taps.items()
            }
            stack.enter_context(Interception(modules))
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._exit.close()

    @property
    def images(self) -> int:
        return 0 if self.features is None else self.features.shape[0]

    def view(self) -> VisionView:
        assert self.features is not None
        assert self.projected is not None
        return VisionView(self.features, self.projected, self.blocks, self._project)

    def clear(self) -> None:
        self.features = self.projected = None
        self.blocks = {}

    def _project(self, features: Tensor) -> Tensor:
        projector = self.adapter.projector
        return projector.linear_2(projector.act(projector.linear_1(features)))

    def _on_projector(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.features, self.projected = args[0], output

    def _observer(self, name: int) -> Any:
        def observe(kernel: Any, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
            self.blocks[name] = (q, k, kwargs["scaling"])
            return kernel(module, q, k, v, mask, **kwargs)

        return observe


def vision_cut(forward: Forward, tap: VisionTap, layout: TokenLayout) -> Keep | Merge | None:
    """Ask the method about the images and translate its answer, (N, P) over images, to the rows of the batch."""
    if tap.features is None:
        return None
    view = tap.view()
    decision = forward.vision(view)
    images, patches = view.features.shape[:2]
    tap.clear()
    if decision is None:
        return None
    if images * patches != sum(layout.visual_counts) or any(count % patches for count in layout.visual_counts):
        raise InputError(f"{images} images of {patches} patches do not fill the {sum(layout.visual_counts)} image tokens")
    rows = ImageRows(layout, patches)
    if isinstance(decision, Keep):
        return Keep(rows.spread(decision.mask))
    return Merge(
        rows.spread(decision.mask),
        None if decision.replaced is None else rows.spread(decision.replaced),
        None if decision.added is None else rows.group(decision.added),
        None if decision.added is None else rows.group(_present(decision)),
        None if decision.added_positions is None else rows.group(decision.added_positions),
        None if decision.added is None else rows.anchors(decision.added.shape[1]),
    )


def _present(decision: Merge) -> Tensor:
    assert decision.added is not None
    if decision.added_present is not None:
        return decision.added_present
    return torch.ones(decision.added.shape[:2], dtype=torch.bool, device=decision.added.device)


class ImageRows:
    """Where the images (N, in row-major order) stand in the rows (B, with up to M images each)."""

    def __init__(self, layout: TokenLayout, patches: int) -> None:
        counts = [count // patches for count in layout.visual_counts]
        self.most, self.patches = max(counts), patches
        places = [row * self.most + k for row, n in enumerate(counts) for k in range(n)]
        self.rows = len(counts)
        self.places = torch.tensor(places, device=layout.device)

    def group(self, images: Tensor) -> Tensor:
        """(N, K, …) → (B, M·K, …), zero where a row has fewer than M images."""
        out = images.new_zeros(self.rows * self.most, *images.shape[1:])
        out[self.places] = images
        return out.reshape(self.rows, self.most * images.shape[1], *images.shape[2:])

    spread = group

    def anchors(self, added: int) -> Tensor:
        """Int (B, M·added): for each added token the visual token behind which it goes, the last one of its image."""
        last = (torch.arange(self.most, device=self.places.device) + 1) * self.patches - 1
        return last.repeat_interleave(added).expand(self.rows, -1)


def row_hashes(layout: TokenLayout, inputs: dict[str, Any], hidden: Tensor) -> Tensor:
    """Int (B,): a hash of each row's raw inputs (ids and pixels, or embeddings); integer sums, the same in any batch."""
    pixels, ids = inputs.get("pixel_values"), inputs.get("input_ids")
    if ids is None:
        return _hash(hidden.masked_fill(~layout.valid[..., None].to(hidden.device), 0).flip(1))
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
