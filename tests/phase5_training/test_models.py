import contextlib
import sys
import textwrap
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from phase4_bitnet import (
    build_model,
    convert_model_to_bitnet,
    load_compressed_model,
    save_compressed_model,
    ternary_layers,
)
from phase4_bitnet.layers import BitLinear
from phase5_training.config import parse_config
from phase5_training.errors import UsageError
from phase5_training.loss_registry import build_loss
from phase5_training.models import (
    check_against_data,
    check_monitor,
    describe_layers,
    describe_size,
    prepare_model,
)
from phase5_training.pipeline.formats.spec import DataSpec, TargetSpec

CPU = torch.device("cpu")
FEATURES = DataSpec(
    task="classification", input_kind="features", input_shape=(4,), input_dtype="float32",
    target_kind="class", num_classes=3, label_range=(0, 2),
)  # fmt: skip
TOKENS = DataSpec(
    task="next_token", input_kind="tokens", input_shape=(None,), input_dtype="int64", target_kind="tokens",
    vocab_size=256, max_token=120, max_length=20, ragged=True, tokenizer="bytes",
)  # fmt: skip
BATCH = {"input": torch.randn(5, 4), "target": torch.tensor([0, 1, 2, 0, 1])}


def net(outputs=3, inputs=4):
    return nn.Sequential(nn.Linear(inputs, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, outputs))


def prepare(given, spec=FEATURES, **options):
    return prepare_model(given, parse_config(options), spec)


class TestPrepare:
    def test_a_module_is_made_ternary_in_place(self):
        given = net()
        model = prepare(given, weight_bits=1, quantization_mode="stochastic", activation_bits=None)
        assert model is given
        layers = dict(ternary_layers(model))
        assert set(layers) == {"0", "2"}
        for layer in layers.values():
            settings = (layer.weight_bits, layer.quantization_mode, layer.activation_bits)
            assert settings == (1, "stochastic", None)

    def test_float_layers_stay_float(self):
        assert [n for n, _ in ternary_layers(prepare(net(), float_layers=["0", "4"]))] == ["2"]

    def test_use_bitnet_false_changes_nothing(self):
        assert not list(ternary_layers(prepare(net(), use_bitnet=False)))

    def test_the_output_of_phase_4(self):
        model = build_model("mlp", in_features=4, num_outputs=3)
        metrics = {"compression_ratio": 8.2, "speedup": 3.8}
        assert prepare({"model": model, "metrics": metrics}) is model
        with pytest.raises(UsageError, match="without a module under 'model'"):
            prepare({"metrics": metrics})

    @pytest.mark.parametrize("given", ["module", "converted", "mlp"])
    def test_the_arithmetic_of_the_gradients_reaches_every_layer(self, given):
        model = {"module": net, "converted": lambda: convert_model_to_bitnet(net()), "mlp": lambda: "mlp"}[
            given
        ]
        ours = prepare(model(), backward="int8")
        assert {layer.backward for _, layer in ternary_layers(ours)} == {"int8"}
        if given == "mlp":
            assert ours.config.backward == "int8"
        assert {layer.backward for _, layer in ternary_layers(prepare(model()))} == {"auto"}

    def test_a_ternary_model_takes_the_rounding_and_can_be_stored_with_it(self, tmp_path):
        model = prepare(build_model("mlp", in_features=4, num_outputs=3), quantization_mode="stochastic")
        assert {layer.quantization_mode for _, layer in ternary_layers(model)} == {"stochastic"}
        save_compressed_model(model, tmp_path / "m")
        loaded = load_compressed_model(tmp_path / "m")
        assert {layer.quantization_mode for _, layer in ternary_layers(loaded)} == {"stochastic"}

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"weight_bits": 1},
                r"layer .* has 1\.58-bit weights and weight_bits=1\.0; use weight_bits=1\.58",
            ),
            (
                {"use_bitnet": False},
                "use_bitnet=False and the model has ternary layers; give the float model",
            ),
            ({"float_layers": ["layers.0"]}, "the model is ternary already; leave it out"),
            (
                {"model_options": {"hidden": [8]}},
                "model_options build a mlp or decoder or llama, and the model is 'MLP'; leave them out",
            ),
        ],
    )
    def test_what_a_ternary_model_cannot_follow_is_refused(self, options, message):
        with pytest.raises(UsageError, match=message):
            prepare(build_model("mlp", in_features=4, num_outputs=3), **options)

    def test_nothing_to_convert_names_both_ways_out(self):
        with pytest.raises(UsageError, match=r"float_layers=\[\].*or use_bitnet=False to train it in float"):
            prepare(nn.Sequential(nn.Linear(4, 3)))

    def test_a_folder_or_session_that_was_saved(self, tmp_path, monkeypatch):
        model = build_model("mlp", in_features=4, num_outputs=3)
        save_compressed_model(model, "mine", root=tmp_path)
        monkeypatch.setenv("FORGE_SESSIONS", str(tmp_path))
        for name in (str(tmp_path / "mine"), "mine"):
            found = prepare(name)
            assert found.training
            assert torch.equal(found.eval()(BATCH["input"]), model.eval()(BATCH["input"]))

    def test_a_function_of_the_users_own(self, tmp_path, monkeypatch):
        (tmp_path / "own_models.py").write_text(
            textwrap.dedent(
                """
                from torch import nn
                def make():
                    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
                def broken():
                    raise ZeroDivisionError("no layers")
                def needs(width):
                    return nn.Linear(width, 1)
                def text():
                    return "model"
                """
            )
        )
        (tmp_path / "own_faulty.py").write_text("def make(:\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        assert isinstance(prepare("own_models:make")[0], BitLinear)
        for name, message in {
            "own_models:made": "cannot be imported: AttributeError: module 'own_models' has no attribute",
            "own_modelz:make": "No module named 'own_modelz'; is its folder on PYTHONPATH?",
            "own_faulty:make": "cannot be imported: SyntaxError",
            "own_models:broken": "failed: ZeroDivisionError: no layers; wanted a function without arguments",
            "own_models:needs": "missing 1 required positional argument",
            "own_models:text": "returned a str; wanted an nn.Module",
            ":make": "cannot be imported",
        }.items():
            with pytest.raises(UsageError) as caught:
                prepare(name)
            assert message in str(caught.value)
            assert "\n" not in str(caught.value)
        sys.modules.pop("own_models")

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("decodr", "model 'decodr' is unknown; did you mean 'decoder'?"),
            (
                "no/such/folder",
                "model 'no/such/folder' is unknown; use auto, mlp, decoder, llama, the folder",
            ),
        ],
    )
    def test_an_unknown_name(self, name, message):
        with pytest.raises(UsageError) as caught:
            prepare(name)
        assert message in str(caught.value)

    def test_options_of_a_model_that_takes_none(self, tmp_path):
        save_compressed_model(build_model("mlp", in_features=4, num_outputs=3), tmp_path / "m")
        for name in (str(tmp_path / "m"), "own:make"):
            with pytest.raises(UsageError, match=f"and the model is '{name}'; leave them out"):
                prepare(name, model_options={"hidden": [8]})

    def test_another_thing_than_a_model(self):
        with pytest.raises(UsageError, match=r"model is a int; pass an nn\.Module or a name"):
            prepare(3)


