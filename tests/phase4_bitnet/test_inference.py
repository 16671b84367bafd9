"""Packed models compute what the model they were made from computes, to the last bit, and hold no latents."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import library, nn

from oracles.bitnet import int8_rows, linear_forward
from oracles.packing import unpack_tile
from phase4_bitnet import (
    BitConv1d,
    BitConv2d,
    BitEmbedding,
    BitLinear,
    PackedBitLinear,
    build_model,
    convert_model_to_bitnet,
    load_compressed_model,
    load_packed_model,
    native,
    pack_model,
    save_compressed_model,
)
from phase4_bitnet.inference import PackedLayer
from phase4_bitnet.packing import decode_2bit, pack_codes, pack_tiles, unpack_tiles
from phase5_training import BitNetOptimizer

# (rows, inputs, outputs): whole tiles and not, each number of rows that the kernel has a loop for.
SIZES = [
    (1, 1, 1),
    (1, 768, 768),
    (2, 100, 33),
    (3, 17, 16),
    (4, 64, 100),
    (5, 16, 49),
    (6, 1000, 7),
    (7, 130, 65),
    (13, 63, 128),
    (70, 255, 300),
]
DECODER: dict[str, Any] = {"vocab_size": 11, "dim": 32, "layers": 2, "heads": 2, "max_length": 8}


@pytest.fixture(params=["native", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test with the C++ kernel and with torch's operators."""
    if request.param == "torch":
        monkeypatch.setattr(native, "available", lambda: False)
    elif not native.available():
        pytest.skip("the native kernels cannot be built here")
    return request.param


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(7)


def rows_of(count: int, width: int) -> torch.Tensor:
    """Return rows of very different magnitudes, one of them zero."""
    x = torch.randn(count, width) * 10 ** torch.randn(count, 1)
    if count > 2:
        x[1] = 0
    return x


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether dtype, shape and every bit agree."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.nan_to_num(3, 4, 5), b.nan_to_num(3, 4, 5))
    )


# -- one layer ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"norm": True}, {"weight_bits": 1, "norm": True}, {"activation_bits": None}],
    ids=str,
)
def test_a_layer_is_the_training_layer_bit_for_bit(
    kernels: str, size: tuple[int, int, int], options: dict[str, Any]
) -> None:
    count, inputs, outputs = size
    layer = BitLinear(inputs, outputs, **options).eval()
    x = rows_of(count, inputs)
    packed = pack_model(layer)
    assert isinstance(packed, PackedBitLinear)
    with torch.no_grad():
        assert same(packed(x), layer(x))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_layer_is_the_formula(kernels: str, size: tuple[int, int, int]) -> None:
    """Against float64 without our code, to the last integer before scaling."""
    count, inputs, outputs = size
    layer = BitLinear(inputs, outputs, bias=False)
    x = rows_of(count, inputs)
    wanted, accumulator, *_ = linear_forward(x, layer.weight.detach())
    ours = pack_model(layer)(x).double()
    assert torch.allclose(ours, torch.from_numpy(wanted), rtol=1e-6, atol=0)
    integers = (ours / (torch.from_numpy(int8_rows(x)[1]) * layer.scale.double())).round()
    assert torch.equal(integers, torch.from_numpy(accumulator))


