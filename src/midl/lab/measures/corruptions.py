"""Corruptions of model inputs, each of a strength where 0 changes nothing; the same noise on every call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from midl.lab.data import Dataset

__all__ = ["Corruption", "corruptions_for"]

PADDING, UNKNOWN = 0, 1
"""Token ids of the lab's text data sets."""


@dataclasses.dataclass(frozen=True)
class Corruption:
    """One way to damage inputs.

    Args:
        apply: from standardised inputs (rows, ...), a strength and a generator to inputs of the same shape.
        strengths: in ascending order, starting with 0.
        unit: what a strength means.
    """

    apply: Callable[[Tensor, float, torch.Generator], Tensor]
    strengths: tuple[float, ...]
    unit: str


def add_gaussian_noise(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Add normal noise of standard deviation ``strength`` to every number."""
    return x + strength * torch.randn(x.shape, generator=generator)


def add_salt_and_pepper(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Set the fraction ``strength`` of the pixels to the batch's darkest or brightest value, all channels alike."""
    damage = torch.rand((len(x), 1, *x.shape[2:]), generator=generator)
    low, high = (x.amin((0, 2, 3), keepdim=True), x.amax((0, 2, 3), keepdim=True))
    return torch.where(damage < strength / 2, low, torch.where(damage < strength, high, x))


def blur(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Convolve with a Gaussian of standard deviation ``strength`` pixels; the border is repeated."""
    if strength == 0:
        return x
    reach = max(1, round(3 * strength))
    offsets = torch.arange(-reach, reach + 1, dtype=x.dtype)
    kernel = torch.exp(-0.5 * (offsets / strength) ** 2)
    kernel = kernel / kernel.sum()
    images = F.pad(x.flatten(0, 1).unsqueeze(1), [reach] * 4, mode="replicate")
    rows = F.conv2d(images, kernel.view(1, 1, 1, -1))
    return F.conv2d(rows, kernel.view(1, 1, -1, 1)).view(x.shape)


def lower_contrast(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Pull every channel of an image towards its mean by the fraction ``strength``."""
    return x + strength * (x.mean((2, 3), keepdim=True) - x)


def drop_features(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Set each column to zero with probability ``strength``: a number's mean, a category unknown."""
    return x * (torch.rand(x.shape, generator=generator) >= strength)


def drop_words(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Replace each token with probability ``strength`` by the unknown token; padding stays."""
    dropped = (torch.rand(x.shape, generator=generator) < strength) & (x != PADDING)
    return x.masked_fill(dropped, UNKNOWN)


_FRACTIONS = (0.0, 0.1, 0.2, 0.35, 0.5)
_GAUSSIAN = Corruption(add_gaussian_noise, (0.0, 0.25, 0.5, 1.0, 1.5), "standard deviations of the inputs")
_IMAGES = {
    "gaussian": _GAUSSIAN,
    "salt_and_pepper": Corruption(add_salt_and_pepper, (0.0, 0.05, 0.1, 0.2, 0.4), "fraction of the pixels"),
    "blur": Corruption(blur, (0.0, 0.5, 1.0, 2.0, 3.0), "standard deviation in pixels"),
    "contrast": Corruption(lower_contrast, (0.0, 0.25, 0.5, 0.75, 0.9), "fraction of the contrast lost"),
}
_TABLES = {"gaussian": _GAUSSIAN, "feature_dropout": Corruption(drop_features, _FRACTIONS, "fraction of the columns")}
_TEXTS = {"word_dropout": Corruption(drop_words, (0.0, 0.1, 0.2, 0.4, 0.7), "fraction of the words")}


def corruptions_for(dataset: Dataset) -> dict[str, Corruption]:
    """Return the corruptions that make sense for a data set: of images, of table rows or of token ids."""
    if dataset.mean is None:
        return _TEXTS
    return _IMAGES if len(dataset.input_shape) == 3 else _TABLES
