"""The timeline page in a real browser."""

import re

import pytest
from PIL import Image

from fastserve_vllm.trace.page import timeline_page
from fastserve_vllm.trace.reading import read_trace
from fastserve_vllm.trace.trace_file import Event, TraceFile
from scripts.browser import browser, open_page

pytestmark = pytest.mark.skipif(
    browser() is None, reason="Chromium is not installed: apt-get install chromium"
)
QUEUED, PREFILL, DECODE = (227, 192, 106), (27, 127, 92), (98, 189, 147)


def trace(path, queued_s):
    """Three requests; two of them are queued before they run."""
    file = TraceFile(str(path), {"policy": path.stem})
    for number in range(3):
        start_s = number * queued_s
        name = f"<b>r{number}</b></script>"
        file.add(Event(0.0, 0, name, "queued", 0, "arrived", 0))
        file.add(Event(start_s, 1, name, "running", 0, "turn", 1, 50))
        file.add(Event(start_s + 1, 2, name, "running", 0, "prompt computed", 2))
        file.add(Event(start_s + 4, 5, name, "finished", 0, "finished_stopped", 0))
    file.close()
    return read_trace(path)


def test_page_draws(tmp_path):
    """Both traces are drawn in the colours of the legend, without an error in the console."""
    traces = [trace(tmp_path / "fcfs", 3.0), trace(tmp_path / "fastserve", 0.5)]
    page, picture = tmp_path / "page.html", tmp_path / "page.png"
    page.write_text(timeline_page(traces))
    document, console = open_page(page, picture, (900, 600))
    assert console == []
    assert re.findall(r"<h2>(.*?)</h2>", document) == ["policy fcfs", "policy fastserve"]
    assert "time to first token: median 4.000 s" in document
    assert "time to first token: median 1.500 s" in document
    assert document.count("<canvas") == 2
    assert document.count("<li>") == 3, "the legend has what occurs: queued, prompt, generating"
    drawn = list(Image.open(picture).convert("RGB").getdata())
    for colour in (QUEUED, PREFILL, DECODE):
        assert drawn.count(colour) > 500, colour
