"""Training in several processes: which rows are whose, and how what each finds becomes one.

``accelerate launch`` or ``torchrun`` start the processes; alone, everything here leaves things as they are.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from midl.errors import MIDLError

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["accelerator", "share_rows", "tell_all"]


def accelerator() -> Accelerator:
    """Return this process's Accelerator: its place among the others, its device, its way of averaging gradients.

    Raises:
        MIDLError: accelerate was told to shard parameters (FSDP).
    """
    from accelerate import Accelerator

    # Asked here, because accelerate overlooks it where the processes have no accelerators.
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")
    # Without cpu=True accelerate overlooks the other processes of a machine without an accelerator. What is mixed, the
    # recipe says.
    place = None if sharded else Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision="no")
    if place is None or place.distributed_type == "FSDP":
        raise MIDLError(
            "accelerate: FSDP was asked for (ACCELERATE_USE_FSDP), expected data parallelism (DDP): checkpoints and "
            "results are of whole networks, parameters are not sharded"
        )
    return place


def share_rows(batch: Tensor, place: Accelerator) -> tuple[Tensor, float]:
    """Return this process's part of a batch of rows and the weight of its mean loss.

    The mean over the processes of weight times loss is the mean loss of the whole batch, however the rows divide.
    """
    world = place.num_processes
    if world == 1:
        return batch, 1.0
    mine = batch[place.process_index :: world]
    if len(mine) == 0:  # every process must take part in every step
        return batch[:1], 0.0
    return mine, len(mine) * world / len(batch)


def tell_all(value: Any, place: Accelerator) -> Any:
    """Return the first process's ``value`` in every process."""
    if place.num_processes == 1:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]
