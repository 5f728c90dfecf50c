"""What was computed: tokens, KV lengths and attention work of one prefill, per sample and layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from .layout import TokenLayout
from .packing import Packing

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..utils.overlay import Overlay

# Work of each row, int (B,), on the host.
Work = np.ndarray | Tensor
# Entered around work of the method and what carries it out, and inside that around work that the model does anyway.
Watch = Callable[[Literal["method", "model"]], AbstractContextManager[None]]
_nobody: AbstractContextManager[None] = nullcontext()


def unwatched(part: Literal["method", "model"]) -> AbstractContextManager[None]:
    """The default: nobody watches."""
    return _nobody


class OnHost:
    """Numbers on their way to the host. The device goes on meanwhile: what is queued behind them does not wait."""

    def __init__(self, parts: Sequence[Tensor], trace: Trace) -> None:
        self._trace, self._sizes = trace, [part.numel() for part in parts]
        numbers = parts[0] if len(parts) == 1 else torch.cat([part.flatten() for part in parts])
        self._there = numbers.to("cpu", non_blocking=True)
        self._event = torch.cuda.Event() if numbers.is_cuda else None
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(numbers.device))

    def read(self) -> list[np.ndarray]:
        """Those of each part, flat; waits until they are there, and counts as one read."""
        self._trace.host_syncs += 1
        if self._event is not None:
            self._event.synchronize()
        return np.split(np.from_dlpack(self._there).ravel(), np.cumsum(self._sizes)[:-1])


class Trace:
    """Record of one prefill. Layer numbers count decoder layers from 0; work is in multiply-adds (MACs).

    Attention work is kept as *pairs*, query-key products a head: a layer that attends fully over n tokens has n²
    (kernels and papers count the masked half as well). Work of a sample is that of the sample alone; what the batch ran
    besides, where its rows are padded to the longest, is kept for the batch as a whole.
    """

    def __repr__(self) -> str:
        before = self.prompt.visual_counts
        after = self.layouts[-1].visual_counts if self.layouts else before
        shown = "; ".join(f"{one} to {two}" for one, two in zip(before[:4], after, strict=False))
        more = f"; and {len(before) - 4} rows more" if len(before) > 4 else ""
        return f"Trace({len(before)} rows, {self.layers} layers, visual tokens {shown}{more})"

    def __init__(self, prompt: TokenLayout, layers: int, watch: Watch = unwatched) -> None:
        self.prompt, self.watch = prompt, watch
        self.layers = layers
        self.layouts: list[TokenLayout] = []
        self.host_syncs = 0
        # Visual tokens that went through the projector, int (B,).
        self.projected = torch.from_numpy(np.array(prompt.visual_counts))
        # The same for the whole batch; None: the sum of the above.
        self.batch_projected: int | None = None
        # Of the images of each row, int (B, M, blocks, 3): tokens at the attention and at the MLP of each vision block,
        # and the pairs of its attention; zeros for images that a row does not have. And the same of the places that
        # they took. None: all tokens in every block.
        self.tower: Tensor | None = None
        self.batch_tower: Tensor | None = None
        # Frames and patches, int (N, 3), of all images or tiles of the batch; None: images are of one size.
        self.grids: Tensor | None = None
        # The same of what the tower was given in place of these images, where a method made them smaller.
        self.tower_grids: Tensor | None = None
        # Where the tokens of an image lie in it (:mod:`visibench.utils.token_grids`): by the model's image processor,
        # inputs of the batch, the image's number there and its size (width, height); None where that is not known.
        self.views: Callable[[Any, Mapping[str, Any], int, tuple[int, int]], list[list[int]]] | None = None
        # Whether videos are among the images.
        self.has_videos = False
        # The images or tiles of each row, by number; None where that is not known, or there is one row.
        self.units_of_row: list[list[int]] | None = None
        # Sums on the host are numpy's: torch would dispatch them like work of the model.
        self._pairs: dict[int, np.ndarray] = {}
        # Entries that each layer's KV cache held before, int (B,), and the places they take.
        self._cached: list[np.ndarray] = []
        self._cached_places: list[int] = []
        # How each layer's rows lie one behind the other; None where they are padded.
        self._packings: list[Packing | None] = []
        self._scoring: dict[int, np.ndarray] = {}
        self._batch_pairs: dict[int, int] = {}
        self._batch_scoring: dict[int, int] = {}

    # ---- written by the engine -------------------------------------------------------------------------------

    def enter(
        self, layout: TokenLayout, cached: np.ndarray | None = None, places: int = 0, packing: Packing | None = None
    ) -> None:
        """The next decoder layer starts with this layout, and will attend fully unless it says otherwise.

        ``cached``: int (B,), what its KV cache holds already, in so many ``places``; None: nothing.
        ``packing``: how its rows lie one behind the other; None: padded to the longest.
        """
        self.layouts.append(layout)
        self._packings.append(packing)
        self._cached.append(np.zeros(layout.rows, dtype=np.int64) if cached is None else cached)
        self._cached_places.append(places)

    def attended(self, layer: int, pairs: Work, batch: int | None = None, *, instead: bool = False) -> None:
        """Attention over ``pairs`` int (B,) ran in ``layer``, in addition to or instead of the full one.

        ``batch``: pairs that the whole batch ran, by default as if every row were the one with the most.
        """
        pairs = np.asarray(pairs)
        batch = _padded(pairs) if batch is None else batch
        self._batch_pairs[layer] = batch if instead else self._batch_attention(layer) + batch
        self._pairs[layer] = pairs if instead else self._attention(layer) + pairs

    def scored(self, layer: int, macs: Work, batch: int | None = None) -> None:
        """Scoring work, int (B,) MACs, was done for ``layer``; ``batch``: MACs of the whole batch, as above."""
        macs = np.asarray(macs)
        self._batch_scoring[layer] = self._batch_scoring.get(layer, 0) + (_padded(macs) if batch is None else batch)
        self._scoring[layer] = self._scored(layer) + macs

    # ---- read by everybody ------------------------------------------------------------------------------------

    def kept(self, layer: int) -> Tensor:
        """Bool (B, V): which visual tokens of the prompt, in their order there, are at the input of ``layer``.

        False where a row has fewer visual tokens than the row with the most. Tokens added by a merge do not show.
        """
        layout = self.layouts[layer]
        width = max(self.prompt.visual_counts)
        kept = torch.zeros(layout.rows, width + 1, dtype=torch.bool, device=layout.device)
        index = layout.visual_id.masked_fill(layout.visual_id < 0, width)
        return kept.scatter_(1, index, torch.ones_like(kept[:, :1]).expand_as(index))[:, :width]

    def show(self, image: Image | Sequence[Image], row: int = 0, processor: Any = None) -> Overlay:
        """A picture of the visual tokens of ``row`` that stay, by layer; a notebook shows it, ``.figure`` is for files.

        ``image``: that of the row, or all of them in order; other rows have as many. ``processor``: the model's, needed
        for families that cut images into tiles of its choice. Raises :class:`InputError` where it is not known which
        place a token has.
        """
        from ..utils.overlay import Overlay, Strip
        from ..utils.token_grids import size

        if self.has_videos:
            raise InputError(
                "videos are not drawn: show what a method leaves of images, such as a frame, asked about alone"
            )
        images = list(image) if isinstance(image, Sequence) else [image]
        count = self.prompt.visual_counts[row]
        by = getattr(processor, "image_processor", processor)
        inputs = {"image_grid_thw": self.grids, "batch_num_images": [len(images)] * self.prompt.rows}
        numbered = enumerate(images, start=row * len(images))
        places = [self.views(by, inputs, number, one.size) for number, one in numbered] if self.views else []
        if size(places) != count:
            raise InputError(
                f"row {row} has {count} visual tokens, and its images have places for {size(places)}: give the images "
                "that were asked about, and the model's processor"
            )
        kept = torch.stack([self.kept(layer)[row, :count] for layer in range(len(self.layouts))]).cpu().numpy()
        made = [counts - int(stay.sum()) for counts, stay in zip(self.visual_counts()[row].tolist(), kept, strict=True)]
        return Overlay(images, places, [Strip("", kept, made)])

    def visual_counts(self) -> Tensor:
        """Int (B, layers): visual tokens at each layer's input, merged ones included."""
        return torch.tensor([layout.visual_counts for layout in self.layouts]).T

    def kv_lengths(self) -> Tensor:
        """Int (B, layers): entries of each layer's KV cache right after prefill."""
        return torch.tensor([layout.lengths for layout in self.layouts]).T + torch.from_numpy(np.stack(self._cached, 1))

    def attention_pairs(self) -> Tensor:
        """Int (B, layers): query-key pairs a head that attention really computed."""
        return torch.from_numpy(np.stack([self._attention(layer) for layer in range(len(self.layouts))], 1))

    def _attention(self, layer: int) -> np.ndarray:
        tokens = np.array(self.layouts[layer].lengths)
        return self._pairs.get(layer, tokens * (tokens + self._cached[layer]))

    def scoring_macs(self) -> Tensor:
        """Int (B, layers): matrix multiply-adds spent on scoring tokens."""
        return torch.from_numpy(np.stack([self._scored(layer) for layer in range(len(self.layouts))], 1))

    def _scored(self, layer: int) -> np.ndarray:
        return self._scoring.get(layer, np.zeros(self.prompt.rows, dtype=np.int64))

    # ---- of the whole batch -----------------------------------------------------------------

    def batch_tokens(self) -> list[int]:
        """Tokens that each layer ran over: those of all rows, and padding where there is some."""
        layers = zip(self.layouts, self._packings, strict=True)
        return [layout.rows * layout.width if packing is None else packing.tokens for layout, packing in layers]

    def batch_attention_pairs(self) -> list[int]:
        """Query-key pairs a head that attention really computed in each layer."""
        return [self._batch_attention(layer) for layer in range(len(self.layouts))]

    def _batch_attention(self, layer: int) -> int:
        layout, packing = self.layouts[layer], self._packings[layer]
        full = layout.rows * layout.width * (layout.width + self._cached_places[layer])
        return self._batch_pairs.get(layer, full if packing is None else packing.pairs)

    def batch_scoring_macs(self) -> list[int]:
        """Matrix multiply-adds spent on scoring tokens, for each layer."""
        return [self._batch_scoring.get(layer, 0) for layer in range(len(self.layouts))]


def _padded(work: np.ndarray) -> int:
    return len(work) * int(work.max())
