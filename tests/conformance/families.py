"""A tiny random model of every decoder-only family that transformers knows.

Knows: which sizes a config has, by the names that families give them. Does not know: streams, adapters.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lossless.models import freeze

VOCAB, WINDOW = 96, 12

# the families that must be served
REQUIRED = """
    llama mistral mixtral ministral qwen2 qwen2_moe qwen3 qwen3_moe gemma gemma2 gemma3_text phi phi3 phimoe gpt2
    gpt_neo gpt_neox gptj codegen gpt_bigcode opt bloom falcon mpt stablelm starcoder2 olmo olmo2 olmo3 olmoe granite
    granitemoe cohere cohere2 smollm3 glm glm4 ernie4_5 exaone4 nemotron persimmon helium seed_oss hunyuan_v1_dense
    apertus arcee biogpt xglm deepseek_v2 deepseek_v3 gpt_oss llama4_text dbrx jetmoe diffllama
""".split()

ALL = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "word_embed_proj_dim": 32,
    "num_hidden_layers": 4, "n_layer": 4, "n_layers": 4, "num_layers": 4,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "kv_channels": 8,
    "intermediate_size": 48, "n_inner": 48, "ffn_dim": 48, "shared_expert_intermediate_size": 24,
    "moe_intermediate_size": 24, "intermediate_size_mlp": 48, "num_shared_experts": 1, "n_shared_experts": 1,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1,
    "max_position_embeddings": 256, "n_positions": 256, "n_ctx": 256, "max_seq_len": 256,
    "sliding_window": WINDOW, "window_size": WINDOW, "attention_chunk_size": 64,
    "rotary_dim": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "initializer_range": 0.3, "init_std": 0.3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip

_SPECIAL: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "intermediate_size": 48},
    "qwen2_moe": {"decoder_sparse_step": 1},
    "mpt": {"expansion_ratio": 2, "use_cache": True},
    "jetmoe": {"num_attention_heads": None, "num_key_value_heads": 4},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "ffn_act_fn": {"name": "silu"}},
    },
    "llama4_text": {"interleave_moe_layer_step": 2},
    "deepseek_v2": {"head_dim": 8, "num_key_value_heads": 4},
    "deepseek_v3": {"head_dim": 8, "num_key_value_heads": 4},
}


def config_of(family: str) -> PretrainedConfig:
    """Its default config with every size made tiny."""
    kind = CONFIG_MAPPING[family]
    known = kind().to_dict() | dict.fromkeys(getattr(kind, "attribute_map", {}))
    sizes = {name: size for name, size in _SIZES.items() if name in known and known.get(name, 0) is not False}
    for name in ("sliding_window", "q_lora_rank"):
        if name in sizes and known[name] is None and family not in ("ministral", "phi3", "starcoder2"):
            del sizes[name]
    sizes |= {k: v for k, v in _SPECIAL.get(family, {}).items() if v is not None}
    for name in [k for k, v in _SPECIAL.get(family, {}).items() if v is None]:
        sizes.pop(name, None)
    if "layer_types" in known and known["layer_types"] is not None:
        kinds = list(dict.fromkeys(known["layer_types"]))
        sizes["layer_types"] = (kinds * 4)[:4]
    return kind(**sizes)


def build(family: str, attention: str | None = None) -> PreTrainedModel:
    """A random model whose choices are not all alike, float32, frozen."""
    torch.manual_seed(3)
    config = config_of(family)
    options = {} if attention is None else {"attn_implementation": attention}
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options)
    with torch.no_grad():  # some families start from weights that are all alike
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and parameter.std() < 0.05:
                parameter.normal_(std=0.3)
            elif parameter.ndim == 1 and "norm" in name.lower() and not parameter.any():
                parameter.normal_(std=0.1)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    return freeze(model)  # type: ignore[return-value]
