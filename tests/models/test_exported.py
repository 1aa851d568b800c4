"""Converted architectures outside PyTorch: the decomposed program and the ONNX file compute the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import midl
import midl.export

pytest.importorskip("transformers")
from architectures import BUILDERS, CONFIG, build, inputs, output

pytestmark = pytest.mark.slow


class FirstOutput(nn.Module):
    """One tensor in, one tensor out."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.model = build(name)
        midl.convert_(self.model, CONFIG)
        ((self.key, self.x),) = inputs(name).items()

    def forward(self, x):
        return output(self.model, {self.key: x})


@pytest.mark.parametrize("name", list(BUILDERS))
@torch.no_grad()
def test_decomposed_program_and_onnx_file_equal_the_model_for_another_batch(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = FirstOutput(name).eval()
    program = torch.export.export(model, (model.x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    x = torch.cat([model.x, model.x.flip(0)])[:3]
    expected = model(x)
    decomposed = program.run_decompositions(midl.export.decompositions())
    torch.testing.assert_close(decomposed.module()(x), expected, rtol=1e-4, atol=1e-5)
    table = midl.export.onnx_translations()
    torch.onnx.export(program, f=tmp_path / "m.onnx", custom_translation_table=table, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), expected, rtol=1e-4, atol=1e-5)
