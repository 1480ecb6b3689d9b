"""LoRA adapters for the tiny model, written by hand: seeded, and strong enough to change tokens."""

import json
from pathlib import Path

RANK = 4


def write_adapters(folder, model, count):
    """Write `count` adapters below `folder`; returns their folders."""
    return [_write(Path(folder) / f"adapter-{seed}", model, seed) for seed in range(1, count + 1)]


def _write(folder, model, seed):
    import torch
    from safetensors.torch import save_file

    config = json.loads((Path(model) / "config.json").read_text())
    hidden = config["hidden_size"]
    kv_width = config["num_key_value_heads"] * config["head_dim"]
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name, width in (("q_proj", hidden), ("v_proj", kv_width)):
            key = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            down = torch.randn(RANK, hidden, generator=generator) / hidden**0.5
            tensors[f"{key}.lora_A.weight"] = down
            tensors[f"{key}.lora_B.weight"] = torch.randn(width, RANK, generator=generator)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder
