"""Folders named like the models of vLLM's tests, so that no hub is asked: only shapes matter."""

import json
from pathlib import Path

from scripts.tiny_model import build_tiny_model

_TOKENS = {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}
OPT = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "hidden_size": 768,
    "word_embed_proj_dim": 768,
    "ffn_dim": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "max_position_embeddings": 2048,
    "vocab_size": 50272,
    "dtype": "float16",
    **_TOKENS,
}
LLAVA = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "image_token_index": 2048,
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "dtype": "float16",
    "text_config": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 32064,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "dtype": "float16",
    },
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "image_size": 336,
        "patch_size": 14,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
}
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_hidden_layers": 28,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "vocab_size": 151936,
    "dtype": "bfloat16",
}
CLIP = {
    "image_processor_type": "CLIPImageProcessor",
    "crop_size": {"height": 336, "width": 336},
    "size": {"shortest_edge": 336},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.25, 0.25, 0.25],
}
PROCESSOR = {
    "processor_class": "LlavaProcessor",
    "patch_size": 14,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
}


def write_models(folder: Path) -> None:
    """Write the folders below `folder`, whose tests are run with it as their working directory."""
    opt = _with_tokenizer(folder / "facebook" / "opt-125m", "</s>")
    _write(opt / "config.json", OPT)
    qwen3 = _with_tokenizer(folder / "Qwen" / "Qwen3-0.6B", "<|im_end|>")
    _write(qwen3 / "config.json", QWEN3)
    llava = _with_tokenizer(folder / "llava-hf" / "llava-1.5-7b-hf", "<image>")
    _write(llava / "config.json", LLAVA)
    _write(llava / "preprocessor_config.json", CLIP)
    _write(llava / "processor_config.json", PROCESSOR)


def _with_tokenizer(folder: Path, extra: str) -> Path:
    """A folder with the tiny model's tokenizer and one more special token."""
    from tokenizers import AddedToken, Tokenizer

    build_tiny_model(folder)
    (folder / "model.safetensors").unlink(missing_ok=True)
    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens([AddedToken(extra, special=True)])
    tokenizer.save(str(path))
    return folder


def _write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
