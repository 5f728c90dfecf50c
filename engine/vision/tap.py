"""Decisions after the vision tower: hooks at the tower and at the projector."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial, wraps
from inspect import signature
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import InputError, VisibenchError
from ...models.adapters import Adapter
from ..attention import Interception
from ..contract import VISION_SIDE, Forward, Method
from ..decisions import Keep, Merge, checked, on_images
from ..layout import TokenLayout, TokenSet
from ..trace import Trace, Watch
from ..units.encoding import Encoding, joined
from ..units.packing import units_of
from ..units.rows import ImageRows
from ..units.shapes import MIXTURE, Group, Numbers, Units, decided
from ..units.view import VisionView
from .features import Entry, FeatureStore, SharedTower
from .images import decided_on_images
from .left import left_inside, squares_left
from .limits import check_side, needed
from .smaller import images_of, renewed, shown_patches, shown_smaller, spaced
from .tower import UNSEEN, Tower

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
        sizes = adapter.geometry.vision
        # Where the tower lays all images one behind the other, none goes through it as if alone.
        shares = not (CHANGING & set(method.hook_points) or (sizes is not None and sizes.one_sequence))
        self.features = features if shares else None
        self.encoding: Encoding | None = None
        self._arguments: Mapping[str, Any] = {}
        self._encoded: Callable[[], Any] | None = None
        self._exit = ExitStack()
        self._hooks_side = bool(VISION_SIDE & set(method.hook_points))
        self._hooks_features = self._hooks_side and "vision" in adapter.family.sides
        check_side(adapter, method)
        vision = adapter.geometry.vision if self._hooks_side else None
        self._read = method.blocks_read(vision) if vision else ()
        self._received = method.blocks_received(vision) if vision else ()

    def __enter__(self) -> VisionTap:
        tower = self.adapter.vision_tower
        if tower is None:
            return self
        with ExitStack() as stack:
            self._wrap_encoder(stack)
            stack.callback(tower.register_forward_pre_hook(self._on_pixels, with_kwargs=True).remove)
            if self._hooks_features:
                self._hook_projector(stack)
            if "image" in self.method.hook_points and self.adapter.family.tower_outputs:
                stack.callback(tower.register_forward_hook(self._watched(self._behind_tower)).remove)
            if self.features is not None:
                stack.enter_context(SharedTower(tower, self.features, self._parts, self._seen, self._recall))
            self._exit = stack.pop_all()
        return self

    def _wrap_encoder(self, stack: ExitStack) -> None:
        """Sizes of images are given to what encodes them alone: ``generate`` does not pass them on."""
        base: Any = self.adapter.model.base_model
        for name in ("get_image_features", "get_video_features"):
            if hasattr(base, name):
                stack.callback(self._noting(base, name))

    def _noting(self, base: Any, name: str) -> Callable[[], None]:
        own, before = getattr(base, name), vars(base).get(name)

        @wraps(own)
        def noted(*args: Any, **kwargs: Any) -> Any:
            outside = self._arguments
            self._arguments = signature(own).bind_partial(*args, **kwargs).arguments
            try:
                return own(*args, **kwargs)
            finally:
                self._arguments = outside

        def undo() -> None:
            delattr(base, name)
            if before is not None:
                setattr(base, name, before)

        setattr(base, name, noted)
        return undo

    def _hook_projector(self, stack: ExitStack) -> None:
        vision, blocks = self.adapter.geometry.vision, self.adapter.vision_blocks
        assert vision is not None
        if self.method.vision_cls:
            for number in {*vision.joined_blocks, vision.feature_block}:
                hook = partial(self._on_feature_block, number)
                stack.callback(blocks[number].register_forward_hook(hook).remove)
        if "tower" in self.method.hook_points:
            stack.enter_context(Tower(self.adapter, self.method, self.watch, self._current))
        before, behind = self._watched(self._on_features), self._watched(self._on_projected)
        stack.callback(self.adapter.features.register_forward_pre_hook(before).remove)
        stack.callback(self.adapter.projector.register_forward_hook(behind).remove)
        read = {name: blocks[vision.feature_block + 1 + name] for name in {*self._read, *self._received}}
        attention = self.adapter.family.vision_attention
        observers = {getattr(block, attention): partial(self._observe, name) for name, block in read.items()}
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
        pixels = args[0] if args else kwargs["pixel_values"]
        grids = None if self.adapter.family.grids is None else self.adapter.family.grids(vision, args, kwargs)
        before = self.encoding
        self.encoding = Encoding(vision, self._units(pixels, grids), grids=grids)
        if grids is not None and before is not None and before.grids is not None:  # videos behind images
            self.encoding.grids, self.encoding.before = torch.cat([before.grids, grids]), before
        if grids is None:  # else images of several shapes: hashes of rows do without their pixels
            self.encoding.pixels = pixels
        if "image" not in self.method.hook_points:
            return None
        given = {key: value for key, value in kwargs.items() if key != "pixel_values"}
        with self.watch("method"):
            small = shown_smaller(self.adapter, self.method, self.encoding, pixels, given)
        return None if small is None else ((small[0], *args[1:]), small[1])

    def _behind_tower(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self._current().smaller is not None:
            for name in self.adapter.family.tower_outputs:
                setattr(output, name, spaced(self._current(), getattr(output, name)))

    def _units(self, pixels: Tensor, grids: Tensor | None) -> Units:
        patches = None if grids is None else grids.tolist()
        units = units_of(self.adapter, patches, len(pixels), self._arguments)
        if needed(self.adapter, self.method) - {"projector"} and any(image.is_mixed for image in units.images):
            raise InputError(MIXTURE.format(self.method.name))
        return units

    def _on_feature_block(self, number: int, module: nn.Module, args: tuple, output: Tensor) -> None:
        encoding, vision = self._current(), self._current().vision
        if not vision.has_cls or vision.merged > 1:
            return
        encoding.cls_of[number] = output[:, 0]
        if number == vision.feature_block:
            joined = vision.joined_blocks or (number,)
            encoding.cls = torch.cat([encoding.cls_of[block] for block in joined], dim=-1)

    def _observe(
        self, name: int, kernel: Any, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any
    ) -> Any:
        self._current().observe(name, q, k, kwargs["scaling"], mask)
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
            parts[f"received{name}"] = {"received": encoding.attention_received(name, (0,))}
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
        encoding, vision = self._current(), self._current().vision
        features = encoding.features = (encoding.smaller or encoding.units).spread(args[0])
        self._check(encoding)
        if encoding.smaller is not None:
            return None
        if encoding.is_shrunk and vision.merged > 1:
            return self._narrowed(encoding, squares_left(encoding, features))
        if encoding.is_shrunk:
            kept = encoding.kept = left_inside(encoding, features)
            encoding.decision = Merge(kept.mask, counts=kept.counts)
            encoding.projected_tokens = kept.host_counts + (features.shape[1] if encoding.has_new else 0)
            return None
        merge, macs = self._by_unit(encoding, "vision", self.method.vision)
        encoding.macs = encoding.macs + macs
        return None if merge is None else self._narrowed(encoding, merge)

    def _narrowed(self, encoding: Encoding, merge: Merge) -> Tensor:
        """What is left to project by a decision about all units."""
        assert encoding.features is not None
        encoding.decision = merge
        masks = [merge.mask] if merge.added is None else [merge.mask, merge.added_mask()]
        numbers = merge.known or torch.stack([mask.sum(1) for mask in masks]).tolist()
        kept, *new = (TokenSet(mask, tuple(counts)) for mask, counts in zip(masks, numbers, strict=False))
        encoding.kept, encoding.new = kept, new[0] if new else None
        encoding.projected_tokens = torch.from_numpy(np.sum(numbers, axis=0))
        return encoding.units.narrowed(encoding.features, merge, kept, encoding.new)

    def _by_unit(
        self, encoding: Encoding, hook: str, ask: Callable[[VisionView], Keep | Merge | None]
    ) -> tuple[Merge | None, Numbers]:
        """The method's decision about all units, asked of those of one shape together, and what it cost each, (N,)."""
        units = encoding.units
        macs = np.zeros(len(units.grids), np.int64)

        def answer(group: Group) -> tuple[Tensor, Merge | None]:
            view = VisionView(encoding, group)
            decision = checked(ask(view), self.method.name, hook, view.sizes)
            macs[list(group.units)] += view.macs
            contents = view.projected if hook == "projected" else view.features
            return contents, None if decision is None else on_images(decision)

        return decided(len(units.grids), units.width, units.groups(unpad=self.method.unpad is True), answer), macs

    def _check(self, encoding: Encoding) -> None:
        """Raise unless all that the method reads of the tower was seen: nothing seen is never nothing to do."""
        vision, seen = encoding.vision, encoding.blocks.keys() | encoding.chunks.keys() | encoding.received.keys()
        complete = seen >= {*self._read, *self._received}
        if self.method.vision_cls and vision.has_cls and vision.merged == 1:
            complete = complete and encoding.cls is not None
        if "tower" in self.method.hook_points:
            complete = complete and len(encoding.block_tokens) == len(self.adapter.vision_blocks)
        if not complete:
            raise VisibenchError(UNSEEN.format(self.method.name))

    def _on_projected(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor | None:
        encoding, units = self._current(), self._current().units
        encoding.projector_input = output.shape[:-1].numel()
        if encoding.smaller is not None:
            inside = bool(self.adapter.family.tower_outputs)
            encoding.decision = renewed(encoding, output, anchored=inside)
            encoding.projected_tokens = torch.tensor([*map(prod, encoding.smaller.grids)])
            return None if inside else output.new_zeros(len(units.grids), units.width, output.shape[-1])
        if encoding.kept is None:
            encoding.projected = units.spread(output)
            return None
        assert encoding.decision is not None
        encoding.projected, added = units.widened(output, encoding.kept, encoding.new)
        encoding.decision = replace(encoding.decision, replaced=None, added=added)
        return units.gathered(encoding.projected)

    # ---- at decoder layer 0 ---------------------------------------------------------------------------------------

    def record(self, layout: TokenLayout, trace: Trace, ids: Tensor | None) -> TokenLayout:
        """The ``layout`` with its images, where these differ in shape; what the ``trace`` keeps of them.

        ``ids``: (B, n), those of the prompt first.
        """
        encoding = self.encoding
        if encoding is None or encoding.grids is None or not any(layout.visual_counts):
            return layout
        if encoding.before is not None and ids is not None:
            is_video = layout.visual.pick(ids[:, : layout.width], 1) == self.adapter.visual_tokens[-1]
            encoding = self.encoding = joined(encoding, is_video.cpu().numpy(), layout.visual_counts)
        trace.grids, counts = encoding.grids, layout.visual.host_counts.double()
        assert trace.grids is not None
        trace.projected = counts / counts.sum() * int(trace.grids.prod(1).sum()) / encoding.vision.merged
        with suppress(InputError):  # else it is not known who has which
            rows = encoding.rows(layout)
            trace.units_of_row = rows.of_row
            trace.projected = torch.from_numpy(rows.sum(np.array([*map(prod, encoding.units.grids)])))
            trace.prompt = layout = replace(layout, images=rows.shapes(encoding.units))
        return layout

    def decide(self, forward: Forward, layout: TokenLayout, trace: Trace, hidden: Tensor) -> Merge | None:
        """The method's decision about the images, as one about the rows of the batch, (B, V).

        ``hidden``: (B, L, D), what enters decoder layer 0.
        """
        if not self._hooks_side:
            return None
        encoding, method = self.encoding, self.method
        seen = encoding is not None and (encoding.features is not None or encoding.is_joined)
        if encoding is None or (self._hooks_features and not seen):
            raise InputError(f"{method.name} needs the images: pass pixel_values inside the `with` block")
        if encoding.before is not None:
            raise InputError(f"{method.name} must know which tokens are images and which are videos: pass input_ids")
        rows, visual = encoding.rows(layout), layout.visual.pick(hidden, 1)
        merge, macs, projected = encoding.decision, encoding.macs, "projector" in method.hook_points
        if merge is None and projected and not method.by_unit:
            decision, work = decided_on_images(forward, method, layout, visual, encoding)
        else:
            if merge is None and projected:
                merge, more = self._by_unit(encoding, "projected", forward.projected)
                macs = macs + more
            decision = None if merge is None else self._translated(rows, merge, visual, encoding)
            work = rows.sum(macs)
        trace.scored(0, work, int(work.sum()) + encoding.padding_macs)
        trace.host_syncs += encoding.host_syncs
        if encoding.smaller is not None:
            trace.tower_grids, trace.units_of_row = shown_patches(encoding), rows.of_row
            if decision is not None and self.adapter.family.places is not None:
                decision = replace(decision, images=images_of(rows, encoding))
        if "tower" in method.hook_points:
            trace.tower, trace.batch_tower = (rows.group(tokens) for tokens in self._tower_tokens(encoding))
        if encoding.projected_tokens is not None:
            trace.projected = rows.group(encoding.projected_tokens[:, None]).sum(1).cpu()
            trace.batch_projected = encoding.projector_input
        return decision

    def _translated(self, rows: ImageRows, merge: Merge, visual: Tensor, encoding: Encoding) -> Merge:
        """A decision about units as one about rows; patches of padding that were chosen come in addition."""
        new = None if self.method.unpad is not False or encoding.has_new else encoding.projected
        return rows.translate(merge, visual, anchors_stay=self.method.newlines != "drop", padding=new)

    def _tower_tokens(self, encoding: Encoding) -> tuple[Tensor, Tensor]:
        """Int (N, 1, blocks, 3): of units, tokens at attention and MLP of each block, and pairs; the same of places."""
        every = encoding.block_tokens, encoding.block_places
        tokens, places = (np.array(numbers).transpose(2, 0, 1)[:, None] for numbers in every)
        tokens, places = (np.concatenate([part, part[..., :1] ** 2], axis=-1) for part in (tokens, places))
        if any(encoding.block_pairs):
            tokens[..., 2] = places[..., 2] = np.array(encoding.block_pairs).T[:, None]
        return torch.from_numpy(tokens), torch.from_numpy(places)
