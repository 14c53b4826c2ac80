"""A GGUF file of a tiny Llama with a tiny byte-pair tokenizer, written here."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

WIDTH, FEED, HEADS, GROUPS, LAYERS, CONTEXT = 32, 64, 4, 2, 2, 64
TOKENS = ["<s>", "</s>", *"abcdefgh", "ab", "abc"]
MERGES = ["a b", "ab c"]


def write_tiny_gguf(path: Path, seed: int = 0) -> dict[str, np.ndarray]:
    """Write the file and return its tensors as they were before one of them was quantized."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FEED)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, *[1] * (len(TOKENS) - 2)])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    tensors = _tensors(np.random.default_rng(seed))
    for name, values in tensors.items():
        kind = gguf.GGMLQuantizationType.Q8_0 if name.endswith("ffn_down.weight") else None
        data = values if kind is None else gguf.quants.quantize(values, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def _tensors(generator: np.random.Generator) -> dict[str, np.ndarray]:
    small = WIDTH // HEADS * GROUPS
    shapes = {"attn_q": (WIDTH, WIDTH), "attn_k": (small, WIDTH), "attn_v": (small, WIDTH)}
    shapes |= {"attn_output": (WIDTH, WIDTH), "ffn_gate": (FEED, WIDTH), "ffn_up": (FEED, WIDTH)}
    shapes |= {"ffn_down": (WIDTH, FEED), "attn_norm": (WIDTH,), "ffn_norm": (WIDTH,)}
    found = {
        f"blk.{i}.{name}.weight": shape for i in range(LAYERS) for name, shape in shapes.items()
    }
    found |= {"token_embd.weight": (len(TOKENS), WIDTH), "output_norm.weight": (WIDTH,)}
    found |= {"output.weight": (len(TOKENS), WIDTH)}
    return {
        name: (
            np.ones(shape, np.float32)
            if len(shape) == 1
            else generator.normal(0, 0.5, shape).astype(np.float32)
        )
        for name, shape in found.items()
    }