@pytest.mark.parametrize("shape", [(9,), (1, 9), (0, 9), (2, 0, 9), (2, 3, 4, 9)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_any_leading_shape(kernels: str, shape: tuple[int, ...], bias: bool) -> None:
    layer = BitLinear(9, 5, bias).eval()
    x = torch.randn(shape)
    with torch.no_grad():
        assert same(pack_model(layer)(x), layer(x))


def test_rows_that_do_not_lie_together(kernels: str) -> None:
    layer = BitLinear(40, 24).eval()
    for x in (torch.randn(40, 6).t(), torch.randn(6, 80)[:, ::2], torch.randn(1, 40).expand(6, 40)):
        with torch.no_grad():
            assert same(pack_model(layer)(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_and_autocast(kernels: str, dtype: torch.dtype) -> None:
    layer = BitLinear(40, 24, norm=True).eval()
    x = torch.randn(3, 40)
    packed = pack_model(layer)
    with torch.no_grad():
        assert same(packed(x.to(dtype)), layer(x.to(dtype)))
        if dtype != torch.float64:
            with torch.autocast("cpu", dtype=dtype):
                assert same(packed(x), layer(x))


def test_values_that_are_no_numbers(kernels: str) -> None:
    layer = BitLinear(20, 18).eval()
    x = torch.randn(5, 20)
    x[0, 3], x[1, 5], x[2, 7] = float("nan"), float("inf"), float("-inf")
    x[3] = 3e38
    with torch.no_grad():
        ours, theirs = pack_model(layer)(x), layer(x)
    assert same(ours, theirs)
    assert ours[:3].isnan().all()


def test_halves_are_rounded_as_in_training(kernels: str) -> None:
    """Half-way values: the last bit of the factor decides, so the kernel has to compute it the same way."""
    layer = BitLinear(128, 24).eval()
    x = (torch.arange(128) - 63.5).repeat(200, 1) / 127 * torch.rand(200, 1).mul_(100)
    x[:, -1] = 2 * x.amax(1)  # what the others are half-way steps of
    with torch.no_grad():
        assert same(pack_model(layer)(x), layer(x))


def test_more_threads_give_the_same(kernels: str) -> None:
    layer = BitLinear(1024, 1040).eval()
    packed, before = pack_model(layer), torch.get_num_threads()
    for count in (1, 9, 100):
        x = rows_of(count, 1024)
        try:
            torch.set_num_threads(3)
            ours = packed(x)
        finally:
            torch.set_num_threads(before)
        with torch.no_grad():
            assert same(ours, layer(x))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: BitConv1d(6, 5, 3, padding=1, stride=2), (2, 6, 9)),
        (lambda: BitConv1d(6, 5, 1, bias=False, weight_bits=1), (2, 6, 9)),
        (lambda: BitConv2d(6, 4, (3, 2), groups=2, dilation=2, padding=2), (2, 6, 9, 8)),
        (lambda: BitConv2d(6, 4, 3, padding="same", padding_mode="reflect"), (2, 6, 9, 8)),
    ],
)
def test_convolutions(layer: Any, shape: tuple[int, ...]) -> None:
    layer = layer().eval()
    packed, x = pack_model(layer), torch.randn(shape)
    with torch.no_grad():
        assert same(packed(x), layer(x))
    assert torch.equal(packed.codes, layer.codes)
    assert packed.packed_codes.numel() * 4 < layer.weight.numel() + 4 * layer.out_channels


def test_embeddings() -> None:
    layer = BitEmbedding(9, 6, padding_idx=0).eval()
    packed, index = pack_model(layer), torch.tensor([[0, 8], [3, 3]])
    assert same(packed(index), layer(index).detach())
    assert packed(index[:0]).shape == (0, 2, 6)
    with pytest.raises(IndexError):
        packed(torch.tensor([9]))


# -- layouts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (16, 16), (17, 33), (40, 4)], ids=str)
def test_tiles_hold_each_code_where_the_description_says(shape: tuple[int, int]) -> None:
    codes = torch.randint(-1, 2, shape, dtype=torch.int8)
    tiles = pack_tiles(codes)
    padded = torch.zeros(tiles.shape[0] * 16, tiles.shape[1] * 16, dtype=torch.int8)
    padded[: shape[0], : shape[1]] = codes
    for down in range(tiles.shape[0]):
        for across in range(tiles.shape[1]):
            wanted = padded[down * 16 : down * 16 + 16, across * 16 : across * 16 + 16].tolist()
            assert unpack_tile(tiles[down, across].tolist()) == wanted
    assert torch.equal(unpack_tiles(tiles, *shape), codes)
    assert torch.equal(decode_2bit(pack_codes(codes), shape[1]), codes)


def test_codes_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="wanted -1, 0 or 1"):
        pack_tiles(torch.full((2, 2), 2, dtype=torch.int8))


# -- models ------------------------------------------------------------------------------------------


def mixed() -> nn.Module:
    """Return a model with every kind of ternary layer, float layers and a ternary layer that occurs twice."""
    shared = BitLinear(12, 12)
    net = nn.Sequential(
        nn.Embedding(30, 10),
        nn.Conv1d(7, 6, 3, padding=1),
        nn.BatchNorm1d(6),
        nn.Conv1d(6, 4, 1),
        nn.Flatten(),
        nn.Linear(40, 12),
        shared,
        nn.Dropout(0.5),
        shared,
        nn.Linear(12, 3),
    )
    return convert_model_to_bitnet(net, embeddings=True, convolutions=True, skip=("9",))


MODELS: dict[str, tuple[Any, torch.Tensor]] = {
    "mlp": (
        lambda: build_model("mlp", in_features=10, hidden=(17, 8), num_outputs=3),
        torch.linspace(-3, 2, 40).reshape(4, 10),
    ),
    "decoder": (lambda: build_model("decoder", **DECODER), torch.arange(24).reshape(3, 8) % 11),
    "one bit": (lambda: build_model("decoder", weight_bits=1, **DECODER), torch.arange(8).reshape(1, 8)),
    "weights only": (
        lambda: build_model("decoder", activation_bits=None, **DECODER),
        torch.arange(8).reshape(1, 8),
    ),
    "tied": (lambda: build_model("decoder", tie_embeddings=True, **DECODER), torch.zeros(1, 1).long()),
    "mixed": (mixed, torch.arange(14).reshape(2, 7)),
}


