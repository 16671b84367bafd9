"""What the verbs do: train, resume, evaluate, and the runs they refuse."""

import json

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from phase5_training.checkpoint import CheckpointError
from phase5_training.commands import evaluate, open_run, resume, train
from phase5_training.errors import ForgeError, UsageError

pytestmark = pytest.mark.usefixtures("no_report")

SMALL = {
    "model": "mlp", "model_options": {"hidden": [16, 16]}, "epochs": 3, "learning_rate": 0.01,
    "use_amp": False, "compile": False, "device": "cpu", "progress": "quiet", "experiment_name": "run",
}  # fmt: skip


@pytest.fixture
def wine(task_files):
    train_path, val_path = task_files()
    return {**SMALL, "train_data_path": train_path, "val_data_path": val_path}


def final(run):
    metrics = json.loads((run / "result.json").read_text())["metrics"]
    return {k.removeprefix("final_"): v for k, v in metrics.items() if k in ("final_loss", "final_accuracy")}


class TestTrain:
    def test_yaml_flags_or_both(self, wine, tmp_path, weights, assert_same):
        (tmp_path / "run.yaml").write_text(yaml.safe_dump({**wine, "seed": 3}))
        by_yaml = train("run.yaml", {})
        by_both = train("run.yaml", {"experiment_name": "both", "epochs": 1})
        by_flags = train(None, {**wine, "seed": 3, "experiment_name": "flags"})
        assert (by_yaml.metrics["steps"], by_both.metrics["steps"]) == (15, 5)
        assert_same(weights(by_yaml.run_dir), weights(by_flags.run_dir))

    def test_a_bad_key_names_the_file(self, tmp_path):
        (tmp_path / "run.yaml").write_text("batchsize: 3\n")
        with pytest.raises(UsageError, match=r"^run\.yaml: unknown option 'batchsize'; did you mean"):
            train("run.yaml", {})

    def test_the_recorded_configuration_can_be_fed_back(self, wine, weights, assert_same):
        first = train(None, wine).run_dir
        second = train(str(first / "config.yaml"), {"experiment_name": "second"}).run_dir
        assert_same(weights(first), weights(second))
        configs = [yaml.safe_load((run / "config.yaml").read_text()) for run in (first, second)]
        assert {k for k in configs[0] if configs[0][k] != configs[1][k]} == {"experiment_name"}


