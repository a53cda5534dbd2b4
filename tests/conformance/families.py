"""A tiny random model of every decoder-only family that transformers knows.

Knows: which sizes a config has, by the names that families give them. Does not know: streams, adapters.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lossless.base.loading import freeze

VOCAB, WINDOW = 96, 12
_MOST_WEIGHTS = 7_000_000

# the families that must be served
REQUIRED = [
    "apertus", "arcee", "biogpt", "bloom", "codegen", "cohere", "cohere2", "dbrx", "deepseek_v2", "deepseek_v3",
    "diffllama", "ernie4_5", "exaone4", "falcon", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt2", "gpt_bigcode",
    "gpt_neo", "gpt_neox", "gpt_oss", "gptj", "granite", "granitemoe", "helium", "hunyuan_v1_dense", "jetmoe", "llama",
    "llama4_text", "ministral", "mistral", "mixtral", "mpt", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "opt",
    "persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "roberta", "seed_oss", "smollm3", "stablelm",
    "starcoder2", "xglm",
]  # fmt: skip

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
    "sliding_window": WINDOW, "window_size": WINDOW, "attention_chunk_size": 16,
    "rotary_dim": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "initializer_range": 0.3, "init_std": 0.3,
    "unpadded_vocab_size": VOCAB, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "sliding_window_size": WINDOW,
    "dense_intermediate_size": 48, "rel_extent": 64, "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8, "global_head_dim": 8, "num_global_key_value_heads": 2,
    "image_size": 28, "patch_size": 14, "mm_tokens_per_image": 4, "pronunciation_vocab_size": 16, "shape_vocab_size": 16,
    "mm_embed_dim": 32, "mm_posemb_size": 8,
    "decoder_layers": 4, "encoder_layers": 4, "decoder_attention_heads": 4, "encoder_attention_heads": 4,
    "decoder_ffn_dim": 48, "encoder_ffn_dim": 48, "embedding_size": 32, "type_vocab_size": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip

# heads and widths that kernels of ours take, in place of those above; values of latent attention are narrower than its keys
_WIDER = dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size"), 128) | dict.fromkeys(
    ("head_dim", "kv_channels", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "swa_head_dim", "global_head_dim", "rotary_dim"), 32
) | dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "intermediate_size_mlp", "dense_intermediate_size", "decoder_ffn_dim"), 192) | dict.fromkeys(
    ("shared_expert_intermediate_size", "moe_intermediate_size"), 96
)  # fmt: skip

_SPECIAL: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "intermediate_size": 48},
    "qwen2_moe": {"decoder_sparse_step": 1},
    "mpt": {"expansion_ratio": 2, "use_cache": True},
    "jetmoe": {"num_attention_heads": None, "num_key_value_heads": 4},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "ffn_act_fn": {"name": "silu"}},
    },
    "lfm2": {"layer_types": ["conv", "conv", "full_attention", "full_attention"]},
    "llama4_text": {"interleave_moe_layer_step": 2},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "full_attention"]},
    "gemma3n_text": {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": VOCAB, "laurel_rank": 4, "intermediate_size": [48] * 4,
                     "activation_sparsity_pattern": [0.0] * 4},
    "gemma4_text": {"num_kv_shared_layers": 0},
    "zaya": {"num_experts_per_tok": 1},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8, "layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4, "num_experts": 2},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [16, 16]},
    "cohere_compass_text": {
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")},
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "xlstm": {"embedding_dim": 128, "hidden_size": 128, "num_blocks": 4},
    "zamba": {
        "attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4, "mamba_dt_rank": 4, "mamba_d_state": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False,
    },
    "zamba2": {
        "attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4, "num_query_groups": 4, "mamba_d_state": 4, "n_mamba_heads": 8,
        "mamba_headdim": 8, "chunk_size": 16, "layers_block_type": ["linear_attention", "hybrid"] * 2, "hybrid_layer_ids": [1, 3], "adapter_rank": 4,
        "layer_types": None,
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 16, "indexer_compress_ratio": 4,
        "ngram_vocab_size_base": 64, "split_ngram_parts": 2, "make_ngram_vocab_size_divisible_by": 2, "hc_lowrank": 4, "ple_embed_dim": 32,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "heads_per_ngram": 2,
    },
    "dots3_note_text": {"per_layer_config": {}, "index_topk": 8, "index_head_dim": 16, "head_dim": 16, "index_n_heads": 4, "shared_experts_intermediate_size": 24},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
}


# tied, scaled embeddings of random models say the last token again and again
_SELF_CENTRED = frozenset(("gemma2", "gemma3_text", "xglm"))


def config_of(family: str, wider: bool = False) -> PretrainedConfig:
    """Its default config with every size made tiny, or as small as kernels of ours allow."""
    kind = CONFIG_MAPPING[family]
    specs, inner = getattr(kind, "sub_configs_defaults", {}), {}
    for name, sub in getattr(kind, "sub_configs", {}).items():
        part = getattr(sub, "model_type", "") or getattr(specs.get(name), "model_type", "")
        if part in CONFIG_MAPPING:
            inner[name] = sizes_of(CONFIG_MAPPING[part], part, wider) | ({} if hasattr(sub, "model_type") else {"model_type": part})
    return kind(**sizes_of(kind, family, wider), **inner)


def sizes_of(kind: type[PretrainedConfig], family: str, wider: bool = False) -> dict[str, Any]:
    """Tiny values for those sizes that a config has, by the names that it gives them."""
    known = kind().to_dict() | dict.fromkeys(getattr(kind, "attribute_map", {}))
    sizes = {name: _WIDER.get(name, size) if wider else size for name, size in _SIZES.items() if name in known and known.get(name, 0) is not False}
    for name in ("sliding_window", "q_lora_rank"):
        if name in sizes and known[name] is None and family not in ("ministral", "phi3", "starcoder2"):
            del sizes[name]
    special = _SPECIAL.get(family, {})
    if "kv_lora_rank" in sizes:  # latent attention has as many key heads as heads
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    if "is_decoder" in known:
        sizes["is_decoder"] = True
    sizes = {name: size for name, size in (sizes | special).items() if special.get(name, 0) is not None}
    if known.get("layer_types") is not None and "layer_types" not in special:
        kinds = list(dict.fromkeys(known["layer_types"]))
        sizes["layer_types"] = (kinds * 4)[:4]
    return sizes


def build(family: str, attention: str | None = None, wider: bool = False) -> PreTrainedModel:
    """A random model whose choices are not all alike, float32, frozen."""
    torch.manual_seed(3)
    config = config_of(family, wider)
    options = {} if attention is None else {"attn_implementation": attention}
    with torch.device("meta"):
        weights = AutoModelForCausalLM.from_config(config, **options).num_parameters()
    if weights > _MOST_WEIGHTS:
        raise ValueError(f"its sizes have other names: a tiny one would have {weights:,} weights")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options)
    with torch.no_grad():  # some families start from weights that are all alike
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and parameter.std() < 0.05:
                parameter.normal_(std=0.3)
            elif parameter.ndim == 1 and "norm" in name.lower() and not parameter.any():
                parameter.normal_(std=0.1)
        if family in _SELF_CENTRED:
            model.get_input_embeddings().weight.mul_(0.1)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    return freeze(model)  # type: ignore[return-value]
