#!/usr/bin/env python3
"""Write a tiny Llama with seeded random weights: a model folder in two seconds, without a network.

    python scripts/tiny_model.py OUT_DIR [--seed 0] [--layers 2] [--hidden 128] [--vocab 2048] ...

For tests and benchmarks, which want an engine that really computes and costs almost nothing. What
the weights promise, so that comparing tokens means something:

* greedy outputs differ from prompt to prompt and do not settle on one token;
* the largest logit leads by far more than floating-point noise, so float32 greedy output is the
  same in any batch;
* generated text is printable ASCII, and the end-of-sequence token never wins greedily: a request
  runs to its `max_tokens`, with `ignore_eos` or without it.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

HEAD_DIM = 32
MANIFEST = "tiny_model.json"
BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"
SPECIAL_TOKENS = (BOS, EOS, PAD, "<|system|>", "<|user|>", "<|assistant|>")
SPECIAL_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# By frequency in English, so that small vocabularies keep the useful pairs.
LETTERS = "etaoinshrdlcumwfgypbvkjxqz"
SPACE = "\u0120"  # how byte-level BPE writes a space
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class TinyModelParams:
    """Shape of the model; two equal values give byte-identical weights.

    `hidden` is a multiple of 32 (the head size); there are `hidden / 32` query heads and half as
    many KV heads. `vocab` counts the tokenizer's entries, which are exactly the model's. `max_len`
    is in tokens.
    """

    seed: int = 0
    layers: int = 2
    hidden: int = 128
    vocab: int = 2048
    max_len: int = 4096
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.hidden < HEAD_DIM or self.hidden % HEAD_DIM:
            raise ValueError(f"hidden must be a positive multiple of {HEAD_DIM}, got {self.hidden}")
        for name in ("layers", "max_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.hidden // HEAD_DIM

    @property
    def kv_heads(self) -> int:
        """KV heads: grouped-query attention wherever there are two query heads."""
        return max(1, self.heads // 2)

    @property
    def intermediate(self) -> int:
        """Width of the MLP."""
        return 2 * self.hidden


def build_tiny_model(
    path: str | Path,
    seed: int = 0,
    layers: int = 2,
    hidden: int = 128,
    vocab: int = 2048,
    max_len: int = 4096,
    dtype: str = "float32",
) -> Path:
    """Make `path` a tiny model folder and return it; `TinyModelParams` has the parameters' units.

    Does nothing when the folder already holds that model. The folder appears whole or not at all,
    so processes may race for it. Raises ValueError for parameters no model can have,
    FileExistsError when `path` holds something that this function did not write.
    """
    params = TinyModelParams(seed, layers, hidden, vocab, max_len, dtype)
    out_dir, manifest = Path(path), _manifest(params)
    if _holds(out_dir, manifest):
        return out_dir
    if out_dir.exists() and any(out_dir.iterdir()) and not (out_dir / MANIFEST).is_file():
        raise FileExistsError(f"{out_dir} exists and is not a tiny model")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out_dir.name}.", dir=out_dir.parent) as scratch:
        staged = Path(scratch) / "model"
        _write_model(staged, params, manifest)
        _publish(staged, out_dir, manifest)
    return out_dir


def _manifest(params: TinyModelParams) -> str:
    """What identifies a finished folder: its parameters and the code that made it."""
    recipe = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    return json.dumps({**dataclasses.asdict(params), "recipe": recipe}, indent=2) + "\n"


def _holds(out_dir: Path, manifest: str) -> bool:
    written = out_dir / MANIFEST
    return written.is_file() and written.read_text() == manifest


def _publish(staged: Path, out_dir: Path, manifest: str) -> None:
    """Rename `staged` to `out_dir`, replacing an older model; a concurrent builder may win."""
    if out_dir.exists() and not _holds(out_dir, manifest):
        shutil.rmtree(out_dir, ignore_errors=True)
    try:
        staged.rename(out_dir)
    except OSError:
        if not _holds(out_dir, manifest):
            raise


def _write_model(folder: Path, params: TinyModelParams, manifest: str) -> None:
    from safetensors.torch import save_file

    folder.mkdir()
    vocabulary = _vocabulary(params.vocab)
    save_file(_weights(params, vocabulary), folder / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(folder, vocabulary, params)
    _write_json(folder / "config.json", _config(params))
    _write_json(folder / "generation_config.json", dict(SPECIAL_IDS))
    (folder / MANIFEST).write_text(manifest)


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _config(params: TinyModelParams) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": params.hidden,
        "intermediate_size": params.intermediate,
        "num_hidden_layers": params.layers,
        "num_attention_heads": params.heads,
        "num_key_value_heads": params.kv_heads,
        "head_dim": HEAD_DIM,
        "vocab_size": params.vocab,
        "max_position_embeddings": params.max_len,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        **SPECIAL_IDS,
        "dtype": params.dtype,
        "torch_dtype": params.dtype,
    }


def _weights(params: TinyModelParams, vocabulary: Vocabulary) -> dict[str, torch.Tensor]:
    """Seeded weights by Hugging Face parameter name.

    Matrices have standard deviation gain / sqrt(inputs). Gains above 1 in the layers make the
    residual stream forget the last token's own embedding, which is what makes small random models
    repeat themselves; the gain of the output matrix spreads the logits, so that near-ties are rare.
    """
    import torch

    generator = torch.Generator().manual_seed(params.seed)
    dtype = getattr(torch, params.dtype)

    def matrix(rows: int, columns: int, gain: float) -> torch.Tensor:
        values = torch.randn(rows, columns, generator=generator, dtype=torch.float32)
        return (values * (gain / columns**0.5)).to(dtype)

    hidden, vocab = params.hidden, params.vocab
    tensors = {"model.embed_tokens.weight": matrix(vocab, hidden, gain=hidden**0.5)}
    for layer in range(params.layers):
        for name, rows, columns, gain in _layer_matrices(params):
            tensors[f"model.layers.{layer}.{name}.weight"] = matrix(rows, columns, gain)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = torch.ones(hidden, dtype=dtype)
    tensors["model.norm.weight"] = torch.ones(hidden, dtype=dtype)
    tensors["lm_head.weight"] = matrix(vocab, hidden, gain=4.0)
    # A zero row is a logit of 0, which never beats the best of the others: these tokens are not
    # generated greedily.
    tensors["lm_head.weight"][vocabulary.unspoken] = 0.0
    return tensors


def _layer_matrices(params: TinyModelParams) -> list[tuple[str, int, int, float]]:
    """(name, rows, columns, gain) of a layer's matrices."""
    hidden, kv_width = params.hidden, params.kv_heads * HEAD_DIM
    return [
        ("self_attn.q_proj", hidden, hidden, 1.5),
        ("self_attn.k_proj", kv_width, hidden, 1.5),
        ("self_attn.v_proj", kv_width, hidden, 1.5),
        ("self_attn.o_proj", hidden, hidden, 2.0),
        ("mlp.gate_proj", params.intermediate, hidden, 1.5),
        ("mlp.up_proj", params.intermediate, hidden, 1.5),
        ("mlp.down_proj", hidden, params.intermediate, 2.0),
    ]


