"""Tiny random models of many architectures, with distributions far from uniform."""

from __future__ import annotations

import torch
import transformers

from cpmtp.pretrained import HuggingFaceLanguageModel

VOCAB = 24
_IDS = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
_WIDE = _IDS | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
_LONG = {"max_position_embeddings": 96}
_GROUPED = _WIDE | _LONG | {"num_attention_heads": 4, "num_key_value_heads": 2}
_GEMMA = _GROUPED | {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8}
_BART = {"d_model": 32, "decoder_layers": 2, "encoder_layers": 1, "decoder_ffn_dim": 48}
_BART |= {"encoder_ffn_dim": 48, "decoder_attention_heads": 4, "encoder_attention_heads": 4}
_GPT = _IDS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96}
_BERT = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
_BERT |= {"num_attention_heads": 4, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
_SPARSE = {"num_attention_heads": 4, "num_key_value_heads": 4, "moe_intermediate_size": 16}
_SPARSE |= {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2}
_SPARSE |= {"topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8}
_SPARSE |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "index_head_dim": 8}
_SPARSE |= {"index_n_heads": 2, "index_topk": 8}
_ROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}

# Name: configuration class, settings, and the way a ragged batch is followed.
ARCHITECTURES = {
    "llama": ("LlamaConfig", _GROUPED, "batch"),
    "gpt2": ("GPT2Config", _GPT, "batch"),
    "granite": ("GraniteConfig", _GROUPED | {"logits_scaling": 8.0}, "batch"),
    "cohere": ("CohereConfig", _GROUPED | {"logit_scale": 0.25}, "batch"),
    "gemma2": ("Gemma2Config", _GEMMA | {"final_logit_softcapping": 2.0}, "rows"),
    "mistral": ("MistralConfig", _GROUPED | {"sliding_window": 6}, "rows"),
    "mpt": ("MptConfig", {"vocab_size": VOCAB, "d_model": 32, "n_layers": 2, "n_heads": 4}, "rows"),
    "bart": ("BartConfig", {"vocab_size": VOCAB} | _BART | _LONG, "rows"),
    "lfm2": (
        "Lfm2Config",
        _GROUPED | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
        "recorded rows",
    ),
    # Attention beside a state space, whose share of the logits is small.
    "falcon_h1": (
        "FalconH1Config",
        _GROUPED
        | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}
        | {"mamba_n_groups": 1, "mamba_chunk_size": 8},
        "replayed",
    ),
    "mamba2": (
        "Mamba2Config",
        _IDS
        | {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "num_heads": 8}
        | {"head_dim": 8, "n_groups": 1, "chunk_size": 8},
        "replayed",
    ),
    "mamba": (
        "MambaConfig",
        _IDS | {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
        "stepped",
    ),
    "openai-gpt": ("OpenAIGPTConfig", {k: _GPT[k] for k in list(_GPT)[4:]} | _IDS, "full passes"),
    "roberta": ("RobertaConfig", _BERT | {"is_decoder": True} | _LONG, "full passes"),
    # Each token attends to the eight that an index chooses, among later ones as well.
    "deepseek_v32": ("DeepseekV32Config", _WIDE | _LONG | _SPARSE, "passes of prefixes"),
    "longrope": (
        "Phi3Config",
        _GROUPED
        | {"pad_token_id": 2, "rope_scaling": _ROPE, "original_max_position_embeddings": 24},
        "passes of prefixes",
    ),
}


def tiny(name: str, *, dtype: torch.dtype = torch.float32, **changes) -> HuggingFaceLanguageModel:
    """The model `name`, its matrices four times as large as they are drawn."""
    kind, settings, _ = ARCHITECTURES[name]
    config = getattr(transformers, kind)(**settings | changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(4.0)
    return HuggingFaceLanguageModel(model.to(dtype), name=name)