class TestFromData:
    """A reference architecture takes its sizes from the data."""

    def test_auto_is_mlp_for_features_and_decoder_for_tokens(self):
        model = prepare("auto", model_options={"hidden": [8, 8]}, weight_bits=1)
        assert model(BATCH["input"]).shape == (5, 3)
        assert (model.config.architecture, model.config.weight_bits) == ("mlp", 1)
        small = {"dim": 16, "layers": 1, "heads": 2}
        decoder = prepare("auto", TOKENS, model_options=small)
        assert decoder(torch.zeros(2, 24, dtype=torch.long)).shape == (2, 24, 256)

    def test_use_bitnet_false_gives_the_float_twin(self):
        assert not list(ternary_layers(prepare("mlp", use_bitnet=False)))

    def test_options_of_the_user_win(self):
        assert prepare("mlp", model_options={"num_outputs": 7}).config.num_outputs == 7

    @pytest.mark.parametrize(
        ("name", "spec", "options", "message"),
        [
            ("mlp", FEATURES, {"hiden": 3}, "mlp has no option 'hiden'; did you mean 'hidden'?"),
            ("decoder", FEATURES, {}, "reads token ids and the inputs are features; use model='mlp'"),
            ("llama", FEATURES, {}, "reads token ids and the inputs are features; use model='mlp'"),
            ("mlp", TOKENS, {}, "the mlp reads features and the inputs are text; use model='decoder'"),
            ("mlp", replace(TOKENS, tokenizer=None), {}, "input_kind='features' where they are quantities"),
        ],
    )  # fmt: skip
    def test_what_does_not_go_together(self, name, spec, options, message):
        with pytest.raises(UsageError) as caught:
            prepare(name, spec, model_options=options)
        assert message in str(caught.value)

    def test_several_targets_need_the_users_own_model(self):
        spec = DataSpec(
            task="multi_task", input_kind="features", input_shape=(4,), input_dtype="float32",
            target_kind="multi", targets={"a": TargetSpec(kind="class", num_classes=2)},
        )  # fmt: skip
        with pytest.raises(UsageError, match="need a model of your own that returns a dict"):
            prepare("auto", spec)


