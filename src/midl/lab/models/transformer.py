"""Transformer: a small encoder over token ids, with attention in windows and mean pooling."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from midl.lab.models.architecture import widest

__all__ = ["Transformer"]


@dataclasses.dataclass(frozen=True)
class Transformer:
    """Pre-norm blocks of attention and feed-forward layers; the mean over real tokens goes to the head.

    Attention stays within windows of neighbouring tokens, so that nearly all FLOPs are in layers that methods may
    replace: the projections of attention and both feed-forward layers.

    >>> Transformer(vocabulary=100, tokens=64, num_classes=2).layer_names[3:]
    ['block1.attention.output', 'block1.ffn.up', 'block1.ffn.down']

    A. Vaswani et al., "Attention Is All You Need", NeurIPS 2017; pre-norm: R. Xiong et al., ICML 2020; windows: the
    block-local attention of N. Parmar et al., "Image Transformer", ICML 2018.

    Args:
        vocabulary: number of token ids.
        tokens: per input; a multiple of ``window``.
        num_classes: outputs.
        width: of the tokens' vectors; a multiple of ``heads``.
        inner: width inside the feed-forward layers.
        blocks: of attention and feed-forward layers.
        heads: of attention.
        window: tokens that attend to each other.
        padding: the token id that is no token.
        dropout: rate behind attention and inside the feed-forward layers.
    """

    vocabulary: int
    tokens: int
    num_classes: int
    width: int = 128
    inner: int = 512
    blocks: int = 1
    heads: int = 4
    window: int = 32
    padding: int = 0
    dropout: float = 0.0

    def build(self) -> nn.Module:
        """Return a freshly initialised network on token ids, (rows, tokens) int64."""
        return _Encoder(self)

    @property
    def layer_names(self) -> list[str]:
        """Qualified names of the projections of attention and the feed-forward layers."""
        inside = (
            "attention.query", "attention.key", "attention.value", "attention.output", "ffn.up", "ffn.down",
        )  # fmt: skip
        return [f"block{i}.{name}" for i in range(1, self.blocks + 1) for name in inside]

    def example(self, batch: int = 1) -> Tensor:
        """Return a batch of inputs without padding, (batch, tokens) int64."""
        return torch.full((batch, self.tokens), self.padding + 1)

    def narrow(self, flops: int) -> Transformer:
        """Return the widest version, all widths scaled alike, of at most ``flops`` per input.

        >>> Transformer(100, 64, 2, width=32, inner=128).narrow(800_000).inner
        83

        Raises:
            MIDLError: not even the narrowest version fits.
        """

        def scaled(step: int) -> Transformer:
            width = max(1, self.width * step // self.inner // self.heads) * self.heads
            return dataclasses.replace(self, width=width, inner=step)

        return widest(scaled, self.inner, flops)


class _Encoder(nn.Module):
    def __init__(self, sizes: Transformer) -> None:
        super().__init__()
        self.padding, self.blocks = sizes.padding, sizes.blocks
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.width, padding_idx=sizes.padding)
        self.position = nn.Parameter(torch.empty(sizes.tokens, sizes.width))
        # As small as the vectors of words are after training has begun to move them: N(0, 1) would drown the blocks.
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.position, std=0.02)
        for i in range(1, sizes.blocks + 1):
            self.add_module(f"block{i}", _Block(sizes))
        self.norm = nn.LayerNorm(sizes.width)
        self.head = nn.Linear(sizes.width, sizes.num_classes)

    def forward(self, ids: Tensor) -> Tensor:
        real = ids != self.padding
        x = self.embedding(ids) + self.position
        for i in range(1, self.blocks + 1):
            x = self.get_submodule(f"block{i}")(x, real)
        weights = real.to(x.dtype)[:, None]
        # A review without a token has the mean 0, not NaN.
        mean = (weights @ self.norm(x))[:, 0] / weights.sum(-1).clamp(min=1)
        return self.head(mean)


class _Block(nn.Module):
    def __init__(self, sizes: Transformer) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(sizes.width)
        self.attention = _Attention(sizes)
        self.norm2 = nn.LayerNorm(sizes.width)
        self.ffn = nn.Sequential(
            OrderedDict(
                up=nn.Linear(sizes.width, sizes.inner),
                relu=nn.ReLU(),
                dropout=nn.Dropout(sizes.dropout),
                down=nn.Linear(sizes.inner, sizes.width),
            )
        )

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), real)
        return x + self.ffn(self.norm2(x))


class _Attention(nn.Module):
    """Scaled dot-product attention within windows."""

    def __init__(self, sizes: Transformer) -> None:
        super().__init__()
        self.heads, self.window = sizes.heads, sizes.window
        self.query, self.key, self.value, self.output = (nn.Linear(sizes.width, sizes.width) for _ in range(4))
        self.dropout = nn.Dropout(sizes.dropout)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        windows = real.view(-1, 1, 1, self.window)
        # In a window of padding alone everything attends to everything: its outputs are never read, but must be finite.
        mask = windows | ~windows.any(-1, keepdim=True)
        query, key, value = (self._split(layer(x)) for layer in (self.query, self.key, self.value))
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.dropout(self.output(attended.transpose(1, 2).reshape(x.shape)))

    def _split(self, x: Tensor) -> Tensor:
        """Return (rows * windows, heads, window, width per head)."""
        return x.view(-1, self.window, self.heads, x.shape[-1] // self.heads).transpose(1, 2)
