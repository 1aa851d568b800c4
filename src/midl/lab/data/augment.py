"""Augmentation of stored training rows; the random numbers come from torch's global generator."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["crop", "crop_and_flip", "drop_tokens"]

_SHIFT = 4


def crop(images: Tensor) -> Tensor:
    """Return each image shifted by up to 4 pixels along both axes; what comes into view is mirrored at the border.

    >>> crop(torch.arange(64, dtype=torch.uint8).reshape(1, 1, 8, 8)).shape
    torch.Size([1, 1, 8, 8])

    Args:
        images: (rows, channels, height, width), of any dtype.
    """
    return _shift(images, flip=False)


def crop_and_flip(images: Tensor) -> Tensor:
    """Return what :func:`crop` does, and half of the images mirrored left to right.

    >>> image = torch.arange(64, dtype=torch.uint8).reshape(1, 1, 8, 8)
    >>> crop_and_flip(image).shape
    torch.Size([1, 1, 8, 8])
    """
    return _shift(images, flip=True)


def drop_tokens(ids: Tensor, *, rate: float, replacement: int, keep: int) -> Tensor:
    """Return ``ids`` with each token replaced with probability ``rate``, except those equal to ``keep``.

    >>> drop_tokens(torch.tensor([[5, 6, 0, 0]]), rate=1.0, replacement=1, keep=0)
    tensor([[1, 1, 0, 0]])

    Args:
        ids: (rows, tokens), of any integer dtype.
        rate: probability, 0 to 1.
        replacement: the id that stands for an unknown token.
        keep: the id of padding.
    """
    dropped = (torch.rand(ids.shape) < rate) & (ids != keep)
    return ids.masked_fill(dropped, replacement)


def _shift(images: Tensor, flip: bool) -> Tensor:
    rows, channels, height, width = images.shape
    y = _reflect(torch.randint(-_SHIFT, _SHIFT + 1, (rows, 1)) + torch.arange(height), height)
    x = _reflect(torch.randint(-_SHIFT, _SHIFT + 1, (rows, 1)) + torch.arange(width), width)
    if flip:
        x = torch.where(torch.rand(rows, 1) < 0.5, x.flip(1), x)
    # One gather of whole images: several times faster than indexing with a tensor per axis.
    pixels = (y[:, :, None] * width + x[:, None, :]).view(rows, 1, height * width)
    return images.flatten(2).gather(2, pixels.expand(-1, channels, -1)).view_as(images)


def _reflect(index: Tensor, size: int) -> Tensor:
    index = index.abs()
    return torch.where(index < size, index, 2 * (size - 1) - index)
