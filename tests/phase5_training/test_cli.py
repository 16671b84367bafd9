"""The command line: what is printed where, and with which exit code."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from phase5_training import cli
from phase5_training.cli import main

FAST = ["--no-use-amp", "--no-compile", "--device", "cpu", "--quiet", "--learning-rate", "0.01"]
SMALL = ["--model", "mlp", "--model-options", "hidden=[16,16]", "--epochs", "3", *FAST]


@pytest.fixture
def forge(capsys, no_report):
    """Call the command; returns (exit code, standard output, lines of standard error)."""

    def call(*words):
        code = main([str(w) for w in words])
        out, err = capsys.readouterr()
        return code, out, err.splitlines()

    return call


@pytest.fixture
def wine(task_files):
    train, val = task_files()
    return ["--train-data-path", train, "--val-data-path", val]


@pytest.fixture
def trained(forge, wine):
    """A finished run, runs/done."""
    assert forge("train", *wine, *SMALL, "--experiment-name", "done")[0] == 0
    return "runs/done"


def final(run):
    return json.loads((Path(run) / "result.json").read_text())["metrics"]


def refused(answer, code, *fragments):
    """The call ended with ``code`` and one line on standard error."""
    found, _, err = answer
    assert (found, len(err)) == (code, 1), (found, err)
    assert err[0].startswith("forge: ")
    assert "Traceback" not in err[0]
    for fragment in fragments:
        assert fragment in err[0], err[0]


class TestTrain:
    def test_flags_only(self, forge, wine):
        code, out, err = forge("train", *wine, *SMALL, "--experiment-name", "a")
        assert (code, err) == (0, [])
        assert re.match(r"finished at step 15: final_loss [\d.]+  final_accuracy [\d.]+  best_val_loss", out)
        assert "report: runs/a/report.html\nmodel: runs/a/best\n" in out

    def test_a_yaml_file_with_overrides(self, forge, wine, tmp_path):
        (tmp_path / "run.yaml").write_text(
            yaml.safe_dump(
                {"model": "mlp", "model_options": {"hidden": [16, 16]}, "epochs": 2, "weight_bits": 1,
                 "train_data_path": wine[1], "val_data_path": wine[3], "experiment_name": "y"}
            )
        )  # fmt: skip
        assert forge("train", "run.yaml", *FAST)[0] == 0
        assert forge("train", "run.yaml", *FAST, "--epochs", "1", "--experiment-name", "z")[0] == 0
        steps = [final(f"runs/{n}")["steps"] for n in "yz"]
        assert steps == [10, 5]
        assert yaml.safe_load(Path("runs/z/config.yaml").read_text())["weight_bits"] == 1
        assert forge("train", "--overwrite", "run.yaml", *FAST)[0] == 0  # the switch leaves the file alone

    def test_help(self, capsys):
        for words, shown in (([], "forge resume RUN"), (["--help"], "Exit code"), (["help"], "forge demo")):
            assert main(words) == 0
            assert shown in capsys.readouterr().out
        for verb in cli.VERBS:
            with pytest.raises(SystemExit) as caught:
                main([verb, "--help"])
            assert caught.value.code == 0
            assert verb in capsys.readouterr().out

    def test_version(self, forge):
        code, out, err = forge("--version")
        assert (code, err) == (0, [])
        assert re.fullmatch(r"\d+\.\d+\.\d+\S*\n", out)

    def test_a_model_of_the_folder_one_stands_in(self, forge, wine, tmp_path, monkeypatch):
        (tmp_path / "cwd_model.py").write_text(
            "from torch import nn\n"
            "def make(): return nn.Sequential(nn.Linear(13, 8), nn.ReLU(), nn.Linear(8, 3))\n"
        )
        monkeypatch.setattr(sys, "path", list(sys.path))
        options = ["--model", "cwd_model:make", "--epochs", "1", *FAST, "--experiment-name", "own"]
        assert forge("train", *wine, *options)[0] == 0
        code, out, _ = forge("evaluate", "runs/own", "--json")
        assert (code, json.loads(out)["samples"]) == (0, 36)

    def test_warnings_are_one_line(self, forge, wine, tmp_path, monkeypatch):
        (tmp_path / "with_attention.py").write_text(
            textwrap.dedent(
                """
                from torch import nn
                class Model(nn.Module):
                    def __init__(self):
                        super().__init__()
                        self.body, self.head = nn.Linear(13, 8), nn.Linear(8, 3)
                        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
                    def forward(self, x):
                        x = self.body(x)[:, None]
                        return self.head(self.attention(x, x, x)[0][:, 0])
                """
            )
        )
        monkeypatch.setattr(sys, "path", list(sys.path))
        options = ["--model", "with_attention:Model", "--epochs", "1", *FAST, "--experiment-name", "own"]
        code, _, err = forge("train", *wine, *options)
        assert code == 0
        assert len(err) == 1
        assert err[0].startswith("forge: warning: 1 attention projections stay float")


class TestMistakes:
    """Each is one line that says what was found, where, and the remedy; exit code 2, 1 for a failed run."""

    def test_verbs_and_flags(self, forge):
        refused(forge("trian"), 2, "unknown command 'trian'; did you mean 'train'?")
        refused(
            forge("zzz"),
            2,
            "use one of demo, train, resume, evaluate, inspect-data, tune, bench, export, report",
        )
        refused(
            forge("train", "--batchsize", "8"), 2, "unknown flag '--batchsize'; did you mean '--batch-size'?"
        )
        refused(forge("resume", "runs/a", "--batch-size", "8"), 2, "unknown flag '--batch-size'")
        refused(forge("resume"), 2, "the following arguments are required: run")
        refused(forge("evaluate"), 2, "required: run")
        refused(forge("report"), 2, "required: runs")

    def test_options(self, forge, wine, tmp_path):
        train = ["train", *wine, *SMALL]
        refused(forge("train"), 2, "train_data_path is missing")
        refused(forge(*train, "--epochs", "0"), 2, "epochs=0 does not fit", "greater than or equal to 1")
        refused(forge(*train, "--weight-bits", "2"), 2, "use 1.58 (codes -1, 0, 1) or 1")
        refused(forge(*train, "--quantization-mode", "noisy"), 2, "'deterministic' or 'stochastic'")
        both = ["--batch-size", "30", "--micro-batch-size", "8"]
        refused(forge(*train, *both), 2, "not a multiple of micro_batch_size=8; use micro_batch_size=6")
        refused(forge(*train, "--model", "mpl"), 2, "model 'mpl' is unknown; did you mean 'mlp'?")
        refused(forge(*train, "--loss", "hubert"), 2, "loss='hubert' is unknown; did you mean 'huber'?")
        refused(forge(*train, "--optimizer", "adamv"), 2, "did you mean 'adamw'?")
        refused(forge(*train, "--monitor", "acuracy"), 2, "did you mean 'accuracy'?")
        refused(forge(*train, "--schedule", "constant", "--acceleration-steps", "5"), 2, "acceleration_steps")
        refused(forge(*train, "--experiment-name", "a/b"), 2, "a/b")
        refused(forge("train", "nothing.yaml"), 2, "configuration 'nothing.yaml' does not exist")
        (tmp_path / "bad.yaml").write_text("learning_rat: 1\n")
        refused(
            forge("train", "bad.yaml"),
            2,
            "bad.yaml: unknown option 'learning_rat'; did you mean 'learning_rate'?",
        )

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    def test_cuda_without_one(self, forge, wine, trained):
        words = ["device='cuda' cannot be used", "use device='auto'"]
        refused(forge("train", *wine, *SMALL, "--device", "cuda"), 2, *words)
        refused(forge("evaluate", trained, "--device", "cuda"), 2, *words)

    def save(self, name, **arrays):
        np.savez(name, **arrays)
        return ["train", "--train-data-path", name, *SMALL]

    def test_data(self, forge, tmp_path):
        refused(forge("train", "--train-data-path", "no.json", *SMALL), 2, "no.json: no such file")
        (tmp_path / "data.xlsx").write_text("x")
        refused(forge("train", "--train-data-path", "data.xlsx", *SMALL), 2, "unknown extension '.xlsx'")
        (tmp_path / "empty.json").write_text('{"samples": []}')
        refused(forge("train", "--train-data-path", "empty.json", *SMALL), 2, "empty.json", "empty")
        x, y = np.random.rand(40, 13).astype(np.float32), np.arange(40) % 3
        bad = x.copy()
        bad[7, 2] = np.nan
        refused(forge(*self.save("nan.npz", inputs=bad, targets=y)), 2, "nan.npz record 7", "nan")
        refused(forge(*self.save("short.npz", inputs=x, targets=y[:30])), 2, "short.npz", "40", "30")
        refused(forge(*self.save("negative.npz", inputs=x, targets=y - 1)), 2, "negative.npz record 0", "-1")
        (tmp_path / "broken.json").write_text('{"samples": [{"input": [1.0], "target": 0}, {"input"')
        refused(forge("train", "--train-data-path", "broken.json", *SMALL), 2, "broken.json")
        (tmp_path / "mixed.json").write_text(
            json.dumps({"samples": [{"input": [1.0, 2.0], "target": 0}, {"input": [1.0], "target": 1}] * 9})
        )
        refused(forge("train", "--train-data-path", "mixed.json", *SMALL), 2, "mixed.json record 1")
        assert not os.path.exists("runs")

    def test_a_model_that_does_not_fit_the_data(self, forge, wine, tmp_path, monkeypatch):
        (tmp_path / "misfits.py").write_text(
            "from torch import nn\n"
            "def two(): return nn.Sequential(nn.Linear(13, 8), nn.ReLU(), nn.Linear(8, 2))\n"
            "def narrow(): return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))\n"
        )
        monkeypatch.setattr(sys, "path", list(sys.path))
        train = ["train", *wine, "--epochs", "1", *FAST, "--model"]
        words = ["labels go from 0 to 2 and the model has 2 outputs", "build it with 3 outputs"]
        refused(forge(*train, "misfits:two"), 2, *words)
        refused(forge(*train, "misfits:narrow"), 2, "cannot take the data", "(2, 13)")
        refused(forge(*train, "decoder"), 2, "use model='mlp'")
        refused(forge(*train, "misfits:three"), 2, "misfits", "three")

    def test_runs(self, forge, wine, trained):
        again = ["train", *wine, *SMALL, "--experiment-name", "done"]
        refused(forge(*again), 2, "runs/done already holds a run", "forge resume runs/done")
        assert forge(*again, "--overwrite")[0] == 0
        refused(forge("resume", trained, "--quiet"), 2, "is complete at step 15 (finished)")
        refused(forge("resume", "runs/dome"), 2, "did you mean 'runs/done'?")
        refused(forge("evaluate", "runs/dome"), 2, "did you mean 'runs/done'?")
        refused(forge("report", "runs/dome"), 2, "did you mean 'runs/done'?")
        refused(forge("evaluate", trained, "--data", "no.npz"), 2, "no.npz: no such file")

    def test_a_failed_run(self, forge, wine):
        options = ["--learning-rate", "1e30", "--schedule", "constant", "--no-gradient-clipping"]
        options += ["--no-use-bitnet", "--optimizer", "sgd", "--epochs", "60", "--log-interval", "1"]
        answer = forge("train", *wine, *SMALL, *options, "--experiment-name", "wild")
        refused(answer, 1, "not finite; lower learning_rate")

    def test_a_full_disk(self, forge, wine, monkeypatch):
        def full(*args, **kwargs):
            raise OSError(28, "No space left on device", "runs/a/best")

        monkeypatch.setattr("phase5_training.results.save_compressed_model", full)
        refused(forge("train", *wine, *SMALL), 1, "No space left on device")

    def test_what_nobody_thought_of(self, forge, monkeypatch, capsys):
        def broken(words):
            raise ZeroDivisionError("division\nby zero")

        monkeypatch.setitem(cli.VERBS, "train", broken)
        refused(forge("train"), 1, "unexpected ZeroDivisionError: division by zero; --debug shows where")
        assert main(["train", "--debug"]) == 1
        assert "Traceback" in capsys.readouterr().err

    def test_debug_shows_the_traceback(self, forge):
        code, _, err = forge("train", "--train-data-path", "no.json", "--debug")
        assert code == 2
        assert err[0].startswith("Traceback")

    def test_ctrl_c_before_training(self, forge, monkeypatch):
        def interrupted(words):
            raise KeyboardInterrupt

        monkeypatch.setitem(cli.VERBS, "train", interrupted)
        assert forge("train") == (130, "", ["forge: interrupted"])


class TestEvaluateAndReport:
    def test_figures(self, forge, trained, wine):
        figures = final(trained)
        code, out, err = forge("evaluate", trained)
        assert (code, err) == (0, [])
        assert f"loss {figures['final_loss']:.4g}" in out
        assert f"accuracy {figures['final_accuracy']:.4g}" in out
        code, out, err = forge("evaluate", trained, "--json")
        assert json.loads(out)["loss"] == figures["final_loss"]
        code, out, err = forge("evaluate", trained, "--json", "--data", wine[1])
        assert (code, json.loads(out)["samples"]) == (0, 142)
        assert json.loads(out)["loss"] != figures["final_loss"]

    def test_report(self, wine, capsys):
        for name in ("a", "b"):
            assert main(["train", *wine, *SMALL, "--epochs", "1", "--experiment-name", name]) == 0
        os.remove("runs/a/report.html")
        capsys.readouterr()
        assert main(["report", "runs/a"]) == 0
        assert capsys.readouterr().out.strip() == "runs/a/report.html"
        assert "<svg" in Path("runs/a/report.html").read_text()
        assert main(["report", "runs/a", "runs/b", "--output", "both.html"]) == 0
        assert "both.html" in capsys.readouterr().out


MODEL = '''
"""A model with dropout that sends its own process a signal in the forward of a chosen training step."""
import os

import torch
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(13, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.dropout, self.steps = nn.Dropout(0.2), 0
        self.number, self.at = map(int, os.environ.get("TEST_SIGNAL", "0 0").split())

    def forward(self, x):
        self.steps += self.training
        if self.training and self.steps == self.at:
            os.killpg(0, self.number) if os.environ.get("TEST_GROUP") else os.kill(os.getpid(), self.number)
        x = torch.relu(self.first(x))
        return self.head(self.dropout(torch.relu(self.second(x))))
'''


class TestInterrupt:
    @pytest.fixture(autouse=True)
    def _own_model(self, tmp_path, monkeypatch):
        (tmp_path / "signaled.py").write_text(MODEL)
        monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
        sys.modules.pop("signaled", None)

    @pytest.mark.parametrize("mode", ["deterministic", "stochastic"])
    def test_resume_gives_the_weights_of_an_uninterrupted_run(
        self, forge, wine, monkeypatch, mode, weights, assert_same
    ):
        train = ["train", *wine, "--model", "signaled:Model", "--epochs", "4", *FAST, "--eval-interval", "6"]
        train += ["--quantization-mode", mode, "--checkpoint-interval", "5"]
        assert forge(*train, "--experiment-name", "whole")[0] == 0
        for number, step in ((signal.SIGTERM, 8), (signal.SIGINT, 5)):
            name = f"at-{step}"
            monkeypatch.setenv("TEST_SIGNAL", f"{int(number)} {step}")
            code, out, err = forge(*train, "--experiment-name", name)
            assert (code, err) == (128 + number, [])
            assert f"interrupted at step {step}" in out
            assert f"continue with: forge resume runs/{name}" in out
            monkeypatch.delenv("TEST_SIGNAL")
            refused(forge("evaluate", f"runs/{name}"), 2, f"continue it with `forge resume runs/{name}`")
            assert forge("resume", f"runs/{name}", "--quiet")[0] == 0
            assert_same(weights("runs/whole"), weights(f"runs/{name}"))

    def test_a_damaged_checkpoint_is_passed_over_and_said(
        self, forge, wine, monkeypatch, weights, assert_same
    ):
        train = [
            "train",
            *wine,
            "--model",
            "signaled:Model",
            "--epochs",
            "3",
            *FAST,
            "--checkpoint-interval",
            "4",
        ]
        assert forge(*train, "--experiment-name", "whole")[0] == 0
        monkeypatch.setenv("TEST_SIGNAL", f"{int(signal.SIGTERM)} 9")
        assert forge(*train, "--experiment-name", "part")[0] == 143
        monkeypatch.delenv("TEST_SIGNAL")
        with open("runs/part/checkpoints/step-00000009/tensors.safetensors", "r+b") as file:
            file.seek(200)
            file.write(b"\xff\xff")
        code, _, err = forge("resume", "runs/part", "--quiet")
        assert code == 0
        assert len(err) == 1
        assert err[0].startswith("forge: warning: ")
        assert "does not match its hash; resumed from step-00000008 instead" in err[0]
        assert_same(weights("runs/whole"), weights("runs/part"))

    def test_all_checkpoints_damaged(self, forge, wine, monkeypatch):
        monkeypatch.setenv("TEST_SIGNAL", f"{int(signal.SIGTERM)} 3")
        train = ["train", *wine, "--model", "signaled:Model", *FAST, "--experiment-name", "part"]
        assert forge(*train)[0] == 143
        os.remove("runs/part/checkpoints/step-00000003/state.json")
        refused(forge("resume", "runs/part"), 1, "state.json is missing: no whole checkpoint there")

    @pytest.mark.parametrize(
        ("number", "code", "workers", "group"),
        [(signal.SIGTERM, 143, 0, ""), (signal.SIGINT, 130, 2, "yes"), (signal.SIGTERM, 143, 2, "yes")],
    )
    def test_as_a_process(self, forge, wine, tmp_path, number, code, workers, group, weights, assert_same):
        """The real thing; with workers the signal reaches all processes, as from a terminal or a service."""
        options = ["--model", "signaled:Model", "--epochs", "2", *FAST, "--num-workers", str(workers)]
        options += ["--eval-interval", "2"]  # the workers that validate at step 2 are wanted again at step 4
        command = [
            sys.executable,
            "-m",
            "phase5_training",
            "train",
            *wine,
            *options,
            "--experiment-name",
            "part",
        ]
        environment = {**os.environ, "TEST_SIGNAL": f"{int(number)} 4", "TEST_GROUP": group}
        environment["PYTHONPATH"] = os.path.dirname(os.path.dirname(cli.__file__))
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
            start_new_session=True,
        )  # fmt: skip
        assert done.returncode == code
        advice = ["forge: warning: num_workers=2: the data are in memory, "] if workers else []
        for line, wanted in zip(done.stderr.splitlines(), advice, strict=True):
            assert line.startswith(wanted)
        assert "continue with: forge resume runs/part" in done.stdout
        assert os.listdir("runs/part/checkpoints") == ["step-00000004"]
        assert forge("resume", "runs/part", "--quiet", "--num-workers", "0")[0] == 0
        assert forge("train", *wine, *options, "--num-workers", "0", "--experiment-name", "whole")[0] == 0
        assert_same(weights("runs/whole"), weights("runs/part"))


@pytest.mark.parametrize(("local", "said"), [("0", 1), ("1", 0)])
def test_of_the_processes_of_a_machine_the_first_speaks_of_a_mistake_and_torchrun_shows_all(
    forge, tmp_path, monkeypatch, local, said
):
    """What is written for torchrun is read by torchrun's own reader."""
    path = str(tmp_path / "error.json")
    for name, value in {"RANK": "3", "LOCAL_RANK": local, "TORCHELASTIC_ERROR_FILE": path}.items():
        monkeypatch.setenv(name, value)
    line = "forge (rank 3): unknown flag '--epoch'; did you mean '--epochs'?"
    assert forge("train", "--epoch", "3") == (2, "", [line] * said)
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=path)
    assert f"traceback : {line}\n" in str(ChildFailedError("forge", {3: failure}))


def test_a_program_that_ends_with_workers_waiting_ends_at_once(tmp_path):
    """They go on for a while after a SIGTERM, which is how Python ends the children of a program."""
    program = textwrap.dedent(
        """
        import torch
        from phase5_training import DataConfig, DataLoaderFactory
        data = torch.utils.data.TensorDataset(torch.rand(100, 4), torch.arange(100) % 3)
        batches = iter(DataLoaderFactory.create_loader(data, DataConfig(batch_size=4, num_workers=1)))
        next(batches)
        """
    )
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(cli.__file__))}
    # Workers do not pay on so little, which is said.
    command = [sys.executable, "-W", "ignore", "-c", program]
    # Less than GRACE_SECONDS, after which they end by themselves.
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=25)
    assert (done.returncode, done.stderr) == (0, "")
