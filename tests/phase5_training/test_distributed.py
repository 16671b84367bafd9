"""Several processes train as one does: through the real torchrun, on CPUs.

Each number of processes is started once and does all its jobs (tests/ranks/jobs.py).
"""

import json
import os
import shutil

import pytest
import torch
from torch import nn

from phase5_training.config import load_yaml, parse_config
from phase5_training.distributed import ProcessGroup, Ranks, join, launched
from phase5_training.errors import ForgeError, UsageError
from phase5_training.parallel import in_parts, on_ranks
from phase5_training.sharded import shard
from ranks import jobs
from ranks.launch import run_jobs, torchrun

pytestmark = pytest.mark.usefixtures("no_report")
SAME = 1e-5  # relative, over 50 steps of a ternary network: rounding and its growth


@pytest.fixture(scope="session")
def ranks_folder(tmp_path_factory):
    """Return the folder of all runs of this file."""
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="session")
def two(ranks_folder):
    """Return what two ranks found."""
    names = ["equal", "again", "numbers", "tokens", "micro", "bf16", "stopped", "memory", "nonfinite"]
    return run_jobs(ranks_folder, 2, "ddp", *names)


@pytest.fixture(scope="session")
def four(ranks_folder):
    """Return what four ranks found."""
    return run_jobs(ranks_folder, 4, "ddp", "equal", "half")


@pytest.fixture(scope="session")
def parts(ranks_folder):
    """Return what two ranks found that have parts of the model."""
    return run_jobs(ranks_folder, 2, "fsdp", "equal", "muon", "stopped", "half")


def one(name, folder):
    """What one process finds."""
    return getattr(jobs, name)(folder / name, "ddp")


def assert_same_run(found, wanted, rel=SAME):
    assert found["losses"] == pytest.approx(wanted["losses"], rel=rel)
    assert found["norms"] == pytest.approx(wanted["norms"], rel=10 * rel)
    for ours, theirs in zip(found["validation"], wanted["validation"], strict=True):
        assert ours == pytest.approx(theirs, rel=10 * rel)
    assert found["weights"] == pytest.approx(wanted["weights"], rel=1e-3, abs=1e-3)


def test_1_2_and_4_ranks_with_the_same_batches_give_the_same_run(two, four, tmp_path):
    alone = one("equal", tmp_path)
    assert len(alone["losses"]) == 50
    assert alone["losses"][-1] < 0.6 * alone["losses"][0]
    for ranks in (two, four):
        assert_same_run(ranks[0]["equal"], alone)
        assert [r["equal"]["losses"] for r in ranks] == [ranks[0]["equal"]["losses"]] * len(ranks)
        assert ranks[0]["equal"]["samples"] == alone["samples"]


@pytest.mark.parametrize("name", ["equal", "muon"])
def test_two_ranks_with_parts_of_the_model_give_the_same_run(parts, tmp_path, name):
    assert_same_run(parts[0][name], one(name, tmp_path))


def test_parts_travel_as_codes(parts):
    """In float32 the two hidden latents alone would take 2816 bytes of a rank in each forward."""
    assert parts[0]["equal"]["gathered"] / 50 < 2816 / 3


def test_parts_stop_and_go_on_with_the_same_bits_and_as_one_whole(parts, ranks_folder, tmp_path):
    first, rest = parts[0]["stopped"]["first"], parts[0]["stopped"]["rest"]
    assert first["losses"] + rest["losses"] == parts[0]["equal"]["losses"]
    shutil.copytree(ranks_folder / "fsdp-2" / "half", tmp_path / "half")
    alone = jobs.rest(tmp_path / "rest", "ddp")
    losses = parts[0]["half"]["losses"] + alone["losses"]
    assert losses == pytest.approx(parts[0]["equal"]["losses"], rel=SAME)


def test_the_same_ranks_give_the_same_bits_again(two):
    assert two[0]["equal"] == two[0]["again"]


@pytest.mark.parametrize("name", ["numbers", "tokens", "micro"])
def test_figures_are_means_over_all_samples_and_tokens(two, tmp_path, name):
    """r2 is taken around one mean, perplexity over tokens of which the ranks have different numbers."""
    assert_same_run(two[0][name], one(name, tmp_path))


def test_gradients_in_bfloat16_stay_near(two):
    near, exact = two[0]["bf16"]["losses"], two[0]["equal"]["losses"]
    assert near != exact
    assert near[:10] == pytest.approx(exact[:10], rel=0.05)


def test_a_stop_that_one_rank_asks_for_is_that_of_all_and_changes_nothing(two):
    first, rest = two[0]["stopped"]["first"], two[0]["stopped"]["rest"]
    assert [r["stopped"]["first"]["steps"] for r in two] == [8, 8]
    assert first["stop_reason"] == "interrupted"
    assert first["losses"] + rest["losses"] == two[0]["equal"]["losses"]


def test_lack_of_memory_on_one_rank_halves_the_micro_batch_of_all(two):
    for rank in two:
        assert rank["memory"]["sizes"] == [[4, 2]]
    assert_same_run(two[0]["memory"]["short"], two[0]["memory"]["plain"])


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_by_all(two):
    for rank in two:
        losses = rank["nonfinite"]["losses"]
        assert [step for step, loss in enumerate(losses, 1) if loss is None] == [3]
        assert losses == two[0]["nonfinite"]["losses"]
        (bad,) = rank["nonfinite"]["told"]
        assert bad["step"] == 3
        assert len(set(bad["samples"])) == 24  # of both ranks


