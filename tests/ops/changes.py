"""Ways in which a parameter may change behind the back of what was made of it."""

from __future__ import annotations

import torch


@torch.no_grad()
def change_by_copy(tensor):
    tensor.copy_(torch.randn_like(tensor))


@torch.no_grad()
def change_one_value(tensor):
    tensor.view(-1)[0] += 100


def change_data(tensor):
    tensor.data = torch.randn_like(tensor)


def change_through_data(tensor):
    tensor.data.mul_(2)


def change_in_inference_mode(tensor):
    with torch.inference_mode():
        tensor.mul_(2)
