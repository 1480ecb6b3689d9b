"""The picture in docs/operating.md: the same requests under two policies, on the tiny model.

python scripts/timeline_example.py MODEL FOLDER

Writes fcfs.jsonl, fastserve.jsonl, timeline.html and timeline.png. Requests arrive one by one,
faster than four batch places and a small device can serve them; lengths are log-normal.
"""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from fastserve_vllm.trace.page import timeline_page
from fastserve_vllm.trace.reading import read_trace
from scripts.browser import browser, open_page

_REQUESTS = 60
_RATE = 40.0
_SIZE = (1180, 760)


def run(model: str, policy: str, trace: Path) -> None:
    """Serve the requests under a policy."""
    from vllm import SamplingParams

    from fastserve_vllm import LLM

    llm = LLM(
        model,
        fastserve_config={"policy": policy, "trace_file": str(trace)},
        dtype="float32",
        enforce_eager=True,
        block_size=32,
        max_model_len=1024,
        max_num_seqs=4,
        num_gpu_blocks_override=64,
        kv_cache_memory_bytes=64 << 20,
    )
    engine = llm.llm_engine
    rng = random.Random(1)
    # What is compiled or loaded at first use is no part of the picture.
    llm.generate([{"prompt_token_ids": [11] * 64}], SamplingParams(max_tokens=8), use_tqdm=False)
    due, started = [], time.monotonic()
    at_s = 0.0
    for number in range(_REQUESTS):
        at_s += rng.expovariate(_RATE)
        prompt = min(1 + int(rng.lognormvariate(3.8, 1.0)), 500)
        answer = min(1 + int(rng.lognormvariate(4.0, 1.0)), 500)
        due.append((at_s, f"r{number}", prompt, answer))
    while due or engine.has_unfinished_requests():
        while due and due[0][0] <= time.monotonic() - started:
            _, name, prompt, answer = due.pop(0)
            parameters = SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True)
            tokens = {"prompt_token_ids": [rng.randint(10, 200) for _ in range(prompt)]}
            engine.add_request(name, tokens, parameters)
        if engine.has_unfinished_requests():
            engine.step()
    engine.engine_core.shutdown()


def main() -> int:
    """Both policies, the page, and its picture where there is a browser."""
    model, folder = sys.argv[1], Path(sys.argv[2]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    traces = []
    for policy in ("fcfs", "fastserve"):
        path = folder / f"{policy}.jsonl"
        path.unlink(missing_ok=True)
        run(model, policy, path)
        trace = read_trace(path)
        # The first request was the warm-up.
        del trace.stories[next(iter(trace.stories))]
        traces.append(trace)
    page = folder / "timeline.html"
    page.write_text(timeline_page(traces), encoding="utf-8")
    print(page)
    if browser() is not None:
        picture = folder / "timeline.png"
        _, console = open_page(page, picture, _SIZE)
        crop(picture)
        print(picture, *console)
    return 0


def crop(picture: Path) -> None:
    """Cut off the empty part below the page."""
    from PIL import Image, ImageChops

    image = Image.open(picture).convert("RGB")
    blank = Image.new("RGB", image.size, (255, 255, 255))
    bottom = ImageChops.difference(image, blank).getbbox()[3]
    image.crop((0, 0, image.width, bottom + 16)).save(picture, optimize=True)


if __name__ == "__main__":
    sys.exit(main())