class TestEvaluate:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"val_data_path": None, "validation_split": 0.3},
            {"use_amp": True},
            {"quantization_mode": "stochastic", "learning_rate": 0.3, "eval_interval": 2, "epochs": 6},
            {"label_smoothing": 0.1, "quantization_penalty": 0.01},
            {"use_bitnet": False},
            {"loss": "cross_entropy"},
        ],
    )
    def test_figures_are_those_of_the_run(self, wine, options):
        run = train(None, {**wine, **options}).run_dir
        figures = evaluate(str(run))
        assert {k: figures[k] for k in ("loss", "accuracy")} == final(run)

    def test_regression_and_text(self, task_files, tmp_path):
        train_path, val_path = task_files("diabetes")
        run = train(None, {**SMALL, "train_data_path": train_path, "val_data_path": val_path}).run_dir
        assert evaluate(str(run))["loss"] == final(run)["loss"]
        (tmp_path / "text.txt").write_text("abcdefgh" * 300)
        options = {"train_data_path": "text.txt", "model": "decoder", "experiment_name": "text", "epochs": 1}
        options |= {"model_options": {"dim": 16, "layers": 1, "heads": 2}, "max_length": 32}
        run = train(None, {**SMALL, **options}).run_dir
        figures = evaluate(str(run))
        assert figures["loss"] == final(run)["loss"]
        assert figures["bits_per_byte"] == pytest.approx(figures["loss"] / np.log(2), rel=1e-5)

    def test_other_data_are_measured_whole(self, wine, tmp_path):
        """Also where the run held out a share of its training data: the file given is not split."""
        run = train(None, {**wine, "val_data_path": None, "validation_split": 0.2}).run_dir
        figures = evaluate(str(run), wine["val_data_path"])
        assert figures["samples"] == 36
        with np.load(wine["val_data_path"]) as file:
            np.savez(tmp_path / "half.npz", inputs=file["inputs"][:18], targets=file["targets"][:18])
            np.savez(tmp_path / "rest.npz", inputs=file["inputs"][18:], targets=file["targets"][18:])
        halves = [evaluate(str(run), name) for name in ("half.npz", "rest.npz")]
        assert figures["accuracy"] == pytest.approx(sum(h["accuracy"] for h in halves) / 2)
        assert evaluate(str(run), ["half.npz", "rest.npz"])["loss"] == pytest.approx(figures["loss"])

    def test_classes_are_numbered_as_in_training(self, tmp_path):
        """A file with the last class only would number it 0 by itself."""
        names = ["ape", "bee", "cat"]
        for file in ("all", *names):
            samples = [
                {"input": [float(name == other) for other in names], "target": name}
                for name in (names if file == "all" else [file])
                for _ in range(20)
            ]
            (tmp_path / f"{file}.json").write_text(json.dumps({"samples": samples}))
        options = {"train_data_path": "all.json", "epochs": 100, "schedule": "constant", "optimizer": "adamw"}
        run = train(None, {**SMALL, **options}).run_dir
        assert [evaluate(str(run), f"{file}.json")["accuracy"] for file in ("all", *names)] == [1.0] * 4

    def test_multi_task_takes_the_learned_weights(self, tmp_path, monkeypatch):
        (tmp_path / "two_heads.py").write_text(
            "from torch import nn\n"
            "class Two(nn.Module):\n"
            "    def __init__(self):\n"
            "        super().__init__()\n"
            "        self.body, self.act = nn.Linear(4, 8), nn.ReLU()\n"
            "        self.deep, self.head = nn.Linear(8, 8), nn.Linear(8, 3)\n"
            "    def forward(self, x):\n"
            "        y = self.head(self.act(self.deep(self.act(self.body(x)))))\n"
            "        return {'sign': y[:, :2], 'sum': y[:, 2:]}\n"
        )
        monkeypatch.syspath_prepend(str(tmp_path))
        g = np.random.default_rng(0).normal(size=(60, 4))
        samples = [{"input": x.tolist(), "target": {"sign": int(x[0] > 0), "sum": x.sum()}} for x in g]
        (tmp_path / "multi.json").write_text(json.dumps({"samples": samples}))
        options = {"model": "two_heads:Two", "model_options": {}, "train_data_path": "multi.json"}
        run = train(None, {**SMALL, **options, "eval_interval": 2, "epochs": 8}).run_dir
        learned = json.loads((run / "result.json").read_text())["loss"]["learned"]["log_variances"]
        assert all(abs(w) > 1e-4 for w in learned)
        assert evaluate(str(run))["loss"] == final(run)["loss"]

    def test_unfinished_or_without_validation_data(self, wine, pipeline):
        run = pipeline(nn.Sequential(nn.Linear(13, 8), nn.Linear(8, 3)), wine["train_data_path"]).setup()
        with pytest.raises(UsageError, match="has no finished model; continue it with `forge resume"):
            evaluate(str(run.run_directory.path))
        options = {"val_data_path": None, "validation_split": 0, "experiment_name": "none"}
        run = train(None, {**wine, **options}).run_dir
        with pytest.raises(UsageError, match="trained without validation data; give --data FILE"):
            evaluate(str(run))
        assert evaluate(str(run), wine["val_data_path"])["samples"] == 36

    def test_data_that_do_not_fit(self, wine, tmp_path):
        run = str(train(None, wine).run_dir)
        np.savez(tmp_path / "wide.npz", inputs=np.zeros((4, 5), np.float32), targets=np.zeros(4, int))
        np.savez(tmp_path / "more.npz", inputs=np.zeros((4, 13), np.float32), targets=np.full(4, 7))
        with pytest.raises(ForgeError, match=r"wide\.npz"):
            evaluate(run, "wide.npz")
        with pytest.raises(UsageError, match="labels go from 7 to 7 and the model has 3 outputs"):
            evaluate(run, "more.npz")

    def test_runs_of_python_programs(self, wine, pipeline):
        """What a file holds is used; what it does not hold is named."""
        arrays = torch.utils.data.TensorDataset(torch.randn(40, 13), torch.arange(40) % 3)
        from phase4_bitnet import build_model

        model = build_model("mlp", in_features=13, hidden=(8, 8), num_outputs=3)
        run = (
            pipeline(model, wine["train_data_path"], wine["val_data_path"], experiment_name="a").run().run_dir
        )
        assert evaluate(str(run))["loss"] == final(run)["loss"]
        run = pipeline("mlp", arrays, experiment_name="b").run().run_dir
        with pytest.raises(
            UsageError, match=r"its own train_data_path \(<TensorDataset>\).*give --data FILE"
        ):
            evaluate(str(run))
        assert evaluate(str(run), wine["val_data_path"])["samples"] == 36
        foreign = nn.Sequential(nn.Linear(13, 8), nn.ReLU(), nn.Linear(8, 3))
        run = pipeline(foreign, wine["train_data_path"], experiment_name="c").run().run_dir
        with pytest.raises(UsageError, match="no reference architecture"):
            evaluate(str(run))
        own = lambda outputs, targets: nn.functional.cross_entropy(outputs, targets)  # noqa: E731
        run = pipeline("mlp", wine["train_data_path"], loss=own, experiment_name="d").run().run_dir
        with pytest.raises(UsageError, match=r"its own loss .*which no file holds"):
            evaluate(str(run))

    def test_a_damaged_model(self, wine):
        run = train(None, wine).run_dir
        (run / "best" / "weights.safetensors").write_bytes(b"\0" * 64)
        with pytest.raises(UsageError, match="does not match its SHA-256"):
            evaluate(str(run))


