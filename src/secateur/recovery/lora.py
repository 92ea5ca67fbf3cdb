"""Plain low-rank adapters through peft: W + s BA beside the weight, never merged, since the sum has no zeros.

For work with other tools; what keeps the zeros in one matrix is `masked` (see adapters.py). Needs the extra [peft].

Source: Hu et al. 2021, arXiv:2106.09685.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import save_file
from torch import nn

from secateur.cache import scratch_beside, sync
from secateur.errors import UsageError
from secateur.models.layers import Layer

FOLDER = "adapter"  # inside the saved model's folder


def check_lora(layers: Sequence[Layer]) -> None:
    """Refuse what peft adapters cannot be put on.

    Raises:
        UsageError: peft is not installed, or a layer is a slice of a 3-D expert weight.
    """
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise UsageError("--adapter lora needs peft: pip install 'secateur[peft]'.") from error
    slices = [layer.name for layer in layers if layer.expert is not None]
    if slices:
        raise UsageError(
            f"{slices[0]} is a slice of a 3-D weight, which peft's lora cannot adapt: use --adapter masked."
        )


def attach(model: nn.Module, layers: Sequence[Layer], rank: int, scale: float, seed: int) -> dict[str, nn.Parameter]:
    """Put adapters on the layers, in place; the tensors to train, in fp32. The global random state is left alone."""
    from peft import LoraConfig, inject_adapter_in_model

    names = [layer.name for layer in layers]
    stored = all(layer.transposed for layer in layers)
    config = LoraConfig(
        r=rank, lora_alpha=scale * rank, lora_dropout=0.0, target_modules=names, fan_in_fan_out=stored
    )  # fmt: skip
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    parts = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
            parts[name] = parameter
        else:
            parameter.requires_grad_(wanted[name.replace(".base_layer", "")])
    model.eval()
    return parts


def detach(model: nn.Module) -> None:
    """Take the adapters off again; the model is the pruned one, with its zeros."""
    for module in list(model.modules()):
        for leaf, child in list(module.named_children()):
            if hasattr(child, "lora_A") and hasattr(child, "base_layer"):
                setattr(module, leaf, child.base_layer)
    vars(model).pop("peft_config", None)


def save_adapters(model: Any, folder: Path) -> Path:
    """Write the adapters as peft's own folder, whole or not at all: `PeftModel.from_pretrained(base, folder)`."""
    from peft import get_peft_model_state_dict

    tensors = get_peft_model_state_dict(model)
    with scratch_beside(folder) as scratch:
        made = scratch / "new"
        made.mkdir()
        save_file({f"base_model.model.{name}": t.contiguous() for name, t in tensors.items()},
                  made / "adapter_model.safetensors")  # fmt: skip
        model.peft_config["default"].save_pretrained(made)
        sync(made)
        made.rename(folder)
    return folder


def merge(model: nn.Module) -> NoReturn:
    """Refused: the merged weight would have no zeros.

    Raises:
        UsageError: always, with what to do instead.
    """
    raise UsageError(
        "peft adapters cannot be merged into a pruned model: its zeros would be lost. Keep them beside it, or train "
        "--adapter masked, which merges exactly."
    )
