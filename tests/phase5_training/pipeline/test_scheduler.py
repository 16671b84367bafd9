"""GrokfastScheduler: rates from the table, per group, on any object, and exact resume."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from oracles.schedule import phase_table
from phase5_training.errors import UsageError
from phase5_training.phases import SCHEDULES, PhaseSchedule, build_schedule
from phase5_training.pipeline.scheduler import GrokfastScheduler, GrokfastSchedulerConfig

PLAN = PhaseSchedule(total_steps=40, warmup_steps=4, acceleration_steps=10, consolidation_steps=6)


def optimizer(*rates: float, kind=torch.optim.AdamW) -> torch.optim.Optimizer:
    torch.manual_seed(0)
    return kind([{"params": [nn.Parameter(torch.randn(3))], "lr": rate} for rate in rates])


def test_rates_follow_the_table_from_the_first_step() -> None:
    opt = optimizer(0.1)
    scheduler = GrokfastScheduler(opt, PLAN)
    seen, phases, factors = [], [], []
    for _ in range(45):
        seen.append(opt.param_groups[0]["lr"])
        assert scheduler.get_lr() == seen[-1]
        phases.append(scheduler.get_current_phase().value)
        factors.append(scheduler.get_phase_multiplier())
        scheduler.step()
    want = [0.1 * f for f in phase_table(4, 10, 6, 40)]
    assert seen == pytest.approx(want + [want[-1]] * 5, rel=1e-12)
    assert phases == ["warmup"] * 4 + ["acceleration"] * 10 + ["consolidation"] * 6 + ["refinement"] * 25
    assert factors == [1.0] * 4 + [5.0] * 10 + [0.2] * 6 + [1.0] * 25
    assert scheduler.step_count == 45


def test_groups_keep_their_ratio() -> None:
    opt = optimizer(0.1, 0.01)
    scheduler = GrokfastScheduler(opt, PLAN)
    for _ in range(40):
        first, second = (group["lr"] for group in opt.param_groups)
        assert second == pytest.approx(first / 10, rel=1e-12)
        assert scheduler.get_last_lr() == [first, second]
        scheduler.step()


def test_a_base_rate_scales_the_groups_together() -> None:
    opt = optimizer(0.1, 0.01, 0.1)
    GrokfastScheduler(opt, GrokfastSchedulerConfig(base_lr=3e-3, total_steps=1800))
    assert [g["initial_lr"] for g in opt.param_groups] == pytest.approx([3e-3, 3e-4, 3e-3], rel=1e-12)
    assert opt.param_groups[0]["initial_lr"] == 3e-3
    assert opt.param_groups[0]["lr"] == 3e-3 / 100


def test_initial_lr_wins_over_base_lr() -> None:
    opt = optimizer(0.1)
    opt.param_groups[0]["initial_lr"] = 0.7
    scheduler = GrokfastScheduler(opt, PLAN, base_lr=1.0)
    assert scheduler.get_lr() == pytest.approx(0.7 / 4)


def test_any_object_with_param_groups_and_tensor_rates() -> None:
    rate = torch.tensor(0.5)
    owner = SimpleNamespace(param_groups=[{"lr": rate}])
    scheduler = GrokfastScheduler(owner, PLAN)
    assert owner.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(0.125)
    for _ in range(4):
        scheduler.step()
    assert float(rate) == pytest.approx(2.5)
    owner.param_groups.append({"lr": 0.2})
    scheduler.step()
    assert owner.param_groups[1]["lr"] == pytest.approx(1.0)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("stop", [0, 1, 7, 39])
def test_resume_equals_uninterrupted(name: str, stop: int) -> None:
    def run(opt, scheduler, steps):
        rates = []
        for _ in range(steps):
            for group in opt.param_groups:
                for p in group["params"]:
                    p.grad = p.detach().cos()
            opt.step()
            scheduler.step()
            rates.append(scheduler.get_last_lr())
        return rates

    plan = build_schedule(name, 40)
    whole_opt = optimizer(0.1, 0.03)
    whole = GrokfastScheduler(whole_opt, plan)
    want = run(whole_opt, whole, 40)

    first_opt = optimizer(0.1, 0.03)
    first = GrokfastScheduler(first_opt, plan)
    got = run(first_opt, first, stop)
    saved = json.loads(json.dumps(first.state_dict()))
    second_opt = optimizer(0.9, 0.9)  # what it was made with must not matter
    second = GrokfastScheduler(second_opt, plan)
    for mine, theirs in zip(second_opt.param_groups, first_opt.param_groups, strict=True):
        mine["params"][0].data.copy_(theirs["params"][0].data)
    second_opt.load_state_dict(first_opt.state_dict())
    second.load_state_dict(saved)
    assert second.step_count == stop
    got += run(second_opt, second, 40 - stop)
    assert got == want
    for mine, theirs in zip(second_opt.param_groups, whole_opt.param_groups, strict=True):
        assert torch.equal(mine["params"][0], theirs["params"][0])


def test_loading_sets_the_rate_without_the_optimizer_state() -> None:
    first = GrokfastScheduler(optimizer(0.1), PLAN)
    for _ in range(9):
        first.step()
    opt = optimizer(0.9)
    GrokfastScheduler(opt, PLAN).load_state_dict(first.state_dict())
    assert opt.param_groups[0]["lr"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: GrokfastSchedulerConfig(base_lr=0), "base_lr=0"),
        (lambda: GrokfastSchedulerConfig(base_lr=1.0, schedule="fases"), "did you mean 'phases'"),
        (lambda: GrokfastSchedulerConfig(base_lr=1.0, total_steps=9, warmup_steps=10), "total_steps=9"),
        (lambda: GrokfastScheduler(optimizer(0.1), {"base_lr": 1}), "config is dict"),
        (lambda: GrokfastScheduler(optimizer(0.0), PLAN, base_lr=0.1), "first parameter group's lr=0"),
        (lambda: GrokfastScheduler(SimpleNamespace(param_groups=[]), PLAN), "no parameter groups"),
        (lambda: GrokfastScheduler(optimizer(0.1), PLAN, base_lr=float("inf")), "base_lr=inf"),
        (
            lambda: GrokfastScheduler(optimizer(0.1), PLAN).load_state_dict(
                {"step_count": 1, "base_lrs": [0.1, 0.2]}
            ),
            "2 parameter groups and the optimizer 1",
        ),
    ],
)
def test_bad_use_is_refused(call, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        call()


def test_the_config_describes_the_whole_plan() -> None:
    config = GrokfastSchedulerConfig(
        base_lr=1.0,
        total_steps=100,
        warmup_steps=10,
        acceleration_steps=20,
        consolidation_steps=30,
        acceleration_multiplier=3.0,
        consolidation_multiplier=0.5,
        final_multiplier=0.25,
    )
    plan = config.build()
    want = phase_table(10, 20, 30, 100, 3.0, 0.5, 0.25)
    assert [plan.lr_multiplier(s) for s in range(100)] == pytest.approx(want, abs=1e-12)
