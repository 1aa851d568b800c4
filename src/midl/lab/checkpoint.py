"""Training checkpoints: model, optimizer and progress in one safetensors file, replaced atomically."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from midl.errors import CheckpointError
from midl.lab.files import write_bytes

__all__ = ["read_checkpoint", "write_checkpoint"]


def write_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any]) -> None:
    """Save everything that training needs to go on; ``progress`` is any JSON value."""
    from safetensors.torch import save

    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    names = _parameter_names(model)
    for parameter, state in optimizer.state.items():
        tensors |= {f"optimizer.{names[parameter]}/{key}": value for key, value in state.items()}
    # safetensors stores each storage once and whole.
    contiguous = {name: value.detach().contiguous() for name, value in tensors.items()}
    write_bytes(path, save(contiguous, {"progress": json.dumps(progress)}))


def read_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore model and optimizer in place and return the progress that was saved.

    Raises:
        CheckpointError: the file is damaged or belongs to another model.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            progress = json.loads(file.metadata()["progress"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        model.load_state_dict(_with_prefix(tensors, "model."))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} is no checkpoint of this run ({error}); delete it to train this run from the start"
        ) from error
    parameters = dict(model.named_parameters())
    for key, value in _with_prefix(tensors, "optimizer.").items():
        name, _, entry = key.rpartition("/")
        # The step count stays on the CPU, where AdamW keeps it.
        optimizer.state[parameters[name]][entry] = value.to(parameters[name].device) if value.dim() else value
    return progress


def _parameter_names(model: nn.Module) -> dict[Tensor, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
