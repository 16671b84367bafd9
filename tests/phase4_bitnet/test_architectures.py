"""The reference architectures: against float64 numpy, by their properties, and through JSON."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from oracles.attention import decoder as decoder_oracle
from phase4_bitnet.architecture_config import DecoderConfig, MLPConfig
from phase4_bitnet.architectures import REGISTRY, build_model, build_model_from_dict
from phase4_bitnet.layers import BitLinear, ternary_layers

SMALL: dict[str, dict[str, Any]] = {
    "mlp": {"in_features": 12, "hidden": (16, 8), "num_outputs": 3},
    "decoder": {"vocab_size": 11, "dim": 16, "layers": 2, "heads": 2, "max_length": 24},
    "llama": {"vocab_size": 11, "dim": 16, "layers": 2, "heads": 2, "max_length": 24},
}
names = pytest.mark.parametrize("name", list(REGISTRY))


def small(name: str, seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    return build_model(name, **{**SMALL[name], **options})


def sample(name: str, rows: int = 3, length: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    if name == "mlp":
        return torch.randn(rows, 12, generator=generator)
    return torch.randint(1, 11, (rows, length), generator=generator)


def scramble(model: nn.Module) -> nn.Module:
    """Larger weights and uneven gains, so that no term of the formula is hidden by the initial values."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def test_every_architecture_has_a_small_example() -> None:
    assert set(SMALL) == set(REGISTRY)


@pytest.mark.parametrize("length", [5, 24])
def test_float_decoder_matches_the_oracle(length: int) -> None:
    model = scramble(small("decoder", ternary=False, rope_base=700.0, norm_eps=1e-3))
    tokens = sample("decoder", rows=2, length=length)
    weights = {name: value.detach().numpy() for name, value in model.named_parameters()}
    ours = model(tokens).detach().numpy()
    for row in range(2):
        expected = decoder_oracle(weights, tokens[row].numpy(), layers=2, heads=2, eps=1e-3, base=700.0)
        np.testing.assert_allclose(ours[row], expected, atol=2e-4)


def test_float_mlp_matches_the_formula() -> None:
    model = scramble(small("mlp", ternary=False))
    x = sample("mlp")
    h = x.double().numpy()
    w = {k: v.detach().double().numpy() for k, v in model.state_dict().items()}
    for i in range(2):
        h = np.maximum(h @ w[f"hidden.{i}.weight"].T + w[f"hidden.{i}.bias"], 0)
        h = h / np.sqrt((h * h).mean(-1, keepdims=True) + 1e-5) * w[f"norms.{i}.weight"]
    expected = h @ w["head.weight"].T + w["head.bias"]
    np.testing.assert_allclose(model(x).detach().numpy(), expected, atol=1e-5)


