"""Training in several processes: which rows are whose, and how what each finds becomes one.

``accelerate launch`` or ``torchrun`` start the processes; alone, everything here leaves things as they are.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from midl.errors import MIDLError

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["accelerator", "end_process", "share_rows", "tell_all"]


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


def end_process(place: Accelerator) -> None:
    """End a process among others, its work done and written; returns in a process that is alone.

    Not by the interpreter's own ending: a thread of gloo may still hold the tensors of the last exchange, and where it
    lets go of them while the interpreter ends, Python before 3.14 ends the thread inside a destructor, which aborts
    the process (one in ten did, on two busy cores). Destroying the process group doesn't stop that thread.
    """
    if place.num_processes > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