@pytest.fixture(params=list(MODELS))
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, torch.Tensor]:
    """Return a model and an input for it."""
    make, x = MODELS[request.param]
    return make(), x


def train(model: nn.Module, x: torch.Tensor, steps: int = 2) -> BitNetOptimizer:
    """Take a few steps under the optimizer that owns the codes."""
    optimizer = BitNetOptimizer(torch.optim.SGD(model.parameters(), 0.1), model)
    for _ in range(steps):
        model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("owned", [False, True])
def test_a_model_is_the_training_model_bit_for_bit(
    kernels: str, case: tuple[nn.Module, torch.Tensor], owned: bool
) -> None:
    model, x = case
    if owned:
        owner = train(model, x)
        assert owner is not None
    before = {name: value.clone() for name, value in model.state_dict().items()}
    mode = model.training
    packed = pack_model(model)
    assert model.training == mode
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with torch.no_grad():
        assert same(packed(x), model.eval()(x))
    assert same(packed(x), packed(x).detach())  # and no_grad is not needed


def test_stochastic_codes_are_those_of_the_model(tmp_path: Path) -> None:
    """Under an optimizer the model computes with the codes that were drawn, and so do its sessions."""
    model = build_model("decoder", quantization_mode="stochastic", **DECODER)
    x = MODELS["decoder"][1]
    owner = train(model, x)
    model.eval()
    folder = save_compressed_model(model, tmp_path / "session")
    with torch.no_grad():
        assert same(pack_model(model)(x), model(x))
        assert same(load_packed_model(folder)(x), model(x))
    assert owner is not None


@pytest.mark.parametrize("latents", [True, False])
def test_a_session_is_loaded_packed(
    tmp_path: Path, case: tuple[nn.Module, torch.Tensor], latents: bool
) -> None:
    model, x = case
    train(model, x)
    model.eval()
    save_compressed_model(model, "run", root=tmp_path, latents=latents)
    instance = None if hasattr(model, "config") else mixed()
    packed = load_packed_model("run", root=tmp_path, model=instance)
    with torch.no_grad():
        assert same(packed(x), model(x))
        assert same(packed(x), load_compressed_model("run", root=tmp_path, model=instance)(x))


def test_no_latent_is_left(case: tuple[nn.Module, torch.Tensor]) -> None:
    model, _ = case
    latents = {id(m.weight) for m in model.modules() if hasattr(m, "codes")}
    packed = pack_model(model)
    for layer in packed.modules():
        if isinstance(layer, PackedLayer):
            assert set(dict(layer.named_parameters())) <= {"bias"}
            assert {n: b.dtype for n, b in layer.named_buffers()} == {
                "packed_codes": torch.uint8,
                "scale": torch.float32,
            }
    assert not latents & {id(p) for p in packed.parameters()}
    assert not any(p.requires_grad for p in packed.parameters())
    assert not packed.training


@pytest.mark.parametrize(
    "make",
    [
        lambda: BitLinear(512, 384, bias=False),
        lambda: BitConv2d(128, 128, 3, bias=False),
        lambda: BitConv1d(256, 256, 1, bias=False),
        lambda: BitEmbedding(1000, 128),
    ],
)
def test_each_kind_is_an_eighth_of_float32_on_disk_and_in_memory(tmp_path: Path, make: Any) -> None:
    layer = make()
    folder = save_compressed_model(layer, tmp_path / "small", latents=False)
    assert sum(f.stat().st_size for f in folder.iterdir()) * 8 < layer.weight.nbytes
    assert sum(b.nbytes for b in pack_model(layer).buffers()) * 15.9 < layer.weight.nbytes


def test_layers_that_occur_twice_are_one_layer() -> None:
    packed = pack_model(mixed())
    assert packed[6] is packed[8]


def test_hooks_come_along() -> None:
    model = build_model("mlp", in_features=10, hidden=(17, 8), num_outputs=3)
    seen: list[str] = []
    model.hidden[0].register_forward_hook(lambda module, args, out: seen.append(type(module).__name__))
    pack_model(model)(torch.ones(1, 10))
    assert seen == ["PackedBitLinear"]


# -- a module like any other -------------------------------------------------------------------------


def test_state_copies_and_pickles(case: tuple[nn.Module, torch.Tensor]) -> None:
    model, x = case
    packed = pack_model(model)
    wanted = packed(x)
    assert same(copy.deepcopy(packed)(x), wanted)
    file = io.BytesIO()
    torch.save(packed, file)
    file.seek(0)
    assert same(torch.load(file, weights_only=False)(x), wanted)
    other = pack_model(model)
    for tensor in other.state_dict().values():
        tensor.zero_()
    other.load_state_dict(packed.state_dict())
    assert same(other(x), wanted)


