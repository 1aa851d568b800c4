"""save and load_: round trips, and files that are wrong in every way we could think of."""

import json
import os
import struct
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

import midl
from midl.errors import CheckpointError, MIDLError
from midl.serving import pack_, unpack_


def make(converted: bool = True, width: int = 32, **changes) -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(16, width), nn.Linear(width, 10)
    )
    if converted:
        midl.convert_(model, midl.MIDConfig(group_size=8, rank=2).replace(**changes))
    return model


@pytest.fixture
def x():
    return torch.randn(4, 3, 3, 3)


@pytest.fixture
def saved(tmp_path, x):
    """A converted model, its output and its file."""
    model = make().eval()
    path = tmp_path / "model.safetensors"
    midl.save(model, path)
    return model, model(x), path


@pytest.mark.parametrize(
    "target",
    [make(False), make(), make(rank=4), make(active=0.9, noise=0.5), make(gate="light"), make(group_size=1)],
    ids=["dense", "same", "other-rank", "other-budget", "other-gate", "other-groups"],
)
def test_loads_into_dense_and_converted_models(saved, x, target):
    model, expected, path = saved
    target.eval()
    weight = target[3].weight
    assert midl.load_(target, path) is target
    assert torch.equal(target(x), expected)
    assert target[3].weight is weight
    assert target[3].config == model[3].config
    assert type(target[4]) is nn.Linear
    assert not target[3].training


def test_a_dense_file_makes_a_converted_model_dense(tmp_path, x):
    dense = make(False).eval()
    midl.save(dense, tmp_path / "dense")
    model = make().eval()
    midl.load_(model, tmp_path / "dense")
    assert type(model[0]) is nn.Conv2d
    assert torch.equal(model(x), dense(x))


def test_tied_and_shared_layers_round_trip(tmp_path):
    def build():
        shared = nn.Linear(16, 16)
        model = nn.ModuleDict({"a": shared, "b": shared, "embed": nn.Embedding(32, 16), "out": nn.Linear(16, 32)})
        model["out"].weight = model["embed"].weight
        return model

    model = build()
    midl.convert_(model, midl.MIDConfig(group_size=8, rank=2))
    midl.save(model, tmp_path / "m")
    other = midl.load_(build(), tmp_path / "m")
    assert other["a"] is other["b"]
    assert other["out"].weight is other["embed"].weight
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())


def test_dtype_and_memory_format_of_the_model_are_kept(saved):
    _, _, path = saved
    target = make(False).to(torch.float64).to(memory_format=torch.channels_last)
    midl.load_(target, path)
    assert target[0].weight.dtype == torch.float64
    assert target[0].light_up.dtype == torch.float64
    assert target[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_views_into_one_storage_are_saved_as_tensors_of_their_own(tmp_path):
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            both = torch.arange(8.0)
            self.register_buffer("whole", both)
            self.register_buffer("left", both[:4])

    midl.save(Halves(), tmp_path / "m")
    other = Halves()
    other.whole.zero_()
    midl.load_(other, tmp_path / "m")
    assert other.left.tolist() == [0, 1, 2, 3]


def test_huggingface_conv1d_round_trips(tmp_path):
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = nn.Sequential(Conv1D(32, 16))
    midl.convert_(model, midl.MIDConfig(group_size=8, rank=2))
    midl.save(model, tmp_path / "m")
    x = torch.randn(2, 16)
    for target in (nn.Sequential(Conv1D(32, 16)), nn.Sequential(nn.Linear(16, 32))):
        assert torch.equal(midl.load_(target, tmp_path / "m")(x), model(x))
        assert target[0].dense_family == "conv1d"


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_load_fails(path, model, match, error=CheckpointError):
    before, types = state(model), [type(m) for m in model.modules()]
    with pytest.raises(error, match=match):
        midl.load_(model, path)
    assert [type(m) for m in model.modules()] == types
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_equal_models_make_equal_files(tmp_path):
    torch.manual_seed(0)
    model = nn.ModuleDict({"grün": make()})
    for i in range(12):
        midl.save(model, tmp_path / str(i))
    assert len({(tmp_path / str(i)).read_bytes() for i in range(12)}) == 1
    assert "grün.3.light_up" in midl.load_(nn.ModuleDict({"grün": make(False)}), tmp_path / "0").state_dict()


def test_missing_file(tmp_path):
    assert_load_fails(tmp_path / "none", make(), "is not a file", FileNotFoundError)


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_truncated_file(saved, length):
    _, _, path = saved
    path.write_bytes(path.read_bytes()[:length])
    assert_load_fails(path, make(False), "damaged or no safetensors file")


def test_flipped_bit(saved):
    _, _, path = saved
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    assert_load_fails(path, make(False), "checksum")


def test_other_kinds_of_file(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "a")
    assert_load_fails(tmp_path / "a", make(), "expected one written by midl.save")
    (tmp_path / "b").write_bytes(b"PK\x03\x04 a pickle in a zip")
    assert_load_fails(tmp_path / "b", make(), "damaged or no safetensors file")


def edit_description(path, change):
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    description = json.loads(header["__metadata__"]["midl"])
    description = change(description) or description
    header["__metadata__"]["midl"] = description if isinstance(description, str) else json.dumps(description)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda d: d.update(version=99), "format version 99, expected at most 2"),
        (lambda d: d.pop("layers") and None, "damaged description"),
        (lambda d: "no json", "damaged description"),
        (lambda d: d["layers"]["3"]["config"].update(active=7), "damaged description"),
        (lambda d: d["layers"]["3"]["config"].update(group_size=5), "does not fit the model at '3'"),
        (lambda d: d["layers"].update({"9": d["layers"]["3"]}), "the model has no module there"),
        (lambda d: d["layers"].update({"1": d["layers"]["3"]}), "the model has a BatchNorm2d there"),
        (lambda d: d["layers"].update({"0": d["layers"]["3"]}), "the model has a MIDConv2d there|has a Conv2d there"),
        (lambda d: d["aliases"].update({"3.bias": "gone"}), "no tensor 'gone'"),
    ],
)
def test_damaged_or_foreign_description(saved, change, match):
    _, _, path = saved
    edit_description(path, change)
    assert_load_fails(path, make(False), match)


