"""Memory and streams that ranks of one machine share; here the ranks are threads of this process."""

import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from phase5_training import shared_memory
from phase5_training.distributed import RankLost, Ranks
from phase5_training.shared_memory import SharedMemory, StreamedSums, Streams, add_up_, memory_for

WAITED = 30.0  # seconds until a thread that hangs fails its test


class Threads(Ranks):
    """A rank that is a thread; gathers as the processes do.

    Args:
        rank: of how many. meeting: what all ranks have in common.
    """

    def __init__(self, rank, world_size, meeting):
        super().__init__()
        self.rank, self.world_size, self.meeting = rank, world_size, meeting

    def gathered(self, value):
        barrier, held = self.meeting
        held[self.rank] = value
        barrier.wait(WAITED)
        found = [held[rank] for rank in range(self.world_size)]
        barrier.wait(WAITED)
        return found


def on_all(world_size, work):
    """What ``work`` returned on each rank."""
    meeting = (threading.Barrier(world_size), {})
    with ThreadPoolExecutor(world_size) as pool:
        begun = [pool.submit(work, Threads(rank, world_size, meeting)) for rank in range(world_size)]
        return [each.result(WAITED) for each in begun]


def pair():
    """Streams of two ranks to each other."""
    a, b = socket.socketpair()
    a.settimeout(WAITED)
    b.settimeout(WAITED)
    return Streams(0, {1: a}), Streams(1, {0: b}), (a, b)


# In float32 the sum goes by the order: from the left 2**24 + 1 is 2**24, and then + 1 again.
LARGE = [2.0**24, 1.0, 1.0]
# In float64: from the left 1 + 1 + 2**53 is 2**53 + 2, from the right 2**53.
LATE = [1.0, 1.0, 2.0**53, 0.0]


@pytest.mark.parametrize("world_size", [2, 3])
def test_all_ranks_read_what_each_has_posted_and_add_it_up_in_the_same_order(world_size):
    def work(ranks):
        memory = SharedMemory.among(ranks, 1 << 20)
        found = []
        for step in range(3):
            posted = [memory.post(torch.full((5, 7), LARGE[ranks.rank] + step)), memory.post(torch.ones(3))]
            output = torch.empty(35)
            add_up_(output, memory.parts(posted[0]))
            found.append((output.unique().tolist(), [p.tolist() for p in memory.parts(posted[1])]))
            memory.release()
        return found

    found = on_all(world_size, work)
    assert all(each == found[0] for each in found)
    for step, (sums, ones) in enumerate(found[0]):
        wanted = torch.tensor(LARGE[0] + step)
        for large in LARGE[1:world_size]:
            wanted = wanted + torch.tensor(large + step)
        assert sums == [wanted.item()]
        assert ones == [[1.0] * 3] * world_size


def test_parts_of_a_narrower_type_are_added_up_in_the_wider_one():
    parts = [torch.tensor([256.0], dtype=torch.bfloat16), torch.tensor([1.0], dtype=torch.bfloat16)]
    output = torch.empty(1)
    add_up_(output, parts)
    assert output.item() == 257.0  # bfloat16 has 256 and 258


def test_what_another_rank_may_still_read_is_not_written_over():
    def work(ranks):
        memory = SharedMemory.among(ranks, 1024)
        first = memory.post(torch.full((4,), float(ranks.rank)))
        memory.parts(first)
        if ranks.rank == 1:
            before = [part.clone() for part in memory.parts(first)]
            early = written.wait(0.3)
            after = memory.parts(first)
            same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
            memory.release()
            memory.post(torch.full((4,), 9.0))
            return early, same
        memory.release()
        memory.post(torch.full((4,), 9.0))
        written.set()
        return None

    written = threading.Event()
    assert on_all(2, work)[1] == (False, True)


def test_tensors_begin_at_whole_cache_lines_and_more_than_fits_is_refused():
    def work(ranks):
        memory = SharedMemory.among(ranks, 128)
        starts = [memory.post(torch.ones(n)).start for n in (1, 16)]
        with pytest.raises(RuntimeError, match="4 bytes after 128 do not fit in 128"):
            memory.post(torch.ones(1))
        return starts

    assert on_all(2, work) == [[0, 64]] * 2


