"""Decisions after the vision tower: what it computed, and where its images land in the rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, UnsupportedModelError
from ..models.adapters import Adapter
from .attention import Interception
from .contract import Forward, Keep, Merge, Method
from .features import Entry, FeatureStore, SharedTower
from .layout import TokenLayout, TokenSet
from .tower import Tower
from .trace import Trace, Watch
from .views import VisionView

SIDE = {"image", "tower", "vision", "projector"}
# At these hook points a method changes what the tower is given or computes, so that nobody else can use it.
CHANGING = {"image", "tower"}


class VisionTap:
    """While active, keeps what the vision side computed, and asks the method about it at the projector.

    Features that a method drops in front of the projector are not projected; zeros take their places until the cut
    at decoder layer 0. The same holds where the tower itself puts out fewer of them. ``generate`` encodes the images
    before it calls the model, so nothing here may need the prompt. ``features``: where to share the tower's outputs,
    for methods that leave the tower as it is.
    """

    def __init__(self, adapter: Adapter, method: Method, watch: Watch, features: FeatureStore | None = None) -> None:
        self.adapter, self.method, self.watch = adapter, method, watch
        self.features = None if CHANGING & set(method.hook_points) else features
        self.pixels: Tensor | None = None
        self.cls: Tensor | None = None
        self.macs = 0
        self._view: VisionView | None = None
        self._decision: Keep | Merge | None = None
        self._kept: TokenSet | None = None
        self._projected_tokens: Tensor | None = None
        self._blocks: dict[int, tuple[Tensor, Tensor, float]] = {}
        self._encoded: Any = None
        self._tower: Tower | None = None
        self._exit = ExitStack()
        self._asked = bool(SIDE & set(method.hook_points))
        self.grids: Tensor | None = None
        if SIDE & set(method.hook_points) - set(adapter.family.sides) and adapter.vision_tower is not None:
            raise UnsupportedModelError(
                f"{method.name} acts on the vision side, which cannot be pruned in architecture {adapter.kind!r}: "
                "choose a method that acts in the decoder"
            )
        if adapter.vision_tower is None and self._asked:
            raise UnsupportedModelError(
                f"{method.name} reads the vision tower, and a bare decoder has none: pass the full model"
            )

    def __enter__(self) -> VisionTap:
        with ExitStack() as stack:
            if self.adapter.vision_tower is not None:
                stack.callback(
                    self.adapter.vision_tower.register_forward_pre_hook(self._on_pixels, with_kwargs=True).remove
                )
            if self._asked:
                vision, blocks = self.adapter.geometry.vision, self.adapter.vision_blocks
                assert vision is not None
                self.vision, self.patches = vision, vision.tokens
                if self.method.vision_cls:
                    stack.callback(blocks[vision.feature_block].register_forward_hook(self._on_feature_block).remove)
                if "tower" in self.method.hook_points:
                    self._tower = stack.enter_context(Tower(self.adapter, self.method, self))
                before, behind = self._watched(self._on_features), self._watched(self._on_projected)
                stack.callback(self.adapter.projector.register_forward_pre_hook(before).remove)
                stack.callback(self.adapter.projector.register_forward_hook(behind).remove)
                asked = {name: blocks[vision.feature_block + 1 + name] for name in self.method.vision_blocks}
                observers = {block.self_attn: partial(self._observe, name) for name, block in asked.items()}
                stack.enter_context(Interception(observers))
            if self.features is not None and self.adapter.vision_tower is not None:
                stack.enter_context(
                    SharedTower(self.adapter.vision_tower, self.features, self._parts, self._seen, self._recall)
                )
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._exit.close()

    def begin(self, encoded: Any) -> None:
        """A prefill begins; ``encoded``: its images, if ``generate`` encoded them before, or None.

        What was seen belongs to it if nobody has used that yet, or only a prefill on the same encoded images.
        """
        if encoded is None or (self._encoded is not None and self._encoded is not encoded):
            self.forget()
        self._encoded = encoded

    def forget(self) -> None:
        """What was seen has been used, or belongs to another prompt."""
        self.pixels = self.grids = self.cls = self._view = self._decision = self._kept = self._projected_tokens = None
        self._encoded = None
        self._blocks, self.macs = {}, 0
        if self._tower is not None:
            self._tower.forget()

    def _watched(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any) -> Any:
            with self.watch("method"):
                return hook(*args)

        return watched

    def _on_pixels(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        self.forget()
        if self.adapter.family.grids is not None:
            # Images of several shapes: hashes of rows do without their pixels.
            self.grids = self.adapter.family.grids(self.adapter.geometry.vision, args, kwargs)
            return None
        self.pixels = args[0] if args else kwargs["pixel_values"]
        with self.watch("method"):
            smaller = self.method.image(self.pixels, self.vision) if "image" in self.method.hook_points else None
        if smaller is None:
            return None
        rest = {key: value for key, value in kwargs.items() if key != "pixel_values"}
        return (smaller, *args[1:]), rest | {"interpolate_pos_encoding": True}

    def _on_feature_block(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.cls = output[:, 0]

    def _observe(
        self, name: int, kernel: Any, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any
    ) -> Any:
        self._blocks[name] = (q, k, kwargs["scaling"])
        return kernel(module, q, k, v, mask, **kwargs)

    @property
    def _parts(self) -> tuple[str, ...]:
        """What the method reads of the tower's inside, by name."""
        if not self._asked:
            return ()
        return *(f"block{name}" for name in self.method.vision_blocks), *(("cls",) if self.method.vision_cls else ())

    def _seen(self) -> dict[str, Entry]:
        # Tokens first, as the block lays them out; of the queries CLS's alone can be read.
        found: dict[str, Entry] = {
            f"block{name}": {
                "query": q[:, :, :1].transpose(1, 2),
                "key": k.transpose(1, 2),
                "scaling": torch.tensor([scaling], dtype=torch.float64),
            }
            for name, (q, k, scaling) in self._blocks.items()
        }
        return found if self.cls is None else found | {"cls": {"cls": self.cls}}

    def _recall(self, found: Mapping[str, Entry]) -> None:
        if not self._asked:
            return
        for name in self.method.vision_blocks:
            part = found[f"block{name}"]
            query, key = part["query"].transpose(1, 2), part["key"].transpose(1, 2)
            self._blocks[name] = (query, key, float(part["scaling"][0]))
        if self.method.vision_cls:
            self.cls = found["cls"]["cls"]

    def _on_features(self, module: nn.Module, args: tuple[Tensor]) -> Tensor | None:
        self._view = VisionView(args[0], self._blocks, self)
        if args[0].shape[1] < self.patches:
            # They stand for no patch in particular.
            nothing = args[0].new_zeros(args[0].shape[0], self.patches, dtype=torch.bool)
            self._kept, self._decision = TokenSet(nothing, (0,) * len(nothing)), Merge(nothing)
            self._projected_tokens = torch.full((len(nothing),), args[0].shape[1])
            return None
        self._decision = self.method.vision(self._view)
        if self._decision is None:
            return None
        merge = as_merge(self._decision)
        source = args[0] if merge.replaced is None else merge.replaced
        self._kept = TokenSet(merge.mask, tuple(merge.mask.sum(1).tolist()))
        kept = self._kept.pick(source, 1)
        self._projected_tokens = self._kept.total + (0 if merge.added is None else merge.added_mask().sum(1))
        return kept if merge.added is None else torch.cat([kept, merge.added.to(kept.dtype)], dim=1)

    def _on_projected(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor | None:
        assert self._view is not None
        if self._kept is None:
            self._view.projected = output
            return None
        merge, count = as_merge(self._decision), self._kept.index.shape[1]
        added = None if output.shape[1] == count else output[:, count:]
        self._decision = replace(merge, replaced=None, added=added)
        places = output.new_zeros(output.shape[0], self.patches, output.shape[2])
        return self._kept.place(output[:, :count], places, dim=1)

    def decide(self, forward: Forward, layout: TokenLayout, trace: Trace) -> Keep | Merge | None:
        """The method's decision about the images, translated from images (N, P) to the rows (B, V) of the batch."""
        if not self._asked:
            return None
        if self._view is None:
            raise InputError(f"{self.method.name} needs the images: pass pixel_values inside the `with` block")
        if self._decision is None:
            self._decision = forward.projected(self._view)
        if self._decision is None:
            return None
        rows = ImageRows(layout, self.patches, self._view.features.shape[0])
        trace.scored(0, torch.tensor(rows.counts) * self.macs)
        trace.tower = self._tower_tokens()
        if self._projected_tokens is not None:
            trace.projected = rows.group(self._projected_tokens[:, None]).sum(1).cpu()
        return rows.translate(as_merge(self._decision))

    def _tower_tokens(self) -> tuple[tuple[int, int], ...] | None:
        if self._tower is not None:
            return tuple(self._tower.tokens)
        assert self._view is not None
        count = int(self._view.features.shape[1])
        return None if count == self.patches else ((count + self.vision.has_cls,) * 2,) * self.vision.layers


def as_merge(decision: Keep | Merge | None) -> Merge:
    """A Keep as the Merge that only keeps."""
    assert decision is not None
    return decision if isinstance(decision, Merge) else Merge(decision.mask)


class ImageRows:
    """Where the ``images`` (N, in row-major order) stand in the rows (B, with up to M images each).

    In beam search each row of the prompt, with its images, is repeated after the images were encoded.
    """

    def __init__(self, layout: TokenLayout, patches: int, images: int) -> None:
        visual = layout.visual_counts
        if any(count % patches for count in visual) or not images or sum(visual) // patches % images:
            raise InputError(f"{images} images of {patches} patches do not fill rows of {visual} visual tokens")
        self.counts = [count // patches for count in visual]
        self.most, self.patches = max(self.counts), patches
        beams = sum(self.counts) // images
        if any(len(set(self.counts[row : row + beams])) > 1 for row in range(0, len(self.counts), beams)):
            raise InputError(f"{images} images of {patches} patches do not fill rows of {visual} visual tokens")
        sources: list[int] = []
        places: list[int] = []
        first = 0
        for row, count in enumerate(self.counts):
            sources += range(first, first + count)
            places += range(row * self.most, row * self.most + count)
            first += count if (row + 1) % beams == 0 else 0
        self.sources = torch.tensor(sources, device=layout.device)
        self.places = torch.tensor(places, device=layout.device)

    def group(self, images: Tensor) -> Tensor:
        """(N, K, …) → (B, M·K, …), zero where a row has fewer than M images."""
        rows = len(self.counts)
        out = images.new_zeros(rows * self.most, *images.shape[1:])
        out[self.places] = images[self.sources]
        return out.reshape(rows, self.most * images.shape[1], *images.shape[2:])

    def translate(self, merge: Merge) -> Merge:
        """A decision over images (N, P) as one over rows (B, V)."""
        return Merge(
            self.group(merge.mask),
            None if merge.replaced is None else self.group(merge.replaced),
            None if merge.added is None else self.group(merge.added),
            None if merge.added is None else self.group(merge.added_mask()),
            None if merge.added_positions is None else self.group(merge.added_positions),
            None if merge.added is None else self._anchors(merge),
        )

    def _anchors(self, merge: Merge) -> Tensor:
        """Int (B, M·added): for each added token the visual token of the row behind which it goes."""
        assert merge.added is not None
        own = merge.anchors
        if own is None:
            own = torch.full(merge.added.shape[:2], self.patches - 1, device=self.places.device)
        own = self.group(own)
        first = (torch.arange(self.most, device=self.places.device) * self.patches).repeat_interleave(
            merge.added.shape[1]
        )
        return torch.where(own < 0, own - first, own + first)


def row_hashes(layout: TokenLayout, inputs: dict[str, Any], pixels: Tensor | None, patches: int) -> Tensor:
    """Int (B,): a hash of each row's raw inputs (ids and pixels, or embeddings); integer sums, alike in any batch."""
    ids = inputs.get("input_ids")
    if ids is None:
        embeddings = inputs["inputs_embeds"]
        return _hash(embeddings.masked_fill(~layout.valid[..., None], 0).flip(1))
    hashes = (ids * layout.valid).sum(1)
    if pixels is None or not any(layout.visual_counts):
        return hashes
    return hashes + ImageRows(layout, patches, pixels.shape[0]).group(_hash(pixels)[:, None]).sum(1)


def _hash(values: Tensor) -> Tensor:
    bits = (values.detach().double() * 2**20).long().flatten(1)
    weights = torch.arange(bits.shape[1], device=bits.device) * 2654435761 % 4294967291
    return (bits * weights).sum(1)
