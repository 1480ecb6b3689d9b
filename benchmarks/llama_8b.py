"""A model of the size of Llama 3 8B without its weights.

What a step and a copy cost depends on shapes, hardly on values, so vLLM's `dummy` weights measure
both. They say nothing about tokens: logits are near ties, which any change of the batch tips over.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "torch_dtype": "bfloat16",
}
LAYERS: int = CONFIG["num_hidden_layers"]
# Tokens of a KV block; vLLM's default on a GPU.
BLOCK_SIZE = 16
_ELEMENT_BYTES = 2  # bfloat16
# Keys and values of one block in one layer, and in all of them.
LAYER_BLOCK_BYTES: int = (
    2 * BLOCK_SIZE * CONFIG["num_key_value_heads"] * CONFIG["head_dim"] * _ELEMENT_BYTES
)
BLOCK_BYTES = LAYERS * LAYER_BLOCK_BYTES


def write_model(folder: Path) -> Path:
    """Make `folder` a model folder that holds a configuration alone, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n", encoding="utf-8")
    return folder