@pytest.mark.parametrize("world_size", [2, 4])
def test_sums_of_a_few_numbers_may_be_awaited_in_any_order(world_size):
    def work(ranks):
        begin = StreamedSums(Streams.among(ranks)).begin
        numbers = torch.tensor([0.1, 3.0], dtype=torch.float64) * (ranks.rank + 1)
        awaited = [begin(numbers), begin(numbers[:1] * 10), begin(numbers * 100)]
        numbers.zero_()  # was copied
        large = begin(torch.tensor([LATE[ranks.rank]], dtype=torch.float64))
        return [awaited[i]().tolist() for i in (2, 0, 1)], large().tolist()

    found = on_all(world_size, work)
    assert all(each == found[0] for each in found)
    found, [large] = found[0]
    assert large == sum(LATE[:world_size])
    total = sum(range(1, world_size + 1))
    wanted = [[10.0 * total, 300.0 * total], [0.1 * total, 3.0 * total], [1.0 * total]]
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-15)


@pytest.mark.parametrize("what", ["sums", "parts", "release"])
def test_a_rank_that_has_ended_is_named(what):
    streams, other, (_, b) = pair()
    if what == "sums":
        awaited = StreamedSums(streams).begin(torch.ones(1, dtype=torch.float64))
        b.close()
        with pytest.raises(RankLost, match="rank 1 has ended"):
            awaited()
        return
    own, theirs = os.memfd_create("a"), os.memfd_create("b")
    for file in (own, theirs):
        os.ftruncate(file, 256)
    with ThreadPoolExecutor(2) as pool:
        made = pool.submit(SharedMemory, streams, own, 256)
        pool.submit(SharedMemory, other, theirs, 256).result(WAITED)
        memory = made.result(WAITED)
    posted = memory.post(torch.ones(4))
    b.close()
    if what == "release":
        memory.release()  # the other may have been through with all that there is
    with pytest.raises(RankLost, match="rank 1 has ended"):
        memory.parts(posted) if what == "parts" else memory.post(torch.ones(4))


def test_a_rank_that_says_nothing_is_not_waited_for_without_end():
    streams, _, (a, _) = pair()
    a.settimeout(0.05)
    with pytest.raises(RankLost, match="rank 1 has said nothing"):
        StreamedSums(streams).begin(torch.ones(1, dtype=torch.float64))()


CPU = torch.device("cpu")


def test_ranks_of_one_machine_share_memory_and_add_up_numbers_without_gloo():
    def work(ranks):
        memory = memory_for([100, 28], ranks, CPU)
        return memory is not None, ranks.near(torch.ones(2, dtype=torch.float64))().tolist()

    assert on_all(2, work) == [(True, [2.0, 2.0])] * 2


def differs(monkeypatch, name, wrong):
    """Have ``shared_memory.name`` be another function on one of the ranks that call it."""
    right, lock, calls = getattr(shared_memory, name), threading.Lock(), []

    def either(*arguments):
        with lock:
            calls.append(name)
            first = len(calls) == 1
        return wrong(*arguments) if first else right(*arguments)

    monkeypatch.setattr(shared_memory, name, either)


def test_on_several_machines_nothing_is_shared(monkeypatch):
    differs(monkeypatch, "_machine", lambda: "another")
    assert on_all(2, lambda ranks: (memory_for([8], ranks, CPU), ranks.near)) == [(None, None)] * 2


def test_where_one_rank_cannot_have_memory_none_has(monkeypatch):
    def refused(name):
        raise OSError("no memory")

    real, lock, calls = os.memfd_create, threading.Lock(), []

    def once(name):
        with lock:
            calls.append(name)
            first = len(calls) == 1
        return refused(name) if first else real(name)

    monkeypatch.setattr(os, "memfd_create", once)
    assert on_all(2, lambda ranks: (memory_for([8], ranks, CPU), ranks.near)) == [(None, None)] * 2


def test_ranks_that_do_not_see_each_other_s_doors_share_nothing(monkeypatch):
    """Containers of one machine, each with a /tmp of its own."""

    class Blind(Threads):
        def gathered(self, value):
            hidden = value if not isinstance(value, tuple) else (value[0], value[1] + "-elsewhere")
            return super().gathered(hidden)

    monkeypatch.setattr(shared_memory, "_SECONDS_TO_MEET", 0.2)
    monkeypatch.setitem(globals(), "Threads", Blind)
    assert on_all(2, lambda ranks: memory_for([8], ranks, CPU)) == [None] * 2


def test_gradients_on_a_gpu_do_not_take_the_host_s_memory():
    assert memory_for([8], Ranks(), torch.device("cuda")) is None