def test_casts_keep_the_scale(kernels: str) -> None:
    layer = BitLinear(40, 24)
    scale = layer.scale.item()
    for dtype in (torch.bfloat16, torch.float16):
        packed = pack_model(layer).to(dtype)
        assert packed.scale.dtype == torch.float32
        assert packed.scale.item() == scale
        assert packed.bias.dtype == dtype
        assert packed(torch.randn(2, 40, dtype=dtype)).dtype == dtype
        assert packed.to(torch.float32).scale.item() == scale
    weights = pack_model(BitLinear(8, 8, activation_bits=None)).bfloat16()
    assert weights(torch.ones(1, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("name", ["decoder", "weights only", "mixed"])
def test_compiles_in_one_graph(kernels: str, name: str) -> None:
    make, x = MODELS[name]
    packed = pack_model(make())
    compiled = torch.compile(packed, fullgraph=True)
    with torch.no_grad():
        # The norms between the layers are compiled too and round differently in the last place.
        assert torch.allclose(compiled(x), packed(x), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_compiled_layer_takes_any_number_of_rows_and_is_exact() -> None:
    layer = BitLinear(40, 24).eval()
    compiled = torch.compile(pack_model(layer), fullgraph=True, dynamic=True)
    for count in (1, 2, 9):
        x = torch.randn(count, 40)
        with torch.no_grad():
            ours, theirs = compiled(x), layer(x)
        if native.available():
            assert same(ours, theirs)
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_what_torch_compile_is_told_is_true() -> None:
    if not native.available():
        pytest.skip("the native kernels cannot be built here")
    packed = pack_model(BitLinear(20, 18))
    for shape in ((20,), (3, 20), (2, 0, 20)):
        arguments = (torch.randn(shape), packed.packed_codes, packed.scale, packed.bias, 18)
        library.opcheck(
            torch.ops.forge.packed_linear.default, arguments, test_utils=("test_schema", "test_faketensor")
        )


@pytest.fixture
def cuda() -> torch.device:
    """Return the CUDA device."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda")


@pytest.mark.cuda
def test_on_cuda_it_is_the_training_model_there(
    case: tuple[nn.Module, torch.Tensor], cuda: torch.device
) -> None:
    model, x = case
    packed = pack_model(model).to(cuda)
    model.eval().to(cuda)
    with torch.no_grad():
        assert same(packed(x.to(cuda)), model(x.to(cuda)))


# -- refusals ----------------------------------------------------------------------------------------


def test_gradients_are_refused() -> None:
    packed = pack_model(nn.Sequential(BitLinear(4, 4), BitConv1d(4, 4, 1)))
    x = torch.randn(2, 4, requires_grad=True)
    for layer, value in ((packed[0], x), (packed[1], x.reshape(2, 4, 1))):
        with pytest.raises(
            RuntimeError, match=r"packed codes pass none; call the model under torch\.no_grad"
        ):
            layer(value)
        with torch.no_grad():
            layer(value)


def test_inputs_of_other_features_are_refused(kernels: str) -> None:
    packed = pack_model(BitLinear(17, 4))
    # 18 features need as many tiles as 17: the kernel alone would not see it.
    with pytest.raises(ValueError, match=r"shape \(2, 18\) has 18 features, the layer in_features=17"):
        packed(torch.randn(2, 18))


def test_models_that_cannot_be_packed_are_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no ternary layer to pack; convert it"):
        pack_model(nn.Linear(3, 3))

    class Mine(BitLinear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    with pytest.raises(ValueError, match="layer '0' is a Mine with a forward of its own"):
        pack_model(nn.Sequential(Mine(3, 3)))


def test_a_packed_model_is_not_a_session(tmp_path: Path) -> None:
    packed = pack_model(nn.Sequential(BitLinear(3, 3)))
    with pytest.raises(ValueError, match="save the model it was packed from, with latents=False"):
        save_compressed_model(packed, tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_the_kernel_refuses_what_does_not_fit() -> None:
    if not native.available():
        pytest.skip("the native kernels cannot be built here")
    tiles, scale = pack_tiles(torch.zeros(16, 32, dtype=torch.int8)), torch.tensor(1.0)
    run = torch.ops.forge.packed_linear
    for arguments in (
        (torch.zeros(1, 33), tiles, scale, None, 16),
        (torch.zeros(1, 32), tiles, scale, None, 17),
        (torch.zeros(1, 32).half(), tiles, scale, None, 16),
        (torch.zeros(1, 32), tiles.to(torch.int8), scale, None, 16),
        (torch.zeros(1, 32), tiles, scale.double(), None, 16),
        (torch.zeros(1, 32), tiles, scale, torch.zeros(15), 16),
    ):
        with pytest.raises(ValueError, match="packed_linear: "):
            run(*arguments)
