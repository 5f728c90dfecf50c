"""Towers of one sequence by hand: each image alone, patch by patch in the order of squares, with attention written out.

Of a miniature's own modules norms, projections, MLPs and mergers run; windows, rotary rows, cuts and merges are here.
"""

import torch
from units import VISUAL

SIDE = 2
PARTS = SIDE * SIDE


class Picture:
    """One image: ``hidden`` (n, D) in front of block 0, rotary ``table`` and ``window`` (n,) of its patches."""

    def __init__(self, hidden, table, rows, columns, window):
        squares = [(r, c) for r in range(rows) for c in range(columns)]
        own = [(r // window, c // window) if window else (0, 0) for r, c in squares]
        in_tower = sorted(range(len(squares)), key=lambda place: (own[place], squares[place]))
        back = torch.tensor(in_tower).argsort()
        patches = (back[:, None] * PARTS + torch.arange(PARTS)).flatten()
        self.hidden, self.table = hidden[patches], tuple(part[patches] for part in table)
        keys = sorted(set(own))
        self.window = torch.tensor([keys.index(key) for key in own]).repeat_interleave(PARTS)
        self.size, self.outputs = torch.ones(len(self.hidden), dtype=hidden.dtype), {}

    def attend(self, block, windowed, proportional):
        """The block's attention is added; queries, keys and values (H, n, d)."""
        n = len(self.hidden)
        made = block.attn.qkv(block.norm1(self.hidden)).view(n, 3, block.attn.num_heads, -1).permute(1, 2, 0, 3)
        q, k = (rotated(part, *self.table) for part in made[:2])
        logits = q @ k.transpose(1, 2) / q.shape[2] ** 0.5
        if proportional:
            logits = logits + self.size.log()
        if windowed:
            logits = logits.masked_fill(self.window[:, None] != self.window, -torch.inf)
        mixed = (logits.softmax(2) @ made[2]).transpose(0, 1).reshape(n, -1)
        self.hidden = self.hidden + block.attn.proj(mixed)
        return q, k, made[2]

    def mlp(self, block):
        self.hidden = self.hidden + block.mlp(block.norm2(self.hidden))

    def leave(self, kept):
        """Go on with the patches in ``kept``, int (n,)."""
        self.hidden, self.window, self.size = self.hidden[kept], self.window[kept], self.size[kept]
        self.table = tuple(part[kept] for part in self.table)
        self.outputs = {number: output[kept] for number, output in self.outputs.items()}

    def merge(self, sets, stands):
        """Squares become averages by size of each of the ``sets``; the new ones stand where those of ``stands`` did."""

        def averaged(values):
            whole, weight = values.unflatten(0, (-1, PARTS)), self.size.view(-1, PARTS, 1)
            new = [sum(weight[s] * whole[s] for s in own) / sum(weight[s] for s in own) for own in sets]
            return torch.cat(new)

        sizes = torch.stack([sum(self.size[s * PARTS] for s in own) for own in sets])
        hidden, outputs = averaged(self.hidden), {b: averaged(output) for b, output in self.outputs.items()}
        self.leave((torch.tensor(stands)[:, None] * PARTS + torch.arange(PARTS)).flatten())
        self.hidden, self.outputs, self.size = hidden, outputs, sizes.repeat_interleave(PARTS)


def rotated(part, cos, sin):
    """Rotary tables are those of single precision, and so are products with them."""
    half, single = part.shape[-1] // 2, part.float()
    turned = torch.cat([-single[..., half:], single[..., :half]], dim=-1)
    return (single * cos.float() + turned * sin.float()).to(part.dtype)


def pictures(model, sample):
    """The images of a sample in front of the tower's first block."""
    seen, visual = {}, model.model.visual
    hook = visual.blocks[0].register_forward_pre_hook(lambda m, a, k: seen.update(k, hidden=a[0]), with_kwargs=True)
    model(**sample)
    hook.remove()
    side = getattr(visual.config, "window_size", 0) // SIDE // visual.config.patch_size
    found, first = [], 0
    for frames, rows, columns in sample["image_grid_thw"].tolist():
        assert frames == 1
        here = slice(first, first := first + rows * columns)
        table = tuple(part[here] for part in seen["position_embeddings"])
        found.append(Picture(seen["hidden"][here], table, rows // SIDE, columns // SIDE, side))
    return found


def is_windowed(visual, number):
    return number not in getattr(visual.config, "fullatt_block_indexes", range(100))


def flowcut(model, picture, tokens):
    """The authors' loop for Qwen2-VL, down to so many ``tokens``."""
    visual, running, last = model.model.visual, None, len(model.model.visual.blocks) - 1
    for number, block in enumerate(visual.blocks):
        q, k, v = picture.attend(block, is_windowed(visual, number), proportional=False)
        picture.mlp(block)
        keep_output(visual, picture, number)
        n, budget = len(picture.hidden), tokens * PARTS
        if n <= budget:
            continue
        share = ((q.mean(1, keepdim=True) @ k.transpose(1, 2))[:, 0] / q.shape[2] ** 0.5).softmax(1).mean(0)
        score = share * v.mean(0).abs().sum(1)
        running = score if running is None else (running + score) / 2
        to_go = last - number
        if to_go % 2:
            continue
        stay = budget
        if to_go:
            pace = 1 - (-(share * share.log()).sum() / torch.tensor(n).log()) ** 2
            stay = max(budget, n - round(float((n - budget) / to_go**0.5 * pace)))
        kept = running.topk(stay).indices.sort().values
        picture.leave(kept)
        running = running[kept]


def tome(model, picture, merges, *, proportional=True):
    """So many ``merges`` of squares in each block."""
    visual = model.model.visual
    for number, block in enumerate(visual.blocks):
        _, k, _ = picture.attend(block, is_windowed(visual, number), proportional)
        if merges[number]:
            keys = torch.nn.functional.normalize(k.mean(0).unflatten(0, (-1, PARTS)).mean(1), dim=1)
            even, odd = [*range(0, len(keys), 2)], [*range(1, len(keys), 2)]
            best, partner = (keys[even] @ keys[odd].T).max(1)
            falling = best.argsort(descending=True, stable=True).tolist()
            going, staying = falling[: merges[number]], falling[merges[number] :]
            stands = [even[a] for a in staying] + odd
            sets = [[square] for square in stands]
            for a in going:
                sets[len(staying) + int(partner[a])].append(even[a])
            picture.merge(sets, stands)
        picture.mlp(block)
        keep_output(visual, picture, number)


def keep_output(visual, picture, number):
    if number in getattr(visual, "deepstack_visual_indexes", ()):
        picture.outputs[number] = picture.hidden


def projected(model, picture):
    """What enters the decoder of an image, (T, D), and what is added behind its first layers."""
    visual = model.model.visual
    inner = getattr(visual, "deepstack_visual_indexes", [])
    deep = [visual.deepstack_merger_list[i](picture.outputs[number]) for i, number in enumerate(inner)]
    return visual.merger(picture.hidden), deep


def last_state(model, sample, images):
    """The decoder's last state (1, D) on a row of these ``images``, as :func:`projected` has them, numbered anew."""
    ids, parts, positions, image = sample["input_ids"][0], [], [], 0
    place = 0
    while place < len(ids):
        if ids[place] != VISUAL:
            parts.append(model.get_input_embeddings()(ids[place : place + 1]))
            positions.append(False)
            place += 1
            continue
        frames, rows, columns = sample["image_grid_thw"][image].tolist()
        parts.append(images[image][0])
        positions += [True] * len(images[image][0])
        place, image = place + frames * rows * columns // PARTS, image + 1
    embeds, is_visual = torch.cat(parts)[None], torch.tensor(positions)[None]
    more, deep = {}, [torch.cat(each) for each in zip(*(own for _, own in images), strict=True)]
    if deep:
        more = {"deepstack_visual_embeds": deep, "visual_pos_masks": is_visual}
    count = torch.arange(embeds.shape[1]).expand(3, 1, -1)
    return model.model.language_model(inputs_embeds=embeds, position_ids=count, **more).last_hidden_state[:, -1]
