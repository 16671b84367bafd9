"""Several processes that train one model: who is who, what they agree on, and what they add up.

torchrun starts the processes and tells each one its place in the environment. :class:`Ranks` is a process
alone: it answers every question by itself and never touches torch.distributed. :class:`ProcessGroup` asks
the others, so all of them have to ask the same questions in the same order.

Only the first rank writes files and speaks on the console.
"""

import atexit
import contextlib
import copy
import os
import random
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from phase5_training.errors import ForgeError, OtherRankFailed, RunFailed, first_line

T = TypeVar("T")
Units = TypeVar("Units", int, Tensor, int | Tensor)

# How long a rank waits for the others: a checkpoint may be written meanwhile.
TIMEOUT = timedelta(minutes=30)


class RankLost(RuntimeError):  # noqa: N818 - as torch names DistError's kinds
    """Another process of this run has ended."""


class Traffic:
    """Bytes of tensors that this rank has handed to the collectives of training.

    Args:
        gathered: weights, or the updates of Muon, that other ranks are to have.
        reduced: gradients that are added up.
    """

    def __init__(self) -> None:
        self.gathered = self.reduced = 0


class Ranks:
    """One process alone.

    Example:
        >>> alone = Ranks()
        >>> alone.first, alone.chosen("here"), alone.gathered(3), alone.totals(5, 4, False)()
        (True, 'here', [3], (5, 4, False))
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    def __init__(self) -> None:
        self.traffic = Traffic()
        self.near: Callable[[Tensor], Callable[[], Tensor]] | None = None
        """Begins sums of float64 numbers on the host, where all ranks are on one machine."""

    @property
    def first(self) -> bool:
        """Whether this rank writes and speaks."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there are no others."""
        return self.world_size == 1

    def chosen(self, value: T) -> T:
        """The first rank's value, on all ranks."""
        return value

    def by_first(self, work: Callable[[], T]) -> T:
        """What ``work`` returned on the first rank, the only one that calls it.

        Raises:
            OtherRankFailed: on the other ranks, when it raised there.
        """
        return work()

    def by_all(self, work: Callable[[], T]) -> T:
        """What ``work`` returned here, where it did on all ranks.

        Raises:
            Exception: what it raised here, or else on the first rank where it raised.
        """
        return work()

    def apart(self) -> "Ranks":
        """The same ranks, to agree on something beside the training, in a thread of its own; all call."""
        return self

    def gathered(self, value: T) -> list[T]:
        """The values of all ranks, by rank, on all of them."""
        return [value]

    def any(self, value: bool) -> bool:
        """Whether it is so on any rank."""
        return value

    def totals(self, units: Units, samples: int, asked: bool) -> Callable[[], tuple[Units, int, bool]]:
        """Begin to add up units and samples of a batch over all ranks, and whether any was asked to stop.

        Returns:
            What waits for that and gives it.
        """
        return lambda: (units, samples, asked)

    def add_up_(self, tensors: Sequence[Tensor], failed: bool = False) -> Callable[[], bool]:
        """Begin to add up tensors over the ranks.

        Returns:
            What waits for that, replaces them by their sums, and gives whether any rank ``failed``.
        """
        return lambda: failed

    def begin_sum(self, values: Tensor) -> Callable[[], Tensor]:
        """Begin to add up ``values`` over the ranks; what is returned waits and gives the sums."""
        return lambda: values

    def level_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by those of the first rank."""

    def seed(self, *numbers: int) -> None:
        """Seed all generators by these numbers; alone they run on, as in any program."""

    def bytes_per_step(self, steps: int) -> dict[str, float]:
        """:class:`Traffic` since the last call, which is ``steps`` steps ago; alone there is none."""
        return {}


class ProcessGroup(Ranks):
    """This process among the others of a process group of torch.

    Tensors on a CPU travel by gloo, also beside CUDA, so that agreeing never waits for the device.

    Args:
        group: of all ranks; None is the default group.
    """

    def __init__(self, group: Any = None) -> None:
        super().__init__()
        self.group = group
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.local_rank = int(os.environ.get("LOCAL_RANK", self.rank))
        self._told = Traffic()

    def chosen(self, value: T) -> T:
        """See :class:`Ranks`."""
        held = [value]
        dist.broadcast_object_list(held, src=0, group=self.group)
        return held[0]

    def by_first(self, work: Callable[[], T]) -> T:
        """See :class:`Ranks`."""
        if not self.first:
            done, value = self.chosen((False, None))
            if not done:
                raise OtherRankFailed(f"rank {self.rank} stops: the first rank failed and says why")
            return value  # type: ignore[return-value]
        try:
            found = work()
        except BaseException:
            self.chosen((False, None))
            raise
        self.chosen((True, found))
        return found

    def by_all(self, work: Callable[[], T]) -> T:
        """See :class:`Ranks`."""
        try:
            found = work()
        except Exception as error:
            told = error if isinstance(error, ForgeError) else OtherRankFailed(f"rank {self.rank}: {error}")
            self.gathered(told)
            raise
        for failed in self.gathered(None):
            if failed is not None:
                raise failed
        return found

    def apart(self) -> Ranks:
        """See :class:`Ranks`."""
        return ProcessGroup(dist.new_group(backend="gloo", timeout=TIMEOUT))

    def gathered(self, value: T) -> list[T]:
        """See :class:`Ranks`."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def any(self, value: bool) -> bool:
        """See :class:`Ranks`."""
        return bool(self._sum([value])()[0])

    def totals(self, units: Units, samples: int, asked: bool) -> Callable[[], tuple[Units, int, bool]]:
        """See :class:`Ranks`."""
        sums = self._sum([float(units), samples, asked])

        def awaited() -> tuple[Any, int, bool]:
            total, all_samples, any_asked = sums()
            whole = torch.tensor(int(total)) if isinstance(units, Tensor) else int(total)
            return whole, int(all_samples), bool(any_asked)

        return awaited

    def add_up_(self, tensors: Sequence[Tensor], failed: bool = False) -> Callable[[], bool]:
        """See :class:`Ranks`."""
        own = torch.cat([t.detach().double().reshape(-1) for t in tensors])
        sizes = [t.numel() for t in tensors]
        # Among the numbers, but on the host: a flag that is on the device would be waited for there.
        flag = torch.tensor([float(failed)], dtype=torch.float64)
        begun = [torch.cat([own, flag])] if own.device.type == "cpu" else [own, flag]
        sums = [self.begin_sum(values) for values in begun]

        def awaited() -> bool:
            found = [wait() for wait in sums]
            for t, total in zip(tensors, found[0][: sum(sizes)].split(sizes), strict=True):
                t.copy_(total.view(t.shape))
            return bool(found[-1][-1])

        return awaited

    def begin_sum(self, values: Tensor) -> Callable[[], Tensor]:
        """See :class:`Ranks`."""
        if self.near is not None and values.device.type == "cpu" and values.dtype == torch.float64:
            return self.near(values)
        sums = values.clone()
        work = dist.all_reduce(sums, group=self.group, async_op=True)

        def awaited() -> Tensor:
            work.wait()
            return sums

        return awaited

    def level_(self, tensors: Sequence[Tensor]) -> None:
        """See :class:`Ranks`."""
        for tensor in tensors:
            dist.broadcast(tensor, src=0, group=self.group)

    def seed(self, *numbers: int) -> None:
        """See :class:`Ranks`."""
        words = np.random.SeedSequence(numbers).generate_state(3)
        random.seed(int(words[0]))
        np.random.seed(int(words[1]))
        torch.manual_seed(int(words[2]))

    def bytes_per_step(self, steps: int) -> dict[str, float]:
        """See :class:`Ranks`."""
        now, before = self.traffic, self._told
        found = {
            "gathered_bytes_per_step": (now.gathered - before.gathered) / max(1, steps),
            "reduced_bytes_per_step": (now.reduced - before.reduced) / max(1, steps),
        }
        self._told = copy.copy(now)
        return found

    def _sum(self, values: Sequence[float]) -> Callable[[], list[float]]:
        sums = self.begin_sum(torch.tensor([float(v) for v in values], dtype=torch.float64))
        return lambda: sums().tolist()