@names
@pytest.mark.parametrize("ternary", [True, False])
def test_hidden_linears_are_ternary_and_the_rest_float(name: str, ternary: bool) -> None:
    model = small(name, ternary=ternary)
    kinds = {n: type(m) for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert kinds.pop("head") is nn.Linear
    assert kinds
    assert set(kinds.values()) == {BitLinear if ternary else nn.Linear}
    if name == "decoder":
        assert type(model.embed_tokens) is nn.Embedding


@names
def test_float_twin_has_the_same_parameters_and_start(name: str) -> None:
    ternary, floating = small(name, ternary=True), small(name, ternary=False)
    ours, twins = dict(ternary.named_parameters()), dict(floating.named_parameters())
    assert list(ours) == list(twins)
    assert all(torch.equal(ours[key], twins[key]) for key in ours)
    assert [n for n, _ in ternary.named_modules()] == [n for n, _ in floating.named_modules()]


@names
def test_codes_belong_to_the_initial_weights(name: str) -> None:
    for _, layer in ternary_layers(small(name)):
        codes, scale = layer.codes.clone(), layer.scale.clone()
        layer.requantize_()
        assert torch.equal(codes, layer.codes)
        assert torch.equal(scale, layer.scale)


def test_initial_spread_is_gpt2s() -> None:
    model = small("decoder", dim=256, layers=8, vocab_size=200, heads=4)
    stds = {name: p.std().item() for name, p in model.named_parameters() if p.dim() == 2}
    for name, std in stds.items():
        wanted = 0.02 / 4 if "o_proj" in name or "down_proj" in name else 0.02
        assert std == pytest.approx(wanted, rel=0.03), name


@pytest.mark.parametrize("ternary", [True, False])
@pytest.mark.parametrize("length", [8, 24])
def test_a_later_token_does_not_change_earlier_logits(ternary: bool, length: int) -> None:
    model = scramble(small("decoder", ternary=ternary)).eval()
    tokens = sample("decoder", length=length)
    changed = tokens.clone()
    changed[:, 5] = changed[:, 5] % 10 + 1
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_order_of_tokens_matters() -> None:
    model = scramble(small("decoder", num_classes=4)).eval()
    tokens = torch.tensor([[1, 2, 3, 4]])
    assert not torch.allclose(model(tokens), model(tokens[:, [1, 0, 2, 3]]), atol=1e-4)


@pytest.mark.parametrize("head", [{"num_classes": 5}, {"num_outputs": 5}])
@pytest.mark.parametrize("padded", [9, 24])
def test_padding_does_not_change_a_pooled_output(head: dict[str, int], padded: int) -> None:
    model = scramble(small("decoder", pad_id=0, **head)).eval()
    tokens = sample("decoder", length=6)
    wide = torch.zeros(3, padded, dtype=torch.long)
    wide[:, :6] = tokens
    wide[1, 4:] = 0
    out = model(wide)
    assert out.shape == (3, 5)
    torch.testing.assert_close(out[[0, 2]], model(tokens[[0, 2]]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out[1:2], model(tokens[1:2, :4]), atol=1e-4, rtol=1e-4)


def test_zero_is_a_token_like_any_other_without_pad_id() -> None:
    model = scramble(small("decoder", num_classes=5)).eval()
    tokens = torch.tensor([[3, 1, 0, 0]])
    assert not torch.allclose(model(tokens), model(tokens[:, :2]), atol=1e-4)


def test_inner_padding_ids_count_and_all_padding_is_defined() -> None:
    model = scramble(small("decoder", pad_id=0, num_classes=5)).eval()
    torch.testing.assert_close(model(torch.tensor([[3, 0, 2, 0]])), model(torch.tensor([[3, 0, 2]])))
    assert model(torch.zeros(1, 4, dtype=torch.long)).isfinite().all()


def test_tied_embeddings_share_one_parameter() -> None:
    model = small("decoder", tie_embeddings=True)
    assert model.head.weight is model.embed_tokens.weight
    assert "head.weight" not in dict(model.named_parameters())
    model(sample("decoder")).sum().backward()


@names
@pytest.mark.parametrize("options", [{}, {"ternary": False}, {"weight_bits": 1}, {"activation_bits": None}])
def test_every_parameter_gets_a_gradient(name: str, options: dict[str, Any]) -> None:
    model = scramble(small(name, **options))
    model(sample(name)).square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


@names
@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_without_a_graph_break(name: str, autocast: bool) -> None:
    model = scramble(small(name))
    x = sample(name, length=20)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = compiled(x)
        expected = model(x)
    torch.testing.assert_close(
        out, expected, atol=1e-4 if not autocast else 0.1, rtol=0.1 if autocast else 1e-4
    )
    out.float().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@names
@pytest.mark.filterwarnings("error")
def test_autocast_stays_near_float32(name: str) -> None:
    model = scramble(small(name)).eval()
    x = sample(name, length=20)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    expected = model(x)
    assert (out.float() - expected).norm() < 0.1 * expected.norm()


@names
@pytest.mark.parametrize("ternary", [True, False])
def test_config_goes_through_json(name: str, ternary: bool) -> None:
    model = small(name, ternary=ternary, norm_eps=1e-6)
    text = json.dumps(model.config.to_dict(), allow_nan=False)
    twin = build_model_from_dict(json.loads(text))
    assert twin.config == model.config
    assert type(twin) is type(model)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(sample(name)), twin.eval()(sample(name)))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("decodr", {}, "did you mean 'decoder'"),
        ("zzz", {}, "use one of mlp, decoder"),
        ("decoder", {"vocab_size": 9, "layer": 2}, "did you mean 'layers'"),
        ("decoder", {}, "needs vocab_size"),
        ("mlp", {}, "needs in_features and num_outputs"),
        ("decoder", {"vocab_size": 9, "dim": 128, "heads": 5}, "use heads=4"),
        ("decoder", {"vocab_size": 9, "dim": 6, "heads": 2}, "use heads=1"),
        ("decoder", {"vocab_size": 9, "dim": 7, "heads": 3}, "use an even dim, for example dim=6"),
        ("decoder", {"vocab_size": 0}, "vocab_size=0 is not a positive integer"),
        ("decoder", {"vocab_size": 9, "layers": 2.0}, "layers=2.0 is not a positive integer"),
        ("decoder", {"vocab_size": 9, "pad_id": 9}, "outside the vocabulary 0..8"),
        ("decoder", {"vocab_size": 9, "pad_id": True}, "not a token id"),
        ("decoder", {"vocab_size": 9, "mlp_ratio": 0.001}, "leaves no hidden unit"),
        ("decoder", {"vocab_size": 9, "mlp_ratio": float("nan")}, "not a positive number"),
        ("decoder", {"vocab_size": 9, "num_classes": 2, "num_outputs": 2}, "keep one"),
        ("decoder", {"vocab_size": 9, "num_classes": 2, "tie_embeddings": True}, "next-token head"),
        ("mlp", {"in_features": 4, "num_outputs": 2, "hidden": ()}, "no layer to make ternary"),
        ("mlp", {"in_features": 4, "num_outputs": 2, "hidden": (8, 0)}, r"hidden\[1\]=0"),
        ("mlp", {"in_features": 4, "num_outputs": 2, "hidden": 8}, "not a list of widths"),
        ("mlp", {"in_features": 4, "num_outputs": 2, "weight_bits": 2}, "use 1.58 or 1"),
        ("mlp", {"in_features": 4, "num_outputs": 2, "ternary": 1}, "use True or False"),
        ("mlp", {"in_features": 4, "num_outputs": 2, "backward": "fp8"}, "'bf16'"),
    ],
)
def test_bad_options_are_refused_with_a_remedy(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build_model(name, **options)
    assert "\n" not in str(caught.value)


def test_bad_inputs_are_refused_with_a_remedy() -> None:
    with pytest.raises(ValueError, match="build the model with max_length=25"):
        small("decoder")(torch.ones(1, 25, dtype=torch.long))
    with pytest.raises(ValueError, match=r"wanted \(batch, length\)"):
        small("decoder")(torch.ones(4, dtype=torch.long))
    with pytest.raises(ValueError, match="build it with in_features=13"):
        small("mlp")(torch.ones(2, 13))
    with pytest.raises(ValueError, match="no 'architecture'"):
        build_model_from_dict({"vocab_size": 9})


def test_mlp_flattens_images() -> None:
    x = sample("mlp")
    model = small("mlp").eval()
    assert torch.equal(model(x), model(x.reshape(3, 3, 2, 2)))


def test_configs_are_frozen() -> None:
    with pytest.raises(AttributeError):
        DecoderConfig(vocab_size=9).dim = 3  # type: ignore[misc]
    assert MLPConfig(in_features=2, hidden=[4], num_outputs=1).hidden == (4,)  # type: ignore[arg-type]
