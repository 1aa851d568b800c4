"""imdb: is a film review positive? 50,000 reviews, the official split, as rows of 256 token ids.

Words and punctuation marks are tokens, in lower case. The vocabulary is the most frequent tokens of the training
reviews; others become ``UNKNOWN``. Longer reviews keep their beginning, shorter ones are filled with ``PADDING``.

Source: A. L. Maas, R. E. Daly, P. T. Pham, D. Huang, A. Y. Ng, C. Potts, "Learning Word Vectors for Sentiment
Analysis", ACL 2011. No licence is stated.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from midl.lab.data.augment import drop_tokens
from midl.lab.data.dataset import NO_STATISTICS, Arrays
from midl.lab.data.hub import from_hub
from midl.lab.data.registry import Spec
from midl.lab.data.table import Table

__all__ = ["PADDING", "SPEC", "TOKENS", "UNKNOWN", "VOCABULARY"]

VOCABULARY = 20_000
"""Number of token ids; 0 to ``VOCABULARY - 1``."""
TOKENS = 256
PADDING = 0
UNKNOWN = 1


def _decode(tables: Mapping[str, Table]) -> Arrays:
    texts = {split: table.strings("text") for split, table in tables.items()}
    tokenizer = _learn(texts["train"])
    rows = {split: _encode(tokenizer, texts[split]) for split in texts}
    labels = {split: table.labels("label", 2) for split, table in tables.items()}
    return Arrays(rows["train"], labels["train"], rows["test"], labels["test"], NO_STATISTICS, NO_STATISTICS)


def _learn(texts: list[str]) -> Any:
    """Return a tokenizer whose vocabulary is that of ``texts``."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace("<br />", " "), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(
        vocab_size=VOCABULARY, special_tokens=["[PAD]", "[UNK]"], show_progress=False
    )  # the order of the special tokens makes their ids PADDING and UNKNOWN
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS, pad_id=PADDING, pad_token="[PAD]")
    return tokenizer


def _encode(tokenizer: Any, texts: list[str]) -> np.ndarray:
    out = np.empty((len(texts), TOKENS), dtype=np.int16)  # holds every id below VOCABULARY
    for start in range(0, len(texts), 1000):  # encodings of a whole split take gigabytes
        encoded = tokenizer.encode_batch(texts[start : start + 1000])
        out[start : start + len(encoded)] = [one.ids for one in encoded]
    return out


SPEC = Spec(
    num_classes=2,
    decode=_decode,
    columns=("text", "label"),
    download=from_hub("stanfordnlp/imdb"),
    origin="the hub data set stanfordnlp/imdb",
    augment=functools.partial(drop_tokens, rate=0.1, replacement=UNKNOWN, keep=PADDING),
)
