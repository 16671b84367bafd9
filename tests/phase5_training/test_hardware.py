import os
import platform
import subprocess
import sys
import textwrap

import pytest
import torch

import phase5_training.hardware as hardware
from phase4_bitnet import build_model
from phase5_training.errors import UsageError
from phase5_training.hardware import (
    compile_model,
    estimate_seconds,
    keep_freed_memory,
    resolve_amp,
    resolve_compile,
    resolve_device,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_cuda")
def test_devices_without_cuda():
    assert resolve_device("auto") == CPU
    assert resolve_device("cpu") == CPU
    for name in ("cuda", "cuda:1"):
        with pytest.raises(UsageError, match=rf"device='{name}' cannot be used: .*; use device='auto'"):
            resolve_device(name)
    with pytest.raises(UsageError, match="device='gpu' is not a device; use auto, cpu, cuda or cuda:N"):
        resolve_device("gpu")
    with pytest.raises(UsageError, match="device='meta' is not supported"):
        resolve_device("meta")


def test_devices_with_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == CUDA
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UsageError, match="device='cuda:2' does not exist; there are 2"):
        resolve_device("cuda:2")


def test_mixed_precision_on_a_cpu(monkeypatch):
    assert resolve_amp(True, "auto", CPU) == (True, torch.bfloat16)
    assert resolve_amp(False, "fp16", CPU)[0] is False
    with pytest.raises(UsageError, match="amp_dtype='fp16' needs CUDA; use amp_dtype='bf16'"):
        resolve_amp(True, "fp16", CPU)
    for faster in (True, False):
        monkeypatch.setattr(hardware, "bf16_is_faster_on_this_cpu", lambda faster=faster: faster)
        assert resolve_amp("auto", "auto", CPU) == (faster, torch.bfloat16)


@pytest.mark.parametrize("has_bf16", [True, False])
def test_mixed_precision_on_cuda(monkeypatch, has_bf16):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: has_bf16)
    auto = torch.bfloat16 if has_bf16 else torch.float16
    assert resolve_amp("auto", "auto", CUDA) == (True, auto)
    assert resolve_amp(True, "fp16", CUDA) == (True, torch.float16)
    assert resolve_amp(False, "bf16", CUDA) == (False, torch.bfloat16)


@pytest.mark.parametrize(("ratio", "faster"), [(0.5, True), (0.9, False)])
def test_bf16_has_to_be_clearly_faster(monkeypatch, ratio, faster):
    times = lambda x: ratio if x.dtype == torch.bfloat16 else 1.0  # noqa: E731
    monkeypatch.setattr(hardware, "_time_product", times)
    assert hardware.bf16_is_faster_on_this_cpu() is faster


def test_other_work_on_the_machine_does_not_make_bf16_fast(monkeypatch):
    """Most of the float32 products are disturbed and most of the others are not."""
    times = {torch.float32: iter([1.0] + [9.0] * 8 + [1.0] + [9.0] * 6), torch.bfloat16: iter([1.8] * 16)}
    monkeypatch.setattr(hardware, "_time_product", lambda x: next(times[x.dtype]))
    assert hardware.bf16_is_faster_on_this_cpu() is False


def test_measuring_bf16_leaves_the_generator_alone():
    state = torch.get_rng_state()
    hardware.bf16_is_faster_on_this_cpu()
    assert torch.equal(state, torch.get_rng_state())


def test_compilation(monkeypatch):
    monkeypatch.setattr(hardware, "has_compiler", lambda device: True)
    assert resolve_compile(False, CPU, None)[0] is False
    assert resolve_compile(True, CPU, None)[0] is True
    assert resolve_compile("auto", CPU, 30.0) == (
        False,
        "the run is too short to earn the compilation back",
    )
    assert resolve_compile("auto", CPU, 3600.0) == (True, "the run would take about 60 minutes without")
    monkeypatch.setattr(hardware, "has_compiler", lambda device: False)
    assert resolve_compile("auto", CPU, 3600.0) == (False, "no C++ compiler was found")
    with pytest.raises(UsageError, match=r"compile=True needs a C\+\+ compiler .*; install g\+\+"):
        resolve_compile(True, CPU, None)


def test_a_compiler_is_looked_for_on_the_path(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert hardware.has_compiler(CPU) is False
    (tmp_path / "g++").write_text("")
    (tmp_path / "g++").chmod(0o755)
    assert hardware.has_compiler(CPU) is True


def test_length_of_a_run_is_estimated_from_its_forwards(monkeypatch):
    clock = iter([0.0, 5.0, 10.0, 10.5])
    monkeypatch.setattr(hardware.time, "perf_counter", lambda: next(clock))
    seen = []
    assert estimate_seconds(lambda x: seen.append(torch.is_grad_enabled()), 0, 100, CPU) == 3 * 0.5 * 100
    assert seen == [False, False]


def test_a_memory_budget_keeps_less_and_changes_no_bit():
    torch.manual_seed(0)
    model = build_model("decoder", vocab_size=9, dim=32, layers=1, heads=2, backward="int8")
    tokens = torch.randint(9, (4, 20))

    def run(budget):
        torch._dynamo.reset()
        kept = 0

        def pack(x):
            nonlocal kept
            kept += x.numel() * x.element_size()
            return x

        model.zero_grad()
        compiled = compile_model(model, budget, backend="aot_eager_decomp_partition")
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = compiled(tokens)
        out.square().sum().backward()
        return kept, [p.grad for p in model.parameters()]

    try:
        (most, want), (least, got) = run(1.0), run(0.5)
    finally:
        torch._functorch.config.activation_memory_budget = 1.0
    assert least < most
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_used_again_without_page_faults() -> None:
    """Eight tensors of 8 MB each round are 16,384 pages; in a process of its own, since the setting stays.

    glibc raises its thresholds with what a process frees, so what it would give back depends on its past: the
    environment pins them to their first values (mallopt(3)), which the call under test has to overrule.
    """
    first_values = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    script = textwrap.dedent("""
        import resource, sys, torch
        from phase5_training.hardware import keep_freed_memory
        kept = sys.argv[1] == "kept" and keep_freed_memory(torch.device("cpu"))
        def step():
            tensors = [torch.zeros(2_000_000) for _ in range(8)]
        for _ in range(3):
            step()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(5):
            step()
        print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    """)
    found = {}
    for how in ("kept", "freed"):
        done = subprocess.run(
            [sys.executable, "-c", script, how],
            env={**os.environ, **first_values},
            capture_output=True,
            text=True,
            check=True,
        )
        kept, faults = done.stdout.split()
        assert kept == str(how == "kept")
        found[how] = int(faults)
    assert found["kept"] < 500
    assert found["freed"] > found["kept"]


def test_on_another_device_the_memory_is_torch_s_own_affair() -> None:
    assert not keep_freed_memory(torch.device("meta"))
