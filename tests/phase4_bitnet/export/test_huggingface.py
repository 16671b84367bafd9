"""Folders for transformers: bytes made by hand, transformers' own code as the judge, and the traps on the
way."""

import json
import struct

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from exported import assert_close, lively
from phase4_bitnet import BitLinear, build_model, convert_model_to_bitnet, save_compressed_model
from phase4_bitnet.export import export_huggingface, load_huggingface
from phase4_bitnet.export import huggingface as module
from phase4_bitnet.export.huggingface import pack_rows, unpack_rows
from phase4_bitnet.store import load_compressed_model
from phase4_bitnet.ternary import quantize_weight

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
TINY = {"vocab_size": 256, "dim": 16, "layers": 2, "heads": 2, "max_length": 64}
LLAMA = {
    "vocab_size": 256, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture(autouse=True)
def eager():
    """transformers compiles its rounding with torch.compile; what it computes is the same without."""
    with torch.compiler.set_stance("force_eager"):
        yield


def tiny(name="llama", **options):
    torch.manual_seed(0)
    return lively(build_model(name, **{**TINY, **options}))


def hf_llama(**options):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, **options}))


def tokens(rows=4, length=20):
    return torch.randint(256, (rows, length), generator=torch.Generator().manual_seed(3))


class TestPacking:
    ROWS = ([1, 0], [0, -1], [-1, 1], [1, 1], [1, 0], [1, -1], [-1, 0], [0, 1])
    CODES = torch.tensor(ROWS, dtype=torch.int8)
    # Byte r holds rows r, r + 2, r + 4, r + 6, as code + 1, two bits each, the first in the lowest.
    GOLDEN = bytes([0b00_10_00_10, 0b01_01_10_01, 0b01_10_10_01, 0b10_00_10_00])

    def test_golden_bytes(self):
        packed = pack_rows(self.CODES)
        assert packed.shape == (2, 2)
        assert packed.numpy().tobytes() == self.GOLDEN
        assert torch.equal(unpack_rows(packed), self.CODES)

    def test_is_what_transformers_packs_and_unpacks(self):
        from transformers.integrations import bitnet

        codes = torch.randint(-1, 2, (24, 7), generator=torch.Generator().manual_seed(0)).to(torch.int8)
        assert torch.equal(pack_rows(codes), bitnet.pack_weights(codes.float().clone()))
        assert torch.equal(bitnet.unpack_weights(pack_rows(codes), torch.float32), codes.float())


