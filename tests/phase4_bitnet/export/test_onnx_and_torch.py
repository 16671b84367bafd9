"""ONNX files in onnxruntime and programs of torch: the same outputs, other sizes of input, no paths."""

import subprocess
import sys
import zipfile

import pytest
import torch
from torch import nn

from exported import assert_close, lively
from phase4_bitnet import BitLinear, build_model, convert_model_to_bitnet
from phase4_bitnet.export import export_onnx, export_torch

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def features():
    return torch.randn(3, 20, generator=torch.Generator().manual_seed(1))


def tokens(rows=2, length=12):
    return torch.randint(50, (rows, length), generator=torch.Generator().manual_seed(1))


def images():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def sequential(**options):
    """Biases and norms, hidden widths that fill no byte."""
    net = nn.Sequential(nn.Linear(20, 33), nn.GELU(), nn.Linear(33, 18), nn.Tanh(), nn.Linear(18, 4))
    return convert_model_to_bitnet(net, **options)


def convolutional():
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1, stride=2), nn.Flatten())
    return convert_model_to_bitnet(net.append(nn.Linear(54, 8)).append(nn.Linear(8, 2)), convolutions=True)


DECODER = {"vocab_size": 50, "dim": 16, "layers": 1, "heads": 2, "max_length": 24}
# Every kind of ternary layer, and every reference architecture.
CASES = {
    "mlp": (lambda: build_model("mlp", in_features=20, hidden=(24,), num_outputs=3), features),
    "sequential": (sequential, features),
    "sequential, norm": (lambda: sequential(norm=True), features),
    "sequential, float activations": (lambda: sequential(activation_bits=None), features),
    "sequential, one bit": (lambda: sequential(weight_bits=1), features),
    "convolutions": (convolutional, images),
    "embedding": (
        lambda: convert_model_to_bitnet(
            nn.Sequential(nn.Embedding(50, 10), nn.Linear(10, 12), nn.Linear(12, 50)), embeddings=True
        ),
        tokens,
    ),
    "llama": (lambda: build_model("llama", **DECODER), tokens),
    "decoder": (lambda: build_model("decoder", **DECODER), tokens),
    "decoder of classes": (lambda: build_model("decoder", num_classes=5, pad_id=0, **DECODER), tokens),
}
cases = pytest.mark.parametrize("case", list(CASES))


def made(case):
    torch.manual_seed(0)
    make, sample = CASES[case]
    return lively(make()), sample()


def run_onnx(path, x):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"input": x.numpy()})[0])


@cases
def test_onnxruntime_computes_the_same(case, tmp_path):
    model, sample = made(case)
    report = export_onnx(model, tmp_path / "m.onnx", sample=sample)
    assert report.checked_with.startswith("onnxruntime")
    assert report.usual_difference < 1e-5
    # Other rows than were traced, one and many.
    for x in (sample[:1], sample.repeat(4, *[1] * (sample.dim() - 1)).flip(-1)):
        assert_close(model(x), run_onnx(tmp_path / "m.onnx", x))
    kinds = {node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node}
    assert ("MatMulInteger" in kinds) == (case != "sequential, float activations")


@cases
def test_a_program_of_torch_computes_the_same(case, tmp_path):
    model, sample = made(case)
    report = export_torch(model, tmp_path / "m.pt2", sample=sample)
    assert report.usual_difference < 1e-5
    program = torch.export.load(tmp_path / "m.pt2").module()
    for x in (sample[:1], sample.repeat(4, *[1] * (sample.dim() - 1)).flip(-1)):
        assert_close(model(x), program(x))


def test_any_length_of_text(tmp_path):
    model, sample = made("llama")
    export_onnx(model, tmp_path / "m.onnx", sample=sample)
    export_torch(model, tmp_path / "m.pt2", sample=sample)
    program = torch.export.load(tmp_path / "m.pt2").module()
    for length in (2, 7, 24):
        x = tokens(3, length)
        assert_close(model(x), run_onnx(tmp_path / "m.onnx", x))
        assert_close(model(x), program(x))


def test_rows_of_very_different_size_keep_a_scale_each(tmp_path):
    # onnxruntime joins MatMulInteger, scales and bias into one operator, which has one scale for all rows.
    model = lively(nn.Sequential(BitLinear(20, 30)))
    x = features() * torch.tensor([[1e-3], [1.0], [1e3]])
    export_onnx(model, tmp_path / "m.onnx", sample=x)
    torch.testing.assert_close(run_onnx(tmp_path / "m.onnx", x), model(x).detach(), rtol=1e-5, atol=1e-6)


def test_a_program_needs_no_package_of_ours(tmp_path):
    model, sample = made("sequential")
    export_torch(model, tmp_path / "m.pt2", sample=sample)
    torch.save(sample, tmp_path / "x.pt")
    script = (
        "import sys, torch\n"
        "out = torch.export.load('m.pt2').module()(torch.load('x.pt'))\n"
        "torch.save(out, 'y.pt')\n"
        "assert not [m for m in sys.modules if m.startswith('phase')]\n"
    )
    subprocess.run([sys.executable, "-I", "-c", script], cwd=tmp_path, check=True)
    assert_close(model(sample), torch.load(tmp_path / "y.pt"))


def test_files_hold_packed_codes_and_no_paths(tmp_path):
    torch.manual_seed(0)
    model = build_model("mlp", in_features=256, hidden=(1024, 1024), num_outputs=2)
    codes = 256 * 1024 + 1024 * 1024
    onnx_report = export_onnx(model, tmp_path / "m.onnx")
    torch_report = export_torch(model, tmp_path / "m.pt2")
    assert onnx_report.bytes < codes + 50_000
    assert torch_report.bytes < codes / 4 + 150_000
    texts = [(tmp_path / "m.onnx").read_bytes()]
    with zipfile.ZipFile(tmp_path / "m.pt2") as archive:
        texts += [archive.read(name) for name in archive.namelist()]
    for text in texts:
        assert b"site-packages" not in text
        assert b"portable.py" not in text


def test_a_model_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = lively(convert_model_to_bitnet(transformers.LlamaForCausalLM(config)))
    report = export_torch(model, tmp_path / "m.pt2", sample=tokens())
    assert report.usual_difference < 1e-5
    report = export_onnx(model, tmp_path / "m.onnx", sample=tokens())
    assert report.usual_difference < 1e-5
    x = tokens(3, 7)
    assert_close(model(x).logits, run_onnx(tmp_path / "m.onnx", x))


def test_the_model_is_left_alone(tmp_path):
    model = sequential().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    export_torch(model, tmp_path / "m.pt2", sample=features())
    assert all(m.training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="what a Sequential takes is not known; pass sample="):
        export_onnx(sequential(), tmp_path / "m.onnx")

    class Branches(nn.Sequential):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else -x)

    for export in (export_onnx, export_torch):
        with pytest.raises(ValueError, match="the model cannot be traced"):
            export(Branches(BitLinear(20, 4)), tmp_path / "m", sample=features())

    class Own(BitLinear):
        def forward(self, x):
            return super().forward(x) + 1

    with pytest.raises(ValueError, match=r"rows of 140000 weights.* up to 132104; use the format onnx"):
        export_torch(nn.Sequential(BitLinear(140_000, 1)), tmp_path / "m")

    with pytest.raises(ValueError, match="a Own with a forward of its own"):
        export_torch(nn.Sequential(Own(20, 4)), tmp_path / "m", sample=features())
    assert list(tmp_path.iterdir()) == []
