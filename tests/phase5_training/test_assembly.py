"""That the options about data reach what reads them, and what "auto" comes to."""

import json
from types import MappingProxyType

import pytest
import torch
from torch import nn

from phase4_bitnet import BitLinear, build_model
from phase5_training.assembly import (
    data_config,
    filter_notices,
    monitor_of,
    optimizer_of,
    torch_optimizers,
)
from phase5_training.config import TrainingConfig
from phase5_training.defaults import grokfast_config
from phase5_training.distributed import Ranks
from phase5_training.errors import DataError, UsageError
from phase5_training.loss_registry import build_loss
from phase5_training.muon import ITERATIONS, iteration_flops
from phase5_training.pipeline.data_config import DataConfig

pytestmark = pytest.mark.usefixtures("no_report")

# What DataConfig has and a run has not: figures of reading that do not change what is learned, which part of
# each batch a process takes, and what kind of inputs the model's name stands for.
NOT_OPTIONS = {"shuffle_buffer", "memory_limit_mb", "rank", "world_size", "reads"}


def written(path, samples):
    path.write_text(json.dumps({"samples": samples}))
    return path


def test_every_field_of_the_data_is_an_option_and_is_passed_on():
    given = {
        "batch_size": 8, "num_workers": 1, "cache_size": 3, "streaming": True, "quality_threshold": 0.5,
        "validation_split": 0.2, "seed": 4, "shuffle": False, "drop_last": True, "max_length": 6,
        "tokenizer": "t.json", "task": "regression", "invalid_records": "drop", "input_kind": "features",
        "pad_id": 7, "data_timeout": 9.0, "record_policies": {"duplicate": "drop"},
        "pack_text": True, "bucket_by_length": True, "inputs_path": "x", "targets_path": "y", "cache_mb": 5,
        "max_dropped_share": 0.5, "num_classes": 3,
    }  # fmt: skip
    fields = {name.removeprefix("data_"): value for name, value in given.items()}
    assert set(fields) == set(DataConfig.__dataclass_fields__) - NOT_OPTIONS
    made = data_config(TrainingConfig(**given), split=True)
    assert {name: getattr(made, name) for name in fields} == fields
    assert data_config(TrainingConfig(), split=False) == DataConfig()


@pytest.mark.parametrize("name", ["null.json", "nan.jsonl"])
def test_a_bad_record_stops_the_run_or_is_dropped_and_listed(pipeline, tmp_path, runs, name):
    """JSON has no NaN: a file as one document says null, and a line with the word is one bad record."""
    samples = [{"input": [float(i), 1.0], "target": i % 2} for i in range(40)]
    path = written(tmp_path / "null.json", samples)
    if name == "nan.jsonl":
        samples[7]["input"][1] = float("nan")
        path = tmp_path / name
        path.write_text("\n".join(map(json.dumps, samples)))
    else:
        path.write_text(path.read_text().replace("[7.0, 1.0]", "[7.0, null]"))
    with pytest.raises(DataError, match=f"{name} record 7"):
        pipeline("mlp", path, epochs=1).run()
    result = pipeline("mlp", path, epochs=1, invalid_records="drop").run()
    assert result.success
    lines = (runs / "run" / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines] == [7]


def test_whole_numbers_are_features_where_the_run_says_so(pipeline, tmp_path):
    path = written(tmp_path / "w.json", [{"input": [i, i % 3], "target": i % 2} for i in range(40)])
    assert pipeline("auto", path, experiment_name="tokens").setup().spec.input_kind == "tokens"
    run = pipeline("mlp", path, input_kind="features", experiment_name="features").setup()
    assert run.spec.input_kind == "features"
    assert next(iter(run.train_loader))["input"].dtype == torch.float32


def test_token_lists_of_different_lengths_need_a_pad_id(pipeline, tmp_path):
    samples = [{"input": [1 + i % 5] * (1 + i % 4), "target": i % 2} for i in range(40)]
    path = written(tmp_path / "ragged.json", samples)
    small = {"model_options": {"dim": 16, "layers": 1, "heads": 2}}
    with pytest.raises((DataError, UsageError), match="pad_id"):
        pipeline("decoder", path, **small).setup()
    run = pipeline("decoder", path, pad_id=9, **small).setup()
    assert any((batch["input"] == 9).any() for batch in run.train_loader)
    own = nn.Sequential(nn.Embedding(6, 8), nn.Flatten(), nn.LazyLinear(2))
    with pytest.raises(
        UsageError, match=r"^padding is token 9 and the model embeds 6 tokens .*vocab_size=10"
    ):
        pipeline(own, path, pad_id=9, use_bitnet=False, experiment_name="own").setup()


