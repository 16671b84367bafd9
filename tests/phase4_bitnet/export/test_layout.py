"""The Llama of ours against that of transformers, with the same float weights and no export in between."""

import pytest
import torch

from phase4_bitnet import build_model

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("length", [5, 24])
def test_the_float_llama_is_that_of_transformers(length):
    torch.manual_seed(0)
    ours = build_model(
        "llama", vocab_size=11, dim=16, layers=2, heads=2, max_length=24, ternary=False, rope_base=700.0
    )
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(torch.randn(p.shape) * 0.3)
    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=16, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=24, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 700.0},
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    state = {"model.embed_tokens.weight": ours.embed_tokens.weight, "lm_head.weight": ours.head.weight}
    state["model.norm.weight"] = ours.norm.weight
    for i, block in enumerate(ours.layers):
        place = f"model.layers.{i}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            state[f"{place}{name}.weight"] = getattr(block, name).weight
        q, k, v = block.self_attn.qkv_proj.weight.split(16)
        gate, up = block.mlp.gate_up_proj.weight.split(48)
        state |= {f"{place}self_attn.{n}_proj.weight": w for n, w in (("q", q), ("k", k), ("v", v))}
        state[f"{place}self_attn.o_proj.weight"] = block.self_attn.o_proj.weight
        state |= {f"{place}mlp.gate_proj.weight": gate, f"{place}mlp.up_proj.weight": up}
        state[f"{place}mlp.down_proj.weight"] = block.mlp.down_proj.weight
    theirs.load_state_dict(state)
    tokens = torch.randint(11, (3, length))
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=2e-5, rtol=1e-5)
