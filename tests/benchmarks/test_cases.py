"""What the benchmarks compare with is what it is said to be, and is compared like with like."""

import math

import pytest
import torch

from cases import CASES, Shape, choose, training_step
from phase4_bitnet.convert import hidden_linears

SMALL = Shape(width=64, layers=2, tokens=32)
# Ternary weights and int8 activations in the first forward; parq's layers are float until its first step.
QUANTIZED = [n for n, c in CASES.items() if c.kind in ("ternary peer", "forge") and not n.startswith("parq")]


@pytest.fixture(autouse=True)
def libraries(request):
    """Skip the cases of a library that is not installed."""
    name = request.node.callspec.params.get("name") if hasattr(request.node, "callspec") else None
    for module in CASES[name].imports if name else ():
        pytest.importorskip(module.partition(".")[0])


@pytest.mark.parametrize("name", list(CASES))
def test_a_step_trains_every_parameter(name):
    training = CASES[name].build(SMALL, "cpu")
    before = {n: p.detach().clone() for n, p in training.model.named_parameters()}
    step, _ = training_step(CASES[name], training, SMALL.batch("cpu"), compiled=False)
    step()
    still = [n for n, p in training.model.named_parameters() if torch.equal(p.detach(), before[n])]
    # A gain of one moves by the rate, which bf16 cannot add to one.
    assert not [n for n in still if "params" not in name or "norm" not in n]


@pytest.mark.parametrize("name", QUANTIZED)
def test_ternary_cases_compute_the_same_function(name):
    losses = {}
    for case in ("forge-float32", name):
        training = CASES[case].build(SMALL, "cpu")
        losses[case] = CASES[case].loss_function(training.model, "cpu")(*SMALL.batch("cpu")).item()
    assert math.isclose(losses[name], losses["forge-float32"], rel_tol=2e-3)
    plain = CASES["float-fp32"].build(SMALL, "cpu").model
    assert set(hidden_linears(plain)) == {n for n, _ in plain.named_modules() if n.endswith("_proj")}


def test_flops_are_six_a_weight_and_token_and_attention():
    shape = Shape(width=128, layers=3, tokens=512)
    model = CASES["float-fp32"].build(shape, "cpu").model
    matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    scores_and_values = 2 * 3 * 2 * 512 * 256 * 128 * 3  # two products, thrice their forward, 3 layers
    assert shape.flops == 6 * matrices * 512 + scores_and_values


def test_shape_refuses_a_ragged_batch():
    with pytest.raises(ValueError, match="tokens=300 is no multiple of the length 256"):
        Shape(width=64, layers=1, tokens=300)


def test_cases_are_chosen_by_name_or_beginning():
    assert choose(["naive", "forge-int8"], ()) == ["naive-fp32", "naive-bf16", "forge-int8"]
    assert choose([], ("float-fp32",)) == ["float-fp32"]
    with pytest.raises(SystemExit, match="nobody begins no case"):
        choose(["nobody"], ())