class TestResume:
    def stopped(self, wine, pipeline, step=7, **options):
        values = {**wine, **options}
        named = [values.pop(k) for k in ("model", "train_data_path", "val_data_path")]
        run = pipeline(*named, **values)
        run.register_callback("step_end", lambda at, metrics: run.loop.stop() if at == step else None)
        return run.run().run_dir

    def test_ends_with_the_weights_of_a_run_that_was_not_stopped(self, wine, pipeline, weights, assert_same):
        whole = train(None, {**wine, "experiment_name": "whole"}).run_dir
        part = self.stopped(wine, pipeline)
        result = resume(str(part), {"progress": "quiet"})
        assert result.success
        assert_same(weights(whole), weights(part))

    def test_a_moved_folder(self, wine, pipeline, runs):
        part = self.stopped(wine, pipeline)
        moved = part.rename(runs / "moved")
        assert resume(str(moved), {}).run_dir.resolve() == moved.resolve()

    def test_a_complete_run_goes_on_only_when_told_to(self, wine):
        run = str(train(None, wine).run_dir)
        for overrides in ({}, {"progress": "quiet"}, {"num_workers": 0}):
            with pytest.raises(
                UsageError, match=r"is complete at step 15 \(finished\); give --epochs or --max"
            ):
                resume(run, overrides)
        result = resume(run, {"epochs": 5})
        assert (result.metrics["steps"], result.metrics["epochs_completed"]) == (25, 5)

    def test_a_run_that_stopped_early_goes_on_with_more_patience(self, wine):
        options = {
            "learning_rate": 0.5,
            "schedule": "constant",
            "eval_interval": 1,
            "patience": 2,
            "epochs": 50,
        }
        first = train(None, {**wine, **options})
        assert first.stop_reason == "early_stop"
        for overrides in ({}, {"epochs": 60}):  # more epochs change nothing for it
            with pytest.raises(UsageError, match="give --patience to go on"):
                resume(str(first.run_dir), overrides)
        again = resume(str(first.run_dir), {"patience": 4})
        assert again.metrics["steps"] > first.metrics["steps"]

    def test_from_a_checkpoint_that_is_named(self, wine, runs, weights, assert_same):
        whole = train(None, {**wine, "checkpoint_interval": 6})
        before, checkpoints = weights(whole.run_dir), whole.run_dir / "checkpoints"
        with pytest.warns(
            UserWarning, match="step-00000015 was passed over; resumed from step-00000012 instead"
        ):
            again = resume(str(checkpoints / "step-00000012"), {})
        assert again.metrics["steps"] == 15
        assert_same(before, weights(again.run_dir))
        names = sorted(p.name for p in checkpoints.iterdir())
        assert names == ["step-00000012", "step-00000015", "superseded-step-00000015"]
        assert json.loads((runs / "run" / "events.jsonl").read_text().splitlines()[-1])["event"] == "fit_end"

    def test_one_that_is_named_and_does_not_verify_is_an_error(self, wine, runs):
        train(None, {**wine, "checkpoint_interval": 6})
        newest = runs / "run" / "checkpoints" / "step-00000015"
        (newest / "state.json").write_bytes(b"{}")
        with pytest.raises(CheckpointError, match=r"step-00000015/state.json does not match its hash"):
            resume(str(newest), {})
        missing = newest.with_name("step-00000099")
        with pytest.raises(
            CheckpointError, match=r"is no checkpoint of this run; it has step-00000012, step"
        ):
            resume(str(missing), {})
        assert newest.is_dir()
        with pytest.raises(UsageError, match="is of no run that experiment_name names"):
            train(None, {**wine, "experiment_name": "other", "resume_from": str(newest)})

    def test_what_cannot_be_resumed(self, wine, pipeline, runs):
        with pytest.raises(UsageError, match="nothing holds no run; give the folder of a run"):
            resume(str(runs / "nothing"), {})
        part = self.stopped(wine, pipeline, experiment_name="digits")
        with pytest.raises(UsageError, match=r"holds no run; did you mean '.*digits'"):
            resume(str(runs / "digit"), {})
        for path in (part / "checkpoints").iterdir():
            (path / "manifest.json").write_text("{}")
        with pytest.raises(
            ForgeError, match=r"holds no checkpoint that can be read; .*; start the run again"
        ):
            resume(str(part), {})
        for path in (part / "checkpoints").iterdir():
            path.rename(runs / path.name)
        with pytest.raises(
            UsageError, match="has no checkpoint yet; start it again with `forge train --over"
        ):
            resume(str(part), {})

    def test_a_run_with_python_objects_names_them(self, wine, pipeline):
        model = nn.Sequential(nn.Linear(13, 8), nn.ReLU(), nn.Linear(8, 3))
        part = self.stopped({**wine, "model": model, "model_options": {}}, pipeline, step=3)
        with pytest.raises(
            UsageError, match=r"its own model \(<Sequential>\), which no file holds; call create"
        ):
            resume(str(part), {})

    def test_a_teacher_is_not_forgotten(self, wine, pipeline):
        """The student would go on with the labels alone."""
        teacher = nn.Sequential(nn.Linear(13, 3))
        part = self.stopped(wine, pipeline, step=3, teacher=teacher)
        with pytest.raises(UsageError, match=r"its own teacher \(<Sequential>\)"):
            resume(str(part), {})


def test_open_run(wine):
    run = train(None, wine).run_dir
    assert open_run(str(run)).path == run
