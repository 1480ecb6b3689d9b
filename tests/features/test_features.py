"""Everything vLLM can do, under preemption at every turn, against stock vLLM."""

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import vllm
from features import KINDS, SETTINGS, UNDISTURBED, adapters, observed
from tiny_adapters import write_adapters
from tiny_engine import running

from fastserve_vllm import LLM

# Compiling the drafts' kernels takes half a minute: once is enough.
CASES = [
    pytest.param(
        kind,
        feature,
        id=f"{kind}: {feature.__name__}",
        marks=() if KINDS[kind].alone else pytest.mark.host_versions,
    )
    for kind in KINDS
    for feature in KINDS[kind].features
]


class Sides:
    """Stock vLLM's answers and FastServe's engine, of one kind at a time."""

    def __init__(self, model, paths):
        self._model, self._paths = model, paths
        self._kind = None
        self._open = ExitStack()

    def call(self, feature, llm):
        """Ask one engine."""
        return feature(llm, self._paths) if feature is adapters else feature(llm)

    def use(self, name):
        """Ask stock vLLM all that the kind has to ask; then start FastServe's engine."""
        if name == self._kind:
            return
        self.close()
        kind, self._kind = KINDS[name], name
        with running(vllm.LLM, self._model, max_num_seqs=32, **kind.args) as llm:
            self.expected = {feature: self.call(feature, llm) for feature in kind.features}
        if kind.alone:
            found = _alone(self._model, name)
            self._found = dict(zip(kind.features, found, strict=True))
            self.expected = json.loads(json.dumps(list(self.expected.values())))
            self.expected = dict(zip(kind.features, self.expected, strict=True))
            return
        args = {**kind.args, **kind.tight}
        engine = running(LLM, self._model, fastserve_config=SETTINGS, **args)
        self._llm = self._open.enter_context(engine)

    def observe(self, name, feature):
        """FastServe's answer, and how often somebody was preempted for it."""
        if KINDS[name].alone:
            return self._found[feature]
        return observed(self._llm, KINDS[name], feature, self.call)

    def close(self):
        self._open.close()


def _alone(model, name):
    here = Path(__file__).parent
    path = [here.parent, here.parent.parent, os.environ.get("PYTHONPATH")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(str(p) for p in path if p)}
    command = [sys.executable, str(here / "alone.py"), str(model), name]
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, check=False, timeout=300
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-4000:]
    return json.loads(lines[-1].removeprefix("RESULT "))


@pytest.fixture(scope="module")
def sides(tiny_model, tmp_path_factory):
    paths = write_adapters(tmp_path_factory.mktemp("adapters"), tiny_model, count=3)
    sides = Sides(tiny_model, paths)
    yield sides
    sides.close()


@pytest.mark.parametrize(("kind", "feature"), CASES)
def test_feature_survives_preemption(sides, kind, feature):
    """Requests are preempted, and the answers are stock vLLM's; nothing stays behind."""
    sides.use(kind)
    found, preemptions = sides.observe(kind, feature)
    assert found == sides.expected[feature]
    assert preemptions > 0 or feature in UNDISTURBED, "nothing was preempted"