class Fn(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.fn(x)


class TestCheckAgainstData:
    def check(self, model, batch=BATCH, spec=FEATURES, loss="classification", **options):
        check_against_data(model, build_loss(loss, model=model, **options), batch, spec, CPU)

    def test_leaves_modes_and_generator_as_they_were(self):
        noisy = Fn(lambda x: x + torch.randn_like(x))  # in eval mode too
        model = nn.Sequential(net(), noisy).train()
        model[0].eval()
        state = torch.get_rng_state()
        self.check(model)
        assert (model.training, model[0].training, model[1].training) == (True, False, True)
        assert torch.equal(state, torch.get_rng_state())

    @pytest.mark.parametrize(
        ("device", "kept"), [("cpu", []), ("cuda:1", [1]), ("cuda", [3])], ids=["cpu", "cuda:1", "cuda"]
    )
    def test_keeps_the_generator_of_the_device(self, monkeypatch, device, kept):
        seen = []

        def fork(devices):
            seen.append(list(devices))
            return contextlib.nullcontext()

        monkeypatch.setattr(torch.random, "fork_rng", fork)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
        monkeypatch.setattr("phase5_training.models.to_device", lambda value, device: value)
        model = net()
        batch = {"input": torch.randn(4, 4), "target": torch.tensor([0, 1, 2, 0])}
        check_against_data(model, build_loss("cross_entropy"), batch, FEATURES, torch.device(device))
        assert seen == [kept]

    @pytest.mark.cuda
    def test_leaves_the_generator_of_a_gpu_as_it_was(self):
        device = torch.device("cuda")
        model = nn.Sequential(net(), Fn(lambda x: x + torch.randn_like(x))).to(device)
        state = torch.cuda.get_rng_state()
        batch = {"input": torch.randn(4, 4), "target": torch.tensor([0, 1, 2, 0])}
        check_against_data(model, build_loss("cross_entropy"), batch, FEATURES, device)
        assert torch.equal(state, torch.cuda.get_rng_state())

    @pytest.mark.parametrize(
        ("model", "message"),
        [
            (
                net(outputs=2),
                r"labels go from 0 to 2 and the model has 2 outputs .*; build it with 3 outputs",
            ),
            (net(inputs=5), r"cannot take the data: input of shape \(2, 4\)"),
            (Fn(lambda x: "text"), "the model returned a str; wanted a tensor"),
            (Fn(lambda x: torch.zeros(2, 7, 3)), r"gives shape \(2, 7, 3\) for labels of shape \(2,\)"),
            (Fn(lambda x: x.logits), "AttributeError"),
        ],
    )
    def test_a_model_that_does_not_fit(self, model, message):
        with pytest.raises(UsageError, match=message) as caught:
            self.check(model)
        assert "\n" not in str(caught.value)

    def test_regression_outputs(self):
        spec = SimpleNamespace(
            task=None,
            input_kind="features",
            target_kind="float",
            label_range=None,
            max_token=None,
            targets={},
        )
        batch = {"input": torch.randn(5, 4), "target": torch.randn(5)}
        self.check(net(outputs=1), batch, spec, "mse")
        with pytest.raises(UsageError, match="give it 1 outputs per sample"):
            self.check(net(outputs=2), batch, spec, "mse")

    def test_tokens_past_the_embedding(self):
        model = nn.Sequential(nn.Embedding(100, 8), nn.Linear(8, 256))
        batch = {"input": torch.zeros(2, 8).long(), "target": torch.zeros(2, 8).long()}
        with pytest.raises(UsageError, match=r"hold token 120 and the model embeds 100 .*vocab_size=121"):
            self.check(model, batch, TOKENS, "next_token")

    def test_several_targets(self):
        spec = SimpleNamespace(
            task=None,
            input_kind="features", target_kind="multi", max_token=None,
            targets={"a": TargetSpec(kind="class", label_range=(0, 4)), "b": TargetSpec(kind="float")},
        )  # fmt: skip
        batch = {
            "input": torch.randn(5, 4),
            "target": {"a": torch.tensor([0, 1, 4, 3, 2]), "b": torch.randn(5)},
        }
        tasks = {"a": "classification", "b": "mse"}
        good = Fn(lambda x: {"a": torch.zeros(2, 5), "b": torch.zeros(2, 1)})
        self.check(good, batch, spec, "multi_task", tasks=tasks)
        for outputs, message in (
            (torch.zeros(2, 5), "the data have targets a, b; the model must return a dict with those keys"),
            ({"a": torch.zeros(2, 5)}, "must return a dict with those keys"),
            ({"a": torch.zeros(2, 3), "b": torch.zeros(2)}, "labels go from 0 to 4 and the model has 3"),
        ):
            with pytest.raises(UsageError, match=message):
                self.check(Fn(lambda x, o=outputs: o), batch, spec, "multi_task", tasks=tasks)

    def test_a_loss_of_ones_own_decides_about_the_outputs(self):
        two = {"input": torch.randn(5, 4), "target": torch.tensor([0, 1, 1, 0, 1])}

        def binary(outputs, targets):
            return nn.functional.binary_cross_entropy_with_logits(outputs[:, 0], targets.float())

        self.check(net(outputs=1), two, loss=binary)
        with pytest.raises(UsageError, match="the model and its loss cannot take the data"):
            self.check(net(outputs=1), two, loss=lambda outputs, targets: outputs @ targets)
        with pytest.raises(UsageError, match=r"returned shape \(2,\); wanted a 0-dim tensor"):
            self.check(net(outputs=1), two, loss=lambda outputs, targets: outputs[:, 0])


def test_monitor_has_to_be_measured():
    figures = {"loss": 1.0, "accuracy": None, "mse": 1.0, "r2": None, "samples": 3, "units": 3}
    for name in ("loss", "mse", "r2"):
        check_monitor(name, figures)
    for name, hint in (
        ("mze", "did you mean 'mse'?"),
        ("accuracy", "use one of loss, mse, r2"),
        ("samples", ""),
    ):
        with pytest.raises(UsageError, match=f"monitor='{name}' is not measured for this task") as caught:
            check_monitor(name, figures)
        assert hint in str(caught.value)


def test_descriptions():
    model = prepare(net())
    rows = describe_layers(model)
    assert [(r["name"], r["shape"], r["bits"]) for r in rows] == [("0", [8, 4], 1.58), ("2", [8, 8], 1.58)]
    zeros = [(layer.codes == 0).sum().item() / layer.codes.numel() for _, layer in ternary_layers(model)]
    assert [r["zero_share"] for r in rows] == pytest.approx(zeros)
    size = describe_size(model)
    assert size["parameters"] == 4 * 8 + 8 + 8 * 8 + 8 + 8 * 3 + 3
    assert size["ternary_parameters"] == 4 * 8 + 8 * 8
    assert size["packed_mb"] == pytest.approx(((8 + 8 + 8 * 3 + 3) * 4 + 96 / 4) / 1e6)
    # Rows of 9 codes take 3 bytes each, not 2.25.
    odd = prepare(nn.Sequential(nn.Linear(9, 8, bias=False), nn.Linear(8, 3, bias=False)))
    assert describe_size(odd)["packed_mb"] == pytest.approx((8 * 3 * 4 + 8 * 3) / 1e6)


def test_a_ternary_layer_whose_weight_is_read_past_its_forward_is_named():
    class Past(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.used, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.used(nn.functional.linear(x, self.qkv.weight)))

    model = convert_model_to_bitnet(Past())
    batch = {"input": torch.randn(4, 4), "target": torch.tensor([0, 1, 2, 0])}
    with pytest.warns(UserWarning, match="1 ternary layers .* 'qkv' first"):
        check_against_data(model, build_loss("cross_entropy"), batch, FEATURES, CPU)
    assert not model.used._forward_pre_hooks


def test_identifiers_as_labels_are_refused_before_anything_is_allocated():
    spec = replace(FEATURES, num_classes=10**12 + 1, label_range=(0, 10**12))
    with pytest.raises(UsageError, match=r"labels go up to 1000000000000.*number the labels from 0"):
        prepare_model("mlp", parse_config({}), spec)


def test_nothing_to_predict_is_refused_with_the_remedy():
    model = build_model("decoder", vocab_size=256, dim=16, layers=1, heads=2, max_length=24)
    batch = {"input": torch.ones(2, 8, dtype=torch.long), "target": torch.full((2, 8), -100)}
    with pytest.raises(UsageError, match="raise max_length, or leave out the targets"):
        check_against_data(model, build_loss("next_token"), batch, TOKENS, CPU)
