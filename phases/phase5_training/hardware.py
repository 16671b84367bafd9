"""What the run is computed with: device, mixed precision, compilation, determinism."""

import contextlib
import ctypes
import os
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from phase5_training.errors import UsageError

# Compiling costs up to a minute on two cores; a run has to be several times as long to earn it back.
COMPILE_PAYS_AFTER_SECONDS = 240.0


def resolve_device(device: str, local_rank: int | None = None) -> torch.device:
    """The device that ``device`` names; "auto" is CUDA where there is one, else the CPU.

    Of several processes on a machine each takes the GPU of its number, ``local_rank``.

    Raises:
        UsageError: the device does not exist here.

    Example:
        >>> resolve_device("cpu")
        device(type='cpu')
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and local_rank is not None:
        device = f"cuda:{local_rank}"
    try:
        found = torch.device(device)
    except RuntimeError:
        raise UsageError(f"device={device!r} is not a device; use auto, cpu, cuda or cuda:N") from None
    if found.type not in ("cpu", "cuda"):
        raise UsageError(f"device={device!r} is not supported; use auto, cpu, cuda or cuda:N")
    if found.type == "cuda" and not torch.cuda.is_available():
        why = "torch has no CUDA support" if torch.version.cuda is None else "no CUDA device is visible"
        raise UsageError(
            f"device={device!r} cannot be used: {why}; use device='auto', or install a CUDA build"
        )
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device={device!r} does not exist; there are {torch.cuda.device_count()} CUDA devices"
        )
    return found


def resolve_amp(use_amp: bool | str, amp_dtype: str, device: torch.device) -> tuple[bool, torch.dtype]:
    """Whether to autocast, and to what.

    Raises:
        UsageError: float16 on a CPU, where it has no fast path and nothing to gain.
    """
    if amp_dtype == "fp16" and device.type == "cpu" and use_amp:
        raise UsageError("amp_dtype='fp16' needs CUDA; use amp_dtype='bf16' on a CPU")
    if amp_dtype == "auto":
        has_bf16 = device.type == "cpu" or torch.cuda.is_bf16_supported()
        dtype = torch.bfloat16 if has_bf16 else torch.float16
    else:
        dtype = torch.float16 if amp_dtype == "fp16" else torch.bfloat16
    if use_amp == "auto":
        return (device.type == "cuda" or bf16_is_faster_on_this_cpu()), dtype
    return bool(use_amp), dtype


def bf16_is_faster_on_this_cpu() -> bool:
    """Whether a bf16 matrix product takes at most 0.8 of the time of a float32 one here.

    The two are timed in turn and judged by the fastest of each: other work on the machine can only make a
    product slower. On two busy cores that ratio lay within 1.55 and 1.99 in 25 calls, and the median ratio of
    the pairs within 1.1 and 6.1. Takes about 50 ms.
    """
    a = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    b = a.bfloat16()
    _time_product(a), _time_product(b)
    pairs = [(_time_product(a), _time_product(b)) for _ in range(15)]
    in_float32, in_bf16 = map(min, zip(*pairs, strict=True))
    return in_bf16 <= 0.8 * in_float32


def _time_product(x: torch.Tensor) -> float:
    started = time.perf_counter()
    x @ x
    return time.perf_counter() - started


def resolve_compile(
    compile_model: bool | str, device: torch.device, seconds_left: float | None
) -> tuple[bool, str]:
    """Whether to compile the model, and why.

    Args:
        compile_model: True, False or "auto".
        device: where it runs.
        seconds_left: estimated length of the run without compilation, None when unknown.

    Raises:
        UsageError: True on a CPU without a C++ compiler.
    """
    compiler = has_compiler(device)
    if compile_model is True and not compiler:
        raise UsageError(
            "compile=True needs a C++ compiler and none was found; install g++ (Debian: apt install g++), "
            "or use compile='auto'"
        )
    if compile_model != "auto":
        return bool(compile_model), "as configured"
    if not compiler:
        return False, "no C++ compiler was found"
    if seconds_left is None or seconds_left < COMPILE_PAYS_AFTER_SECONDS:
        return False, "the run is too short to earn the compilation back"
    return True, f"the run would take about {seconds_left / 60:.0f} minutes without"


def compile_model(model: Any, memory_budget: float = 1.0, **options: Any) -> Any:
    """``torch.compile`` that may keep fewer activations for backward.

    The budget is torch's own setting for min-cut recomputation: one for the process, read when a compiled
    model is first called. On the reference decoder 0.9 drops normalized values and their int8 copies: a
    quarter of the activations at the same time a step. Recomputed values have the same bits.

    Args:
        model: a module or function.
        memory_budget: share of the bytes that would be kept by default, in (0, 1].
        options: of ``torch.compile``.
    """
    torch._functorch.config.activation_memory_budget = memory_budget
    return torch.compile(model, **options)


def estimate_seconds(model: Callable[[Any], Any], inputs: Any, steps: int, device: torch.device) -> float:
    """Length of a run of ``steps`` steps without compilation, from two forwards of one batch.

    Args:
        model: in the mode in which it is to be timed.
        inputs: of one batch, on the device.
        steps: optimizer steps.
        device: where it runs.
    """
    seconds = []
    with torch.no_grad():
        for _ in range(2):
            started = time.perf_counter()
            model(inputs)
            wait_for(device)
            seconds.append(time.perf_counter() - started)
    # A step is about three forwards: one, and two products in backward for each of its.
    return 3 * min(seconds) * steps


def wait_for(device: torch.device) -> None:
    """Let the device finish what it was told to do, so that time is measured and not promised."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def has_compiler(device: torch.device) -> bool:
    """Whether torch.compile can build code for the device."""
    if device.type == "cuda":
        return True
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++") if name)


def keep_freed_memory(device: torch.device) -> bool:
    """Have the C library reuse the memory of freed tensors on a CPU instead of giving it back at once.

    By default glibc unmaps or trims what a step frees, and the next step pays a page fault for every 4 kB of
    it: 3,500 faults a step on the modular task (docs/findings.md). Tensors above 32 MB, the most that
    glibc lets one set, are still mapped one by one. A setting of the process; its peak does not change.

    Returns:
        Whether it was set: False on another device or with another C library.

    Source: mallopt(3).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if device.type == "cpu" else None
    if mallopt is None:
        return False
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # malloc.h
    most = 32 << 20
    return all(
        mallopt(*each) == 1 for each in ((trim_threshold, 2**31 - 1), (top_pad, most), (mmap_threshold, most))
    )


def prepare_determinism(wanted: bool) -> None:
    """Ask cuBLAS for the workspace without which its products are not repeatable; it looks once, early."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextlib.contextmanager
def deterministic_kernels(wanted: bool) -> Iterator[None]:
    """While inside, torch uses only kernels that give the same bits each time, or raises where it has none.

    The switch is torch's own, one for the process. Memory that was not written yet is not filled, which
    torch would do as well, since nothing here reads it.
    """
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fill, benchmark = memory.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)
        memory.fill_uninitialized_memory = fill
        torch.backends.cudnn.benchmark = benchmark