def test_another_architecture(saved):
    _, _, path = saved
    assert_load_fails(path, make(False, width=64), r"of shape \(.*expected \(")
    assert_load_fails(path, nn.Sequential(*make(False), nn.Linear(10, 2)), r"lacks \['5.bias', '5.weight'\]")
    assert_load_fails(path, nn.Sequential(*list(make(False))[:4]), r"unexpected \['4.bias', '4.weight'\]")


def test_a_model_on_the_meta_device(saved):
    _, _, path = saved
    with pytest.raises(CheckpointError, match="meta device"):
        midl.load_(make(False).to("meta"), path)


def test_root_layers(tmp_path):
    midl.save(midl.MIDLinear(8, 8, rank=2), tmp_path / "m")
    assert midl.load_(midl.MIDLinear(8, 8, rank=2, active=0.9), tmp_path / "m").active == 0.45
    assert_load_fails(tmp_path / "m", nn.Linear(8, 8), "itself a Linear and cannot be replaced in place")
    midl.save(nn.Linear(8, 8), tmp_path / "d")
    assert_load_fails(tmp_path / "d", midl.MIDLinear(8, 8, rank=2), "holds a dense layer, the model is a MID-L")


def test_state_that_is_no_tensor_is_an_error(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"step": 3}

        def set_extra_state(self, state):
            pass

    with pytest.raises(MIDLError, match="_extra_state is a dict, expected tensors"):
        midl.save(Extra(2, 2), tmp_path / "m")


def test_a_failed_save_leaves_the_old_file_and_no_temporary_one(saved, monkeypatch):
    model, _, path = saved
    old = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        midl.save(model, path)
    assert path.read_bytes() == old
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_without_safetensors_the_error_names_the_extra(tmp_path):
    code = "import sys; sys.modules['safetensors'] = None; import midl, torch; midl.save(torch.nn.Linear(1, 1), 'x')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode
    assert "pip install 'midl[save]'" in done.stderr


def test_a_parametrized_layer_round_trips_into_its_like_and_is_an_error_elsewhere(tmp_path):
    weight_norm = nn.utils.parametrizations.weight_norm
    model, x = nn.Sequential(midl.MIDLinear(16, 32, rank=2)), torch.randn(3, 16)
    weight_norm(model[0])
    midl.save(model, tmp_path / "m")
    other = nn.Sequential(midl.MIDLinear(16, 32, rank=2, active=0.9))
    weight_norm(other[0])
    assert torch.equal(midl.load_(other, tmp_path / "m")(x), model(x))
    assert_load_fails(tmp_path / "m", nn.Sequential(nn.Linear(16, 32)), r"lacks \['0.weight'\]")
    midl.save(nn.Sequential(nn.Linear(16, 32)), tmp_path / "d")
    assert_load_fails(tmp_path / "d", other, "is parametrized, expected", MIDLError)


def test_a_full_disk_is_an_os_error_and_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*args):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match=r"could not be written: .*No space left on device"):
        midl.save(make(), tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("save", lambda: midl.save(None, "file")),
        ("load_", lambda: midl.load_(None, "file")),
        ("set_active", lambda: midl.set_active(None, 0.5)),
        ("pack_", lambda: pack_(None)),
        ("unpack_", lambda: unpack_(None)),
        ("convert_", lambda: midl.convert_(nn.Sequential(nn.LazyLinear(4)))),
        ("adapt", lambda: midl.adapt(nn.Sequential(nn.LazyLinear(4)), torch.zeros(8, 4))),
    ],
)
def test_what_is_no_module_or_has_no_shapes_yet_is_named(name, call):
    with pytest.raises(
        MIDLError, match=rf"{name}: (model is a NoneType, expected torch.nn.Module|the model's 0.weight has no shape)"
    ):
        call()
