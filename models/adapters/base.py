"""What a family says of itself, as data: its parts, its sizes, its images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from ..support import Towers


@dataclass(frozen=True)
class VisionGeometry:
    """Sizes of the vision tower and projector.

    ``tokens``: visual tokens of one image, or of one tile in a family that cuts images into tiles; 0 if they depend on
    the image. ``tiled``: images are cut into tiles, of which not all tokens enter the prompt. ``patches``: those of
    which the tower makes them, without CLS. ``merged``: patches in one token. ``projector_macs``: for one token.
    ``inner_macs``: for one token of the whole image, of projectors that the tower has inside, behind its
    ``inner_blocks``.
    ``ffn_matrices``: 2, or 3 in a gated FFN. ``window``: patches along a side of the windows in which blocks attend,
    all but the ``full_blocks``; None: every block attends to the whole image. ``feature_block``: the block whose output
    is used, the last of the ``joined_blocks`` where the outputs of several are used side by side. ``one_sequence``: all
    images of a call are padded to the largest, and their patches attend in one sequence, with a mask between images.
    ``cls_enters``: CLS is one of the ``tokens``. ``squares``: tokens are made of patches that form a square.
    """

    layers: int
    hidden: int
    heads: int
    intermediate: int
    tokens: int
    patch_inputs: int
    has_cls: bool
    feature_block: int
    projector_macs: int
    merged: int = 1
    inner_macs: int = 0
    inner_blocks: tuple[int, ...] = ()
    tiled: bool = False
    ffn_matrices: int = 2
    window: int | None = None
    full_blocks: tuple[int, ...] = ()
    joined_blocks: tuple[int, ...] = ()
    one_sequence: bool = False
    cls_enters: bool = False
    squares: bool = False

    @property
    def patches(self) -> int:
        """Patches of one image or tile, without CLS."""
        return self.tokens * self.merged - self.cls_enters

    @property
    def block_weights(self) -> int:
        """Weights of one block, as :attr:`Geometry.layer_weights`."""
        return 4 * self.hidden**2 + self.ffn_matrices * self.hidden * self.intermediate

    @property
    def last_full(self) -> int:
        """The last block, up to the one whose output is used, that attends to the whole image; -1 is that one."""
        last = self.feature_block
        if self.window is not None:
            last = max(block for block in self.full_blocks if block <= last)
        return last - self.feature_block - 1

    @property
    def grid(self) -> int:
        """Visual tokens along one side of the (square) image."""
        return round(self.tokens**0.5)

    @property
    def is_square(self) -> bool:
        """Whether the tokens of every image are one square grid, of one size for all."""
        return not self.tiled and 0 < self.tokens == self.grid**2

    @property
    def shape(self) -> tuple[int, int, int]:
        """Frames, rows and columns of the tokens of an image or tile, where all are of one size."""
        return (1, self.grid, self.grid) if self.grid**2 == self.tokens else (1, 1, self.tokens)


@dataclass(frozen=True)
class Geometry:
    """Sizes of the decoder (Llama-style: q, k, v, o projections and a gated FFN of three matrices) and of the tower."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    vision: VisionGeometry | None = None

    @property
    def layer_weights(self) -> int:
        """Weights of one layer: its multiply-adds for a token, without the products of attention."""
        return 2 * self.hidden * (self.heads + self.kv_heads) * self.head_size + 3 * self.hidden * self.intermediate


class Images(NamedTuple):
    """``shape`` of the pixels of a batch, and ``more`` inputs."""

    shape: tuple[int, ...]
    more: dict[str, Tensor]


Views = Callable[[Any, Any, Mapping[str, Any], int, tuple[int, int]], list[list[int]]]
"""Where the tokens of one image lie in it: see visibench.utils.token_grids. Arguments: the model's
configuration, its image processor, the inputs of the batch, and the image's number and size (width, height) there."""

RandomImages = Callable[[VisionGeometry, Any, int, int], Images]
"""Images of so many visual tokens for each row of a batch. Arguments: sizes of the vision side, the model's
configuration, visual tokens of a row, rows. Raises :class:`InputError` where no images have so many."""

Smaller = Callable[[Any, Mapping[str, Any], Tensor, Tensor], dict[str, Any]]
"""Keyword arguments of the vision tower that go with images made smaller. Arguments: the model's configuration, the
keyword arguments for images as they were, and the pixels of the smaller ones, with their frames and patches (N, 3)."""


