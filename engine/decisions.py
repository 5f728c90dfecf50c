"""What a method may return: keep, merge, let tokens join that were held aside, or go on in the vision tower with fewer.

Shapes as in :mod:`visibench.engine.contract`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..errors import VisibenchError
from .layout import ADDED, Cut, TokenLayout, TokenSet, arranged, cut_run, cut_to


@dataclass(frozen=True)
class Keep:
    """Keep the visual tokens where ``mask`` (bool, (B, V)) is true and drop the others.

    ``order``: int (B, V) or None; the tokens that stay go on in ascending order of these numbers, in place of their
    own, by methods that say so (``reorders``). Equal ones keep their order. On the vision side B counts images, which
    never mix. ``aside``: in the decoder, the others are held aside as they are, until a :class:`Join`. ``counts``: how
    many stay in each row, from methods that have read it; the cut then need not.
    """

    mask: Tensor
    order: Tensor | None = None
    aside: bool = False
    counts: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Ranking:
    """Keep the visual tokens of highest score in each row, of equal ones the earlier, and drop the others.

    ``scores``: (B, V) of the ``tokens``. ``counts``: how many stay in each row, on the host, so that no cut has to
    wait for its own numbers. ``added``: (B, M, D) or None, new tokens, placed behind the last visual token of the row,
    of which the first ``new`` exist in each row; None: all of them. For methods that number positions anew.
    """

    scores: Tensor
    counts: tuple[int, ...]
    tokens: TokenSet
    added: Tensor | None = None
    new: tuple[int, ...] | None = None

    @classmethod
    def of(cls, scores: Tensor, counts: Sequence[int], tokens: TokenSet) -> Ranking:
        """Of ``counts`` of which more than there are mean all."""
        asked = zip(counts, tokens.counts, strict=True)
        return cls(scores, tuple(min(count, there) for count, there in asked), tokens)

    def adding(self, added: Tensor, new: tuple[int, ...] | None = None) -> Ranking:
        """The same with new tokens."""
        other = replace(self, added=added, new=new)
        vars(other)["order"] = self.order
        return other

    @property
    def more(self) -> int:
        """M, the places of new tokens."""
        return 0 if self.added is None else int(self.added.shape[1])

    def cut(self, layout: TokenLayout) -> Cut | None:
        """Carried out on ``layout``, whose visual tokens these are; None if all stay. No host sync."""
        new = (self.more,) * layout.rows if self.new is None else self.new
        if self.counts == layout.visual_counts and not any(new):
            return None
        if layout.span is not None and min(self.counts) == max(self.counts) and min(new) == self.more:
            return cut_run(layout, self.order[:, : self.counts[0]].sort(dim=1)[0], self.counts, self.more)
        if not self.more:
            return cut_to(layout, self.mask, self.counts)
        anchor = self.tokens.last_of(layout.counted[:, : layout.width], self.more)
        return cut(layout, self.mask, self.added_present, anchor, counts=self.counts, new=new)

    @cached_property
    def order(self) -> Tensor:
        """Int (B, V): the tokens, those of highest score first; what a row does not have comes last."""
        scores = self.scores if self.tokens.is_even else self.scores.masked_fill(~self.tokens.present, float("-inf"))
        return scores.argsort(dim=1, descending=True, stable=True)

    @cached_property
    def mask(self) -> Tensor:
        """Bool (B, V): which stay."""
        counts = torch.tensor(self.counts).to(self.scores.device, non_blocking=True)
        return top(self.scores, counts, self.tokens.present)

    @property
    def added_present(self) -> Tensor:
        """Bool (B, M): which of the new tokens exist."""
        place = torch.arange(self.more, device=self.scores.device).expand(len(self.scores), -1)
        new = torch.tensor(self.new or (self.more,) * len(place))[:, None]
        return place < new.to(place.device, non_blocking=True)


def top(scores: Tensor, count: Tensor, present: Tensor) -> Tensor:
    """Mask of the ``count`` highest scores of each row; ties go to the earlier token.

    ``scores``: (B, V), ``count``: int (B,), ``present``: bool (B, V). Returns bool (B, V). No host sync.
    """
    ordered = scores.masked_fill(~present, float("-inf")).argsort(dim=1, descending=True, stable=True)
    place = torch.arange(scores.shape[1], device=scores.device).expand_as(ordered)
    return (torch.empty_like(ordered).scatter_(1, ordered, place) < count[:, None]) & present


@dataclass(frozen=True)
class Join:
    """All visual tokens held aside come back, between the neighbours and at the positions that they had.

    Their hidden states are those with which they left.
    """


@dataclass(frozen=True)
class Merge:
    """Keep, replace and add visual tokens.

    ``mask``: bool (B, V), the tokens that stay. ``replaced``: (B, V, D) or None, new contents for all present tokens
    (only those that stay matter). ``added``: (B, M, D) or None, new tokens, placed behind the last kept visual token of
    the row; ``added_present``: bool (B, M), where None means that all are. ``added_positions``: int (B, M), the
    positions of the new tokens, needed under the ``keep`` policy only, and there not where they are ``anchored``: each
    then has that of the token by which it stands. ``anchors``: int (B, M), for each new token the visual token (it need
    not stay) by which it goes: j for behind token j, -1 - j for in front of it; None: behind the last one. On the
    vision side P + k, of P tokens, is behind the whole image of which the unit is a part, those of lower k first.
    ``order``: as in :class:`Keep`; where tokens change places, anchors name the places.

    ``bias``: (B, V) or None, a lasting bias on tokens that stay, in place of the one they had: added to the attention
    logits of each as a key, in this layer and all behind it, in later turns and in decoding too. log(n) lets a token
    that stands for n count as often. For methods that say so (``biases_keys``). ``positions``: int (B, V) or (B, V, 3),
    other positions of the tokens that stay, under the ``keep`` policy; None: their own. ``counts``: as in
    :class:`Keep`. ``images``: int (N, 3), frames and patches of the images that the rows hold then, all of them, row by
    row: positions that are numbered anew are those that the model itself gives such a prompt.
    """

    mask: Tensor
    replaced: Tensor | None = None
    added: Tensor | None = None
    added_present: Tensor | None = None
    added_positions: Tensor | None = None
    anchors: Tensor | None = None
    order: Tensor | None = None
    bias: Tensor | None = None
    positions: Tensor | None = None
    counts: tuple[int, ...] | None = None
    images: Tensor | None = None
    anchored: bool = False

    @property
    def known(self) -> tuple[tuple[int, ...], tuple[int, ...]] | tuple[()]:
        """How many stay and how many are new in each row, where that is known on the host and their order is theirs."""
        if self.counts is None or self.added_present is not None or self.order is not None:
            return ()
        return self.counts, (0 if self.added is None else int(self.added.shape[1]),) * len(self.counts)

    def added_mask(self) -> Tensor:
        """Bool (B, M): the new tokens that exist."""
        assert self.added is not None
        if self.added_present is not None:
            return self.added_present
        return torch.ones(self.added.shape[:2], dtype=torch.bool, device=self.added.device)

    def columns(self, visual: TokenSet) -> Tensor:
        """Int (B, M): the columns of the ``visual`` tokens by which new ones stand; one less is in front of it."""
        anchor = visual.device_counts[:, None] - 1 if self.anchors is None else self.anchors
        token = torch.where(anchor < 0, -1 - anchor, anchor).clamp(max=visual.index.shape[1] - 1)
        return visual.index.gather(1, token.expand(self.added_mask().shape)) - (anchor < 0).long()


@dataclass(frozen=True)
class BlockCut:
    """Go on in the vision tower with the patches of highest ``scores`` (N, P), of each unit so many as ``counts`` say.

    ``counts``: on the host, at most those that are there; all alike once patches have merged. Of equal scores the
    earlier patch stays; they keep their order, and CLS its place. Where several patches make a token, those that are
    left at the end do in their order: of each unit a multiple of them.
    """

    scores: Tensor
    counts: tuple[int, ...]


@dataclass(frozen=True)
class BlockMerge:
    """Go on in the vision tower with averages of tokens, weighted by size, the number of patches they stand for.

    ``group``: int (N, u), which of ``count`` tokens each one becomes, CLS first where there is one. Where several
    patches make a token behind the tower it is these tokens that merge, patch by patch, and CLS stays the first. Units
    must have the same number left. ``proportional``: log(size) is added to the attention logits of all of them as keys
    in the blocks that follow. ``stands``: returns int (N, count), at which of the u places each new one stands; called
    in towers whose blocks give every patch a position.
    """

    group: Tensor
    count: int
    proportional: bool = False
    stands: Callable[[], Tensor] | None = None


def merged(tokens: Tensor, size: Tensor, group: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Averages (N, count, D) of ``tokens`` (N, t, D) by ``group``, weighted by ``size`` (N, t), and their sizes."""
    images, _, width = tokens.shape
    total = size.new_zeros(images, count).scatter_add(1, group, size)
    precise = tokens if tokens.dtype == torch.float64 else tokens.float()
    weighted = precise * size[..., None]
    sums = weighted.new_zeros(images, count, width).scatter_add(1, group[..., None].expand_as(weighted), weighted)
    return (sums / total[..., None]).to(tokens.dtype), total


