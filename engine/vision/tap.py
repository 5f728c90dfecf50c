"""Decisions after the vision tower: hooks at the tower and at the projector."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import InputError, UnsupportedModelError, VisibenchError
from ...models.adapters import Adapter
from ..attention import Interception, received
from ..contract import Forward, Method
from ..decisions import Keep, Merge, as_merge, checked, on_images
from ..encoding import Encoding, VisionView
from ..features import Entry, FeatureStore, SharedTower
from ..layout import TokenLayout, TokenSet
from ..trace import Trace, Watch
from .rows import ImageRows
from .tower import UNSEEN, Tower

SIDE = {"image", "tower", "vision", "projector"}
# At these points a method changes what the tower is given or computes, so that nobody else can use it.
CHANGING = {"image", "tower"}


class VisionTap:
    """While active, keeps what the vision side computed, and asks the method about it at the projector.

    Features that a method drops in front of the projector are not projected; zeros take their places until the cut
    at decoder layer 0. The same holds where the tower itself puts out fewer of them. ``generate`` encodes the images
    before it calls the model, so nothing here may need the prompt. ``features``: where to share the tower's outputs,
    for methods that leave the tower as it is. ``encoding``: the record of the latest images, None if they were used.
    """

    def __init__(self, adapter: Adapter, method: Method, watch: Watch, features: FeatureStore | None = None) -> None:
        self.adapter, self.method, self.watch = adapter, method, watch
        self.features = None if CHANGING & set(method.hook_points) else features
        self.encoding: Encoding | None = None
        self._encoded: Callable[[], Any] | None = None
        self._exit = ExitStack()
        self._hooks_side = bool(SIDE & set(method.hook_points))
        if SIDE & set(method.hook_points) - set(adapter.family.sides) and adapter.vision_tower is not None:
            raise UnsupportedModelError(
                f"{method.name} acts on the vision side, which cannot be pruned in architecture {adapter.kind!r}: "
                "choose a method that acts in the decoder"
            )
        if adapter.vision_tower is None and self._hooks_side:
            raise UnsupportedModelError(
                f"{method.name} reads the vision tower, and a bare decoder has none: pass the full model"
            )
        vision = adapter.geometry.vision if self._hooks_side else None
        self._read = method.blocks_read(vision) if vision else ()
        self._received = method.blocks_received(vision) if vision else ()

    def __enter__(self) -> VisionTap:
        tower = self.adapter.vision_tower
        if tower is None:
            return self
        with ExitStack() as stack:
            stack.callback(tower.register_forward_pre_hook(self._on_pixels, with_kwargs=True).remove)
            if self._hooks_side:
                self._hook_projector(stack)
            if self.features is not None:
                stack.enter_context(SharedTower(tower, self.features, self._parts, self._seen, self._recall))
            self._exit = stack.pop_all()
        return self

    def _hook_projector(self, stack: ExitStack) -> None:
        vision, blocks = self.adapter.geometry.vision, self.adapter.vision_blocks
        assert vision is not None
        if self.method.vision_cls:
            stack.callback(blocks[vision.feature_block].register_forward_hook(self._on_feature_block).remove)
        if "tower" in self.method.hook_points:
            stack.enter_context(Tower(self.adapter, self.method, self.watch, self._current))
        before, behind = self._watched(self._on_features), self._watched(self._on_projected)
        stack.callback(self.adapter.projector.register_forward_pre_hook(before).remove)
        stack.callback(self.adapter.projector.register_forward_hook(behind).remove)
        read = {name: blocks[vision.feature_block + 1 + name] for name in {*self._read, *self._received}}
        observers = {block.self_attn: partial(self._observe, name) for name, block in read.items()}
        stack.enter_context(Interception(observers))

    def __exit__(self, *error: Any) -> None:
        self._exit.close()

    def begin(self, encoded: Any) -> None:
        """A prefill begins; ``encoded``: its images, if ``generate`` encoded them before, or None.

        What was seen belongs to it if nobody has used that yet, or only a prefill on the same encoded images.
        """
        if encoded is None or (self._encoded is not None and self._encoded() is not encoded):
            self.forget()

    def used(self, encoded: Any, *, again: bool) -> None:
        """A prefill has used what was seen of its images; ``again``: ``generate`` may run them with the next token."""
        if encoded is None or not again:
            self.forget()
        else:  # for as long as the encoded images live
            self._encoded = weakref.ref(encoded, lambda _: self.forget())

    def forget(self) -> None:
        """What was seen has been used, or belongs to another prompt."""
        self.encoding = self._encoded = None

    def _current(self) -> Encoding:
        assert self.encoding is not None
        return self.encoding

    def _watched(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any) -> Any:
            with self.watch("method"):
                return hook(*args)

        return watched

    # ---- at the tower ---------------------------------------------------------------------------------------------

    def _on_pixels(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        vision, self._encoded = self.adapter.geometry.vision, None
        assert vision is not None
        before = None if self.encoding is None else self.encoding.grids
        self.encoding = Encoding(vision)
        if self.adapter.family.grids is not None:
            # Images of several shapes: hashes of rows do without their pixels. Videos come behind them.
            grids = self.adapter.family.grids(vision, args, kwargs)
            self.encoding.grids = grids if before is None else torch.cat([before, grids])
            return None
        pixels = self.encoding.pixels = args[0] if args else kwargs["pixel_values"]
        with self.watch("method"):
            smaller = self.method.image(pixels, vision) if "image" in self.method.hook_points else None
        if smaller is None:
            return None
        rest = {key: value for key, value in kwargs.items() if key != "pixel_values"}
        return (smaller, *args[1:]), rest | {"interpolate_pos_encoding": True}

    def _on_feature_block(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self._current().cls = output[:, 0]

    def _observe(
        self, name: int, kernel: Any, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any
    ) -> Any:
        self._current().blocks[name] = (q, k, kwargs["scaling"])
        return kernel(module, q, k, v, mask, **kwargs)

    @property
    def _parts(self) -> tuple[str, ...]:
        """What the method reads of the tower's inside, by name."""
        if not self._hooks_side:
            return ()
        read, received = (f"block{name}" for name in self._read), (f"received{name}" for name in self._received)
        return *read, *received, *(("cls",) if self.method.vision_cls else ())

    def _seen(self) -> dict[str, Entry]:
        # Tokens first, as the block lays them out; of the queries CLS's alone can be read.
        encoding = self._current()
        parts: dict[str, Entry] = {
            f"block{name}": {
                "query": q[:, :, :1].transpose(1, 2),
                "key": k.transpose(1, 2),
                "scaling": torch.tensor([scaling], dtype=torch.float64),
            }
            for name, (q, k, scaling) in encoding.blocks.items()
            if name in self._read
        }
        for name in self._received:
            parts[f"received{name}"] = {"received": received(*encoding.blocks[name])}
        return parts if encoding.cls is None else parts | {"cls": {"cls": encoding.cls}}

    def _recall(self, parts: Mapping[str, Entry]) -> None:
        if not self._hooks_side:
            return
        for name in self._received:
            self._current().received[name] = parts[f"received{name}"]["received"]
        for name in self._read:
            part = parts[f"block{name}"]
            query, key = part["query"].transpose(1, 2), part["key"].transpose(1, 2)
            self._current().blocks[name] = (query, key, float(part["scaling"][0]))
        if self.method.vision_cls:
            self._current().cls = parts["cls"]["cls"]

    # ---- at the projector -----------------------------------------------------------------------------------------

    def _on_features(self, module: nn.Module, args: tuple[Tensor]) -> Tensor | None:
        (features,), encoding = args, self._current()
        encoding.features = features
        self._check(encoding)
        patches = encoding.vision.tokens
        if features.shape[1] < patches:
            kept = encoding.kept = _left_inside(encoding, features)
            encoding.decision, new = Merge(kept.mask), features.shape[1] if encoding.inside.patches is None else 0
            encoding.projected_tokens = kept.host_counts + new
            return None
        view = VisionView(encoding)
        encoding.decision = checked(self.method.vision(view), self.method.name, "vision", tuple(view.present.shape))
        if encoding.decision is None:
            return None
        merge = on_images(encoding.decision)
        kept = encoding.kept = TokenSet(merge.mask, tuple(merge.mask.sum(1).tolist()))
        encoding.projected_tokens = kept.device_counts + (0 if merge.added is None else merge.added_mask().sum(1))
        left = kept.pick(features if merge.replaced is None else merge.replaced, 1)
        return left if merge.added is None else torch.cat([left, merge.added.to(left.dtype)], dim=1)

    def _check(self, encoding: Encoding) -> None:
        """Raise unless all that the method reads of the tower was seen: nothing seen is never nothing to do."""
        seen = encoding.blocks.keys() >= set(self.method.vision_blocks)
        seen = seen and (encoding.cls is not None or not self.method.vision_cls)
        if "tower" in self.method.hook_points:
            seen = seen and len(encoding.block_tokens) == len(self.adapter.vision_blocks)
        if not seen:
            raise VisibenchError(UNSEEN.format(self.method.name))

    def _on_projected(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor | None:
        encoding = self._current()
        encoding.projector_input = output.shape[:2].numel()
        if encoding.kept is None:
            encoding.projected = output
            return None
        assert encoding.decision is not None
        count = encoding.kept.index.shape[1]
        added = None if output.shape[1] == count else output[:, count:]
        encoding.decision = replace(as_merge(encoding.decision), replaced=None, added=added)
        places = output.new_zeros(output.shape[0], encoding.vision.tokens, output.shape[2])
        return encoding.kept.place(output[:, :count], places, dim=1)

    # ---- at decoder layer 0 ---------------------------------------------------------------------------------------

    def decide(self, forward: Forward, layout: TokenLayout, trace: Trace) -> Keep | Merge | None:
        """The method's decision about the images, translated from images (N, P) to the rows (B, V) of the batch."""
        if not self._hooks_side:
            return None
        encoding = self.encoding
        if encoding is None or encoding.features is None:
            raise InputError(f"{self.method.name} needs the images: pass pixel_values inside the `with` block")
        if encoding.decision is None:
            view = VisionView(encoding)
            encoding.decision = checked(
                forward.projected(view), self.method.name, "projected", tuple(view.present.shape)
            )
        if encoding.decision is None:
            return None
        rows = ImageRows(layout, encoding.vision.tokens, encoding.features.shape[0])
        images = encoding.features.shape[0]
        macs = rows.group(torch.tensor(encoding.macs).expand(images)[:, None]).sum(1)
        trace.scored(0, macs, sum(rows.counts) * encoding.padded_macs)
        trace.host_syncs += encoding.host_syncs
        ran = self._tower_tokens(encoding)
        if ran is not None:
            trace.tower, trace.batch_tower = (rows.group(tokens.expand(images, 1, -1, 2)) for tokens in ran)
        if encoding.projected_tokens is not None:
            trace.projected = rows.group(encoding.projected_tokens[:, None]).sum(1).cpu()
            trace.batch_projected = encoding.projector_input
        return rows.translate(on_images(encoding.decision))

    def _tower_tokens(self, encoding: Encoding) -> tuple[Tensor, Tensor] | None:
        """Int (N or 1, 1, blocks, 2): tokens of images at attention and MLP of each block, and places they took."""
        if "tower" in self.method.hook_points:
            tokens = torch.tensor(encoding.block_tokens).permute(2, 0, 1)[:, None]
            return tokens, torch.tensor(encoding.block_widths)[None, None]
        assert encoding.features is not None
        vision, count = encoding.vision, int(encoding.features.shape[1])
        if count == vision.tokens:
            return None
        tokens = torch.full((1, 1, vision.layers, 2), count + vision.has_cls)
        return tokens, tokens


def _left_inside(encoding: Encoding, features: Tensor) -> TokenSet:
    """Which patches are left of each image where the tower put out fewer; none where its tokens are new ones."""
    images, patches, inside = features.shape[0], encoding.vision.tokens, encoding.inside
    left = features.new_zeros(images, patches + 1, dtype=torch.bool)
    if inside.patches is None:
        return TokenSet(left[:, :-1], (0,) * images)
    first = int(encoding.vision.has_cls)
    index = inside.patches[:, first:] - first
    if inside.present is not None:
        index = index.masked_fill(~inside.present[:, first:], patches)
    counts = tuple(count - first for count in inside.counts)
    return TokenSet(left.scatter(1, index, torch.ones_like(index, dtype=torch.bool))[:, :-1], counts)
