"""GGUF files: blocks made by hand, the gguf library's reader, and llama.cpp itself."""

import gguf
import numpy as np
import pytest
import torch
from torch import nn

from exported import lively
from phase4_bitnet import build_model, convert_model_to_bitnet
from phase4_bitnet.export import export_gguf
from phase4_bitnet.export import gguf as module
from phase4_bitnet.export.byte_tokenizer import byte_characters
from phase4_bitnet.export.gguf import blocks_of
from phase4_bitnet.export.llama_engine import LlamaEngine, log_probabilities_apart
from phase4_bitnet.ternary import quantize_weight

SMALL = {"vocab_size": 256, "dim": 256, "layers": 2, "heads": 4, "mlp_ratio": 2, "max_length": 128}


def small(**options):
    torch.manual_seed(0)
    return lively(build_model("llama", **{**SMALL, **options}), weights=0.05)


def hf_llama(kind="LlamaForCausalLM", **options):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        **options,
    )  # fmt: skip
    return convert_model_to_bitnet(getattr(transformers, kind)(config), norm=False)


def tensors(path):
    return {t.name: t for t in gguf.GGUFReader(str(path)).tensors}


class TestBlocks:
    # One row of 256 codes: 1 at place 0, -1 at 32, 1 at 64, 0 at 96, -1 at 128, 1 at 255, 0 elsewhere.
    CODES = np.zeros((1, 256), dtype=np.int8)
    CODES[0, [0, 32, 64, 96, 128, 255]] = 1, -1, 1, 0, -1, 1

    def test_golden_bytes_of_tq2_0(self):
        # Code 0 is stored as 1: a byte of zeros is 0b01010101. Byte 0 holds places 0, 32, 64, 96; byte 32
        # places 128, 160, 192, 224; byte 63 places 159, 191, 223, 255.
        golden = bytearray(b"\x55" * 64)
        golden[0] = 0b01_10_00_10
        golden[32] = 0b01_01_01_00
        golden[63] = 0b10_01_01_01
        assert blocks_of(self.CODES, 0.5, "TQ2_0").tobytes() == bytes(golden) + b"\x00\x38"  # 0.5 in float16

    def test_golden_bytes_of_tq1_0(self):
        # Five zeros are the digits 11111 in base 3, 121, stored as ceil(121 * 256 / 243) = 128; four and a
        # last digit 0 are 120, stored as 127. Byte 0 holds places 0, 32, 64, 96, 128: digits 2 0 2 1 0 =
        # 2 * 81 + 2 * 9 + 3 = 183, stored as ceil(183 * 256 / 243) = 193. Byte 51 holds places 243, 247, 251,
        # 255: digits 1 1 1 2 and 0 = 81 + 27 + 9 + 6 = 123, stored as ceil(123 * 256 / 243) = 130.
        golden = bytearray(b"\x80" * 48 + b"\x7f" * 4)
        golden[0], golden[51] = 193, 130
        assert blocks_of(self.CODES, 0.5, "TQ1_0").tobytes() == bytes(golden) + b"\x00\x38"

    @pytest.mark.parametrize("kind", ["TQ2_0", "TQ1_0"])
    @pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
    def test_the_library_reads_codes_times_scale(self, kind, share):
        rng = np.random.default_rng(0)
        codes = rng.choice([-1, 0, 1], (5, 768), p=[share / 2, 1 - share, share / 2]).astype(np.int8)
        scale = float(np.float16(0.01234))
        blocks, kind = blocks_of(codes, scale, kind), gguf.GGMLQuantizationType[kind]
        weight = codes.astype(np.float32) * np.float32(scale)
        assert np.array_equal(gguf.dequantize(blocks, kind), weight)
        if share:  # a block without a code keeps its scale here, and loses it in the library
            assert np.array_equal(gguf.quantize(weight, kind), blocks)

    def test_a_file_that_llama_cpp_gives_up_on_is_an_error_and_no_crash(self, tmp_path):
        (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(100))
        with pytest.raises(ValueError, match=r"llama\.cpp cannot run it"):
            log_probabilities_apart(tmp_path / "m.gguf", [[1, 2]], 256)