def launched() -> tuple[int, int]:
    """(rank, number of ranks) as torchrun gives them; (0, 1) for a process that was started by itself.

    Raises:
        ForgeError: the environment names ranks and not where to meet.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if world > 1 and missing:
        raise ForgeError(
            f"WORLD_SIZE={world} and no {' or '.join(missing)}: start the processes with "
            "`torchrun --nproc-per-node N -m phase5_training train config.yaml`"
        )
    return int(os.environ.get("RANK", "0")) if world > 1 else 0, world


def join(device: str = "auto") -> Ranks:
    """The ranks that torchrun started this process among; meets the others at the first call.

    Args:
        device: the configuration's; with CUDA each rank takes the GPU of its place on the machine.

    Raises:
        ForgeError: see :func:`launched`, or the ranks cannot meet.
    """
    if launched()[1] == 1 and not dist.is_initialized():
        return Ranks()
    if not dist.is_initialized():
        cuda = torch.cuda.is_available() and (device == "auto" or device.startswith("cuda"))
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        store, rank, world_size = _meet()
        # After a restart torchrun's store still holds where the dead processes listened.
        own = PrefixStore(f"forge/{restarts()}/{world_size}", store)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=own,
            rank=rank,
            world_size=world_size,
            timeout=TIMEOUT,
        )
        atexit.register(_leave)
    return ProcessGroup() if dist.get_world_size() > 1 else Ranks()


def _meet() -> tuple[Any, int, int]:
    """The store through which the ranks find each other, this rank, and how many there are."""
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        return next(rendezvous("env://", timeout=TIMEOUT))
    except dist.DistError as error:
        if "EADDRINUSE" in str(error):
            raise ForgeError(
                f"the ranks cannot meet at {where}: another program has that port; start them with another "
                "MASTER_PORT, or with torchrun --standalone, which finds a free one"
            ) from error
        raise ForgeError(
            f"the ranks cannot meet at {where} ({first_line(error)}); check that rank 0 runs there "
            "and that the others reach it"
        ) from error


def restarts() -> int:
    """How often torchrun has started the processes again after one died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def may_restart() -> bool:
    """Whether torchrun was told to start the processes again when one dies."""
    return _most_restarts() > 0


def _most_restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))


@contextlib.contextmanager
def naming_lost_ranks() -> Iterator[None]:
    """While inside, what torch raises where another process is gone says so, and what comes next.

    Raises:
        RunFailed: on the first rank, which speaks for all that are left.
        OtherRankFailed: on the others.
    """
    try:
        yield
    except RuntimeError as error:
        # gloo's errors have no type of their own.
        lost = isinstance(error, (dist.DistError, RankLost)) or "/gloo/" in str(error)
        if not (lost and dist.is_initialized()):
            raise
        if restarts() < _most_restarts():
            next_ = "torchrun starts them again, and a run that has begun goes on from its last checkpoint"
        else:
            next_ = (
                "`forge resume RUN` goes on from its last checkpoint with any number of processes, and "
                "torchrun's --max-restarts does so by itself"
            )
        kind = RunFailed if dist.get_rank() == 0 else OtherRankFailed
        raise kind(f"another of the {dist.get_world_size()} processes has ended; {next_}") from error


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
