import warnings

import pytest
import torch
from torch import nn

from phase4_bitnet.convert import convert_model_to_bitnet
from phase4_bitnet.layers import BitConv2d, BitLinear, ternary_layers


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def names(model):
    return [name for name, _ in ternary_layers(model)]


def test_hidden_layers_are_converted_and_the_last_one_is_kept():
    model = mlp()
    weights = [m.weight for m in model if isinstance(m, nn.Linear)]
    assert convert_model_to_bitnet(model) is model
    assert names(model) == ["0", "2"]
    assert type(model[4]) is nn.Linear
    # The very parameters stay, so an optimizer built before the conversion still moves them.
    assert [m.weight for m in model if isinstance(m, nn.Linear)] == weights


def test_skip_takes_patterns_and_refuses_a_name_that_matches_nothing():
    model = convert_model_to_bitnet(mlp(), skip=("2", "4"))
    assert names(model) == ["0"]
    with pytest.raises(ValueError, match="'fc9' matches no convertible layer"):
        convert_model_to_bitnet(mlp(), skip=("fc9",))
    assert names(convert_model_to_bitnet(mlp(), skip=())) == ["0", "2", "4"]


def test_heads_by_name_and_tied_heads_stay_float():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(7, 4)
            self.body = nn.Linear(4, 4)
            self.out = nn.Linear(4, 7, bias=False)
            self.out.weight = self.embed.weight
            self.late = nn.Linear(4, 4)

    assert names(convert_model_to_bitnet(Model())) == ["body", "late"]


def test_shared_modules_stay_shared():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(4, 2))
    convert_model_to_bitnet(model)
    assert model[0] is model[2]
    assert isinstance(model[0], BitLinear)


def test_converting_twice_changes_nothing_more():
    model = convert_model_to_bitnet(mlp())
    first = model[0]
    assert convert_model_to_bitnet(model, skip=("4",))[0] is first


def test_nothing_to_convert_is_an_error_with_the_remedy():
    with pytest.raises(ValueError, match=r"pass skip=\(\)"):
        convert_model_to_bitnet(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="wrap it"):
        convert_model_to_bitnet(nn.Linear(3, 3), skip=())


def test_frozen_flags_mode_and_bias_are_kept():
    model = mlp().eval()
    model[0].weight.requires_grad_(False)
    bias = model[0].bias
    convert_model_to_bitnet(model)
    assert not model[0].weight.requires_grad
    assert model[0].bias is bias
    assert not model[0].training


@pytest.mark.parametrize(("attention", "expected"), [(True, True), (False, False)])
def test_norm_is_automatic_for_models_with_attention(attention, expected):
    class SelfAttention(nn.Linear):
        pass

    kind = SelfAttention if attention else nn.Linear
    model = convert_model_to_bitnet(nn.Sequential(kind(4, 4), nn.Linear(4, 2)))
    assert model[0].norm is expected


def test_convolutions_on_request_keep_the_first():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    convert_model_to_bitnet(model, convolutions=True)
    assert type(model[0]) is nn.Conv2d
    assert isinstance(model[1], BitConv2d)
    assert model(torch.randn(2, 1, 5, 5)).shape == (2, 2)


@pytest.mark.parametrize("norm_first", [True, False])
def test_torch_encoder_evaluates_through_the_ternary_layers(norm_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=norm_first)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(16, 2))
        convert_model_to_bitnet(model)
    x = torch.randn(3, 5, 16)
    trained = model(x)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x), trained)


def test_fused_attention_projections_are_named_in_a_warning():
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), nn.Linear(16, 2))
    with pytest.warns(UserWarning, match="self_attn.out_proj"):
        convert_model_to_bitnet(model)
    assert names(model) == ["0.linear1", "0.linear2"]


def test_layers_with_more_than_their_class_stay_float_and_are_named():
    class LoRALinear(nn.Linear):
        def forward(self, x):
            return super().forward(x) + x.sum()

    model = nn.Sequential(LoRALinear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.warns(UserWarning, match="'0' first"):
        convert_model_to_bitnet(model)
    assert names(model) == ["1"]
    table = nn.Sequential(nn.Embedding(5, 4, max_norm=1.0), nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.warns(UserWarning, match="'0' first"):
        convert_model_to_bitnet(table, embeddings=True)
    assert names(table) == ["1"]


def test_hooks_go_on_firing():
    model, calls = mlp(), []
    model[0].register_forward_hook(lambda *_: calls.append("after"))
    model[0].register_forward_pre_hook(lambda *_: calls.append("before"))
    convert_model_to_bitnet(model)(torch.randn(2, 6))
    assert calls == ["before", "after"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 8)), "'0' is computed from others"),
        (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8)), "'0' is computed from others"),
        (lambda: nn.LazyLinear(8), "'0' is lazy"),
    ],
)
def test_weights_that_are_not_parameters_are_refused_by_name(make, message):
    model = mlp()
    model[0] = make()
    with pytest.raises(ValueError, match=message):
        convert_model_to_bitnet(model)
    assert type(model[2]) is nn.Linear, "nothing is changed when one layer cannot be"


def test_a_head_that_was_registered_before_the_body_is_known_by_its_name():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.output = nn.Linear(4, 2)
            self.body = nn.Sequential(nn.Linear(4, 4))

    assert names(convert_model_to_bitnet(Model())) == ["body.0"]
