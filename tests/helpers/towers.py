"""Vision towers written out: their own blocks on the tokens of one image, as a test gives them."""

import math

import torch
from decoders import CONFIGS, FULL, LLAVA, SIGLIP, miniature
from families import TEXT
from visibench.models.adapters import Adapter

DEPTH = 7
KINDS = CONFIGS | {"llava+siglip": LLAVA | FULL | {"vision_config": SIGLIP}}
SIDES = dict.fromkeys(("internvl", "smolvlm", "idefics3"), 48)
SIDES |= dict.fromkeys(("deepseek_vl", "llava_onevision", "llava", "llava+siglip"), 24)
"""Of 6 × 6 pixels a patch; where 2 × 2 patches make a token, 4 × 4 tokens of one image."""
_models = {}


def deep_model(kind):
    """A miniature with a tower of seven blocks, whose attention differs enough between patches to set a pace."""
    if kind not in _models:
        config = KINDS[kind]
        sides = {"image_size": SIDES[kind]} if kind in ("smolvlm", "idefics3") else {}
        vision = config["vision_config"] | {"num_hidden_layers": DEPTH} | sides
        model = miniature(kind, config | {"vision_config": vision, "text_config": TEXT | config["text_config"]}, "sdpa")
        for block in Adapter(model).vision_blocks:
            for name, weights in block.named_parameters():
                if "q_proj" in name or "k_proj" in name:
                    weights.data.mul_(4)
        _models[kind] = model.double()  # what these weights make of rounding in fp32 grows block by block
    return _models[kind]


def entered(model, run):
    """What entered the blocks and the projector while ``run`` ran: (N, P, D), and (N, T, D) or (T, D)."""
    adapter, seen, hooks = Adapter(model), {}, []
    for name, part in (("blocks", adapter.vision_blocks[0]), ("projector", adapter.projector)):

        def note(module, args, name=name):
            seen.setdefault(name, args[0])

        hooks.append(part.register_forward_pre_hook(note))
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return seen["blocks"], seen["projector"]


def behind(model):
    """The norm behind the last block, whose output makes the features; LLaVA's are a block's output itself."""
    tower = Adapter(model).vision_tower
    if "llava" in model.config.model_type:
        return lambda x: x
    return getattr(tower, "post_layernorm", None) or getattr(tower, "layernorm", None) or (lambda x: x)


class Block:
    """A block of a tower on the tokens (t, D) of one image, in steps."""

    def __init__(self, block, heads):
        self.block, self.heads = block, heads
        self.attention = getattr(block, "self_attn", None) or block.attention
        self.out = getattr(self.attention, "out_proj", None) or self.attention.projection_layer
        self.before = getattr(block, "layer_norm1", None) or block.layernorm_before
        self.after = getattr(block, "layer_norm2", None) or block.layernorm_after
        self.scales = getattr(block, "lambda_1", 1), getattr(block, "lambda_2", 1)

    def attend(self, tokens, bias=0.0):
        """Tokens behind the attention, and queries, keys and values (heads, t, d); ``bias`` (t,) of the keys."""
        normed = self.before(tokens)
        parts = (getattr(self.attention, f"{name}_proj")(normed) for name in "qkv")
        q, k, v = (part.unflatten(1, (self.heads, -1)).transpose(0, 1) for part in parts)
        weights = (q @ k.mT / math.sqrt(q.shape[2]) + bias).softmax(-1)
        return tokens + self.scales[0] * self.out((weights @ v).transpose(0, 1).flatten(1)), q, k, v

    def mlp(self, tokens):
        return tokens + self.scales[1] * self.block.mlp(self.after(tokens))


def blocks_of(model):
    adapter = Adapter(model)
    return [Block(block, adapter.geometry.vision.heads) for block in adapter.vision_blocks]


def squares(side):
    """Patches of a square image, row by row, as lists of the 2 × 2 that make a token."""
    corners = [(row, column) for row in range(0, side, 2) for column in range(0, side, 2)]
    return [[r * side + c, r * side + c + 1, (r + 1) * side + c, (r + 1) * side + c + 1] for r, c in corners]
