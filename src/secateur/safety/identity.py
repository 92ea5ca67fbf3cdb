"""Which model wrote an answer: a hash of everything that computes it."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

NOT_THE_MODEL = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
CHUNK = 1 << 26  # bytes brought to the CPU at a time
THREADS = 4


def model_sha256(model: Any) -> str:
    """The SHA-256 of a model's config and of every parameter and saved buffer: name, dtype, shape and all bytes.

    Where the model was loaded from does not matter, nor on which device it is. A weight that is changed, or a
    zero that comes or goes, changes it. Reads about a gigabyte a second.

    >>> from torch import nn
    >>> layer = nn.Linear(2, 2)
    >>> before = model_sha256(layer)
    >>> before == model_sha256(layer), len(before)
    (True, 64)
    >>> _ = layer.weight.data[0, 0].zero_()
    >>> before == model_sha256(layer)
    False
    """
    config = getattr(model, "config", None)
    stated = config.to_dict() if config is not None else {}
    facts = {key: value for key, value in stated.items() if key not in NOT_THE_MODEL}
    whole = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    state = sorted(model.state_dict().items())
    unique = {_place(tensor): tensor for _, tensor in state}  # tied weights are read once
    with ThreadPoolExecutor(THREADS) as pool:
        digests = dict(zip(unique, pool.map(_tensor_sha256, unique.values()), strict=True))
    for name, tensor in state:
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {digests[_place(tensor)]}\n".encode())
    return whole.hexdigest()


def _place(tensor: Tensor) -> tuple[object, ...]:
    return tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _tensor_sha256(tensor: Tensor) -> str:
    digest = hashlib.sha256()
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    for start in range(0, flat.numel(), CHUNK):
        digest.update(flat[start : start + CHUNK].cpu().numpy().data)
    return digest.hexdigest()
