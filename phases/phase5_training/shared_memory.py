"""Sums over the ranks of one machine, through memory that all of them have mapped.

gloo sends tensors through the network stack, also to a process beside this one: it copies them into the
kernel and out again, and its threads take the cores from those that compute. Here a rank copies what it gives
into its part of the memory, says so to the others by a byte on a socket, and reads theirs in place. A few
numbers travel on a socket themselves.

All ranks call the same methods in the same order, with tensors of the same size and type. Nothing of this has
a name in the file system once the ranks have met, so nothing is left of it, however they end.
"""

import contextlib
import mmap
import os
import socket
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from phase5_training.distributed import TIMEOUT, RankLost, Ranks

ALIGNMENT = 64  # bytes, a cache line; a tensor in the memory takes a multiple of it
HOW_SHARED = " in memory that the ranks share"
_SECONDS_TO_MEET = 60.0
_POSTED, _RELEASED = b"p", b"r"


class Streams:
    """A stream to each other rank of a machine.

    Args:
        rank: this one.
        sockets: connected, by rank.
    """

    def __init__(self, rank: int, sockets: dict[int, socket.socket]) -> None:
        self.rank, self.others = rank, list(sockets)
        self._sockets = sockets

    @classmethod
    def among(cls, ranks: Ranks) -> "Streams | None":
        """Streams among all ranks; None where they are not on one machine, or cannot meet. All ranks call."""
        with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as door:
            place = f"{folder}/door"
            here = None
            with contextlib.suppress(OSError):  # a path too long for a socket
                door.bind(place)
                door.listen(ranks.world_size)
                here = (_machine(), place)
            found = [other for other in ranks.gathered(here) if other is not None]
            if len(found) < ranks.world_size or len({machine for machine, _ in found}) > 1:
                return None
            met = _meet(door, [other for _, other in found], ranks.rank)
            # The folder goes when all have met.
            if not all(ranks.gathered(met is not None)) or met is None:
                return None
        return cls(ranks.rank, met)

    def tell(self, what: bytes) -> None:
        """Send bytes to all others that are there; one that has ended may have done so as it should."""
        for other, stream in self._sockets.items():
            with _naming(other), contextlib.suppress(BrokenPipeError, ConnectionResetError):
                stream.sendall(what)

    def hear(self, other: int, most: int) -> bytes:
        """Wait for bytes of another rank: one at least, ``most`` at most."""
        with _naming(other):
            said = self._sockets[other].recv(most)
        if not said:
            raise RankLost(f"rank {other} has ended")
        return said

    def swap(self, descriptor: int) -> dict[int, int]:
        """Give the others a file descriptor; returns those of all, by rank."""
        found = {self.rank: descriptor}
        for other, stream in self._sockets.items():
            with _naming(other):
                socket.send_fds(stream, [b"f"], [descriptor])
        for other, stream in self._sockets.items():
            with _naming(other):
                _, held, _, _ = socket.recv_fds(stream, 1, 1)
            if not held:
                raise RankLost(f"rank {other} has ended")
            found[other] = held[0]
        return dict(sorted(found.items()))


class StreamedSums:
    """Sums of a few numbers over the ranks.

    Args:
        streams: of this alone.
    """

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._begun: deque[_Sum] = deque()

    def begin(self, values: Tensor) -> Callable[[], Tensor]:
        """Begin to add up ``values``, (n,) float64 on the CPU.

        Returns:
            What waits for the others and gives the sums, (n,) float64: added in the order of the ranks, so
            that all have the same bits. It raises RankLost where another rank has ended.
        """
        made = _Sum(values.clone())
        self._begun.append(made)
        self._streams.tell(made.own.numpy().tobytes())

        def awaited() -> Tensor:
            while made.total is None:
                self._finish(self._begun.popleft())
            return made.total

        return awaited

    def _finish(self, begun: "_Sum") -> None:
        parts = {self._streams.rank: begun.own}
        for other in self._streams.others:
            said = bytearray()
            while len(said) < begun.own.nbytes:
                said += self._streams.hear(other, begun.own.nbytes - len(said))
            parts[other] = torch.frombuffer(said, dtype=torch.float64)
        total = torch.empty_like(begun.own)
        add_up_(total, [part for _, part in sorted(parts.items())])
        begun.total = total


class _Sum:
    def __init__(self, own: Tensor) -> None:
        self.own = own
        self.total: Tensor | None = None


@dataclass(frozen=True)
class Posted:
    """What every rank has put at the same place of its part of the memory, or will.

    Args:
        number: how many were posted before it.
        start: in bytes.
        length: in elements.
        dtype: of the elements.
    """

    number: int
    start: int
    length: int
    dtype: torch.dtype


