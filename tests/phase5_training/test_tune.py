"""learning_rate="auto" and forge tune: what is tried, what is chosen, what it costs."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from phase5_training import UsageError, create_training_pipeline, hardware
from phase5_training.cli import main
from phase5_training.config import TrainingConfig, parse_config
from phase5_training.tune import Trial, judged_by, search, trial_config, tune

BEST = {"optimizer": "adamw", "learning_rate": 1e-3, "weight_decay": 1.0, "use_grokfast": False}

# What the training loss may choose: it always asks for less decay, so the default stays.
BEST_BUT_DECAY = {**BEST, "weight_decay": 0.1}


def loss_at(options, best=BEST):
    """A bowl in the logarithms, with its bottom at ``best``."""
    away = abs(math.log(options["learning_rate"] / best["learning_rate"]))
    away += 0.1 * abs(math.log(options["weight_decay"] / best["weight_decay"]))
    away += 0.5 * (options["use_grokfast"] != best["use_grokfast"])
    return 1.0 + 0.1 * away + 0.2 * (options["optimizer"] != best["optimizer"])


def planted(loss=loss_at):
    def run(options, steps):
        value = loss(options)
        return Trial(round=0, options=options, steps=steps, first_loss=9.0, train_loss=value,
                     untrained_loss=9.0, val_loss=value)  # fmt: skip

    return run


CONSTANT = TrainingConfig(schedule="constant", learning_rate="auto")


class TestSearch:
    def test_finds_the_bottom_of_a_bowl(self):
        found = search(CONSTANT, 10_000, planted())
        assert found.options == BEST
        assert found.judged_by == "validation"
        assert [t.round for t in found.trials] == [1] * 8 + [2] * 3 + [3] * 3

    def test_finds_the_filter_where_it_helps(self):
        best = {**BEST, "optimizer": "muon", "learning_rate": 1e-2, "use_grokfast": True}
        assert search(CONSTANT, 10_000, planted(lambda o: loss_at(o, best))).options == best

    @pytest.mark.parametrize("total", [600, 601, 2000, 2599, 2600, 2617, 54_321, 1_000_000])
    def test_takes_at_most_a_tenth(self, total):
        found = search(CONSTANT, total, planted())
        assert 0 < 10 * found.steps <= total
        assert found.steps == sum(t.steps for t in found.trials)
        # Trials that are compared have the same length.
        for rounds in ({1}, {2, 3}):
            assert len({t.steps for t in found.trials if t.round in rounds}) <= 1

    @pytest.mark.parametrize("total", [1, 300, 599])
    def test_a_run_too_short_is_refused(self, total):
        with pytest.raises(UsageError, match=f"the run has {total} steps .* train 600 steps or more"):
            search(CONSTANT, total, planted())

    def test_what_is_named_stays(self):
        config = TrainingConfig(schedule="constant", optimizer="sgd", weight_decay=0.5, use_grokfast=True)
        tried = [t.options for t in search(config, 10_000, planted()).trials]
        assert {(o["optimizer"], o["weight_decay"], o["use_grokfast"]) for o in tried} == {("sgd", 0.5, True)}
        assert len({o["learning_rate"] for o in tried}) == 4

    def test_a_number_is_where_the_rates_begin(self):
        config = TrainingConfig(learning_rate=0.02, optimizer="adamw")
        rates = {t.options["learning_rate"] for t in search(config, 10_000, planted()).trials}
        assert rates == {0.02, 0.06, 0.00667, 0.00222}

    def test_trials_that_fail_are_passed_over(self):
        def run(options, steps):
            trial = planted()(options, steps)
            failed = options["optimizer"] == "adamw"
            return Trial(round=0, options=options, steps=3, error="loss blew up") if failed else trial

        assert search(CONSTANT, 10_000, run).options["optimizer"] == "muon"

    def test_when_all_fail_the_first_reason_is_told(self):
        def run(options, steps):
            return Trial(round=0, options=options, steps=1, error="the last 50 steps were skipped")

        with pytest.raises(UsageError, match="the last 50 steps were skipped"):
            search(CONSTANT, 10_000, run)

    def test_memorizing_is_judged_by_the_training_loss(self):
        """Where validation gets worse the better training goes, it would choose the worst rate."""

        def run(options, steps):
            value = loss_at(options)
            return Trial(round=0, options=options, steps=steps, first_loss=4.6, train_loss=value,
                         untrained_loss=4.6, val_loss=9 - value)  # fmt: skip

        found = search(CONSTANT, 10_000, run)
        assert (found.options, found.judged_by) == (BEST_BUT_DECAY, "training")

    def test_without_validation_training_decides(self):
        def run(options, steps):
            value = loss_at(options)
            return Trial(round=0, options=options, steps=steps, first_loss=4.6, train_loss=value)

        assert search(CONSTANT, 10_000, run).options == BEST_BUT_DECAY

    def test_no_trial_judges_by_training(self):
        assert judged_by([]) == "training"


def test_all_trials_are_in_one_precision(monkeypatch):
    """ "auto" is a measurement; made anew by each trial it might come out otherwise for one of a pair."""
    monkeypatch.setattr(hardware, "bf16_is_faster_on_this_cpu", iter([True] + [False] * 99).__next__)
    seen = []

    def trial(make, config, options):
        seen.append(config.use_amp)
        return planted()(options, config.max_steps)

    monkeypatch.setattr("phase5_training.tune.run_trial", trial)
    tune(TrainingConfig(device="cpu", optimizer="adamw"), 10_000, make=None)
    assert len(seen) > 3
    assert {*seen} == {True}


def test_a_trial_has_the_runs_schedule_squeezed():
    config = TrainingConfig(warmup_steps=100, acceleration_steps=500, max_steps=1000, epochs=7)
    trial = trial_config(config, BEST, 50, 1000)
    assert (trial.warmup_steps, trial.acceleration_steps, trial.consolidation_steps) == (5, 25, None)
    assert (trial.max_steps, trial.early_stopping, trial.compile) == (50, False, False)
    assert trial.learning_rate == 1e-3


AUTO = {"learning_rate": "auto", "epochs": 200, "batch_size": 32, "max_steps": 600, "early_stopping": False,
        "eval_interval": 300, "model_options": {"hidden": [8, 8]}}  # fmt: skip


class TestRuns:
    def test_auto_is_the_run_with_the_figures_named(
        self, pipeline, task_files, weights, no_report, assert_same
    ):
        auto = pipeline("mlp", *task_files(), **AUTO, experiment_name="auto")
        result = auto.run()
        chosen = auto.tuning.options
        named = pipeline("mlp", *task_files(), **{**AUTO, **chosen}, experiment_name="named").run()
        assert_same(weights(result.run_dir), weights(named.run_dir))
        config = yaml.safe_load((result.run_dir / "config.yaml").read_text())
        assert {key: config[key] for key in chosen} == chosen
        events = [json.loads(line) for line in (result.run_dir / "events.jsonl").read_text().splitlines()]
        tuned = next(e for e in events if e["event"] == "tuned")
        assert 0 < tuned["tuning_steps"] <= 60
        assert tuned["tuning_seconds"] > 0
        assert sum(e["event"] == "tuning_trial" for e in events) == tuned["tuning_trials"]
        assert any("learning_rate=auto chose" in n for n in auto.notices)
        assert sorted(p.name for p in result.run_dir.parent.iterdir()) == ["auto", "named"]

    def test_a_resumed_run_keeps_what_was_chosen(self, pipeline, task_files, no_report):
        first = pipeline("mlp", *task_files(), **AUTO)
        first.register_callback("eval_end", lambda *_: first.stop())
        assert not first.run().success
        again = pipeline("mlp", *task_files(), **AUTO, auto_resume=True)
        result = again.run()
        assert (again.tuning, result.metrics["steps"]) == (None, 600)
        assert again.config.learning_rate == first.tuning.options["learning_rate"]

    def test_a_given_model_is_left_as_it_is(self, pipeline, task_files, no_report):
        model = nn.Sequential(nn.Linear(13, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        options = {key: value for key, value in AUTO.items() if key != "model_options"}
        found = pipeline(model, *task_files(), **options).tune()
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert type(model[2]) is nn.Linear
        assert found.steps <= 60

    @pytest.mark.parametrize(("optimizer", "tried"), [("auto", {"adamw"}), ("muon", {"muon"})])
    def test_muon_is_not_tried_where_the_run_would_not_take_it(
        self, pipeline, task_files, no_report, optimizer, tried
    ):
        """A loss after equal steps does not show that a step takes seven times as long."""
        found = pipeline("mlp", *task_files(), **AUTO, optimizer=optimizer).tune()
        assert {trial.options["optimizer"] for trial in found.trials} == tried

    def test_muon_is_tried_where_it_costs_little(self, pipeline, task_files, no_report):
        options = {**AUTO, "batch_size": 128, "max_steps": 2600, "epochs": 2000}
        found = pipeline("mlp", *task_files(), **options).tune()
        assert {trial.options["optimizer"] for trial in found.trials if trial.round == 1} == {"adamw", "muon"}

    def test_objects_and_open_ends_are_refused(self, task_files):
        train, val = task_files()
        model = nn.Sequential(nn.Linear(13, 8), nn.ReLU(), nn.Linear(8, 3))
        own = torch.optim.SGD(model.parameters(), 0.1)
        with pytest.raises(UsageError, match="optimizer is a SGD; give its name"):
            create_training_pipeline(model, train, val, optimizer=own, learning_rate="auto").tune()
        with pytest.raises(UsageError, match="give max_steps= as well"):
            create_training_pipeline("mlp", train, val, learning_rate="auto", max_seconds=9).tune()


class TestCommand:
    @pytest.fixture
    def run_yaml(self, task_files, tmp_path):
        train, val = task_files()
        values = {"model": "mlp", "model_options": {"hidden": [8, 8]}, "train_data_path": train,
                  "val_data_path": val, "epochs": 200, "max_steps": 600, "use_amp": False, "compile": False,
                  "device": "cpu", "progress": "quiet", "weight_decay": 0.5}  # fmt: skip
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return path

    def test_writes_what_forge_train_takes(self, run_yaml, capsys, no_report):
        assert main(["tune", str(run_yaml)]) == 0
        out = capsys.readouterr().out
        tuned = run_yaml.with_name("run-tuned.yaml")
        assert f"train with: forge train {tuned}" in out
        told = out.splitlines()
        assert told[0] == "short trials: round, steps, training loss, validation loss, options"
        shown = [line for line in told if "use_grokfast=" in line and "chose" not in line]
        text = tuned.read_text()
        values = yaml.safe_load(text)
        assert parse_config(values).learning_rate == values["learning_rate"]
        assert values["weight_decay"] == 0.5  # was named
        rows = [
            json.loads(line) for line in (tuned.parent / "run-tuned.trials.jsonl").read_text().splitlines()
        ]
        comments = [line for line in text.splitlines() if line.startswith("#")]
        assert [line.removeprefix("#   ") for line in comments if line.startswith("#   ")] == shown
        assert len(shown) == len(rows)
        assert sum(row["steps"] for row in rows) <= 60
        given = yaml.safe_load(run_yaml.read_text())
        assert {key: values[key] for key in given} == given
        assert main(["train", str(tuned), "--max-steps", "20", "--experiment-name", "short"]) == 0

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["nothing.yaml"], "does not exist"),
            (["{run}", "--output", "{run}"], "is the file that is tuned"),
            ([], "required: config"),
        ],
    )
    def test_mistakes_are_one_line(self, run_yaml, capsys, words, said):
        assert main(["tune", *(word.format(run=run_yaml) for word in words)]) == 2
        err = capsys.readouterr().err.splitlines()
        assert len(err) == 1
        assert said in err[0]

    def test_the_flag_takes_auto(self, run_yaml, capsys, no_report):
        words = ["train", str(run_yaml), "--learning-rate", "auto", "--max-steps", "100"]
        assert main(words) == 2
        assert "spares a tenth for learning_rate='auto', 10 steps" in capsys.readouterr().err
        assert not list(Path("runs").glob("*/config.yaml"))
