"""A tiny model that sees: the tiny Llama behind a seeded CLIP tower, all from local files."""

import json
import shutil
from pathlib import Path

IMAGE = "<image>"
SIDE = 56
PATCH = 14
WIDTH = 64
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "image_size": SIDE,
    "patch_size": PATCH,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "projection_dim": WIDTH,
}
IMAGES = {
    "image_processor_type": "CLIPImageProcessor",
    "crop_size": {"height": SIDE, "width": SIDE},
    "size": {"shortest_edge": SIDE},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.25, 0.25, 0.25],
}
PROCESSOR = {
    "processor_class": "LlavaProcessor",
    "patch_size": PATCH,
    "vision_feature_select_strategy": "default",
    # The tower's class token, which that strategy drops.
    "num_additional_image_tokens": 1,
}


def write_llava(folder, llama):
    """Write a model folder for images below `folder`, from that of the tiny Llama; returns it."""
    folder = Path(folder) / "tiny-llava"
    shutil.copytree(llama, folder)
    text = json.loads((folder / "config.json").read_text())
    image_token = _add_token(folder / "tokenizer.json")
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": image_token,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "image_seq_length": (SIDE // PATCH) ** 2,
        "tie_word_embeddings": False,
        "dtype": "float32",
        "text_config": text | {"vocab_size": image_token + 1, "tie_word_embeddings": False},
        "vision_config": VISION,
    }
    for name, content in (
        ("config.json", config),
        ("preprocessor_config.json", IMAGES),
        ("processor_config.json", PROCESSOR),
    ):
        (folder / name).write_text(json.dumps(content))
    _write_weights(folder, text["hidden_size"])
    return str(folder)


def _add_token(path):
    from tokenizers import AddedToken, Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens([AddedToken(IMAGE, special=True)])
    tokenizer.save(str(path))
    return tokenizer.token_to_id(IMAGE)


def _write_weights(folder, hidden):
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        rows = name in ("model.embed_tokens.weight", "lm_head.weight")
        # The new token: it is never read, for an image takes its place, and never generated.
        new = torch.zeros_like(tensor[: int(rows)])
        tensors[f"language_model.{name}"] = torch.cat([tensor, new]) if rows else tensor
    embedding = tensors["language_model.model.embed_tokens.weight"]
    tensors.setdefault("language_model.lm_head.weight", embedding.clone())
    tower = CLIPVisionModel(
        CLIPVisionConfig(**{k: v for k, v in VISION.items() if k != "model_type"})
    )
    for name, tensor in tower.state_dict().items():
        if "position_ids" not in name:
            tensors[f"vision_tower.vision_model.{name.removeprefix('vision_model.')}"] = tensor
    for number, width in ((1, WIDTH), (2, hidden)):
        place = f"multi_modal_projector.linear_{number}"
        tensors[f"{place}.weight"] = torch.randn(hidden, width) / width**0.5
        tensors[f"{place}.bias"] = torch.zeros(hidden)
    # As large as the embeddings of words, so that it matters what an image shows.
    tensors["multi_modal_projector.linear_2.weight"] *= 4 * embedding.std()
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
    )


def picture(number):
    """A picture of its own for every number."""
    from PIL import Image

    image = Image.new("RGB", (SIDE, SIDE), (40 * number % 256, 90 * number % 256, 17))
    image.paste((250, 10 * number % 256, 200), (0, 0, 5 + 7 * number % 48, 30))
    return image
