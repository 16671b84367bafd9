"""`forge export`: from a run on disk to files of other tools; and models of transformers that go in."""

import json

import pytest
import torch

from phase5_training import create_training_pipeline
from phase5_training.cli import main
from phase5_training.commands import evaluate, export, train
from phase5_training.errors import UsageError

pytestmark = pytest.mark.usefixtures("no_report")

SMALL = {
    "max_steps": 3, "learning_rate": 0.01, "use_amp": False, "compile": False, "device": "cpu",
    "progress": "quiet", "experiment_name": "run", "batch_size": 4, "max_length": 32,
}  # fmt: skip
OPTIONS = {"dim": 16, "layers": 1, "heads": 2}


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    return {**SMALL, "train_data_path": "text.txt"}


@pytest.fixture
def run(text):
    return train(None, {**text, "model": "llama", "model_options": OPTIONS}).run_dir


class TestExport:
    @pytest.mark.parametrize(
        ("words", "file"),
        [
            (["huggingface", "--linear-class", "bitlinear"], "huggingface"),
            (["onnx"], "model.onnx"),
            (["torch"], "model.pt2"),
            (["gguf", "--tensor-type", "F16"], "model.gguf"),
        ],
    )
    def test_every_format_from_the_command_line(self, run, words, file, capsys):
        assert main(["export", str(run), "--format", *words]) == 0
        written, checked, *_ = capsys.readouterr().out.splitlines()
        assert written.startswith(f"{run / 'export' / file}: ")
        assert "outputs differ from the model's by at most" in checked
        assert (run / "export" / file).exists()
        assert main(["export", str(run), "--format", *words]) == 2
        assert "give --overwrite" in capsys.readouterr().err

    def test_data_of_ones_own_and_place(self, run, tmp_path):
        (tmp_path / "other.txt").write_text("jumps over" * 50)
        report = export(str(run), "torch", str(tmp_path / "m.pt2"), data="other.txt")
        assert report.path == tmp_path / "m.pt2"
        with pytest.raises(UsageError, match="exists; give --overwrite, or another --output"):
            export(str(run), "torch", str(tmp_path / "m.pt2"))
        assert export(str(run), "torch", str(tmp_path / "m.pt2"), overwrite=True).largest_difference < 0.1

    def test_without_the_data_outputs_are_compared_on_random_input(self, run, tmp_path):
        (tmp_path / "text.txt").unlink()
        with pytest.warns(UserWarning, match="compared on random input"):
            assert export(str(run), "torch").usual_difference < 1e-5

    def test_a_model_of_features(self, task_files):
        train_path, val_path = task_files()
        options = {k: v for k, v in SMALL.items() if k != "max_length"}
        run = train(None, {**options, "train_data_path": train_path, "val_data_path": val_path}).run_dir
        assert export(str(run), "onnx").usual_difference < 1e-5
        with pytest.raises(UsageError, match="MLP is no causal language model"):
            export(str(run), "huggingface")

    def test_refusals(self, run):
        with pytest.raises(UsageError, match="format 'ggfu' is unknown; did you mean 'gguf'"):
            export(str(run), "ggfu")
        with pytest.raises(UsageError, match="--linear-class belongs to --format huggingface"):
            export(str(run), "onnx", linear_class="bitlinear")
        with pytest.raises(UsageError, match=r"rows of 16 weights .* use --tensor-type 'F16'"):
            export(str(run), "gguf")
        with pytest.raises(UsageError, match="holds no run"):
            export("nowhere", "gguf")


class TestModelsOfTransformers:
    @pytest.fixture
    def folder(self, tmp_path):
        transformers = pytest.importorskip("transformers")
        config = transformers.LlamaConfig(
            vocab_size=256, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=64,
        )  # fmt: skip
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
        model.save_pretrained(tmp_path / "hf")
        return "hf"

    def test_a_folder_goes_in_and_comes_out(self, text, folder):
        run = train(None, {**text, "model": folder}).run_dir
        layers = json.loads((run / "result.json").read_text())["layers"]
        assert len(layers) == 7
        assert evaluate(str(run))["loss"] > 0
        report = export(str(run), "huggingface")
        assert report.usual_difference < 1e-5
        # What came out goes in again, ternary as it is.
        again = train(None, {**text, "model": str(report.path), "experiment_name": "again"}).run_dir
        assert len(json.loads((again / "result.json").read_text())["layers"]) == 7

    def test_an_object_goes_in(self, text, folder):
        transformers = pytest.importorskip("transformers")
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        named = {k: v for k, v in text.items() if k != "train_data_path"}
        result = create_training_pipeline(model, "text.txt", **named).run()
        assert result.success
        with pytest.raises(UsageError, match=r"export it in Python, with phase4_bitnet\.export"):
            export(str(result.run_dir), "huggingface")
