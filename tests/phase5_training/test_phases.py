"""The schedules against a table written out by hand, and their properties."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oracles.schedule import cosine_tail, linear_tail, phase_table, shares
from phase5_training.errors import DataError, ForgeError, RunFailed, UsageError, nearest_match
from phase5_training.phases import SCHEDULES, DecaySchedule, Phase, PhaseSchedule, Schedule, build_schedule

lengths = st.integers(0, 60)


def table(schedule: Schedule, steps: int) -> list[float]:
    return [schedule.lr_multiplier(step) for step in range(steps)]


def spans(schedule: Schedule) -> dict[str, int]:
    return {phase.value: end - start for phase, start, end in schedule.boundaries()}


def test_default_figures_of_the_four_phases() -> None:
    plan = PhaseSchedule(total_steps=18_000)
    assert plan.boundaries() == [
        (Phase.WARMUP, 0, 1000),
        (Phase.ACCELERATION, 1000, 6000),
        (Phase.CONSOLIDATION, 6000, 8000),
        (Phase.REFINEMENT, 8000, 18_000),
    ]
    steps = (0, 999, 1000, 5999, 6000, 7999, 8000)
    assert [plan.lr_multiplier(s) for s in steps] == [0.001, 1.0, 5.0, 5.0, 0.2, 0.2, 1.0]
    assert [plan.multiplier(s) for s in steps] == [1.0, 1.0, 5.0, 5.0, 0.2, 0.2, 1.0]
    assert plan.phase(0) == "warmup"


@given(lengths, lengths, lengths, st.integers(1, 80), st.floats(0, 1), st.floats(0, 9), st.floats(0, 9))
def test_multipliers_match_the_table(w, a, c, rest, final, up, down) -> None:
    plan = PhaseSchedule(
        total_steps=w + a + c + rest,
        warmup_steps=w,
        acceleration_steps=a,
        consolidation_steps=c,
        acceleration_multiplier=up,
        consolidation_multiplier=down,
        final_multiplier=final,
    )
    want = phase_table(w, a, c, plan.total_steps, up, down, final)
    assert table(plan, plan.total_steps) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_decay_ends_at_the_last_step_and_stays(name: str) -> None:
    plan = build_schedule(name, 400)
    final = 1.0 if name == "constant" else 0.01
    assert plan.lr_multiplier(399) == pytest.approx(final, abs=1e-15)
    assert plan.lr_multiplier(400) == plan.lr_multiplier(10_000) == pytest.approx(final, abs=1e-15)
    assert name == "constant" or plan.lr_multiplier(398) > final
    assert plan.phase(10_000) is Phase.REFINEMENT


@given(st.sampled_from(SCHEDULES), st.integers(1, 3000))
def test_every_schedule_keeps_the_protocol(name: str, total: int) -> None:
    plan = build_schedule(name, total)
    assert isinstance(plan, Schedule)
    parts = plan.boundaries()
    assert parts[0][1] == 0
    assert parts[-1][2] == total
    assert all(a[2] == b[1] for a, b in pairwise(parts))
    for phase, start, end in parts:
        assert plan.phase(start) is plan.phase(end - 1) is phase
        assert end > start
    factors = table(plan, total)
    warm = spans(plan).get("warmup", 0)
    assert factors[:warm] == sorted(factors[:warm])
    assert len(set(factors[:warm])) == warm
    assert all(f > 0 for f in factors)
    assert warm == 0 or factors[warm - 1] == 1.0
    # Inside a phase the rate never jumps: no step moves further than a warmup's or a decay's step can.
    for phase, start, end in parts:
        if phase is Phase.REFINEMENT and end - start > 1:
            tail = factors[start:end]
            assert tail == sorted(tail, reverse=True)
            assert tail[0] == 1.0
            assert max(x - y for x, y in pairwise(tail)) <= 1.6 / (end - start - 1)


@given(st.integers(1, 40), st.integers(1, 200), st.floats(0, 1))
def test_plain_decays_match_their_formulas(warm: int, rest: int, final: float) -> None:
    ramp = [(k + 1) / warm for k in range(warm)]
    for shape, tail in (("cosine", cosine_tail), ("linear", linear_tail)):
        plan = DecaySchedule(shape=shape, total_steps=warm + rest, warmup_steps=warm, final_multiplier=final)
        assert table(plan, warm + rest) == pytest.approx(ramp + tail(rest, final), abs=1e-12)
    assert table(
        DecaySchedule(shape="constant", total_steps=warm + rest, warmup_steps=warm), warm + rest
    ) == (ramp + [1.0] * rest)


def test_plain_schedules_warm_up_for_five_percent() -> None:
    assert spans(build_schedule("cosine", 1000)) == {"warmup": 50, "refinement": 950}
    assert spans(build_schedule("linear", 10**6))["warmup"] == 1000
    assert spans(build_schedule("constant", 19)) == {"refinement": 19}
    assert spans(build_schedule("linear", 100, warmup_steps=100)) == {"warmup": 100}


@pytest.mark.parametrize(
    ("total", "want"),
    [
        (1, {"refinement": 1}),
        (2, {"warmup": 1, "refinement": 1}),
        (3, {"warmup": 1, "acceleration": 1, "refinement": 1}),
        (4, {"warmup": 1, "acceleration": 1, "consolidation": 1, "refinement": 1}),
        (5, {"warmup": 1, "acceleration": 1, "consolidation": 1, "refinement": 2}),
        (10, {"warmup": 1, "acceleration": 3, "consolidation": 1, "refinement": 5}),
        (1800, {"warmup": 100, "acceleration": 500, "consolidation": 200, "refinement": 1000}),
        (18_000, {"warmup": 1000, "acceleration": 5000, "consolidation": 2000, "refinement": 10_000}),
        (50_000, {"warmup": 1000, "acceleration": 5000, "consolidation": 2000, "refinement": 42_000}),
    ],
)
def test_fit_scales_the_phases_to_the_run(total: int, want: dict[str, int]) -> None:
    assert spans(PhaseSchedule.fit(total)) == want


@given(st.integers(1, 30_000), lengths.map(lambda n: n * 97), lengths.map(lambda n: n * 31), lengths)
def test_fit_is_exact_and_proportional(total: int, w: int, a: int, c: int) -> None:
    plan = PhaseSchedule.fit(total, warmup_steps=w, acceleration_steps=a, consolidation_steps=c)
    got = [plan.warmup_steps, plan.acceleration_steps, plan.consolidation_steps]
    got.append(total - sum(got))
    assert min(got) >= 0
    assert sum(spans(plan).values()) == total
    wanted = [w, a, c]
    if 9 * sum(wanted) <= 4 * total:
        assert got[:3] == wanted
        return
    present = [i for i, n in enumerate([*wanted, 1]) if n]
    if total >= len(present):
        assert all(got[i] >= 1 for i in present)
    # At most one step from its exact share, and two more that the empty phases may have taken.
    for have, exact in zip(got, shares(total, wanted), strict=True):
        assert abs(have - exact) < 3


def test_given_lengths_are_kept_and_the_rest_scaled() -> None:
    plan = build_schedule("phases", 1000, warmup_steps=100)
    assert spans(plan) == {"warmup": 100, "acceleration": 286, "consolidation": 114, "refinement": 500}
    assert spans(build_schedule("phases", 10, warmup_steps=10)) == {"warmup": 10}
    exact = build_schedule("phases", 100, warmup_steps=1, acceleration_steps=2, consolidation_steps=97)
    assert spans(exact) == {"warmup": 1, "acceleration": 2, "consolidation": 97}
    other = build_schedule("phases", 100, acceleration_multiplier=2.0, consolidation_multiplier=0.5)
    assert {other.multiplier(step) for step in range(100)} == {1.0, 2.0, 0.5}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: PhaseSchedule(total_steps=7999), "leave them out to have them scaled"),
        (lambda: PhaseSchedule(total_steps=0), "total_steps=0"),
        (lambda: PhaseSchedule(total_steps=9000, warmup_steps=-1), "warmup_steps=-1"),
        (lambda: PhaseSchedule(total_steps=9000, warmup_steps=1.5), "warmup_steps=1.5"),
        (lambda: PhaseSchedule(total_steps=9000, final_multiplier=float("nan")), "final_multiplier=nan"),
        (lambda: PhaseSchedule(total_steps=9000, acceleration_multiplier=-5), "acceleration_multiplier=-5"),
        (lambda: PhaseSchedule.fit(True), "total_steps=True"),
        (lambda: PhaseSchedule.fit(10, warmup_steps=-3), "warmup_steps=-3"),
        (lambda: PhaseSchedule.fit(10).phase(-1), "step=-1"),
        (lambda: build_schedule("cosin", 10), "schedule='cosin' is unknown; did you mean 'cosine'"),
        (lambda: build_schedule("linear", 10, acceleration_steps=3), "acceleration_steps has no meaning"),
        (lambda: build_schedule("phases", 10, warmup_steps=11), "more than total_steps=10"),
        (lambda: build_schedule("cosine", 10, warmup_steps=11), "more than total_steps=10"),
        (lambda: build_schedule("constant", 10, final_multiplier=0.5), "no meaning for a constant"),
        (lambda: DecaySchedule(shape="line", total_steps=3), "did you mean 'linear'"),
    ],
)
def test_bad_schedules_are_refused_in_one_line(call, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        call()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_errors_carry_their_exit_code_and_builtin_kind() -> None:
    assert [e("x").exit_code for e in (ForgeError, UsageError, DataError, RunFailed)] == [1, 2, 2, 1]
    assert issubclass(UsageError, ValueError)
    assert issubclass(DataError, ValueError)
    assert issubclass(RunFailed, RuntimeError)
    assert str(DataError("two\n   lines")) == "two lines"


@pytest.mark.parametrize(
    ("name", "want"),
    [("learning_rat", "learning_rate"), ("EPOCH-END", "epoch_end"), ("xyz", None), ("", None)],
)
def test_nearest_match(name: str, want: str | None) -> None:
    assert nearest_match(name, ["learning_rate", "epoch_end", "seed"]) == want
