"""Codes that travel in 2 bits make the layer that they came from."""

import pytest
import torch

from phase4_bitnet import BitLinear
from phase4_bitnet.packing import pack_codes
from phase4_bitnet.sharding import GatheredCodes, ShardedLatent, int8_codes, pack_rows
from phase4_bitnet.ternary import requantize_


@pytest.mark.parametrize("shape", [(4, 8), (3, 5), (2, 3, 3), (0, 4)])
def test_rows_are_packed_as_stored_codes_are_and_come_back(shape):
    codes = torch.randint(-1, 2, shape, dtype=torch.int8)
    packed = pack_rows(codes)
    if codes.numel():
        assert torch.equal(packed, pack_codes(codes.reshape(shape[0], -1)))
    assert torch.equal(int8_codes(packed, shape), codes)
    assert int8_codes(codes, shape) is codes


@pytest.mark.parametrize("backward", ["float32", "int8"])
@pytest.mark.parametrize("bits", [8, None])
def test_a_gathered_layer_computes_and_learns_as_the_whole_one(bits, backward):
    torch.manual_seed(0)
    layer = BitLinear(12, 6, activation_bits=bits, backward=backward)
    x, upstream = torch.randn(5, 12), torch.randn(5, 6)
    out = layer(x)
    out.backward(upstream)
    wanted = layer.weight.grad
    codes, scale = layer.current_codes()
    whole = GatheredCodes(pack_rows(codes), scale, layer.weight.shape, torch.float32)
    layer._parameters["weight"] = torch.nn.Parameter(whole)
    found = layer(x)
    found.backward(upstream)
    assert torch.equal(found, out)
    assert torch.equal(layer.weight.grad, wanted)
    assert torch.equal(layer.weight + 0, codes * scale)


def test_rows_of_a_latent_share_its_memory():
    rows = torch.ones(4, 2)
    latent = ShardedLatent(rows)
    latent[1:].copy_(torch.zeros(3, 2))
    assert rows.sum() == 2
    assert isinstance(latent.detach(), ShardedLatent)
    assert type(latent + 1) is torch.Tensor


def test_parts_take_the_scale_of_the_whole():
    weight = torch.randn(6, 8)
    whole = (torch.empty(6, 8, dtype=torch.int8), torch.empty(()))
    requantize_([weight], [whole[0]], [whole[1]])
    for part in (slice(0, 2), slice(2, 6)):
        codes, scale = torch.empty_like(whole[0][part]), torch.empty(())
        requantize_([weight[part]], [codes], [scale], means=weight.abs().double().mean()[None].float())
        assert torch.equal(codes, whole[0][part])
        assert torch.equal(scale, whole[1])
