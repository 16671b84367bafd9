"""Sessions on disk: exact round trips, small files, and refusal of everything that does not fit."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from oracles.packing import unpack_row_2bit
from phase4_bitnet.architectures import build_model
from phase4_bitnet.convert import convert_model_to_bitnet
from phase4_bitnet.layers import BitConv2d, BitLinear, ternary_layers
from phase4_bitnet.store import load_compressed_model, load_session, save_compressed_model, session_folder

MODELS: dict[str, dict[str, Any]] = {
    "mlp": {"in_features": 10, "hidden": (17, 8), "num_outputs": 3},
    "decoder": {"vocab_size": 11, "dim": 16, "layers": 2, "heads": 2, "max_length": 8},
}


def make(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(3)
    return build_model(name, **{**MODELS[name], **options}).eval()


def sample(name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    if name == "mlp":
        return torch.randn(4, 10, generator=generator)
    return torch.randint(0, 11, (4, 8), generator=generator)


def same_state(a: nn.Module, b: nn.Module, *, skip: str = "\0") -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert list(ours) == list(theirs)
    for key, value in ours.items():
        if not key.endswith(skip):
            assert value.dtype == theirs[key].dtype, key
            assert torch.equal(value, theirs[key]), key


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("latents", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_bits": 1},
        {"quantization_mode": "stochastic"},
        {"ternary": False},
        {"activation_bits": None},
    ],
)
def test_outputs_codes_and_scales_come_back_bit_for_bit(
    tmp_path: Path, name: str, latents: bool, options: dict[str, Any]
) -> None:
    model = make(name, **options)
    save_compressed_model(model, "run.1", root=tmp_path, latents=latents)
    twin = load_compressed_model(session_id="run.1", root=tmp_path)
    same_state(model, twin, skip="\0" if latents else ".weight")
    assert torch.equal(model(sample(name)), twin(sample(name)))
    assert not twin.training
    assert twin.config == model.config


@pytest.mark.parametrize("weight_bits", [1.58, 1])
@pytest.mark.parametrize("seed", range(5))
def test_the_latent_of_a_small_file_gives_the_stored_codes_again(
    tmp_path: Path, seed: int, weight_bits: float
) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(
        BitLinear(37, 29, weight_bits=weight_bits), BitLinear(29, 5, weight_bits=weight_bits)
    )
    with torch.no_grad():
        model[0].weight.mul_(10.0 ** (seed - 2)).pow_(3)  # other scales, other shares of zeros
        model[1].weight.zero_()
    for layer in model:
        layer.requantize_()
    save_compressed_model(model, "small", root=tmp_path, latents=False)
    twin = load_compressed_model(
        "small",
        root=tmp_path,
        model=nn.Sequential(
            BitLinear(37, 29, weight_bits=weight_bits), BitLinear(29, 5, weight_bits=weight_bits)
        ),
    )
    for (_, ours), (_, theirs) in zip(ternary_layers(model), ternary_layers(twin), strict=True):
        for _ in range(2):
            assert torch.equal(ours.codes, theirs.codes)
            assert torch.equal(ours.scale, theirs.scale)
            theirs.requantize_()


def test_the_file_holds_packed_codes_that_anyone_can_read(tmp_path: Path) -> None:
    model = make("mlp")
    folder = save_compressed_model(model, "run", root=tmp_path)
    stored = load_file(folder / "weights.safetensors")
    rows = stored["hidden.0.codes"].tolist()
    assert [unpack_row_2bit(row, 10) for row in rows] == model.hidden[0].codes.tolist()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["layers"][0]["name"] == "hidden.0"
    assert manifest["layers"][0]["scale"] == model.hidden[0].scale.item()


def test_small_file_is_an_eighth_of_float32(tmp_path: Path) -> None:
    model = nn.Sequential(BitLinear(512, 512, bias=False), BitLinear(512, 512, bias=False))
    floats = sum(p.nbytes for p in model.parameters())
    small = save_compressed_model(model, "small", root=tmp_path, latents=False)
    full = save_compressed_model(model, "full", root=tmp_path)
    assert sum(f.stat().st_size for f in small.iterdir()) * 8 < floats
    assert sum(f.stat().st_size for f in full.iterdir()) > floats
    metrics = [load_session(s, root=tmp_path, model=model)["metrics"] for s in ("small", "full")]
    assert metrics[0] == metrics[1]
    assert metrics[0]["compression_ratio"] == pytest.approx(16, rel=1e-3)


def test_load_session_is_the_dictionary_of_the_next_phase(tmp_path: Path) -> None:
    save_compressed_model(make("mlp"), "a", root=tmp_path, metrics={"compression_ratio": 8.2, "speedup": 3.8})
    session = load_session("a", root=tmp_path)
    assert set(session) == {"model", "metrics"}
    assert session["metrics"] == {"compression_ratio": 8.2, "speedup": 3.8}
    save_compressed_model(make("mlp"), "b", root=tmp_path, metrics={"note": "x"})
    metrics = load_session("b", root=tmp_path)["metrics"]
    assert metrics["speedup"] is None
    assert metrics["note"] == "x"


def test_training_goes_on_exactly(tmp_path: Path) -> None:
    """A step after save and load equals the step without them."""
    model = make("decoder", num_classes=3)
    save_compressed_model(model, "run", root=tmp_path)
    twin = load_compressed_model("run", root=tmp_path)
    for m in (model, twin):
        optimizer = torch.optim.SGD(m.train().parameters(), lr=0.5)
        for _ in range(2):
            optimizer.zero_grad()
            nn.functional.cross_entropy(m(sample("decoder")), torch.tensor([0, 1, 2, 0])).backward()
            optimizer.step()
    same_state(model, twin)


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    model = make("decoder", tie_embeddings=True)
    folder = save_compressed_model(model, "tied", root=tmp_path)
    stored = load_file(folder / "weights.safetensors")
    assert ("head.weight" in stored) != ("embed_tokens.weight" in stored)
    twin = load_compressed_model("tied", root=tmp_path)
    assert twin.head.weight is twin.embed_tokens.weight
    same_state(model, twin)


def test_a_model_in_bf16_comes_back_in_bf16(tmp_path: Path) -> None:
    model = make("decoder").bfloat16()
    save_compressed_model(model, "half", root=tmp_path)
    twin = load_compressed_model("half", root=tmp_path)
    same_state(model, twin)
    assert twin.head.weight.dtype == torch.bfloat16


def foreign() -> nn.Module:
    torch.manual_seed(5)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        BitConv2d(4, 6, 3),
        nn.BatchNorm2d(6),
        nn.Flatten(),
        nn.Linear(96, 16),
        nn.Linear(16, 2),
    )
    return convert_model_to_bitnet(net).eval()


@pytest.mark.parametrize("latents", [True, False])
def test_foreign_model_loads_into_an_instance(tmp_path: Path, latents: bool) -> None:
    model, x = foreign(), torch.randn(2, 1, 8, 8)
    save_compressed_model(model, "cnn", root=tmp_path, latents=latents)
    with pytest.raises(ValueError, match="pass model=<an instance"):
        load_compressed_model("cnn", root=tmp_path)
    other = foreign()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    twin = load_compressed_model("cnn", root=tmp_path, model=other)
    assert twin is other
    assert torch.equal(model(x), twin(x))


def test_a_converted_reference_model_counts_as_foreign(tmp_path: Path) -> None:
    model = convert_model_to_bitnet(make("mlp", ternary=False))
    save_compressed_model(model, "converted", root=tmp_path)
    with pytest.raises(ValueError, match="pass model="):
        load_compressed_model("converted", root=tmp_path)
    with pytest.raises(ValueError, match="is ternary in the session and not in the model"):
        load_compressed_model("converted", root=tmp_path, model=make("mlp", ternary=False))
    load_compressed_model(
        "converted", root=tmp_path, model=convert_model_to_bitnet(make("mlp", ternary=False))
    )


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mlp", {"hidden": (17, 9)}, "build the MLP with the sizes"),
        ("mlp", {"hidden": (17, 8, 8)}, "is ternary in the model and not in the session"),
        ("mlp", {"norm": False}, "is in the session and not in the model"),
        ("mlp", {"weight_bits": 1}, "convert it with weight_bits=1.58"),
        ("mlp", {"quantization_mode": "stochastic"}, "quantization_mode='deterministic'"),
    ],
)
def test_an_instance_that_does_not_fit_is_refused_untouched(
    tmp_path: Path, name: str, options: dict[str, Any], message: str
) -> None:
    save_compressed_model(make("mlp"), "run", root=tmp_path)
    torch.manual_seed(9)
    other = build_model(name, **{**MODELS[name], **options})
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(ValueError, match=message) as caught:
        load_compressed_model("run", root=tmp_path, model=other)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(before[k], v) for k, v in other.state_dict().items())


@pytest.mark.parametrize("file", ["weights.safetensors", "manifest.json"])
def test_any_changed_byte_is_refused(tmp_path: Path, file: str) -> None:
    folder = save_compressed_model(make("mlp"), "run", root=tmp_path)
    data = (folder / file).read_bytes()
    for position in range(0, len(data), max(1, len(data) // 25)):
        changed = bytearray(data)
        changed[position] ^= 1
        (folder / file).write_bytes(bytes(changed))
        try:
            same = json.loads(bytes(changed)) == json.loads(data)  # white space between the values
        except ValueError:
            same = False
        if not same:
            with pytest.raises(ValueError, match=r"SHA-256|not JSON|format version|not the manifest"):
                load_compressed_model("run", root=tmp_path)
    (folder / file).write_bytes(data[:-3])
    with pytest.raises(ValueError, match=r"SHA-256|not JSON"):
        load_compressed_model("run", root=tmp_path)


def test_other_weights_of_the_same_form_are_refused(tmp_path: Path) -> None:
    folder = save_compressed_model(make("mlp"), "run", root=tmp_path)
    tensors = load_file(folder / "weights.safetensors")
    tensors["head.bias"] += 1
    save_file(tensors, folder / "weights.safetensors")
    with pytest.raises(ValueError, match=r"does not match its SHA-256 in manifest\.json"):
        load_compressed_model("run", root=tmp_path)


@pytest.mark.parametrize(
    "bad", ["", ".", "..", "../x", "a/b", "/etc", "a\\b", ".hidden", "a\0b", "a b", "x" * 129, "a\n"]
)
def test_session_ids_that_could_leave_the_root_are_refused(tmp_path: Path, bad: str) -> None:
    root = tmp_path / "root"
    for act in (
        lambda: save_compressed_model(make("mlp"), bad, root=root),
        lambda: load_compressed_model(bad, root=root),
    ):
        with pytest.raises(ValueError, match="session id"):
            act()
    assert not list(tmp_path.iterdir())


def test_root_is_argument_then_environment_then_sessions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FORGE_SESSIONS", raising=False)
    assert session_folder("a") == Path("sessions/a")
    monkeypatch.setenv("FORGE_SESSIONS", str(tmp_path / "env"))
    assert session_folder("a") == tmp_path / "env" / "a"
    assert session_folder("a", root=tmp_path) == tmp_path / "a"
    assert session_folder(tmp_path / "any folder", root="x") == tmp_path / "any folder"
    save_compressed_model(make("mlp"), tmp_path / "any folder")
    load_compressed_model(tmp_path / "any folder")


def test_existing_session_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    first = make("mlp")
    save_compressed_model(first, "run", root=tmp_path)
    second = make("mlp", hidden=(5,))
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save_compressed_model(second, "run", root=tmp_path)
    assert load_compressed_model("run", root=tmp_path).config == first.config
    save_compressed_model(second, "run", root=tmp_path, overwrite=True)
    assert load_compressed_model("run", root=tmp_path).config == second.config
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    save_compressed_model(make("mlp"), "old", root=tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    for session, overwrite in (("new", False), ("old", True)):
        with pytest.raises(OSError, match="No space left"):
            save_compressed_model(make("mlp", hidden=(5,)), session, root=tmp_path, overwrite=overwrite)
    assert [p.name for p in tmp_path.iterdir()] == ["old"]
    assert load_compressed_model("old", root=tmp_path).config.hidden == (17, 8)


def test_missing_sessions_say_which_exist(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there are no sessions there"):
        load_compressed_model("run", root=tmp_path / "none")
    folder = save_compressed_model(make("mlp"), "my_run", root=tmp_path)
    with pytest.raises(FileNotFoundError, match="sessions there: my_run"):
        load_compressed_model("myrun", root=tmp_path)
    (folder / "weights.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"weights\.safetensors is missing"):
        load_compressed_model("my_run", root=tmp_path)


def test_metrics_that_json_cannot_hold_are_refused(tmp_path: Path) -> None:
    for value in (float("nan"), torch.ones(2), {1, 2}):
        with pytest.raises(ValueError, match="metrics hold something"):
            save_compressed_model(make("mlp"), "run", root=tmp_path, metrics={"x": value})
    assert not list(tmp_path.iterdir())


def test_compiled_models_are_saved_by_their_own_names(tmp_path: Path) -> None:
    model = make("mlp")
    save_compressed_model(torch.compile(model, backend="eager"), "run", root=tmp_path)
    same_state(model, load_compressed_model("run", root=tmp_path))


def test_a_latent_shared_with_a_float_layer_survives_the_small_file(tmp_path: Path) -> None:
    def build() -> nn.Module:
        net = nn.ModuleDict({"ternary": BitLinear(6, 9, bias=False), "table": nn.Embedding(9, 6)})
        net["table"].weight = net["ternary"].weight
        return net

    model = build()
    save_compressed_model(model, "shared", root=tmp_path, latents=False)
    twin = load_compressed_model("shared", root=tmp_path, model=build())
    same_state(model, twin)
    assert twin["table"].weight is twin["ternary"].weight