class SharedMemory:
    """Memory in which each rank writes its part, and reads those of all.

    Args:
        streams: of this alone.
        own: file of this rank's part; closed.
        size: of a part, in bytes.
    """

    def __init__(self, streams: Streams, own: int, size: int) -> None:
        self._streams = streams
        self._parts = []
        for file in streams.swap(own).values():
            self._parts.append(torch.frombuffer(mmap.mmap(file, size), dtype=torch.uint8))
            os.close(file)
        self._heard = {other: {_POSTED: 0, _RELEASED: 0} for other in streams.others}
        self._posts = self._releases = self._used = 0

    @classmethod
    def among(cls, ranks: Ranks, size: int) -> "SharedMemory | None":
        """Memory of ``size`` bytes for each rank, or None where they cannot share any; all ranks call.

        The system gives memory as it is written.
        """
        streams, own = Streams.among(ranks), None
        if streams is None:
            return None
        with contextlib.suppress(OSError):
            own = os.memfd_create("forge-rank")
            os.ftruncate(own, size)
        if None in ranks.gathered(own) or own is None:
            return None
        return cls(streams, own, size)

    def post(self, tensor: Tensor) -> Posted:
        """Give the others a tensor of any shape, on a CPU; it may change afterwards.

        All that is posted between two releases has to fit.

        Raises:
            RankLost: another rank has ended.
        """
        if not self._used:
            # Others may still read what was there before the last release.
            self._wait_for(_RELEASED, self._releases)
        posted = Posted(self._posts, self._used, tensor.numel(), tensor.dtype)
        if self._used + tensor.nbytes > len(self._parts[0]):
            raise RuntimeError(
                f"{tensor.nbytes} bytes after {self._used} do not fit in {len(self._parts[0])}"
            )
        self._view(self._parts[self._streams.rank], posted).copy_(tensor.reshape(-1))
        self._posts += 1
        self._used += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        self._streams.tell(_POSTED)
        return posted

    def parts(self, posted: Posted) -> list[Tensor]:
        """What each rank has posted, by rank, (length,), in place; waits for those who have not yet.

        Raises:
            RankLost: another rank has ended.
        """
        self._wait_for(_POSTED, posted.number + 1)
        return [self._view(part, posted) for part in self._parts]

    def release(self) -> None:
        """Say that all that was posted has been read here; it is written over when all have said so."""
        self._releases += 1
        self._used = 0
        self._streams.tell(_RELEASED)

    def _view(self, part: Tensor, posted: Posted) -> Tensor:
        end = posted.start + posted.length * posted.dtype.itemsize
        return part[posted.start : end].view(posted.dtype)

    def _wait_for(self, word: bytes, times: int) -> None:
        """Wait until all others have said a word so many times since they met."""
        for other, heard in self._heard.items():
            while heard[word] < times:
                said = self._streams.hear(other, 4096)
                for each in heard:
                    heard[each] += said.count(each)


def memory_for(sizes: Sequence[int], ranks: Ranks, device: torch.device) -> SharedMemory | None:
    """Memory that the ranks share, where they can; they then add up a few numbers so too. All ranks call.

    Args:
        sizes: of the tensors that will lie in it at one time, in bytes.
        ranks: those of the model.
        device: of the model; what is on a GPU travels by NCCL.

    Returns:
        None where ranks are on several machines, or the system does not let them.
    """
    if device.type != "cpu":
        return None
    memory = SharedMemory.among(ranks, sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes))
    streams = None if memory is None else Streams.among(ranks)
    if streams is None:
        return None
    ranks.near = StreamedSums(streams).begin
    return memory


def add_up_(output: Tensor, parts: Sequence[Tensor]) -> None:
    """Put the sum of two parts or more into ``output``, added in its type and in their order.

    Args:
        output: (n,); none of the parts.
        parts: (n,) each, of this type or a narrower one.
    """
    if parts[0].dtype == output.dtype:
        torch.add(parts[0], parts[1], out=output)
    else:
        output.copy_(parts[0]).add_(parts[1])
    for part in parts[2:]:
        output.add_(part)


def _machine() -> str:
    """What tells a machine, while it runs, from all others."""
    return Path("/proc/sys/kernel/random/boot_id").read_text()


def _meet(door: socket.socket, doors: Sequence[str], rank: int) -> dict[int, socket.socket] | None:
    """A socket to each other rank: the higher of two knocks at the lower one's door.

    None where a door is not seen: in another container of the same machine.
    """
    found: dict[int, socket.socket] = {}
    door.settimeout(_SECONDS_TO_MEET)
    try:
        for other in range(rank):
            found[other] = socket.socket(socket.AF_UNIX)
            found[other].connect(doors[other])
            found[other].sendall(rank.to_bytes(4, "big"))
        for _ in range(rank + 1, len(doors)):
            stream, _ = door.accept()
            stream.setblocking(True)
            found[int.from_bytes(stream.recv(4, socket.MSG_WAITALL), "big")] = stream
    except OSError:
        return None
    for stream in found.values():
        stream.settimeout(TIMEOUT.total_seconds())
    return found


@contextlib.contextmanager
def _naming(other: int) -> Iterator[None]:
    """Errors of a stream name the rank at its other end."""
    try:
        yield
    except TimeoutError as error:
        raise RankLost(f"rank {other} has said nothing for {TIMEOUT}") from error
    except OSError as error:
        raise RankLost(f"rank {other} has ended") from error