@pytest.mark.parametrize(
    ("task", "loss", "named", "expected"),
    [
        ("classification", "classification", None, "accuracy"),
        ("classification", "classification", "loss", "loss"),
        ("next_token", "next_token", None, "loss"),
        ("regression", "mse", None, "loss"),
        ("classification", lambda outputs, targets: outputs.sum(), None, "loss"),
    ],
)
def test_accuracy_decides_for_classes_unless_another_figure_is_named(task, loss, named, expected):
    assert monitor_of(TrainingConfig(monitor=named), task, build_loss(loss)) == expected


class TestOptimizerOf:
    """ "auto" against the operations counted one product at a time."""

    @staticmethod
    def counted(m: int, n: int, steps: int = 5) -> int:
        """What muon.orthogonalize multiplies, product by product, m <= n."""
        product = lambda a, b, c: 2 * a * b * c  # noqa: E731
        total = product(m, n, m)
        for step in range(steps):
            total += product(m, m, m)
            last = step == steps - 1
            if n >= 1.5 * m:
                total += product(m, m, m) * (step > 0) + 2 * product(m, m, m) * (not last)
            elif not last:
                total += product(m, m, n) + product(m, n, m)
        return total + product(m, m, n)

    @pytest.mark.parametrize("shape", [(3, 3), (4, 5), (2, 3), (8, 100), (100, 8)])
    @pytest.mark.parametrize("steps", [1, 3, 5])
    def test_the_operations_of_an_iteration(self, shape, steps):
        assert iteration_flops(*shape, steps) == self.counted(*sorted(shape), steps)

    def test_fewer_iterations_are_counted(self):
        model = nn.Sequential(BitLinear(100, 100), nn.Linear(100, 3))
        batch = {"input": torch.zeros(400, 100)}
        names = [
            optimizer_of("auto", model, batch, torch.device("cpu"), Ranks(), steps)[0] for steps in (None, 1)
        ]
        assert names == ["adamw", "muon"]

    @pytest.mark.parametrize(("rows", "expected"), [(1, "adamw"), (400, "adamw"), (700, "muon")])
    def test_auto_is_muon_from_the_rows_on_that_pay_for_it(self, rows, expected):
        # 100 x 100 twice between an input and an output layer: 6 * rows * 10,000 against 54 million each.
        model = nn.Sequential(*(BitLinear(100, 100) for _ in range(2)), nn.Linear(100, 3))
        layers = [m for m in model if isinstance(m, BitLinear)]
        share = sum(self.counted(100, 100) for _ in layers) / (len(layers) * 6 * rows * 10_000)
        assert (share <= 1) == (expected == "muon")
        batch = {"input": torch.zeros(rows, 100)}
        name, said = optimizer_of("auto", model, batch, torch.device("cpu"), Ranks())
        assert name == expected
        assert said == [
            f"optimizer {name}: Muon's iteration would be {share:.2g} times the products of a step"
        ]
        assert not any(m._forward_pre_hooks for m in model.modules())

    def test_every_position_of_a_sequence_is_a_row(self):
        model = build_model("decoder", vocab_size=9, dim=32, layers=1, heads=2)
        one, many = (
            optimizer_of(
                "auto", model, {"input": torch.zeros(shape, dtype=torch.long)}, torch.device("cpu"), Ranks()
            )
            for shape in ((4, 1), (64, 16))
        )
        assert (one[0], many[0]) == ("adamw", "muon")

    def test_what_is_named_stays(self):
        model, inner = nn.Linear(2, 2), object()
        for given in ("muon", "adamw", inner):
            assert optimizer_of(given, model, {}, torch.device("cpu"), Ranks()) == (given, [])

    def test_without_a_hidden_matrix_nothing_is_decided(self):
        batch = {"input": torch.zeros(4, 2)}
        assert optimizer_of("auto", nn.Linear(2, 2), batch, torch.device("cpu"), Ranks()) == ("auto", [])