def as_merge(decision: Keep | Ranking | Merge) -> Merge:
    """A decision that only keeps as the Merge that does."""
    if isinstance(decision, Merge):
        return decision
    if isinstance(decision, Ranking):
        return Merge(decision.mask)
    return Merge(decision.mask, order=decision.order, counts=decision.counts)


def check_declared(merge: Merge, method: Any, *, aside: bool) -> None:
    """Raise :class:`VisibenchError` for what a method may do only if it says so."""
    placed = merge.added is None or merge.added_positions is not None or merge.anchored
    if not placed and method.positions != "renumber":
        raise VisibenchError(f"{method.name}: new tokens need added_positions, or positions='renumber'")
    if merge.order is not None and not method.reorders:
        raise VisibenchError(f"{method.name} changes the order of tokens and does not say so: set reorders")
    if merge.bias is not None and not method.biases_keys:
        raise VisibenchError(f"{method.name} puts a bias on keys and does not say so: set biases_keys")
    if aside and method.reorders:
        raise VisibenchError(f"{method.name} changes the order of tokens, so that none can be held aside")


def on_images(decision: Keep | Merge) -> Merge:
    """A decision of the vision side as a Merge. Raises :class:`VisibenchError` if it holds tokens aside."""
    if isinstance(decision, Keep) and decision.aside:
        raise VisibenchError("tokens can be held aside at the input of decoder layers alone, not on the vision side")
    return as_merge(decision)


