"""The tables of docs/distributed.md, from the results.

python tests/distributed/tables.py
"""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "benchmarks/results/distributed.json"
BUBBLES = ROOT / "benchmarks/results/pipeline_bubble.json"
PAGE = ROOT / "docs/distributed.md"
SYSTEMS = ("vllm", "vllm, limit x stages", "fastserve")


def layouts(document):
    """Configuration, executor, tokens, copies by rank, gap between tokens, start command."""
    yield "| configuration | executor | tokens | copies out / in by rank | step time | start |"
    yield "|---|---|---|---|---|---|"
    for row in document["rows"]:
        same = row["requests"] - row["differing"]
        yield (
            f"| {row['layout']} | `{row['executor']}` | {same} of {row['requests']} identical "
            f"| {_copies(row)} | {_step_time(row)} | `{row['command']}` |"
        )


def _step_time(row):
    if "gap_ratio" not in row:
        return "not measured"
    low, high = row["gap_ratio_quartiles"]
    return f"{row['gap_ratio']:.2f} ({low:.2f} to {high:.2f})"


def _copies(row):
    told = []
    for engine in range(row["engines"]):
        for rank in range(row["ranks"]):
            out, into = (row["copies"][f"{engine}/{rank}/{way}"] for way in ("out", "in"))
            of = f"engine {engine} " if row["engines"] > 1 else ""
            told.append(f"{of}rank {rank}: {out} / {into}")
    return "<br>".join(told)


def failures(document):
    """What happened to rank 1, when the server had ended, and what it said."""
    yield "| configuration | executor | rank 1 in mid-copy | server ended after | its log says |"
    yield "|---|---|---|---|---|"
    for row in document["failures"]:
        errors = ", ".join(f"`{error}`" for error in row["errors"])
        yield (
            f"| {row['layout']} | `{row['executor']}` | {row['kind']} | {row['seconds']:.0f} s "
            f"| {errors} |"
        )


def bubbles(document):
    """Idle share of the stages' time, by pipeline and load."""
    yield "| stages | steps overlap | load | stock vLLM | stock, limit x stages | FastServe |"
    yield "|---|---|---|---|---|---|"
    for row in document["rows"]:
        figures = " | ".join(f"{row[system]:.1%}" for system in SYSTEMS)
        overlap = "yes" if row["overlap"] else "no"
        yield f"| {row['stages']} | {overlap} | {row['load']} | {figures} |"


MADE = {
    "layouts": (layouts, RESULTS),
    "failures": (failures, RESULTS),
    "bubbles": (bubbles, BUBBLES),
}


def filled(page):
    """The page with every table as the results have it; one without results is left as it is."""
    for name, (make, path) in MADE.items():
        lines = list(make(json.loads(path.read_text()))) if path.exists() else []
        if len(lines) > 2:
            before, after = page.split(f"<!-- table: {name} -->\n")
            _, end, after = after.partition("<!-- end -->")
            table = "".join(f"{line}\n" for line in lines)
            page = f"{before}<!-- table: {name} -->\n{table}{end}{after}"
    return page


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