class Patches(NamedTuple):
    """The two ways between images and the rows of pixels, one a patch, that a tower takes in their place.

    ``images``: from the model's configuration, patches (n · P, F) and the frames and patches (f, r, c) of each of the n
    images; one frame (n · f, C, h, w) behind the other. ``rows``: from the configuration and images, patches.
    """

    images: Callable[[Any, Tensor, Sequence[int]], Tensor]
    rows: Callable[[Any, Tensor], Tensor]


Places = Callable[[Any, Tensor, Tensor, Tensor], Tensor]
"""Positions (B, L, 3) that a model gives the tokens of a prompt. Arguments: the model without its head, which tokens
are visual and which count, bool (B, L), and frames and patches (N, 3) of their images."""

Packing = Callable[[Any, VisionGeometry, Mapping[str, Any]], list[tuple[Tensor, int, Tensor]]]
"""For each image, which features of its tiles its tokens are (int (n,), -1 for none, -2 for a mixture of several), how
many tiles it has, and all features in order, those of padding too. Arguments: the model without its head, sizes of the
vision side, and the arguments of ``get_image_features`` or ``get_video_features``."""


@dataclass(frozen=True)
class Family:
    """Attribute paths, from the top-level model, of the parts of one architecture (``config.model_type``).

    ``vision``: sizes of its vision side, from the configuration and the projector's MACs for a token. ``sides``: hook
    points of methods that may act on that side. ``grids``: frames and patches (N, 3) of each image or tile, from the
    arguments of the vision tower; None where every image has ``VisionGeometry.tokens``. ``views``: where the tokens of
    an image lie in it. ``features``: the part of the projector that is given one vector a token, if not all of it.
    ``smaller``: what else the tower is given with images made smaller; None: nothing. ``patches``: where it takes rows
    of pixels in place of images. ``tower_outputs``: where the projector is a part of it, what it puts out of the tokens
    of all images, one behind the other. ``places``: positions of a prompt where they follow from the shapes of images.
    ``packing``: what becomes of the features of tiles; None where an image is all its features in order.
    ``order``: where the tokens of all images, each row by row, lie in the one sequence
    that enters the projector, from configuration and ``grids``; None where images are not in one sequence.
    ``images``: random ones, of a family that ``profile`` can run without a processor; ``typical``: visual tokens of an
    ordinary one, where that is no single unit. ``variant``: the family as a configuration has it, where that differs.
    """

    decoder: str
    vision_tower: str | None = None
    vision_blocks: str | None = None
    projector: str | None = None
    # Parts of a vision block: the norm in front of its MLP, and the MLP.
    vision_norm: str = "layer_norm2"
    vision_mlp: str = "mlp"
    vision_attention: str = "self_attn"
    # What a vision block multiplies its MLP's output by; None: nothing.
    vision_scale: str | None = None
    image_token: str = "image_token_id"
    vision: Callable[[Any, int], VisionGeometry] | None = None
    # Of videos, in a family where they go the way of images; None: videos are refused.
    video_token: str | None = None
    # Layers whose mask is not causal alone: images are seen in both directions.
    bidirectional: bool = False
    # Whether features from inside the tower are added behind the first decoder layers.
    deepstack: bool = False
    # Projectors that the tower has inside, one for each of the ``inner_blocks``.
    inner_projectors: str | None = None
    # Where positions of a prompt begin.
    first_position: int = 0
    # Whether its LM head scales and caps logits as the text configuration says; most models with images leave that out.
    scales_logits: bool = False
    # What a processor writes for a visual token into ``token_type_ids``, 0 for text; None: it has no such input.
    token_type: int | None = None
    sides: tuple[str, ...] = ()
    grids: Callable[[Any, tuple, Mapping[str, Any]], Tensor] | None = None
    features: str | None = None
    smaller: Smaller | None = None
    patches: Patches | None = None
    tower_outputs: tuple[str, ...] = ()
    places: Places | None = None
    packing: Packing | None = None
    order: Callable[[Any, Tensor], Tensor] | None = None
    views: Views | None = None
    images: RandomImages | None = None
    typical: Callable[[VisionGeometry, Any], int] | None = None
    variant: Callable[[Any], Family] | None = None
    towers: Towers = field(default_factory=dict)
    # What a configuration needs besides transformers' defaults to be one of the family.
    example: Mapping[str, Any] = field(default_factory=dict)