class TestFilterNotices:
    @pytest.mark.parametrize(
        ("options", "steps", "validated", "said"),
        [
            ({}, 100, False, None),
            ({"grokfast_alpha": 0.9}, 100, False, None),
            ({"use_grokfast": True}, 501, True, None),
            ({"use_grokfast": True}, 500, True, "the first is at step 500 of 500; lower eval_interval"),
            ({"filter": "auto"}, 9000, False, "there are no validation data; give some"),
        ],
    )
    def test_a_filter_that_never_acts_is_told(self, options, steps, validated, said):
        config = TrainingConfig(**options)
        found = filter_notices(grokfast_config(config), config, steps, validated=validated)
        assert len(found) == (said is not None)
        assert all(said in line and "filter=auto stays off" in line for line in found)

    def test_a_run_says_it(self, pipeline, task_files, no_report):
        run = pipeline("mlp", task_files()[0], validation_split=0.0, max_steps=1, use_grokfast=True).setup()
        assert any("filter=auto stays off" in notice for notice in run.notices)


class TestTorchOptimizers:
    NAMED = MappingProxyType(
        {"betas": [0.7, 0.8], "momentum": 0.6, "ns_steps": 2, "ns_coefficients": "polar_express"}
    )

    @staticmethod
    def made(optimizer, **options):
        model = nn.Sequential(BitLinear(4, 4), nn.Linear(4, 3))
        loss = build_loss("mse")
        given = "muon" if optimizer == "auto" else optimizer
        config = TrainingConfig(optimizer=optimizer if isinstance(optimizer, str) else "auto", **options)
        return torch_optimizers(given, model, loss, config, 0.1, 0.0)

    def test_what_is_named_reaches_the_optimizers(self):
        muon, adamw = self.made("muon", **self.NAMED)
        assert [(g["momentum"], g["ns_steps"]) for g in muon.param_groups] == [(0.6, 2)]
        assert [g["ns_coefficients"] for g in muon.param_groups] == [ITERATIONS["polar_express"]]
        assert {g["betas"] for g in adamw.param_groups} == {(0.7, 0.8)}
        (sgd,) = self.made("sgd", momentum=0.6)
        assert {g["momentum"] for g in sgd.param_groups} == {0.6}

    def test_what_is_not_named_is_the_default(self):
        muon, adamw = self.made("muon")
        assert [(g["momentum"], g["ns_steps"]) for g in muon.param_groups] == [(0.95, 5)]
        assert [g["ns_coefficients"] for g in muon.param_groups] == [(3.4445, -4.775, 2.0315)]
        assert {g["betas"] for g in adamw.param_groups} == {(0.9, 0.98)}
        assert {g["momentum"] for g in self.made("sgd")[0].param_groups} == {0.9}

    @pytest.mark.parametrize(
        ("optimizer", "name"),
        [
            ("adamw", "momentum"),
            ("adamw", "ns_steps"),
            ("adamw", "ns_coefficients"),
            ("sgd", "ns_steps"),
            ("sgd", "betas"),
        ],
    )
    def test_what_an_optimizer_does_not_have_is_refused(self, optimizer, name):
        with pytest.raises(
            UsageError, match=f"^optimizer {optimizer} has no {name}, which is for .*leave it out"
        ):
            self.made(optimizer, **{name: self.NAMED[name]})

    def test_auto_takes_all_of_them(self):
        assert len(self.made("auto", **self.NAMED)) == 2

    def test_an_instance_has_its_own(self):
        with pytest.raises(UsageError, match="momentum belongs to the optimizer instance"):
            self.made(torch.optim.SGD(nn.Linear(2, 2).parameters()), momentum=0.5)

    def test_a_resumed_run_keeps_them(self, pipeline, task_files):
        options = {"experiment_name": "part", "optimizer": "adamw", "batch_size": 16}
        pipeline("mlp", *task_files(), betas=[0.8, 0.9], max_steps=2, **options).run()
        again = pipeline(
            "mlp", *task_files(), betas=[0.8, 0.9], max_steps=4, auto_resume=True, **options
        ).setup()
        assert {g["betas"] for g in again.optimizer.param_groups} == {(0.8, 0.9)}
        assert again.run().metrics["steps"] == 4
        with pytest.raises(UsageError, match=r"started with betas=\[0.8, 0.9\] and cannot go on with"):
            pipeline("mlp", *task_files(), betas=[0.5, 0.9], auto_resume=True, **options).setup()

    def test_a_run_whose_auto_took_another_optimizer_goes_on(self, pipeline, task_files):
        """config.yaml names the optimizer that was taken, and forge resume reads it."""
        options = {"experiment_name": "part", "batch_size": 8, "ns_steps": 3}
        pipeline("mlp", *task_files(), optimizer="auto", max_steps=2, **options).run()
        for optimizer in ("auto", "adamw"):
            again = pipeline(
                "mlp", *task_files(), optimizer=optimizer, max_steps=4, auto_resume=True, **options
            )
            assert again.run().metrics["steps"] == 4
