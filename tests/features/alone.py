"""Runs the FastServe side of a kind of engine in a process of its own; prints JSON.

python tests/features/alone.py MODEL KIND
"""

import json
import sys

from features import KINDS, SETTINGS, observed
from tiny_engine import running

from fastserve_vllm import LLM


def main():
    model, name = sys.argv[1:]
    kind = KINDS[name]
    args = {**kind.args, **kind.tight}
    with running(LLM, model, fastserve_config=SETTINGS, **args) as llm:
        found = [observed(llm, kind, f, lambda f, llm: f(llm)) for f in kind.features]
    print("RESULT " + json.dumps(found))


if __name__ == "__main__":
    main()