def test_a_run_of_4_ranks_goes_on_with_1_and_2(four, ranks_folder, tmp_path, two):
    for n in (1, 2):
        folder = tmp_path / str(n)
        shutil.copytree(ranks_folder / "ddp-4" / "half", folder / f"ddp-{n}" / "half")
        if n == 1:
            rest = jobs.rest(folder / "ddp-1" / "rest", "ddp")
        else:
            rest = run_jobs(folder, 2, "ddp", "rest")[0]["rest"]
        assert four[0]["half"]["steps"] == 25
        assert four[0]["half"]["losses"] + rest["losses"] == pytest.approx(
            two[0]["equal"]["losses"], rel=SAME
        )


DYING = """
import os, signal, torch
def make():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(13, 32), torch.nn.ReLU(), torch.nn.Linear(32, 32),
                              torch.nn.ReLU(), torch.nn.Linear(32, 3))
    seen = []
    def count(module, inputs):
        if module.training:
            seen.append(1)
        if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and len(seen) == AT:
            os.kill(os.getpid(), signal.SIGKILL)
    net.register_forward_pre_hook(count)
    return net
"""


def test_a_killed_rank_comes_back_and_the_run_ends_as_if_nothing_had_happened(tmp_path, task_files, rows):
    train, validation = task_files("wine")
    words = ["-m", "phase5_training", "train", "run.yaml", "--train-data-path", train]
    words += ["--val-data-path", validation]
    (tmp_path / "run.yaml").write_text(
        "{batch_size: 24, max_steps: 40, eval_interval: 20, checkpoint_interval: 10, log_interval: 1, "
        "use_amp: false, compile: false, model: 'dying:make', optimizer: adamw, grokfast_alpha: 0.9, "
        "learning_rate: 0.01}"
    )
    losses, outputs = [], []
    for name, at in (("whole", -1), ("killed", 28)):
        (tmp_path / "dying.py").write_text(DYING.replace("AT", str(at)))
        done = torchrun(2, *words, "--experiment-name", name, restarts=1, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-4000:]
        outputs.append(done.stdout)
        losses.append([row["loss"] for row in rows(tmp_path / "runs" / name, "train")])
    assert len(losses[0]) == 40
    assert losses[1] == losses[0]
    events = [json.loads(line) for line in (tmp_path / "runs/killed/events.jsonl").read_text().splitlines()]
    resumed = [e["step"] for e in events if e["event"] == "resumed"]
    assert len(resumed) == 1
    assert 17 <= resumed[0] < 28  # at most checkpoint_interval steps are lost
    assert outputs[0].count("max_steps at step 40") == 1  # the first rank speaks, no other


@pytest.mark.parametrize("name", ["cpu.yaml", "gpu.yaml", "gpus-8.yaml"])
def test_the_examples_are_configurations(repository, name):
    path = repository / "examples" / name
    assert parse_config(load_yaml(path), where=name).experiment_name


def test_one_process_has_no_group(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr("torch.distributed.init_process_group", None)
    assert type(join()) is Ranks


def test_ranks_without_a_place_to_meet_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ForgeError, match="torchrun --nproc-per-node"):
        launched()


def group(**own):
    made = ProcessGroup.__new__(ProcessGroup)
    made.rank, made.world_size = 0, 2
    return made


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"quantization_mode": "stochastic"}, "parallel='ddp'"),
        ({"filter": "ma"}, "filter='ema'"),
        ({"compile": True}, "compile=False"),
    ],
)
def test_what_parts_cannot_do_is_refused_with_a_remedy(options, remedy):
    config = jobs.pipeline(jobs.Path("x"), "fsdp").config.model_copy(update=options)
    with pytest.raises(UsageError, match=remedy):
        shard(nn.Linear(2, 2), config, Ranks(), torch.device("cpu"))


@pytest.mark.parametrize(
    ("options", "remedy"),
    [({"learning_rate": "auto"}, "forge tune"), ({"device": "cuda:1"}, "device='cuda'")],
)
def test_what_several_processes_cannot_do_is_refused_with_a_remedy(options, remedy):
    config = jobs.pipeline(jobs.Path("x"), "ddp").config.model_copy(update=options)
    with pytest.raises(UsageError, match=remedy):
        on_ranks(config, group())


def test_auto_gives_parts_where_the_state_of_training_takes_half_of_the_memory(monkeypatch):
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 2 * 42 * 100}.get)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    cpu = torch.device("cpu")
    assert not in_parts("auto", nn.Linear(99, 1, bias=False), cpu, group())
    assert in_parts("auto", nn.Linear(101, 1, bias=False), cpu, group())
    assert in_parts("fsdp", nn.Linear(1, 1), torch.device("cpu"), group())


def test_a_run_that_may_be_restarted_needs_a_name(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    config = jobs.pipeline(jobs.Path("x"), "ddp").config
    assert on_ranks(config, Ranks()) is config
    with pytest.raises(UsageError, match="experiment_name"):
        on_ranks(config.model_copy(update={"experiment_name": None}), Ranks())


def test_after_a_restart_nothing_is_deleted(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    config = on_ranks(jobs.pipeline(jobs.Path("x"), "ddp", resume_from="old").config, Ranks())
    assert (config.auto_resume, config.overwrite, config.resume_from) == (True, False, None)
    assert os.environ["TORCHELASTIC_RESTART_COUNT"] == "1"