@dataclass(frozen=True)
class Vocabulary:
    """Entries of the byte-level BPE tokenizer: special tokens, then bytes, then one entry a merge.

    `unspoken` are the ids that the model should not generate: special tokens and bytes that are not
    printable ASCII.
    """

    ids: dict[str, int]
    merges: list[tuple[str, str]]
    unspoken: list[int]


def _vocabulary(size: int) -> Vocabulary:
    """Exactly `size` entries; raises ValueError for a size that the merge rule cannot fill."""
    from tokenizers.pre_tokenizers import ByteLevel

    byte_tokens = sorted(ByteLevel.alphabet())
    fixed = [*SPECIAL_TOKENS, *byte_tokens]
    merges = list(itertools.islice(_merges(), size - len(fixed))) if size >= len(fixed) else []
    if len(fixed) + len(merges) != size:
        largest = len(fixed) + sum(1 for _ in _merges())
        raise ValueError(f"vocab must lie between {len(fixed)} and {largest}, got {size}")
    entries = fixed + [left + right for left, right in merges]
    printable = {*map(chr, range(0x21, 0x7F)), SPACE}
    unspoken = [id_ for id_, token in enumerate(fixed) if token not in printable]
    return Vocabulary({token: id_ for id_, token in enumerate(entries)}, merges, unspoken)


def _merges() -> Iterator[tuple[str, str]]:
    """Merges in rank order: two letters, space and letter, space and three letters."""
    yield from itertools.product(LETTERS, LETTERS)
    yield from ((SPACE, letter) for letter in LETTERS)
    for first, second, third in itertools.product(LETTERS, repeat=3):
        yield SPACE + first, second + third


def _write_tokenizer(folder: Path, vocabulary: Vocabulary, params: TinyModelParams) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab=vocabulary.ids, merges=vocabulary.merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "model_max_length": params.max_len,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Write a tiny Llama with seeded random weights.")
    parser.add_argument("out_dir", type=Path, help="folder to make, unless it holds this model")
    for field in dataclasses.fields(TinyModelParams):
        flag, kind = f"--{field.name.replace('_', '-')}", type(field.default)
        parser.add_argument(flag, type=kind, default=field.default, help="default: %(default)s")
    return parser.parse_args()


def main() -> None:
    """Command line: prints the folder."""
    options = vars(_parse_args())
    print(build_tiny_model(options.pop("out_dir"), **options))


if __name__ == "__main__":
    main()
