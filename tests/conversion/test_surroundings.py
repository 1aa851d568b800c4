"""What else a model does with its layers: fused evaluation, padding masks, tied weights, hooks, keyword arguments."""

import copy

import pytest
import torch
from torch import nn

import midl
from midl.adaptation import calibrate_threshold, refresh_normalization
from midl.errors import CheckpointError, MIDLError
from midl.ops.dispatch import unavailable_reason
from midl.serving import factor_, pack_

EXACT = midl.MIDConfig(active=1.0, rank=4, gate="light", interpolation="hard")
ALONE = midl.MIDConfig(active=0, rank=8, gate="light", interpolation="hard")


class FFN(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(width, 128), nn.GELU(), nn.Linear(128, width)

    def forward(self, x):
        return self.down(self.act(self.up(x)))


def encoder(**choices):
    torch.manual_seed(0)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 256, batch_first=True, **choices), 2).eval()


@pytest.mark.parametrize("config", [EXACT, EXACT.replace(active=0.5), ALONE])
@torch.no_grad()
def test_padded_sequences_in_an_encoder_whose_evaluation_torch_would_fuse(config):
    model, x = encoder(), torch.randn(3, 7, 64)
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[0, 5:] = True
    dense = model(x, src_key_padding_mask=padding)
    midl.convert_(model, config)
    converted = model(x, src_key_padding_mask=padding)
    if config is EXACT:
        torch.testing.assert_close(converted[~padding], dense[~padding], rtol=1e-4, atol=1e-5)
    if config is ALONE:
        assert len(factor_(model)) == 4
        torch.testing.assert_close(model(x, src_key_padding_mask=padding)[~padding], converted[~padding])
        torch.testing.assert_close(model(x), encoded_with_gradients(model, x), rtol=1e-4, atol=1e-5)
    else:
        midl.revert_(model)
        assert torch.equal(model(x, src_key_padding_mask=padding), dense)
        assert vars(model).keys() == vars(encoder()).keys()


def encoded_with_gradients(model, x):
    with torch.enable_grad():  # never fused
        return model(x).detach()


@torch.no_grad()
def test_an_encoder_that_uses_no_nested_tensors_goes_back_to_using_none():
    model = encoder()
    model.use_nested_tensor = False
    midl.convert_(model, EXACT)
    midl.revert_(model)
    assert model.use_nested_tensor is False


def test_nested_tensors_are_refused_by_name():
    with pytest.raises(MIDLError, match="input is a nested tensor, expected a padded one"):
        midl.MIDLinear(4, 8, rank=1)(torch.nested.nested_tensor([torch.zeros(2, 4), torch.zeros(3, 4)]))


@pytest.mark.parametrize("tied", [("up.weight",), ("up.weight", "down.weight"), ("up.bias",)])
def test_ffn_units_whose_order_others_see_keep_it(tied):
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": FFN(), "b": FFN(), "head": nn.Linear(32, 5)})
    for name in tied:
        place, parameter = name.split(".")
        setattr(model.b.get_submodule(place), parameter, model.a.get_parameter(name))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = model

        def forward(self, x):
            x = x + self.parts.a(x)
            return self.parts.head(x + self.parts.b(x))

    net, x = Net().eval(), torch.randn(256, 32)
    dense = copy.deepcopy(net)
    midl.adapt(net, x, budget=1.05, ffn=True)
    midl.revert_(net)
    assert torch.equal(net(x), dense(x))


def test_hidden_units_that_something_else_reads_make_no_ffn():
    class Shows(FFN):
        def forward(self, x):
            hidden = self.act(self.up(x))
            return self.down(hidden), hidden

    model = nn.Sequential(Shows())
    report = midl.convert_(model, EXACT, ffn=True)
    assert not any(isinstance(m, midl.MIDFFN) for m in model.modules())
    assert "something else reads the hidden units" in str(report)


def test_input_may_be_a_keyword_as_for_dense_layers():
    x, image = torch.randn(3, 8), torch.randn(2, 3, 5, 5)
    for active in (0, 0.5):
        layer = midl.MIDLinear(8, 16, rank=2, active=active)
        assert torch.equal(layer(input=x), layer(x))
        conv = midl.MIDConv2d(3, 8, 3, rank=2, active=active)
        assert torch.equal(conv(input=image), conv(image))


