"""Tiny models with attention to prune, plans for them, and masked attention written plainly."""

import functools
import random
from contextlib import contextmanager

import torch
import transformers
from families import ids, make

from secateur.attention.plan import SiteMask, plan_of
from secateur.attention.sites import find_sites

BLOCK = 4
KINDS = ("absolute", "toeplitz", "hybrid")
CAUSAL = ("llama", "qwen2", "mistral", "gemma3", "gpt2", "opt")
SEQ2SEQ = ("t5", "marian", "bart")
_MARIAN = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}


def attention_model(family):
    """As `families.make`, and two more; in eval mode."""
    if family not in ("marian", "bart"):
        return make(family)
    kind = {"marian": "Marian", "bart": "Bart"}[family]
    model_class = {"marian": "MarianMTModel", "bart": "BartForConditionalGeneration"}[family]
    config = getattr(transformers, f"{kind}Config")(**_MARIAN)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, model_class)(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def random_mask(site, kind, rng, blocks=16, density=0.4):
    """A mask with other blocks for every head."""

    def marks(*shape):
        return torch.tensor([rng.random() < density for _ in range(torch.Size(shape).numel())]).view(shape)

    heads, lowest = site.heads, 0 if site.causal else -blocks
    options = {"sinks": marks(heads, 2)}
    if kind != "toeplitz":
        rows = blocks if kind == "absolute" else 2
        options["rows"] = marks(heads, rows, rows)
    if kind != "absolute":
        options |= {"offsets": marks(heads, blocks - lowest), "lowest": lowest}
    return SiteMask(kind, BLOCK, site.causal, cross=site.kind == "cross", **options)


def random_plan(model, kind, seed=0, density=0.4):
    """Every site masked, each in its own way."""
    rng = random.Random(seed)
    return plan_of(model, {site.name: random_mask(site, kind, rng, density=density) for site in find_sites(model)})


def keep_all(model):
    """A plan that removes nothing."""
    rows = torch.ones(1, 32, 32, dtype=torch.bool)
    masks = {
        site.name: SiteMask("absolute", BLOCK, site.causal, rows=rows, cross=site.kind == "cross")
        for site in find_sites(model)
    }
    return plan_of(model, masks)


def kept(mask, head, query, key):
    """The rule of a `SiteMask` for one pair of positions, from its words."""
    part = _lists(mask)
    row, column = query // mask.block, key // mask.block
    if mask.causal and key > query:
        return False
    if (column == 0) if mask.cross else (row == column):
        return True
    sinks = part["sinks"][head % len(part["sinks"])] if "sinks" in part else []
    if column < len(sinks) and sinks[column]:
        return True
    if "rows" in part:
        rows = part["rows"][head % len(part["rows"])]
        if row < len(rows) and column < len(rows[0]):
            return rows[row][column]
        if mask.kind == "absolute":
            if mask.extend == "diagonal" and row >= len(rows):
                moved = column - (row - (len(rows) - 1))
                return 0 <= moved < len(rows[0]) and rows[-1][moved]
            return False
    offsets, at = part["offsets"][head % len(part["offsets"])], row - column - mask.lowest
    return 0 <= at < len(offsets) and offsets[at]


@functools.lru_cache(maxsize=64)
def _lists(mask):
    return {name: tensor.tolist() for name, tensor in mask.tensors().items()}


def pairs(mask, heads, queries, keys, offset=0):
    """Bool (heads, queries, keys), pair by pair."""
    return torch.tensor(
        [[[kept(mask, h, offset + q, k) for k in range(keys)] for q in range(queries)] for h in range(heads)]
    )


@contextmanager
def masked_plainly(model, plan):
    """The model with eager attention, each module's additive mask extended by -inf; positions are slots, no cache."""
    before, handles = model.config._attn_implementation, []
    model.set_attn_implementation("eager")
    modules = dict(model.named_modules())
    for site in plan.model_sites:
        module = modules[site.name]
        handles.append(module.register_forward_pre_hook(_with(plan.sites[site.name], site.heads), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        model.set_attn_implementation(before)


def _with(mask, heads):
    def extend(module, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        other = next(
            (kwargs[n] for n in ("key_value_states", "encoder_hidden_states") if kwargs.get(n) is not None), None
        )
        length = (hidden if other is None else other).shape[1]
        cut = torch.zeros(heads, hidden.shape[1], length)
        cut.masked_fill_(~pairs(mask, heads, hidden.shape[1], length), torch.finfo(torch.float32).min)
        name = next((n for n in ("attention_mask", "mask", "encoder_attention_mask") if n in kwargs), "attention_mask")
        given = kwargs.get(name)
        kwargs[name] = cut[None] if given is None else torch.maximum(given + cut[None], torch.tensor(-1e38))
        return args, kwargs

    return extend


def inputs(family, n=2, seqlen=23, target=15):
    """Keyword arguments of one forward pass."""
    if family in SEQ2SEQ:
        return {"input_ids": ids(n, seqlen), "decoder_input_ids": ids(n, target, seed=1)}
    return {"input_ids": ids(n, seqlen)}


def logits(model, **kwargs):
    with torch.no_grad():
        return model(**kwargs).logits
