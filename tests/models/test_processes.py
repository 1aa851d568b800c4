"""Converted models in other processes and plain containers: midl's file, safetensors and state_dict."""

from __future__ import annotations

import multiprocessing

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import midl


def build():
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)).eval()


def converted():
    model = build()
    midl.convert_(model, midl.MIDConfig(rank=2, group_size=4))
    return model


def compute(path, values, results):
    """Run in a worker: only a path and numbers come in, only numbers go out."""
    torch.set_num_threads(1)
    model = midl.load_(build(), path)
    with torch.no_grad():
        results.put(model(torch.tensor(values)).tolist())


@pytest.mark.parametrize("start", ["spawn", "fork"])
def test_a_worker_loads_the_file_and_computes_the_same(tmp_path, start):
    if start not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system cannot {start}")
    model, x = converted(), torch.randn(3, 16)
    midl.save(model, tmp_path / "model.safetensors")
    context = multiprocessing.get_context(start)
    results = context.Queue()
    worker = context.Process(target=compute, args=(tmp_path / "model.safetensors", x.tolist(), results))
    worker.start()
    got = torch.tensor(results.get(timeout=120))
    worker.join()
    torch.testing.assert_close(got, model(x).detach())


def test_state_dict_and_safetensors_round_trip_between_equally_converted_models(tmp_path):
    model, other, x = converted(), converted(), torch.randn(3, 16)
    save_file(model.state_dict(), tmp_path / "plain.safetensors")
    other.load_state_dict(load_file(tmp_path / "plain.safetensors"))
    torch.testing.assert_close(other(x), model(x))
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = converted()
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    torch.testing.assert_close(other(x), model(x))


def test_a_dense_state_dict_loads_with_strict_off_and_the_light_path_is_renewed():
    dense, model, x = build(), converted(), torch.randn(3, 16)
    missing, unexpected = model.load_state_dict(dense.state_dict(), strict=False)
    assert not unexpected
    assert {name.rpartition(".")[2] for name in missing} == {"light_down", "light_up", "gate_weight", "gate_bias"}
    for layer in (model[0], model[2]):
        layer.reset_light_path()
    midl.convert_(dense, midl.MIDConfig(rank=2, group_size=4))
    torch.testing.assert_close(model(x), dense(x))
