"""Several processes train as one does: through the real torchrun, on CPUs.

Each number of processes is started once and does all its jobs (tests/ranks/jobs.py).
"""

import json
import os
import shutil
import socket

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from phase4_bitnet import load_compressed_model, ternary_layers
from phase4_bitnet.sharding import ShardedLatent
from phase5_training.config import load_yaml, parse_config
from phase5_training.distributed import ProcessGroup, Ranks, join, launched
from phase5_training.errors import ForgeError, UsageError
from phase5_training.parallel import in_parts, on_ranks
from phase5_training.sharded import may_stay_gathered, shard
from ranks import jobs
from ranks.launch import run_jobs

pytestmark = pytest.mark.usefixtures("no_report")
SAME = 1e-5  # relative, over 50 steps of a ternary network: rounding and its growth


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
        if os.environ["RANK"] == "1" and os.environ.get("DIES_AT") == f"{len(seen)} of first life":
            if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
                os.kill(os.getpid(), signal.SIGKILL)
    net.register_forward_pre_hook(count)
    return net
"""
OF_DYING = (
    "{batch_size: 24, max_steps: 40, eval_interval: 20, checkpoint_interval: 10, log_interval: 1, "
    "use_amp: false, compile: false, model: 'dying:make', optimizer: adamw, grokfast_alpha: 0.9, "
    "learning_rate: 0.01, device: cpu}"
)


@pytest.fixture(scope="session")
def ranks_folder(tmp_path_factory, task_files):
    """Return the folder of all runs of this file."""
    folder = tmp_path_factory.mktemp("ranks")
    train, validation = task_files("wine")
    (folder / "dying.py").write_text(DYING)
    (folder / "run.yaml").write_text(OF_DYING)
    words = ["train", str(folder / "run.yaml"), "--train-data-path", train, "--val-data-path", validation]
    (folder / "words.json").write_text(json.dumps(words))
    return folder


@pytest.fixture(scope="session")
def four(ranks_folder):
    """Return what four ranks found."""
    return run_jobs(ranks_folder, 4, "ddp.equal", "ddp.half", "fsdp.half")


@pytest.fixture(scope="session")
def two(ranks_folder, four):
    """Return what two ranks found, who also go on with what four began."""
    names = ["equal", "again", "numbers", "tokens", "micro", "bf16", "stopped", "memory", "nonfinite", "rest"]
    names += ["tasks", "noisy", "best", "rest_in_the_other_mode", "rest_of_damaged", "failed_save", "command"]
    dying = ["ddp.killed", "fsdp.three_lives"]
    parts = ["equal", "muon", "tokens", "micro", "bf16", "stopped", "short", "floats", "nonfinite", "tasks"]
    parts += ["ahead", "best", "rest", "rest_in_the_other_mode", "rest_of_damaged", "failed_save"]
    names, parts = [*names, "over_gloo"], [*parts, "over_gloo"]
    own = [*(f"ddp.{n}" for n in names), *(f"fsdp.{n}" for n in parts), *dying]
    return run_jobs(ranks_folder, 2, *own, restarts=3)


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
        assert_same_run(ranks[0]["ddp.equal"], alone)
        assert [r["ddp.equal"]["losses"] for r in ranks] == [ranks[0]["ddp.equal"]["losses"]] * len(ranks)
        assert ranks[0]["ddp.equal"]["samples"] == alone["samples"]


@pytest.mark.parametrize("name", ["equal", "muon"])
def test_two_ranks_with_parts_of_the_model_give_the_same_run(two, tmp_path, name):
    assert_same_run(two[0][f"fsdp.{name}"], one(name, tmp_path))


# Of the network 12 -> 32 -> 32 -> 3: two ternary layers, their biases and gains, and a float head.
CODED, FLOAT = 12 * 32 + 32 * 32, 32 + 32 + 32 + 32 + 32 * 3 + 3


def test_the_bytes_of_a_step_are_those_of_codes_and_of_all_gradients(two):
    """FSDP pads to as many rows on each rank: a head of 4. Codes are a sixteenth of what they stand for."""
    padded = FLOAT + 33
    assert two[0]["ddp.equal"]["bytes"] == [0, 4 * (CODED + FLOAT)]
    assert two[0]["ddp.bf16"]["bytes"] == [0, 2 * (CODED + FLOAT)]
    assert two[0]["fsdp.equal"]["bytes"] == [(CODED // 4 + 4 * padded) // 2, 4 * (CODED + padded)]
    assert two[0]["fsdp.bf16"]["bytes"] == [(CODED // 4 + 4 * padded) // 2, 2 * (CODED + padded)]
    assert two[0]["fsdp.floats"]["bytes"] == [(4 * CODED + 4 * padded) // 2, 4 * (CODED + padded)]
    assert two[0]["fsdp.floats"]["losses"] == pytest.approx(two[0]["fsdp.short"]["losses"], rel=SAME)
    # Muon's updates of the two ternary matrices travel in float32.
    assert two[0]["fsdp.muon"]["bytes"][0] == two[0]["fsdp.equal"]["bytes"][0] + 4 * CODED // 2


def test_blocks_are_gathered_while_those_before_them_compute(two):
    """Embedding and head first. Codes stay from forward to backward, and all are asked for at once."""
    found = two[0]["fsdp.ahead"]
    assert found["codes"] == ["gather"] * 4 + ["block"] * 3
    assert found["floats"] == ["gather"] * 3 + ["block", "gather", "block", "block"]


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_ranks_give_the_same_bits_through_shared_memory_and_over_gloo(two, mode, ranks_folder):
    """The sum of two numbers is the same in both orders. The run says which way gradients travel."""
    assert two[0][f"{mode}.equal"] == two[0][f"{mode}.over_gloo"]
    for name, shared in (("equal", True), ("over_gloo", False)):
        said = (ranks_folder / "2" / f"{mode}.{name}" / "run" / "events.jsonl").read_text()
        assert ("in memory that the ranks share" in said) == shared


def test_the_same_ranks_give_the_same_bits_again(two):
    assert two[0]["ddp.equal"] == two[0]["ddp.again"]


@pytest.mark.parametrize("name", ["ddp.numbers", "ddp.tokens", "ddp.micro", "fsdp.tokens", "fsdp.micro"])
def test_figures_are_means_over_all_samples_and_tokens(two, tmp_path, name):
    """r2 is taken around one mean, perplexity over tokens of which the ranks have different numbers."""
    assert_same_run(two[0][name], one(name.partition(".")[2], tmp_path))


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_what_a_loss_learns_is_the_same_on_all_ranks_and_on_one(two, tmp_path, mode):
    alone = one("tasks", tmp_path)
    assert abs(alone["weights"]["log_variances"]) > 1e-3
    assert_same_run(two[0][f"{mode}.tasks"], alone)
    assert len({r[f"{mode}.tasks"]["weights"]["log_variances"] for r in two}) == 1


def test_masks_differ_between_ranks_and_come_again_and_running_means_are_the_first_ones(two):
    found = [r["ddp.noisy"] for r in two]
    assert found[0]["dropped"] != found[1]["dropped"]
    assert found[0]["means"] == found[1]["means"]
    assert max(map(abs, found[0]["means"])) > 0.01
    assert found[0]["first"]["losses"] + found[0]["rest"]["losses"] == found[0]["whole"]["losses"]
    assert found[0]["rest"]["weights"] == found[0]["whole"]["weights"]


def codes_in(folder):
    layers = ternary_layers(load_compressed_model(folder / "run" / "best"))
    return {name: layer.current_codes()[0].tolist() for name, layer in layers}


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_all_stop_early_at_one_step_and_hand_on_the_codes_that_one_process_does(
    two, ranks_folder, tmp_path, mode
):
    alone = one("best", tmp_path)
    assert alone["stop_reason"] == "early_stop"
    assert alone["best_step"] < alone["steps"] < 60
    for rank in two:
        found = rank[f"{mode}.best"]
        for key in ("stop_reason", "steps", "best_step"):
            assert found[key] == alone[key]
    assert_same_run(two[0][f"{mode}.best"], alone)
    assert codes_in(ranks_folder / "2" / f"{mode}.best") == codes_in(tmp_path / "best")


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_gradients_in_bfloat16_stay_near(two, mode):
    near, exact = two[0][f"{mode}.bf16"]["losses"], two[0][f"{mode}.equal"]["losses"]
    assert near != exact
    assert near[:10] == pytest.approx(exact[:10], rel=0.05)


@pytest.mark.parametrize(("mode", "raised"), [("ddp", "Terminated"), ("fsdp", "Interrupted")])
def test_a_signal_to_one_rank_stops_all_and_changes_nothing(two, mode, raised):
    """SIGTERM, and Ctrl-C."""
    found = [r[f"{mode}.stopped"] for r in two]
    assert [f["first"]["steps"] for f in found] == [8, 8]
    assert [f["first"]["stop_reason"] for f in found] == ["interrupted", "interrupted"]
    assert [f["first"]["raised"] for f in found] == [None, raised]
    assert found[0]["first"]["losses"] + found[0]["rest"]["losses"] == two[0][f"{mode}.equal"]["losses"]


def test_lack_of_memory_on_one_rank_halves_the_micro_batch_of_all(two):
    for rank in two:
        assert rank["ddp.memory"]["sizes"] == [[4, 2]]
    assert_same_run(two[0]["ddp.memory"]["short"], two[0]["ddp.memory"]["plain"])


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_by_all(two, mode):
    for rank in two:
        found = rank[f"{mode}.nonfinite"]
        assert [step for step, loss in enumerate(found["losses"], 1) if loss is None] == [3]
        assert found["losses"] == two[0][f"{mode}.nonfinite"]["losses"]
        (bad,) = found["told"]
        assert bad["step"] == 3
        assert len(set(bad["samples"])) == 24  # of both ranks


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_a_run_of_4_ranks_goes_on_with_2_and_1(four, two, ranks_folder, tmp_path, mode):
    begun, whole = four[0][f"{mode}.half"], two[0][f"{mode}.equal"]["losses"]
    assert begun["steps"] == 25
    rests = [two[0][f"{mode}.{name}"] for name in ("rest", "rest_in_the_other_mode")]
    shutil.copytree(ranks_folder / "4", tmp_path / "4")
    rests.append(jobs.rest(tmp_path / "1" / "rest", mode))
    for rest in rests:
        assert begun["losses"] + rest["losses"] == pytest.approx(whole, rel=SAME)


def checkpoints_in(ranks_folder, job):
    return {p.name: p for p in (ranks_folder / job / "run" / "checkpoints").iterdir()}


def test_each_rank_with_parts_writes_its_own_and_the_whole_is_on_no_disk_twice(four, ranks_folder):
    newest = checkpoints_in(ranks_folder, "4/fsdp.half")["step-00000025"]
    shards = sorted(newest.glob("*.safetensors"))
    assert len(shards) == 4
    whole = checkpoints_in(ranks_folder, "4/ddp.half")["step-00000025"] / "tensors.safetensors"
    rows = [{n: t for n, t in load_file(s).items() if t.dim() == 2} for s in shards]
    matrices = {n: t for n, t in load_file(whole).items() if n in rows[0] and t.dim() == 2}
    assert len(matrices) > 10
    for name, matrix in matrices.items():
        own = [part[name] for part in rows if name in part]  # three rows on four ranks: one has none
        assert [len(part) for part in own] == [len(c) for c in matrix.chunk(4)]
        assert torch.cat(own) == pytest.approx(matrix, rel=1e-2, abs=1e-4)


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_a_damaged_newest_checkpoint_of_4_ranks_is_passed_over_by_2(two, ranks_folder, mode):
    rest, whole = two[0][f"{mode}.rest_of_damaged"]["losses"], two[0][f"{mode}.equal"]["losses"]
    assert rest == pytest.approx(whole[20:], rel=SAME)
    assert "damaged-step-00000025" in checkpoints_in(ranks_folder, f"2/{mode}.rest_of_damaged")


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_where_one_rank_cannot_save_none_has_and_all_stop_at_one_step(two, mode):
    found = [r[f"{mode}.failed_save"] for r in two]
    assert "step 20 cannot be written" in found[0]["error"]
    assert "No space left on device" in found[0]["error"]
    assert all("Error: " in f["error"] or "OtherRankFailed: " in f["error"] for f in found)
    assert {f["stopped_at"] for f in found} == {30}
    assert found[0]["left"] == ["step-00000010"]
    assert found[0]["after"]["losses"] == two[0][f"{mode}.equal"]["losses"][10:]


def test_a_rank_whose_data_fail_or_that_is_killed_in_a_save_costs_what_came_after_the_last_save(
    two, ranks_folder
):
    assert two[0]["fsdp.three_lives"]["losses"] == two[0]["fsdp.equal"]["losses"][20:]
    assert checkpoints_in(ranks_folder, "2/fsdp.three_lives").keys() == {"step-00000040", "step-00000050"}
    run = ranks_folder / "2/fsdp.three_lives/run"
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "resumed"] == [10, 20]


def test_a_killed_rank_comes_back_and_the_run_ends_as_if_nothing_had_happened(two, ranks_folder, rows):
    assert [r[f"ddp.{name}"]["code"] for r in two for name in ("command", "killed")] == [0] * 4
    whole, killed = (ranks_folder / "2" / f"ddp.{name}" / "run" for name in ("command", "killed"))
    losses = [row["loss"] for row in rows(whole, "train")]
    assert len(losses) == 40
    assert [row["loss"] for row in rows(killed, "train")] == losses
    events = [json.loads(line) for line in (killed / "events.jsonl").read_text().splitlines()]
    resumed = [e["step"] for e in events if e["event"] == "resumed"]
    assert len(resumed) == 1
    assert 17 <= resumed[0] < 28  # at most checkpoint_interval steps are lost
    # The first rank speaks, no other: of both runs, and of the one that left it.
    assert (ranks_folder / "2.out").read_text().count("max_steps at step 40") == 2
    said = (ranks_folder / "2.err").read_text()
    assert said.count("forge: another of the 2 processes has ended; torchrun starts them again") == 1
    assert "forge: unexpected" not in said


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
    with pytest.raises(
        ForgeError, match=r"no RANK or MASTER_ADDR or MASTER_PORT: .*torchrun --nproc-per-node"
    ):
        launched()


def test_ranks_whose_place_to_meet_is_taken_say_so_in_one_line(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as other:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(other.getsockname()[1])}
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", **place}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(
            ForgeError, match=f"{':'.join(place.values())}: another program has that port"
        ) as told:
            join("cpu")
    assert "\n" not in str(told.value)


def group():
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


def test_blocks_stay_gathered_where_their_codes_are_small_beside_what_a_rank_keeps():
    """21 bytes of state a weight, of which each rank has its part, against a quarter of a byte of codes."""
    coded, plain = nn.Linear(40, 10, bias=False), nn.Linear(40, 10, bias=False)
    coded.weight = nn.Parameter(ShardedLatent(torch.zeros(10, 40)))
    assert may_stay_gathered(coded, [coded], 21)
    assert not may_stay_gathered(coded, [coded], 22)
    assert not may_stay_gathered(plain, [plain], 2)


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