class TestExport:
    @pytest.mark.parametrize("kind", ["TQ2_0", "TQ1_0", "F16"])
    def test_llama_cpp_computes_nearly_the_same(self, kind, tmp_path):
        model = small()
        sample = torch.randint(256, (4, 40), generator=torch.Generator().manual_seed(1))
        report = export_gguf(model, tmp_path / "m.gguf", tensor_type=kind, sample=sample)
        assert report.checked_with.startswith("xllamacpp")
        # Activations are rounded in other groups: an error of the kind that int8 makes anyway.
        assert report.largest_difference < 0.02 * report.largest_output
        assert report.bytes < {"TQ2_0": 0.16, "TQ1_0": 0.15, "F16": 0.56}[kind] * report.float_bytes

    @pytest.mark.parametrize("kind", ["TQ2_0", "TQ1_0", "F16"])
    def test_every_tensor_is_codes_times_scale(self, kind, tmp_path):
        model = small()
        export_gguf(model, tmp_path / "m.gguf", tensor_type=kind)
        stored = tensors(tmp_path / "m.gguf")
        assert len(stored) == 3 + 2 * 9
        for i, block in enumerate(model.layers):
            codes, scale = quantize_weight(block.self_attn.qkv_proj.weight)
            whole = (codes * scale).numpy()
            gate_up, scale_up = quantize_weight(block.mlp.gate_up_proj.weight)
            down, scale_down = quantize_weight(block.mlp.down_proj.weight)
            wanted = {
                "attn_v": whole[512:],
                "ffn_gate": (gate_up[:512] * scale_up).numpy(),
                "ffn_up": (gate_up[512:] * scale_up).numpy(),
                "ffn_down": (down * scale_down).numpy(),
            }
            for name, part in (("attn_q", whole[:256]), ("attn_k", whole[256:512])):
                # Row 2 i of a head is the first of its pair, row i of the halves; 2 i + 1 the second.
                rows = [
                    head * 64 + half * 32 + i for head in range(4) for i in range(32) for half in range(2)
                ]
                wanted[name] = part[rows]
            for name, value in wanted.items():
                tensor = stored[f"blk.{i}.{name}.weight"]
                assert tensor.tensor_type.name == kind
                got = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(value.shape)
                assert np.array_equal(got, value), name

    def test_tied_embeddings_and_another_base(self, tmp_path):
        model = small(tie_embeddings=True, rope_base=500.0, norm_eps=1e-3)
        report = export_gguf(model, tmp_path / "m.gguf")
        assert "output.weight" not in tensors(tmp_path / "m.gguf")
        assert report.largest_difference < 0.03 * report.largest_output

    def test_a_llama_of_transformers(self, tmp_path):
        transformers = pytest.importorskip("transformers")
        config = transformers.LlamaConfig(
            vocab_size=256, hidden_size=256, intermediate_size=512, num_hidden_layers=1,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        )  # fmt: skip
        torch.manual_seed(0)
        model = lively(
            convert_model_to_bitnet(transformers.LlamaForCausalLM(config), norm=False), weights=0.05
        )
        report = export_gguf(model, tmp_path / "m.gguf")
        assert report.largest_difference < 0.03 * report.largest_output

    def test_bytes_are_its_vocabulary(self, tmp_path):
        model = small()
        export_gguf(model, tmp_path / "m.gguf")
        engine = LlamaEngine(tmp_path / "m.gguf", length=64)
        text = "def f(x):\n\treturn 'é – 日本'"
        assert engine.log_probabilities(text, 256) == engine.log_probabilities(text.encode(), 256)
        assert len(set(byte_characters())) == 256
        ours = model(torch.tensor([list(text.encode())]))[0, -1].detach().log_softmax(-1)
        theirs = torch.tensor(engine.log_probabilities(text, 256))
        assert float((ours - theirs).abs().max()) < 0.3

    def test_another_vocabulary_is_left_out(self, tmp_path):
        report = export_gguf(small(vocab_size=300, layers=1), tmp_path / "m.gguf")
        assert "no vocabulary" in report.notes[0]

    def test_a_file_that_reads_back_otherwise_is_no_file(self, tmp_path, monkeypatch):
        monkeypatch.setitem(module._BLOCKS, "TQ2_0", lambda codes: module._tq2_0(-codes))
        with pytest.raises(ValueError, match="read back is not what was written"):
            export_gguf(small(), tmp_path / "m.gguf")
        assert list(tmp_path.iterdir()) == []

    def test_an_existing_file_is_kept(self, tmp_path):
        (tmp_path / "m.gguf").write_text("mine")
        with pytest.raises(FileExistsError, match="overwrite=True"):
            export_gguf(small(), tmp_path / "m.gguf")
        assert (tmp_path / "m.gguf").read_text() == "mine"

    def test_rows_that_are_not_whole_blocks(self, tmp_path):
        model = small(mlp_ratio=1.5)
        with pytest.raises(
            ValueError, match="rows of 384 weights are not made of TQ2_0's blocks of 256; use tens"
        ):
            export_gguf(model, tmp_path / "m.gguf")
        report = export_gguf(model, tmp_path / "m.gguf", tensor_type="F16")
        assert report.largest_difference < 0.03 * report.largest_output

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: build_model("decoder", vocab_size=256, dim=256), "architecture='llama'"),
            (lambda: hf_llama(hidden_act="gelu"), "hidden_act='gelu'"),
            (
                lambda: hf_llama("LlamaForSequenceClassification"),
                r"a LlamaForSequenceClassification has another head .*use a LlamaForCausalLM",
            ),
            (lambda: small(num_classes=2), "has a head for classes"),
            (lambda: nn.Linear(2, 2), "no causal language model"),
        ],
    )
    def test_refusals(self, make, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            export_gguf(make(), tmp_path / "m.gguf")

    def test_layers_that_normalize_are_refused(self, tmp_path):
        transformers = pytest.importorskip("transformers")
        config = transformers.LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        )
        model = convert_model_to_bitnet(transformers.LlamaForCausalLM(config))
        with pytest.raises(ValueError, match=r"convert_model_to_bitnet\(model, norm=False\)"):
            export_gguf(model, tmp_path / "m.gguf", tensor_type="F16")

    def test_a_type_that_is_none(self, tmp_path):
        with pytest.raises(ValueError, match="tensor_type='Q4_0' is not known; use one of TQ2_0"):
            export_gguf(small(), tmp_path / "m.gguf", tensor_type="Q4_0")
