"""Test methods that exercise the engine where no shipped method does yet: merges, renumbering, the vision side."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from visibench.methods import BlockCut, Forward, Join, Keep, Merge, Method


@dataclass(frozen=True)
class Probe(Method):
    """Drops the tokens whose number is divisible by ``every``."""

    name = "probe"
    title = "Probe"
    hook_points = ("decoder",)
    layer: int = 1
    every: int = 2

    def begin(self, layout, geometry):
        return DecoderProbe(self)

    def mask(self, present):
        keep = torch.arange(present.shape[1]) % self.every != 0
        return keep.expand_as(present) & present


@dataclass(frozen=True)
class AsideProbe(Probe):
    """Holds aside what Probe drops, until the layer ``back``."""

    back: int = 3
    holds_aside = True

    def begin(self, layout, geometry):
        return AsideForward(self)


@dataclass(frozen=True)
class MergeProbe(Probe):
    """Drops like Probe, then adds the mean of the dropped tokens behind the last one (fails on rows without image)."""

    def begin(self, layout, geometry):
        return MergeForward(self)


@dataclass(frozen=True)
class VisionProbe(Probe):
    """Drops like Probe at the projector; with ``merge`` the mean feature comes in front of each image."""

    hook_points = ("vision",)
    merge: bool = False

    def vision(self, view):
        keep = self.mask(view.present)
        if not self.merge:
            return Keep(keep)
        added = view.features.mean(1, keepdim=True)
        return Merge(keep, added=added, anchors=torch.full(added.shape[:2], -1))

    def begin(self, layout, geometry):
        return Forward()


@dataclass(frozen=True)
class OrderProbe(Probe):
    """Drops like Probe in front of the projector; of each image the last token then comes first."""

    hook_points = ("vision",)
    reorders = True

    def vision(self, view):
        keep = self.mask(view.present)
        return Keep(keep, -torch.arange(keep.shape[1]).expand_as(keep))

    def begin(self, layout, geometry):
        return Forward()


@dataclass(frozen=True)
class TowerProbe(Probe):
    """In the first vision block images lose patches at random, some more than others, and none after that."""

    hook_points = ("tower",)
    vision_blocks = ()

    def block(self, view):
        if view.block > 0:
            return None
        scores = view.tokens[:, 1:].sum(2)
        return BlockCut(scores, tuple(9 if total > 0 else 5 for total in view.read(scores.sum(1))))

    def begin(self, layout, geometry):
        return Forward()


@dataclass(frozen=True)
class BehindProbe(TowerProbe):
    """The same behind the MLP."""

    block_part = "mlp"


@dataclass(frozen=True)
class ProjectedProbe(Probe):
    """Drops like Probe behind the projector."""

    hook_points = ("projector",)
    vision_blocks = ()

    def begin(self, layout, geometry):
        return ProjectedForward(self)


@dataclass(frozen=True)
class RaggedProbe(Probe):
    """Row i loses its first i tokens at layer i + 1, so that rows trigger at different layers."""

    def begin(self, layout, geometry):
        return RaggedForward(self)


class DecoderProbe(Forward):
    def __init__(self, method):
        self.method = method

    def layer_input(self, layer, view):
        return Keep(self.method.mask(view.present)) if layer == self.method.layer else None


class AsideForward(Forward):
    def __init__(self, method):
        self.method = method

    def layer_input(self, layer, view):
        if layer == self.method.layer:
            return Keep(self.method.mask(view.present), aside=True)
        return Join() if layer == self.method.back else None


class MergeForward(DecoderProbe):
    def layer_input(self, layer, view):
        if layer != self.method.layer:
            return None
        keep = self.method.mask(view.present)
        dropped = (view.present & ~keep)[..., None].to(view.hidden.dtype)
        mean = (view.hidden * dropped).sum(1, keepdim=True) / dropped.sum(1, keepdim=True).clamp(min=1)
        return Merge(keep, added=mean, added_present=view.present.any(1, keepdim=True))


class ProjectedForward(DecoderProbe):
    def projected(self, view):
        assert view.projected.shape[:2] == view.features.shape[:2]
        return Keep(self.method.mask(view.present))

    def layer_input(self, layer, view):
        return None


class RaggedForward(DecoderProbe):
    """The row is told by its text length, so that it behaves alike alone and in a batch."""

    def layer_input(self, layer, view):
        rank = torch.tensor([count % 3 for count in view.layout.text_counts])
        first = torch.arange(view.present.shape[1]) < (rank + 1)[:, None] * 2
        return Keep(view.present & ~(first & (rank + 1 == layer)[:, None]))


PROBES = [
    Probe(),
    Probe(positions="renumber", every=3),
    MergeProbe(positions="renumber"),
    VisionProbe(),
    VisionProbe(positions="renumber", merge=True),
    OrderProbe(),
    OrderProbe(positions="renumber", every=3),
    TowerProbe(),
    BehindProbe(positions="renumber"),
    ProjectedProbe(positions="renumber"),
    RaggedProbe(),
    RaggedProbe(positions="renumber"),
]