class TestExport:
    @pytest.mark.parametrize("name", ["llama", "decoder"])
    @pytest.mark.parametrize("tied", [True, False])
    @pytest.mark.parametrize("linear_class", ["autobitlinear", "bitlinear"])
    def test_transformers_computes_the_same(self, name, tied, linear_class, tmp_path):
        model = tiny(name, tie_embeddings=tied)
        report = export_huggingface(model, tmp_path / "m", linear_class=linear_class)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
        assert type(loaded).__name__ == {"llama": "LlamaForCausalLM", "decoder": "BitNetForCausalLM"}[name]
        assert_close(model(tokens()), loaded(tokens()).logits.detach())
        assert report.usual_difference < 1e-5
        assert report.bytes == sum(p.stat().st_size for p in (tmp_path / "m").iterdir())

    def test_float_layers_too_when_nothing_is_ternary(self, tmp_path):
        model = tiny(ternary=False)
        report = export_huggingface(model, tmp_path / "m")
        assert "quantization_config" not in json.loads((tmp_path / "m" / "config.json").read_text())
        assert report.largest_difference < 1e-5

    def test_the_tokenizer_is_bytes(self, tmp_path):
        export_huggingface(tiny(), tmp_path / "m")
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
        text = "def f(x):\n\treturn 'é – 日本' \0\x7f"
        assert tokenizer(text)["input_ids"] == list(text.encode())
        assert tokenizer.decode(list(text.encode())) == text

    def test_another_tokenizer_is_put_beside(self, tmp_path):
        (tmp_path / "t.json").write_text('{"model": 1}')
        export_huggingface(tiny(vocab_size=300), tmp_path / "a")
        assert not (tmp_path / "a" / "tokenizer.json").exists()
        export_huggingface(tiny(vocab_size=300), tmp_path / "b", tokenizer=tmp_path / "t.json")
        assert (tmp_path / "b" / "tokenizer.json").read_text() == '{"model": 1}'

    @pytest.mark.parametrize("norm", [True, False])
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("linear_class", ["autobitlinear", "bitlinear"])
    def test_a_model_of_transformers_comes_out_as_it_is(self, norm, bias, linear_class, tmp_path):
        model = lively(convert_model_to_bitnet(hf_llama(attention_bias=bias), norm=norm))
        export_huggingface(model, tmp_path / "m", linear_class=linear_class)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
        assert_close(model(tokens()).logits.detach(), loaded(tokens()).logits.detach())

    def test_an_existing_folder_is_kept(self, tmp_path):
        export_huggingface(tiny(), tmp_path / "m")
        with pytest.raises(FileExistsError, match="overwrite=True"):
            export_huggingface(tiny(), tmp_path / "m")
        export_huggingface(tiny(dim=32), tmp_path / "m", overwrite=True)
        assert json.loads((tmp_path / "m" / "config.json").read_text())["hidden_size"] == 32

    def test_a_file_that_transformers_reads_otherwise_is_an_error(self, tmp_path, monkeypatch):
        monkeypatch.setattr(module, "pack_rows", lambda codes: pack_rows(-codes))
        with pytest.raises(ValueError, match="has other codes or another scale"):
            export_huggingface(tiny(), tmp_path / "m")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: tiny(num_classes=3), "has a head for classes"),
            (lambda: nn.Sequential(nn.Linear(2, 2)), "no causal language model"),
            (lambda: tiny(activation_bits=None), "float activations"),
            (lambda: tiny(dim=18, heads=1), "18 rows of codes do not fill bytes of 4"),
        ],
    )
    def test_refusals(self, make, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            export_huggingface(make(), tmp_path / "m")
        assert not (tmp_path / "m").exists()

    def test_a_class_that_is_none(self, tmp_path):
        with pytest.raises(ValueError, match="linear_class='auto' is not known; use one of autobitlinear"):
            export_huggingface(tiny(), tmp_path / "m", linear_class="auto")


class TestTraps:
    """What other exporters got wrong."""

    def stored(self, path, name):
        """The bytes of a tensor, taken from the file by its format and without a library."""
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        start, end = json.loads(data[8 : 8 + length])[name]["data_offsets"]
        return data[8 + length + start : 8 + length + end]

    @pytest.mark.parametrize(
        ("linear_class", "golden"),
        [
            ("autobitlinear", b"\x00\x00\x80\x3e"),  # 0.25, by which it multiplies
            ("bitlinear", b"\x00\x00\x80\x40"),  # 4.0, by which it divides
        ],
    )
    def test_weight_scale_is_what_the_class_takes_it_for(self, linear_class, golden, tmp_path):
        model = tiny()
        with torch.no_grad():
            model.layers[0].mlp.down_proj.weight.fill_(0.25)
        export_huggingface(model, tmp_path / "m", linear_class=linear_class)
        name = "model.layers.0.mlp.down_proj"
        assert self.stored(tmp_path / "m" / "model.safetensors", f"{name}.weight_scale") == golden
        # 16 rows of 48 codes 1: four rows a byte, each code stored as 2.
        assert self.stored(tmp_path / "m" / "model.safetensors", f"{name}.weight") == b"\xaa" * (4 * 48)
        config = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
        assert (config["quant_method"], config["linear_class"]) == ("bitnet", linear_class)

    def test_a_file_without_a_class_is_read_as_transformers_reads_it(self, tmp_path):
        model = tiny()
        export_huggingface(model, tmp_path / "m", linear_class="bitlinear")
        path = tmp_path / "m" / "config.json"
        config = json.loads(path.read_text())
        del config["quantization_config"]["linear_class"]
        path.write_text(json.dumps(config))
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
        assert type(loaded.model.layers[0].mlp.up_proj).__name__ == "BitLinear"
        ours = load_huggingface(tmp_path / "m").eval()
        assert_close(loaded(tokens()).logits.detach(), ours(tokens()).logits.detach())

    def test_the_class_is_spelled_as_transformers_spells_it(self, tmp_path):
        export_huggingface(tiny("decoder"), tmp_path / "m")
        assert b'"BitNetForCausalLM"' in (tmp_path / "m" / "config.json").read_bytes()
        assert hasattr(transformers, "BitNetForCausalLM")
        assert not hasattr(transformers, "BitnetForCausalLM")

    def test_codes_and_scale_are_never_quantized_again(self, tmp_path):
        model = tiny()
        layer = model.layers[1].mlp.down_proj
        codes, scale = quantize_weight(layer.weight)
        again = quantize_weight(codes * scale)[1]
        assert float(again) < 0.9 * float(scale)  # the trap: absmean is not idempotent
        # The file without latents is the one that tempts to it.
        save_compressed_model(model, tmp_path / "s", latents=False)
        export_huggingface(load_compressed_model(tmp_path / "s"), tmp_path / "m")
        tensors = safetensors.torch.load_file(tmp_path / "m" / "model.safetensors")
        name = "model.layers.1.mlp.down_proj"
        assert torch.equal(unpack_rows(tensors[f"{name}.weight"]), codes)
        assert float(tensors[f"{name}.weight_scale"]) == float(scale)

    def test_the_scale_survives_float16(self, tmp_path):
        export_huggingface(tiny(), tmp_path / "m")
        scales = {
            k: float(v)
            for k, v in safetensors.torch.load_file(tmp_path / "m" / "model.safetensors").items()
            if k.endswith("scale")
        }
        assert len(scales) == 14
        assert all(float(np.float16(s)) == s for s in scales.values())


class TestLoad:
    @pytest.mark.parametrize("linear_class", ["autobitlinear", "bitlinear"])
    @pytest.mark.parametrize("name", ["llama", "decoder"])
    def test_what_was_exported_comes_back_and_trains(self, linear_class, name, tmp_path):
        model = tiny(name)
        export_huggingface(model, tmp_path / "m", linear_class=linear_class)
        back = load_huggingface(tmp_path / "m")
        assert back.training
        assert_close(model(tokens()), back(tokens()).logits.detach())
        layer = back.model.layers[0].self_attn.o_proj
        codes, scale = quantize_weight(model.layers[0].self_attn.o_proj.weight)
        assert type(layer) is BitLinear
        assert torch.equal(layer.codes, codes)
        assert float(layer.scale) == float(scale)
        # The latents quantize to the same codes: the first step starts from this very function.
        layer.requantize_()
        assert torch.equal(layer.codes, codes)
        assert float(layer.scale) == float(scale)
        back(tokens()).logits.sum().backward()
        assert float(layer.weight.grad.abs().max()) > 0

    @pytest.mark.parametrize("options", [{"attention_bias": True}, {"tie_word_embeddings": True}])
    def test_biases_norms_and_ties_come_back(self, options, tmp_path):
        model = lively(convert_model_to_bitnet(hf_llama(**options), norm=True))
        export_huggingface(model, tmp_path / "m")
        back = load_huggingface(tmp_path / "m").eval()
        assert back.model.layers[0].mlp.up_proj.norm
        assert_close(model(tokens()).logits.detach(), back(tokens()).logits.detach())

    def test_float_weights_stay_float(self, tmp_path):
        model = lively(hf_llama())
        model.save_pretrained(tmp_path / "m")
        back = load_huggingface(tmp_path / "m").eval()
        assert not any(isinstance(m, BitLinear) for m in back.modules())
        assert torch.equal(back(tokens()).logits, model(tokens()).logits)

    def test_latents_of_an_online_model_are_made_ternary(self, tmp_path):
        model = lively(hf_llama())
        model.save_pretrained(tmp_path / "m")
        path = tmp_path / "m" / "config.json"
        online = {
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": "online",
        }
        config = json.loads(path.read_text()) | {"quantization_config": online}
        path.write_text(json.dumps(config))
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
        ours = load_huggingface(tmp_path / "m").eval()
        # Ours has the scale in the precision of float16: 2**-11 of it at most.
        difference = (ours(tokens()).logits - theirs(tokens()).logits).abs().median()
        assert float(difference) < 0.01 * float(theirs(tokens()).logits.abs().max())

    def test_refusals(self, tmp_path):
        with pytest.raises(ValueError, match=r"config\.json: cannot be read"):
            load_huggingface(tmp_path)
        config = {"architectures": ["LlamaForCausalLM"], "quantization_config": {"quant_method": "gptq"}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="quantized by 'gptq'"):
            load_huggingface(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LamaForCausalLM"]}))
        with pytest.raises(ValueError, match="is no class of transformers"):
            load_huggingface(tmp_path)

    def test_files_of_another_model_are_refused(self, tmp_path):
        export_huggingface(tiny(), tmp_path / "a")
        export_huggingface(tiny(layers=1), tmp_path / "b")
        (tmp_path / "a" / "config.json").rename(tmp_path / "b" / "config.json")
        with pytest.raises(ValueError, match="does not fit its config"):
            load_huggingface(tmp_path / "b")
