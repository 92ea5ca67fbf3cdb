"""Layouts of every kind that the backends must agree on, tensors for them, and the definition written plainly."""

from dataclasses import dataclass

import torch

from secateur.kernels.block_attention import BlockLayout, blocks_of


@dataclass(frozen=True)
class Case:
    heads: int = 2
    key_heads: int = 2
    queries: int = 64
    keys: int = 64
    size: int = 32
    block: int = 16
    causal: bool = True
    offset: int = 0
    batch: int = 1
    alike: bool = False  # one pattern for all heads
    grouped: bool = False  # one for each group that shares keys
    dead: bool = False  # a row of blocks, and with padding some queries, see nothing
    padded: bool = False

    def __str__(self):
        marks = [name for name in ("causal", "alike", "grouped", "dead", "padded") if getattr(self, name)]
        sizes = f"{self.batch}x{self.heads}/{self.key_heads}x{self.queries}+{self.offset}/{self.keys}x{self.size}"
        return "-".join([sizes, f"b{self.block}", *marks])

    def layout(self, density=0.5):
        generator = torch.Generator().manual_seed(1)
        rows, columns = blocks_of(self.block, self.queries, self.keys, self.offset)
        keep = torch.rand(1 if self.alike else self.heads, rows, columns, generator=generator) < density
        keep[:, :, 0] = True
        if self.grouped:
            group = self.heads // self.key_heads
            keep = keep[::group].repeat_interleave(group, 0)
        if self.dead:
            keep[0, -1] = False
        return BlockLayout(keep, self.block, self.queries, self.keys, self.causal, self.offset)

    def tensors(self, dtype=torch.float32, device="cpu", needs_grad=False):
        generator = torch.Generator().manual_seed(2)
        shapes = [(self.heads, self.queries), (self.key_heads, self.keys), (self.key_heads, self.keys)]
        made = (torch.randn(self.batch, h, n, self.size, generator=generator) for h, n in shapes)
        return [t.to(device, dtype).requires_grad_(needs_grad) for t in made]

    def key_keep(self, device="cpu"):
        if not self.padded:
            return None
        keep = torch.rand(self.batch, self.keys, generator=torch.Generator().manual_seed(3)) < 0.8
        keep[-1, : self.keys // 3] = False  # padding on the left: the first queries see nothing
        return keep.to(device)


CASES = (
    Case(),
    Case(heads=4, key_heads=2, queries=70, keys=70, size=36, dead=True),
    Case(heads=3, key_heads=1, queries=50, keys=90, size=64, block=32, causal=False, batch=2),
    Case(heads=4, key_heads=2, queries=48, keys=48, size=64, batch=2, padded=True),
    Case(queries=50, keys=90, block=32, causal=False, batch=2, padded=True, dead=True),
    Case(heads=4, key_heads=2, queries=40, keys=100, size=64, offset=60),
    Case(heads=4, key_heads=2, queries=40, keys=75, offset=35, grouped=True),
    Case(queries=40, keys=75, offset=35, causal=False),
    Case(heads=2, key_heads=1, size=80, block=32, alike=True),
    Case(heads=2, key_heads=1, size=128, block=64, queries=100, keys=100),
    Case(queries=20, keys=128, offset=70, size=36),  # a cache longer than what is in it
    Case(queries=1, keys=120, offset=119, heads=4, key_heads=2),
)


def naive_mask(layout, key_keep=None):
    """Bool (B or 1, heads, Q, K) asked entry by entry."""
    keep = layout.keep.tolist()
    first = layout.offset // layout.block
    entries = [
        [
            [
                head[at // layout.block - first][j // layout.block] and (j <= at or not layout.causal)
                for j in range(layout.keys)
            ]
            for at in range(layout.offset, layout.offset + layout.queries)
        ]
        for head in keep
    ]
    mask = torch.tensor(entries)[None]
    return mask if key_keep is None else mask & key_keep.cpu()[:, None, None, :]


def naive(query, key, value, layout, key_keep=None, scale=None):
    """Attention with every score in memory, in float64."""
    query, key, value = (t.double().cpu() for t in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    group = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(group, 1) for t in (key, value))
    mask = naive_mask(layout, key_keep)
    weights = torch.exp(query @ key.mT * scale) * mask
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-300) @ value


def gradients(attention, tensors):
    """The output, and the gradients of (output * something fixed).sum()."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    output = attention(*leaves)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(4)).to(output.device, output.dtype)
    return [output.detach(), *torch.autograd.grad(output, leaves, weights)]
