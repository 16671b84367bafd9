"""forge bench: what counts as reached, what is shared, what is left out of every choice."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from phase5_training import TrainingPipeline, UsageError, bench, bench_run, bench_tuning, hardware
from phase5_training.bench_summary import held_level, quartiles, summaries, time_to
from phase5_training.bench_tables import comparison_rows, notes, result_table
from phase5_training.cli import main
from phase5_training.contest import Contest, built_in, from_config, options_of
from phase5_training.errors import RunFailed
from phase5_training.optimizers import AVERAGES
from phase5_training.pipeline.validation import RealTimeValidator
from phase5_training.recipes import (
    ATTRIBUTION,
    BUILT_IN,
    RECIPES,
    SIDE_BY_SIDE,
    TASKS,
    Tuned,
    chosen_recipes,
    grid,
    read_tuned,
)

RECORDS = Path(__file__).resolve().parents[2] / "benchmarks" / "records"


class TestReached:
    @pytest.mark.parametrize("higher", [True, False])
    def test_is_held_for_three_more(self, higher):
        """Against a plain search over every pattern of met and missed evaluations."""
        for met in itertools.product([False, True], repeat=8):
            curve = [(10 * i, 2.0 * i, (0.9 if m else 0.1) if higher else (0.1 if m else 0.9))
                     for i, m in enumerate(met)]  # fmt: skip
            text = "".join("x" if m else "." for m in met)
            first = text.find("xxxx")
            expected = None if first < 0 else (10 * first, 2.0 * first)
            assert time_to(curve, 0.5, higher=higher) == expected

    @pytest.mark.parametrize("higher", [True, False])
    def test_a_held_level_is_reached_and_nothing_better_is(self, higher):
        rng = np.random.default_rng(0)
        for _ in range(50):
            curve = [(i, i, float(v)) for i, v in enumerate(rng.normal(size=12))]
            level = held_level(curve, higher=higher)
            assert time_to(curve, level, higher=higher) is not None
            better = level + (1e-9 if higher else -1e-9)
            assert time_to(curve, better, higher=higher) is None

    def test_a_short_curve_holds_nothing(self):
        assert held_level([(1, 1, 1.0)] * 3, higher=True) is None
        assert time_to([(1, 1, 1.0)] * 3, 0.5, higher=True) is None

    def test_quartiles_are_numpys_where_all_came(self):
        for n in range(1, 9):
            values = np.random.default_rng(n).normal(size=n).tolist()
            assert quartiles(values) == pytest.approx(np.quantile(values, [0.25, 0.5, 0.75]).tolist())

    def test_never_is_longer_than_anything(self):
        assert quartiles([1.0, None, None]) == [None, None, None]
        assert quartiles([1.0, 2.0, None, 3.0, 1.0]) == [1.0, 2.0, 3.0]
        assert quartiles([]) == [None, None, None]


def run_row(recipe, seed, figures, *, seconds=1.0, higher=True, reason="max_steps"):
    curve = [[10 * (i + 1), seconds * (i + 1), f] for i, f in enumerate(figures)]
    return {"kind": "run", "task": "t", "recipe": recipe, "seed": seed, "options": {}, "ternary": False,
            "figure": "accuracy", "higher": higher, "curve": curve, "best": max(figures), "test": 0.5,
            "steps": 10 * len(figures), "seconds": seconds * len(figures), "stop_reason": reason,
            "error": "", "tuning_steps": 7, "tuning_seconds": None, "cap_steps": 80,
            "cap_seconds": None, "precision": "float32", "compiled": False}  # fmt: skip


class TestSummaries:
    def test_failures_ratios_and_targets_of_a_recipe(self):
        good, bad = [0.1, 0.96, 0.97, 0.98, 0.99], [0.1, 0.96, 0.2, 0.98, 0.99]
        late = [0.1, 0.2, 0.3, 0.96, 0.97, 0.98, 0.96]
        runs = [
            run_row("float", 0, late), run_row("forge", 0, good, seconds=0.5),
            run_row("float", 1, late), run_row("forge", 1, bad, seconds=0.5),
            run_row("float", 2, bad), run_row("forge", 2, good, seconds=0.5),
        ]  # fmt: skip
        float_row, forge = summaries(runs, [0.95])
        assert (float_row["failures"], forge["failures"]) == (1, 1)
        assert float_row["steps"] == [40.0, 40.0, None]
        assert forge["seconds"] == [1.0, 1.0, None]
        # 0.25 on the first seed, never on the second; on the third float might have held from its third on.
        assert forge["ratio_float"] == quartiles([1.0 / 4.0, None, 1.0 / 3.0])
        assert forge["ratio_float_muon"] is None
        (_, forge) = summaries(runs[:2], ["float"])
        assert forge["steps"][1] == 20  # float held 0.96
        rows = comparison_rows(runs, summaries(runs, [0.95]))
        assert [row["name"] for row in rows] == ["float AdamW, tuned", "Forge"]
        assert rows[1]["curve"][0] == [0.5, 0.1]

    def test_where_the_figures_come_from_is_said(self):
        runs = [run_row(name, 0, [0.1] * 4) for name in ("plain", "float", "naive", "forge")]
        for run, trials in zip(runs[1:], (24, 6, 24), strict=True):
            source = "tuned.jsonl" if trials == 24 else "learning_rate=auto"
            run |= {"tuning_source": source, "tuning_trials": trials}
        said = notes(summaries(runs, [0.95]))
        assert "tuned by tuned.jsonl: float AdamW, tuned (24 runs); Forge (24 runs)" in said
        assert "tuned by learning_rate=auto: fake-quant ternary AdamW, tuned (6 runs)" in said

    def test_a_baseline_that_never_came_bounds_the_ratio(self):
        """Left out, the seeds on which the baseline was slowest would count for nothing."""
        good, never = [0.1, 0.96, 0.97, 0.98, 0.99], [0.1, 0.2, 0.2, 0.2, 0.2, 0.96, 0.2, 0.96]
        runs = [run_row("float", seed, never) for seed in range(2)]
        runs += [run_row("forge", seed, good) for seed in range(2)]
        float_row, forge = summaries(runs, [0.95])
        # It might have held from its sixth evaluation on.
        assert forge["ratio_float"] == [2.0 / 6.0] * 3
        assert (forge["bounds_float"], float_row["bounds_float"]) == (2, 0)
        assert float_row["ratio_float"] is None
        cells = [list(column.cells) for column in result_table([float_row, forge]).columns]
        assert cells[5] == ["", "<0.33"]
        assert "Forge, 0.95: < is a bound, since float AdamW, tuned did not hold it on 2 of 2 seeds" in notes(
            [float_row, forge]
        )
        # Any run of float's that does come, however late, gives a ratio within the bound.
        runs[0] = run_row("float", 0, never[:5] + [0.96] * 4)
        (_, forge) = summaries(runs, [0.95])
        assert forge["ratio_float"][2] <= 2.0 / 6.0

    def test_a_recipe_that_held_nothing_sets_no_target(self):
        """Against minus infinity everybody would win at once, against nothing everybody would lose."""
        fine, broken = [0.5, 0.6, 0.7, 0.7, 0.7, 0.7], [-math.inf] * 6
        runs = [run_row("float", 0, fine), run_row("float", 1, broken), run_row("float", 2, fine[:3])]
        runs += [run_row("forge", seed, fine) for seed in range(3)]
        rows = summaries(runs, ["float"])
        for row in rows:
            assert (row["seeds"], row["without_target"], row["failures"]) == (3, 2, 0)
            assert row["steps"] == [30.0] * 3
        assert [list(c.cells) for c in result_table(rows).columns][2] == ["1 of 1", "1 of 1"]
        assert any("Forge, held by float: 2 of 3 seeds are left out" in note for note in notes(rows))

    def test_what_the_figures_are_of_is_said(self):
        figures = [0.1, 0.96, 0.97, 0.98, 0.99]
        runs = [run_row("float", seed, figures) for seed in range(3)]
        runs += [run_row("forge", seed, figures, reason="interrupted") for seed in range(3)]
        runs[2] |= {"error": "loss was NaN", "stop_reason": "failed", "curve": [], "test": None}
        runs[4] |= {"precision": "bf16", "compiled": True}
        for run in runs:
            run["tuning_seconds"] = 8.0 if run["recipe"] == "float" else 2.0
        rows = summaries(runs, [0.95])
        said = notes(rows)
        assert "computed in float32, not compiled: float AdamW, tuned" in said
        assert "computed in bf16 and float32, not compiled and compiled: Forge" in said
        assert "float AdamW, tuned: 1 of 3 runs failed (loss was NaN)" in said
        assert any("stopped once they held" in note for note in said)
        # Two seconds to the target each, so 4 against 10.
        assert "0.95, / float AdamW, tuned (10 s) with all tuning counted: Forge 0.40 (4 s)" in said
        assert rows[0]["capped"] == 0  # the run that failed met no cap
        assert [list(c.cells) for c in result_table(rows).columns][9] == ["- / 0.5 / 0.5", "0.5"]

    @pytest.mark.parametrize("higher", [True, False])
    def test_a_run_that_failed_is_the_worst_and_not_the_best(self, higher):
        runs = [run_row("forge", seed, [0.5] * 4, higher=higher) for seed in range(3)]
        figures = [0.8, 0.9, None]
        for run, figure in zip(runs, figures, strict=True):
            run["test"] = run["best"] = figure
        (row,) = summaries(runs, [0.95])
        middle = 0.8 if higher else 0.9
        assert (row["test"][1], row["watched"][1]) == (middle, middle)
        assert row["test"][0 if higher else 2] is None
        # Where none failed the quartiles are numpy's, in ascending order.
        runs[2]["test"] = 0.2
        (row,) = summaries(runs, [0.95])
        assert row["test"] == pytest.approx(np.quantile([0.8, 0.9, 0.2], [0.25, 0.5, 0.75]).tolist())

    def test_a_run_that_failed_early_names_no_figure_and_hides_none(self):
        runs = [run_row("forge", seed, [0.5] * 4, higher=False) for seed in range(2)]
        runs[0] |= {"figure": None, "higher": True, "test": None, "curve": []}
        runs[1]["figure"] = "mse"
        (row,) = summaries(runs, [0.95])
        assert row["figure"] == "mse"
        assert row["test"][2] is None


class TestRecipes:
    def test_the_attribution_has_every_cell_once(self):
        cells = [tuple(RECIPES[n].factors.values()) for n in ATTRIBUTION]
        expected = [("float", f, None, t) for f in (False, True) for t in (False, True)]
        expected += [("ternary", f, i, t) for f, i, t in itertools.product((False, True), repeat=3)]
        assert sorted(cells, key=str) == sorted(expected, key=str)

    def test_the_plain_recipe_is_the_documents(self):
        plain = RECIPES["plain"].options
        assert (plain["optimizer"], plain["learning_rate"], plain["weight_decay"]) == ("adamw", 1e-4, 1e-2)
        assert (plain["schedule"], plain["use_bitnet"], plain["use_grokfast"]) == ("constant", False, False)

    def test_filters_differ_in_the_filter_alone(self):
        for name in ATTRIBUTION:
            if name.endswith("_filter"):
                on, off = RECIPES[name], RECIPES[name.removesuffix("_filter")]
                differs = {k for k in {*on.options, *off.options} if on.options.get(k) != off.options.get(k)}
                assert differs <= {"use_grokfast", "grokfast_alpha", "grokfast_lambda"}
                assert (on.tuned_as, off.options["use_grokfast"]) == (off.tuned_as, False)

    @pytest.mark.parametrize("task", TASKS)
    def test_every_tuned_recipe_has_the_same_budget(self, task):
        sizes = {len(grid(RECIPES[name], TASKS[task])) for name in SIDE_BY_SIDE if RECIPES[name].tuned_as}
        assert len(sizes) == 1

    @pytest.mark.parametrize("task", TASKS)
    def test_a_grid_has_every_rate_decay_and_schedule_once(self, task):
        found = grid(RECIPES["forge"], TASKS[task])
        assert len({str(sorted(each.items())) for each in found}) == len(found)
        averages = TASKS[task].averages
        for optimizer in {each["optimizer"] for each in found}:
            tried = [
                {k: each[k] for k in AVERAGES if k in each}
                for each in found
                if each["optimizer"] == optimizer
            ]
            assert all(own in tried for own in averages.get(optimizer, ({},)))
        whole = TASKS[task].options["max_steps"]
        shapes = {(each["schedule"], round(each.get("max_steps", whole) / whole, 6)) for each in found}
        assert shapes == set(TASKS[task].schedules)
        assert {each["optimizer"] for each in found} == {"muon", "adamw"}
        assert {each["optimizer"] for each in grid(RECIPES["float"], TASKS[task])} == {"adamw"}

    def test_the_soonest_in_seconds_is_the_best_and_else_the_best_held(self):
        def row(name, seconds, figures):
            curve = [[i + 1, seconds * (i + 1), figure] for i, figure in enumerate(figures)]
            return {"name": name, "curve": curve, "higher": True}

        slow = row("fewer steps, more seconds", 5.0, [0.2, 0.9, 0.9, 0.9, 0.9])
        fast = row("more steps, fewer seconds", 1.0, [0.2, 0.2, 0.9, 0.9, 0.9, 0.9])
        good = row("best, not held soonest", 9.0, [0.99] * 4)
        rows = [slow, fast, good]
        assert min(rows, key=lambda row: bench_tuning.merit([row], [0.9])) is fast
        assert min(rows, key=lambda row: bench_tuning.merit([row], [0.999])) is good

    def test_a_candidate_that_holds_on_more_seeds_is_better_than_a_sooner_one(self):
        held = {"curve": [[i, 9.0 * i, 0.95] for i in range(1, 5)], "higher": True}
        lucky = {"curve": [[i, 1.0 * i, 0.95] for i in range(1, 5)], "higher": True}
        never = {"curve": [[i, 1.0 * i, 0.2] for i in range(1, 5)], "higher": True}
        assert bench_tuning.merit([held, held], [0.9]) < bench_tuning.merit([lucky, never], [0.9])
        assert bench_tuning.merit([lucky, lucky], [0.9]) < bench_tuning.merit([held, held], [0.9])
        short = {"curve": [[1, 1.0, 0.99]], "higher": True}
        assert bench_tuning.merit([short], [])[-1] == math.inf

    def test_built_in_figures_are_those_of_the_record(self):
        recorded = read_tuned(RECORDS / "tuned.jsonl")
        for (task, recipe), tuned in BUILT_IN.items():
            assert task in TASKS
            on = "modular_mul" if tuned.source.endswith(", on modular_mul") else task
            found = recorded[on, recipe]
            assert (found.options, found.steps, found.trials) == (tuned.options, tuned.steps, tuned.trials)
            # The row says none: its candidates do.
            assert found.seeds in (tuned.seeds, tuned.seeds[:1])
            assert found.seconds == pytest.approx(tuned.seconds, abs=0.05)

    def test_figures_of_a_task_are_not_for_a_file_of_its_name(self, tmp_path):
        own = Contest(name="digits", options={}, targets=(0.9,), folder=tmp_path)
        assert bench._known_figures(own, ["forge"], {}) == {}
        found = bench._known_figures(replace(own, task=TASKS["digits"]), ["plain", "forge_filter"], {})
        assert found == {"forge": BUILT_IN["digits", "forge"]}

    def test_seeds_begin_where_nothing_was_tuned(self):
        tuned = {"forge": Tuned(options={}, seeds=(0,)), "float": Tuned(options={}, seeds=(2, 7))}
        assert [bench._first_free_seed(tuned, count) for count in (1, 2, 4, 5)] == [1, 3, 3, 8]
        assert bench._first_free_seed({}, 5) == 0

    def test_unknown_names(self):
        with pytest.raises(UsageError, match="did you mean 'forge'"):
            chosen_recipes(["forg"], attribution=False)
        with pytest.raises(UsageError, match="did you mean 'digits'"):
            built_in("digit")
        assert chosen_recipes(None, attribution=False) == list(SIDE_BY_SIDE)

    def test_tuned_figures_come_back_from_a_record(self, tmp_path):
        tuned = Tuned(options={"learning_rate": 0.1}, steps=5, seconds=1.5, trials=2, source="here")
        row = {"kind": "tuned", **bench_tuning.tuned_row("digits", "float", tuned)}
        (tmp_path / "t.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({"kind": "run"}) + "\n")
        (found,) = read_tuned(tmp_path / "t.jsonl").items()
        assert found[0] == ("digits", "float")
        assert (found[1].options, found[1].steps, found[1].seconds) == ({"learning_rate": 0.1}, 5, 1.5)
        (tmp_path / "bad.jsonl").write_text("nonsense\n")
        for name, said in (("bad", "is no record of tuning"), ("none", "does not exist")):
            with pytest.raises(UsageError, match=said):
                read_tuned(tmp_path / f"{name}.jsonl")


def contest(task_files, folder, **options):
    train, val = task_files("wine", validation_share=0.4)
    shared = {"model": "mlp", "model_options": {"hidden": [16, 16]}, "batch_size": 32, "max_steps": 24,
              "epochs": 1000, "eval_interval": 3, "use_amp": False, "compile": False, "device": "cpu",
              "train_data_path": train, "val_data_path": val}  # fmt: skip
    return Contest(name="wine", options={**shared, **options}, targets=(0.9,), folder=folder)


FIGURES = {("wine", name): Tuned(options={"optimizer": "adamw", "learning_rate": 0.01, "weight_decay": 0.1,
                                          "schedule": "constant", "warmup_steps": 2}, steps=11, seconds=2.0)
           for name in ("float", "naive", "forge")}  # fmt: skip


class TestRuns:
    @pytest.fixture
    def done(self, task_files, tmp_path, no_report, capsys):
        """Two seeds of four recipes; gives the contest, what bench returned and the rows recorded."""
        own = contest(task_files, tmp_path / "runs")
        record = tmp_path / "rows.jsonl"
        names = ["plain", "float", "naive", "forge"]
        found = bench.bench(own, names, [0, 1], tuned=FIGURES, record=record, full=True)
        return (
            own,
            found,
            [json.loads(line) for line in record.read_text().splitlines()],
            capsys.readouterr().out,
        )

    @pytest.mark.parametrize(
        ("task", "known", "search"),
        [("wine", ("float",), "grid"), ("wine", (), "trials"), (None, ("float",), "trials")],
    )
    def test_recipes_side_by_side_have_the_same_search(
        self, task_files, tmp_path, no_report, monkeypatch, task, known, search
    ):
        """One that was tuned by ten steps beside one that was tuned by whole runs would be no comparison."""
        own = replace(contest(task_files, tmp_path), task=TASKS[task] if task else None)
        found, called = FIGURES["wine", "naive"], []
        monkeypatch.setattr(bench, "BUILT_IN", {})
        for name, kind in (("tune_to_target", "grid"), ("tune_once", "trials")):
            monkeypatch.setattr(bench, name, lambda *a, kind=kind: called.append((kind, *a[1:3])) or found)
        tuned = {("wine", name): FIGURES["wine", name] for name in known}
        bench.bench(own, ["float", "naive"], [3], tuned=tuned, quiet=True)
        assert called == [(search, name, 4) for name in ("float", "naive") if name not in known]

    def test_targets_of_a_task_need_only_the_recipes_that_run(self, task_files, tmp_path, no_report):
        own = replace(contest(task_files, tmp_path, max_steps=15), targets=("float_muon", "plain"))
        found = bench.bench(own, ["plain"], [0], quiet=True)
        assert [row["target"] for row in found["summaries"]] == ["plain"]
        with pytest.raises(UsageError, match="target 'float_muon' is the figure of a recipe that is not run"):
            bench.bench(replace(own, targets=("float_muon",)), ["plain"], [0], quiet=True)

    def test_bench(self, done, tmp_path):
        _, found, rows, out = done
        runs = [row for row in rows if row["kind"] == "run"]
        # Interleaved by seed, and another recipe begins each round.
        assert [(r["recipe"], r["seed"]) for r in runs] == [
            ("plain", 0), ("float", 0), ("naive", 0), ("forge", 0),
            ("float", 1), ("naive", 1), ("forge", 1), ("plain", 1),
        ]  # fmt: skip
        for row in runs:
            assert [step for step, _, _ in row["curve"]] == list(range(3, 25, 3))
            seconds = [s for _, s, _ in row["curve"]]
            assert seconds == sorted(seconds)
            assert seconds[-1] <= row["seconds"]
            assert (row["figure"], row["steps"], row["stop_reason"]) == ("accuracy", 24, "max_steps")
            # 71 wines are held out: 36 watched, 35 reported.
            assert (row["test"] * 35) == pytest.approx(round(row["test"] * 35), abs=1e-4)
            assert (row["best"] * 36) == pytest.approx(round(row["best"] * 36), abs=1e-4)
            assert row["best"] == max(f for _, _, f in row["curve"])
            assert (row["precision"], row["compiled"]) == ("float32", False)
        same = [r["curve"][0][2] for r in runs if r["recipe"] == "float"]
        assert len(same) == 2
        summary = [row for row in rows if row["kind"] == "summary"]
        assert [row["recipe"] for row in summary] == ["plain", "float", "naive", "forge"]
        assert summary[0]["failures"] == 2  # 24 steps at 1e-4 teach nothing
        assert (summary[1]["tuning_steps"], summary[0]["tuning_steps"]) == (11, 0)
        assert "float, plain settings, 0.9: 2 of 2 seeds did not hold it to the cap of 24 steps" in out
        assert "computed in float32, not compiled: all" in out
        page = Path(found["report"]).read_text()
        for name in ("plain", "float", "naive", "forge"):
            assert RECIPES[name].title in page
        assert "float32, not compiled" in page
        assert str(tmp_path) not in (tmp_path / "rows.jsonl").read_text()

    def test_a_run_stops_when_the_target_is_held(self, task_files, tmp_path, no_report):
        own = contest(task_files, tmp_path, max_steps=600)
        row = bench_run.run_once(own, "float", RECIPES["float"], FIGURES["wine", "float"], 0, [0.9])
        step, seconds = time_to(row["curve"], 0.9, higher=True)
        assert row["steps"] == step + 9 < 600
        assert 0 < seconds < row["seconds"]

    def test_the_reported_figure_is_of_the_best_weights_on_the_other_half(
        self, task_files, tmp_path, no_report, monkeypatch
    ):
        seen = {}
        real = bench_run.quality

        def kept(pipeline, loader):
            seen["model"], seen["figures"] = pipeline, real(pipeline, loader)
            return seen["figures"]

        monkeypatch.setattr(bench_run, "quality", kept)
        own = contest(task_files, tmp_path)
        bench_run.run_once(own, "float", RECIPES["float"], FIGURES["wine", "float"], 0)
        data = np.load(own.options["val_data_path"])
        inputs, targets = torch.from_numpy(data["inputs"]), data["targets"]
        batches = [np.arange(i, min(i + 32, len(targets))) for i in range(0, len(targets), 32)]
        other = np.concatenate([b[1::2] for b in batches])
        with torch.no_grad():
            guessed = seen["model"].model.eval()(inputs[other]).argmax(-1).numpy()
        assert seen["figures"]["accuracy"] == pytest.approx((guessed == targets[other]).mean())

    def test_naive_begins_with_the_weights_of_float(self, task_files, tmp_path):
        own = contest(task_files, tmp_path)
        models = []
        for name in ("float", "naive", "forge"):
            options = options_of(own, RECIPES[name], FIGURES["wine", name])
            pipeline = bench_run.make_pipeline(own, RECIPES[name], options, 3, name)
            models.append(pipeline.setup().model.state_dict())
        for model in models[1:]:
            assert all(torch.equal(model[key], value) for key, value in models[0].items())

    def test_without_figures_a_recipe_is_tuned_for_a_tenth(self, task_files, tmp_path, no_report):
        own = contest(task_files, tmp_path, max_steps=600)
        tuned = bench_tuning.tune_once(own, "float", 0)
        assert 0 < tuned.steps <= 60
        assert tuned.options["optimizer"] == "adamw"
        assert options_of(own, RECIPES["float"], tuned)["learning_rate"] == tuned.options["learning_rate"]

    def test_every_recipe_is_warm_before_the_first_clock(self, task_files, tmp_path, no_report, monkeypatch):
        """What is imported or compiled once must not be paid by whichever recipe goes first."""
        own, order = contest(task_files, tmp_path / "runs"), []
        make = bench_run.make_pipeline

        def kept(contest, recipe, options, seed, run):
            assert run != "warm-up" or options["trackers"] == []  # nothing is mirrored that nobody records
            pipeline = make(contest, recipe, options, seed, run)
            row = [recipe.title, run, 0]
            order.append(row)
            pipeline.register_callback("step_end", lambda step, _: row.__setitem__(2, step))
            return pipeline

        monkeypatch.setattr(bench_run, "make_pipeline", kept)
        bench.bench(own, ["plain", "forge"], [0], tuned=FIGURES, record=tmp_path / "r.jsonl", quiet=True)
        plain, forge = RECIPES["plain"].title, RECIPES["forge"].title
        assert [(title, run) for title, run, _ in order] == [
            (plain, "warm-up"), (forge, "warm-up"), (plain, "plain-seed0"), (forge, "forge-seed0"),
        ]  # fmt: skip
        assert [steps for *_, steps in order] == [3, 3, 24, 24]
        folders = {path.name for path in own.folder.iterdir() if path.is_dir()}
        assert folders == {"forge-seed0", "plain-seed0"}
        recorded = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
        assert len([row for row in recorded if row["kind"] == "run"]) == 2

    def test_a_figure_that_is_no_number_is_the_worst(self, task_files, tmp_path, no_report, monkeypatch):
        real = RealTimeValidator.run_validation

        def validate(validator, *args):
            return {**real(validator, *args), "accuracy": math.nan}

        monkeypatch.setattr(RealTimeValidator, "run_validation", validate)
        row = bench_run.run_once(
            contest(task_files, tmp_path), "float", RECIPES["float"], FIGURES["wine", "float"], 0, [0.0]
        )
        assert [figure for *_, figure in row["curve"]] == [-math.inf] * 8

    def test_when_every_run_fails_early_the_rows_stay_and_one_line_says_so(
        self, task_files, tmp_path, no_report, monkeypatch, capsys
    ):
        def setup(pipeline):
            raise RunFailed("no room")

        monkeypatch.setattr(TrainingPipeline, "setup", setup)
        record = tmp_path / "r.jsonl"
        found = bench.bench(
            contest(task_files, tmp_path), ["plain", "forge"], [0, 1], tuned=FIGURES, record=record
        )
        assert found["report"] is None
        rows = [json.loads(line) for line in record.read_text().splitlines()]
        runs = [row for row in rows if row["kind"] == "run"]
        assert [(r["error"], r["steps"], r["test"], r["precision"]) for r in runs] == [
            ("no room", 0, None, None)
        ] * 4
        assert [row["failures"] for row in rows if row["kind"] == "summary"] == [2, 2]
        (line,) = [line for line in capsys.readouterr().out.splitlines() if "no report" in line]
        assert "each of the 4 runs failed before its first step (no room)" in line

    def test_a_seed_that_was_tuned_on_is_not_reported(self, task_files, tmp_path):
        known = {key: replace(tuned, seeds=(2, 3)) for key, tuned in FIGURES.items()}
        with pytest.raises(UsageError, match=r"was tuned on seed 2 .* --first-seed 4$"):
            bench.bench(contest(task_files, tmp_path), ["float"], [0, 1, 2], tuned=known)

    def test_no_reported_seed_is_tuned_on(self, task_files, tmp_path, no_report, monkeypatch):
        own, tuned_on = contest(task_files, tmp_path), []

        def tune_once(contest, name, seed):
            tuned_on.append(seed)
            return FIGURES["wine", name]

        monkeypatch.setattr(bench, "tune_once", tune_once)
        found = bench.bench(own, ["float"], [3, 4], quiet=True)
        assert tuned_on
        assert not {run["seed"] for run in found["runs"]} & set(tuned_on)

    def test_one_seed_that_fails_early_does_not_end_the_tuning(self, task_files, tmp_path, monkeypatch):
        own = contest(task_files, tmp_path)
        own = Contest(**{**vars(own), "task": replace(TASKS["wine"], delayed=True)})

        def run_once(contest, name, recipe, tuned, seed, stop_at):
            return run_row(name, seed, [0.95] * (1 if seed == 2 else 4))

        monkeypatch.setattr(bench_tuning, "run_once", run_once)
        assert bench_tuning.tune_to_target(own, "float", 0).options == grid(RECIPES["float"], own.task)[0]
        monkeypatch.setattr(bench_tuning, "run_once", lambda *_: run_row("float", 0, [0.95]))
        with pytest.raises(UsageError, match="no run of the grid has four evaluations"):
            bench_tuning.tune_to_target(own, "float", 0)

    def test_a_grid_of_whole_runs(self, task_files, tmp_path, no_report, monkeypatch):
        own = contest(task_files, tmp_path)
        own = Contest(**{**vars(own), "task": replace(TASKS["wine"], delayed=True)})
        tried = [
            {"learning_rate": rate, "weight_decay": 0.0, "schedule": "constant"} for rate in (1e-6, 0.02)
        ]
        monkeypatch.setattr(bench_tuning, "grid", lambda recipe, task: tried)
        record = tmp_path / "tuned.jsonl"
        tuned = bench_tuning.tune_to_target(own, "float", 0, record)
        assert tuned.options == tried[1]
        rows = [json.loads(line) for line in record.read_text().splitlines()]
        assert [row["kind"] for row in rows] == [*["candidate"] * 6, "tuned"]
        assert all({"machine", "threads", "command", "precision", "compiled"} <= {*row} for row in rows[:-1])
        # Each on one seed, then the best few, here both, on two more; the best goes first.
        assert [row["seed"] for row in rows[:-1]] == [0, 0, 1, 2, 1, 2]
        assert [row["tried"] for row in rows[2:4]] == [tried[1]] * 2
        assert tuned.seeds == (0, 1, 2) == read_tuned(record)["wine", "float"].seeds
        assert (tuned.steps, tuned.trials) == (sum(row["steps"] for row in rows[:-1]), 6)
        assert read_tuned(record)["wine", "float"].options == tried[1]


class TestOptions:
    @pytest.mark.parametrize("bf16_is_faster", [True, False])
    def test_one_precision_for_all_recipes_measured_once(self, tmp_path, monkeypatch, bf16_is_faster):
        asked = []
        monkeypatch.setattr(hardware, "bf16_is_faster_on_this_cpu", lambda: asked.append(1) or bf16_is_faster)
        own = built_in("wine", str(tmp_path), device="cpu")
        assert {options_of(own, RECIPES[name], None)["use_amp"] for name in SIDE_BY_SIDE} == {bf16_is_faster}
        assert options_of(own, RECIPES["float_bf16"], None)["use_amp"] is True
        assert len(asked) == 1
        assert built_in("wine", str(tmp_path), device="cpu", use_amp=False).options["use_amp"] is False

    def test_a_schedule_comes_with_its_own_lengths(self, task_files, tmp_path):
        own = contest(task_files, tmp_path, schedule="phases", acceleration_steps=5, early_stopping=True)
        plain = options_of(own, RECIPES["plain"], None)
        assert "acceleration_steps" not in plain
        assert (plain["schedule"], plain["early_stopping"]) == ("constant", False)
        assert options_of(own, RECIPES["float_muon"], None)["acceleration_steps"] == 5

    def test_the_filter_is_the_recipes_affair(self, task_files, tmp_path):
        tuned = Tuned(options={"learning_rate": 0.1, "use_grokfast": False})
        assert (
            options_of(contest(task_files, tmp_path), RECIPES["forge_filter"], tuned)["use_grokfast"] is True
        )

    def test_tuned_for_more_steps_than_the_cap(self, task_files, tmp_path):
        with pytest.raises(UsageError, match="tuned for 300 steps and the cap is 24"):
            options_of(contest(task_files, tmp_path), RECIPES["forge"], Tuned(options={"max_steps": 300}))

    def test_a_configuration_gives_up_what_recipes_decide(self, task_files, tmp_path):
        train, val = task_files()
        path = tmp_path / "mine.yaml"
        values = {"train_data_path": train, "val_data_path": val, "learning_rate": 0.5, "batch_size": 16}
        path.write_text(yaml.safe_dump(values))
        found = from_config(str(path), max_steps=50)
        assert (found.name, found.options["batch_size"], found.options["max_steps"]) == ("mine", 16, 50)
        assert "learning_rate" not in found.options
        del values["val_data_path"]
        path.write_text(yaml.safe_dump(values))
        with pytest.raises(UsageError, match="has no val_data_path"):
            from_config(str(path))


class TestHalves:
    class Loader(list):
        def description(self):
            return {"samples": 0}

    def batches(self, sizes):
        start = 0
        for size in sizes:
            index = torch.arange(start, start + size)
            yield {"input": index.float(), "target": index, "index": index}
            start += size

    @pytest.mark.parametrize("in_order", [True, False])
    @pytest.mark.parametrize("sizes", [(4, 4, 3), (8, 1), (5,)])
    def test_nothing_is_in_both_and_nothing_is_lost(self, in_order, sizes):
        loader = self.Loader(self.batches(sizes))
        watched, reported = bench_run.halves(loader, in_order=in_order)
        left, right = ([int(i) for b in half for i in b["index"]] for half in (watched, reported))
        assert sorted(left + right) == list(range(sum(sizes)))
        assert not set(left) & set(right)
        assert watched.description()["samples"] == len(left)
        if in_order and len(sizes) > 1:
            assert max(left) < min(right)

    def test_too_little_to_halve(self):
        for loader in (None, self.Loader(self.batches([1]))):
            with pytest.raises(UsageError, match="cannot be halved"):
                bench_run.halves(loader, in_order=False)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "takes a CONFIG.yaml or --task NAME, and neither was given"),
        (["a.yaml", "--task", "digits"], "both were given"),
        (["--task", "digit"], "did you mean 'digits'"),
        (["--task", "wine", "--seeds", "0"], "--seeds 0 is not above 0"),
        (["--task", "wine", "--recipes", "frge"], "recipe 'frge' is unknown; did you mean 'forge'"),
        (["--task", "wine", "--recipes", "forge", "--target", "float"], "add it to --recipes"),
        (["--task", "wine", "--target", "flaot"], "recipe 'flaot' is unknown"),
        (["--task", "wine", "--tuned", "none.jsonl"], "none.jsonl does not exist"),
        (["none.yaml"], "does not exist"),
    ],
)
def test_mistakes_are_one_line(words, said, capsys):
    assert main(["bench", *words]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1
    assert said in err[0]


def test_a_configuration_brings_no_figure_of_the_filter(tmp_path):
    """Recipes say what the filter is; a figure of the user's would change some of them and not others."""
    path = tmp_path / "run.yaml"
    path.write_text(
        "train_data_path: a.npz\nval_data_path: b.npz\nmax_steps: 9\ngrokfast_average: bfloat16\n"
        "grokfast_unit_gain: true\nfilter: ma\nuse_grokfast: true\n"
    )
    options = from_config(str(path)).options
    assert not [name for name in options if "grokfast" in name or name == "filter"]
    assert options["max_steps"] == 9
