"""How much memory a process may have, by the files in which Linux says so."""

import os

import pytest

from phase5_training.memory import usable_memory

MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_without_a_container_it_is_the_machine_s(tmp_path):
    assert usable_memory(tmp_path) == MACHINE


@pytest.mark.parametrize(
    ("groups", "file"),
    [
        pytest.param("0::/jobs/7\n", "jobs/7/memory.max", id="cgroup-v2"),
        pytest.param("0::/jobs/7\n", "jobs/memory.max", id="cgroup-v2-of-a-group-above"),
        pytest.param("0::/docker/9f\n", "memory.max", id="cgroup-v2-inside-a-container"),
        pytest.param("9:cpu:/\n4:memory:/jobs/7\n", "memory/jobs/7/memory.limit_in_bytes", id="cgroup-v1"),
        pytest.param("4:memory:/docker/9f\n", "memory/memory.limit_in_bytes", id="cgroup-v1-in-a-container"),
        pytest.param("4:hugetlb,memory:/a\n", "memory/a/memory.limit_in_bytes", id="cgroup-v1-with-another"),
    ],
)
def test_a_container_s_limit_counts(tmp_path, groups, file):
    write(tmp_path / "proc/self/cgroup", groups)
    write(tmp_path / "sys/fs/cgroup" / file, "1048576\n")
    assert usable_memory(tmp_path) == 1 << 20


def test_the_least_of_several_limits_counts(tmp_path):
    write(tmp_path / "proc/self/cgroup", "0::/a/b\n")
    write(tmp_path / "sys/fs/cgroup/a/memory.max", "1000\n")
    write(tmp_path / "sys/fs/cgroup/a/b/memory.max", "2000\n")
    assert usable_memory(tmp_path) == 1000


@pytest.mark.parametrize("said", ["max\n", "9223372036854771712\n"])
def test_a_group_without_a_limit_has_the_machine_s(tmp_path, said):
    write(tmp_path / "proc/self/cgroup", "0::/\n")
    write(tmp_path / "sys/fs/cgroup/memory.max", said)
    assert usable_memory(tmp_path) == MACHINE