def checked(decision: object, method: str, hook: str, sizes: tuple[int, ...]) -> Any:
    """What a method answered at a hook, if it can be that; ``sizes``: (B, V), of the view it was asked about.

    Raises :class:`VisibenchError` that names the hook, what it wants and what it got.
    """
    if decision is None:
        return None
    shape = "(N, P)" if hook in ("vision", "projected") else "(B, V)"
    where = f"{method}.{hook}"
    if isinstance(decision, Ranking):
        if tuple(decision.scores.shape) != sizes:
            raise VisibenchError(f"{where}: Ranking wants scores {shape} = {sizes}, got {spelled(decision.scores)}")
        return decision
    if not isinstance(decision, Keep | Merge | Join):
        got = f"a tensor {spelled(decision)}" if isinstance(decision, Tensor) else f"a {type(decision).__name__}"
        raise VisibenchError(f"{where}: answer with Keep(mask), mask bool {shape} = {sizes}, Merge or None, not {got}")
    mask = getattr(decision, "mask", None)
    if isinstance(mask, Tensor) and (mask.dtype != torch.bool or tuple(mask.shape) != sizes):
        kind = type(decision).__name__
        raise VisibenchError(f"{where}: {kind} wants bool {shape} = {sizes}, got {spelled(mask)}")
    return decision


def spelled(tensor: Tensor) -> str:
    """Its type and shape, for messages."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def cut(
    layout: TokenLayout,
    keep: Tensor,
    added: Tensor | None = None,
    anchor: Tensor | None = None,
    order: Tensor | None = None,
    counts: tuple[int, ...] | None = None,
    new: tuple[int, ...] | None = None,
) -> Cut | None:
    """Drop visual tokens and add others; None if nothing changes. One host sync: the counts, unless they are given,
    and those of the ``new`` tokens, where there are any.

    ``keep``: bool (B, V). ``added``: bool (B, M), the new tokens that exist; each stands right behind the token at
    ``anchor``, int (B, M) in old columns. ``order``: int (B, V), tokens that stay take each other's columns so that
    these numbers rise. Sorting by column with dropped tokens first pads on the left by itself.
    """
    keep = keep if layout.visual.is_even else keep & layout.visual.present
    if added is None and order is None:
        return cut_to(layout, keep, tuple(keep.sum(1).tolist()) if counts is None else counts)
    column = layout.counted[:, : layout.width] * 2
    if added is None or anchor is None:
        added, anchor = keep[:, :0], column[:, :0]
    column, moved = _in_order(layout, column, keep, order)
    if counts is None or new is None:
        counts, new, moves = map(tuple, torch.stack([keep.sum(1), added.sum(1), moved]).tolist())
        if counts == layout.visual_counts and not any(new) and not any(moves):
            return None
    elif counts == layout.visual_counts and not any(new) and order is None:
        return None
    stays = torch.cat([layout.visual.place(keep, layout.nonvisual.mask, dim=1), added], dim=1)
    column = torch.cat([column, anchor * 2 + 1], dim=1)
    ids = torch.full_like(added, ADDED, dtype=layout.visual_id.dtype)
    return arranged(layout, column, stays, ids, tuple(map(sum, zip(counts, new, strict=True))))


def _in_order(layout: TokenLayout, column: Tensor, keep: Tensor, order: Tensor | None) -> tuple[Tensor, Tensor]:
    """Columns (B, L) with those of the tokens that stay dealt out anew by ``order``, and int (B,): how many moved."""
    if order is None:
        return column, torch.zeros_like(column[:, 0])
    visual = layout.visual.pick(column, 1)
    by_place = (~keep).to(torch.int8).argsort(dim=1, stable=True)
    by_order = order.masked_fill(~keep, torch.iinfo(order.dtype).max).argsort(dim=1, stable=True)
    dealt = visual.scatter(1, by_order, visual.gather(1, by_place))
    return layout.visual.place(dealt, column, dim=1), ((dealt != visual) & keep).sum(1)
