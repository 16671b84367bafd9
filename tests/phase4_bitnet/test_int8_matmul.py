import pytest
import torch

from phase4_bitnet.int8_matmul import MAX_INNER, _int_mm_padded, int8_matmul


def operands(m, k, n, seed=0):
    g = torch.Generator().manual_seed(seed)
    a = torch.randint(-128, 128, (m, k), dtype=torch.int8, generator=g)
    b = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=g)
    return a, b


SHAPES = [(1, 1, 1), (1, 17, 5), (3, 7, 2), (16, 16, 16), (33, 100, 9), (64, 129, 31), (2, 1000, 3)]


@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_equals_python_integers(m, k, n, backend):
    a, b = operands(m, k, n)
    out = int8_matmul(a, b.t(), backend)
    assert out.dtype == torch.int32
    expected = (a.numpy().astype("int64") @ b.numpy().astype("int64").T).tolist()
    assert out.tolist() == expected


@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_padding_for_cuda_changes_nothing(m, k, n):
    a, b = operands(m, k, n, seed=1)
    assert torch.equal(_int_mm_padded(a, b.t()), int8_matmul(a, b.t(), "reference"))


@pytest.mark.parametrize(("m", "k", "n"), [(0, 4, 3), (4, 0, 3), (4, 3, 0)])
def test_empty_operands(m, k, n):
    a, b = operands(m, k, n)
    out = int8_matmul(a, b.t())
    assert out.shape == (m, n)
    assert not out.any()


def test_wrong_operands_are_refused():
    a = torch.zeros(2, 3, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"torch\.int8"):
        int8_matmul(a.float(), a.t())
    with pytest.raises(ValueError, match="shapes"):
        int8_matmul(a, a)
    with pytest.raises(ValueError, match="overflow"):
        int8_matmul(a.new_zeros(1, MAX_INNER + 1), a.new_zeros(MAX_INNER + 1, 1))


@pytest.mark.parametrize(
    ("m", "k", "n"), [(1, 64, 8), (64, 1, 8), (8, 64, 1), (1, 9, 1), (5, 1, 1), (1, 1, 7)]
)
def test_axes_of_length_one_may_have_any_stride(m, k, n):
    a, b = torch.randint(-128, 128, (m, k)).to(torch.int8), torch.randint(-128, 128, (k, n)).to(torch.int8)
    for left in (a, a.t().contiguous().t(), a.as_strided((m, k), (1, 1)) if 1 in (m, k) else a):
        for right in (b, b.t().contiguous().t(), b.as_strided((k, n), (1, 1)) if 1 in (k, n) else b):
            assert torch.equal(int8_matmul(left, right), (left.long() @ right.long()).int())


def test_the_longest_sum_does_not_overflow():
    a = torch.full((1, MAX_INNER), -128, dtype=torch.int8)
    assert int8_matmul(a, a.t()).item() == 128 * 128 * MAX_INNER


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_cuda_equals_cpu(m, k, n):
    a, b = operands(m, k, n)
    assert torch.equal(int8_matmul(a.cuda(), b.cuda().t()).cpu(), int8_matmul(a, b.t(), "reference"))