def test_an_error_while_flops_are_counted_leaves_the_model_as_it_was():
    class Strict(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 16)

        def forward(self, x):
            assert type(self.layer) is nn.Linear, "not mine"
            return self.layer(x)

    model = Strict()
    layer = model.layer
    with pytest.raises(AssertionError, match="not mine"):
        midl.convert_(model, EXACT, example_inputs=torch.zeros(1, 8))
    assert model.layer is layer


def test_hooks_are_not_lost_in_silence(tmp_path):
    def hook(module, inputs, output):
        pass

    converted = nn.Sequential(nn.Linear(8, 16))
    midl.convert_(converted, EXACT)
    midl.save(converted, tmp_path / "file")
    for make in (lambda: nn.Linear(8, 16), lambda: nn.utils.spectral_norm(nn.Linear(8, 16))):
        model = nn.Sequential(make())
        model[0].register_forward_hook(hook)
        with pytest.raises(CheckpointError, match=r"the model's 0 has hooks .* removed first"):
            midl.load_(model, tmp_path / "file")
    converted[0].register_forward_hook(hook)
    with pytest.raises(MIDLError, match="revert_: 0 has hooks"):
        midl.revert_(converted)
    assert type(converted[0]) is midl.MIDLinear
    ffn = nn.Sequential(FFN())
    ffn[0].act.register_forward_hook(hook)
    assert "activation layer 0.act has hooks" in str(midl.convert_(ffn, EXACT, ffn=True))


@pytest.mark.parametrize("config", [EXACT, ALONE])
def test_a_frozen_model_stays_frozen_when_a_file_is_loaded(tmp_path, config):
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16))
    midl.convert_(model, config)
    factor_(model)
    midl.save(model, tmp_path / "file")
    frozen = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16)).requires_grad_(False)
    midl.load_(frozen, tmp_path / "file")
    assert not any(p.requires_grad for p in frozen.parameters())


def test_factors_are_left_alone_and_say_so(tmp_path):
    model = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 128))
    midl.convert_(model, ALONE, overrides={"2": None})
    factor_(model)
    report = midl.convert_(model, EXACT)
    assert [change.name for change in report.layers] == ["0", "2"]
    assert report.layers[0].detail == "is what is left of a layer that is its light path alone"
    midl.save(model, tmp_path / "file")
    loaded = midl.load_(nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 128)), tmp_path / "file")
    x = torch.randn(4, 32)
    assert torch.equal(loaded(x), model(x))
    assert model[0].weight.dtype == torch.float32
    assert model[0].bias is model[0].up.bias


@pytest.mark.parametrize("inputs", [torch.zeros(8, 3), torch.zeros(8, 32, dtype=torch.int64)])
def test_statistics_survive_a_refresh_that_fails(inputs):
    model = nn.Sequential(midl.MIDLinear(32, 128, rank=4), nn.BatchNorm1d(128))
    for _ in range(5):
        model(torch.randn(16, 32) + 3)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(MIDLError):
        refresh_normalization(model.eval(), [torch.randn(8, 32), inputs])
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert model[1].momentum == 0.1


@pytest.mark.skipif(unavailable_reason("native") is not None, reason=str(unavailable_reason("native")))
@torch.no_grad()
def test_packed_models_refresh_their_normalisation_and_refuse_thresholds_by_name():
    torch.manual_seed(0)
    model = nn.Sequential(midl.MIDLinear(32, 128, rank=4, group_size=16), nn.BatchNorm1d(128)).eval()
    packed, x = copy.deepcopy(model), torch.randn(64, 32)
    assert pack_(packed) == ["0"]
    for network in (model, packed):
        midl.set_active(network, 0.25)
        assert refresh_normalization(network, [x])
    torch.testing.assert_close(packed(x), model(x))
    with pytest.raises(MIDLError, match=r"gate logits .* midl\.serving\.unpack_\(model\) first"):
        calibrate_threshold(packed, x)
