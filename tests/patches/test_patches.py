"""The patches apply to this vLLM; FastServe uses their hooks, and works the same without them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import vllm

ROOT = Path(__file__).parent.parent.parent
APPLY = [sys.executable, str(ROOT / "patches" / "apply.py")]
PATCHES = sorted((ROOT / "patches").glob("*.patch"))


def copy_of_vllm(folder):
    """A `vllm/` of its own, Python only; the rest is linked."""
    source = Path(vllm.__file__).parent

    def skipped(where, names):
        kept = [n for n in names if n.endswith(".py") or Path(where, n).is_dir()]
        return {*names} - {*kept} | {"__pycache__"}

    target = folder / "vllm"
    shutil.copytree(source, target, ignore=skipped)
    for path in source.rglob("*"):
        copy = target / path.relative_to(source)
        if path.is_file() and not copy.exists() and "__pycache__" not in path.parts:
            copy.symlink_to(path)
    return folder


@pytest.fixture(scope="module")
def patched(tmp_path_factory):
    """A copy of the installed vLLM with all patches applied."""
    folder = copy_of_vllm(tmp_path_factory.mktemp("patched"))
    check = subprocess.run([*APPLY, "--check", folder], capture_output=True, text=True, check=True)
    assert check.stdout.count(": applies\n") == len(PATCHES)
    subprocess.run([*APPLY, "--apply", folder], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def patched_env(patched, subprocess_env):
    """Environment of a process that finds the patched vLLM first."""
    path = os.pathsep.join(filter(None, [str(patched), subprocess_env.get("PYTHONPATH")]))
    return subprocess_env | {"PYTHONPATH": path, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


@pytest.mark.host_versions
def test_ledger_names_every_patch():
    """No patch without a row that says why; no more than three."""
    ledger = (ROOT / "patches" / "README.md").read_text()
    assert 0 < len(PATCHES) <= 3
    assert all(f"`{patch.name}`" in ledger for patch in PATCHES)


@pytest.mark.host_versions
def test_applying_again_changes_nothing(patched):
    """A tree that has a patch is left as it is."""
    path = patched / "vllm" / "engine" / "arg_utils.py"
    before = path.read_text()
    done = subprocess.run([*APPLY, "--apply", patched], capture_output=True, text=True, check=True)
    assert done.stdout.count(": applied\n") == len(PATCHES)
    assert path.read_text() == before


def test_a_tree_that_moved_on_is_reported(patched, tmp_path):
    """Status 1, and what does not fit."""
    path = tmp_path / "vllm" / "engine" / "arg_utils.py"
    path.parent.mkdir(parents=True)
    path.write_text("class EngineArgs:\n    pass\n")
    done = subprocess.run(
        [*APPLY, "--check", tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "arg_utils.py" in done.stdout


GENERATE = """
import json, sys
import vllm
from vllm.engine.arg_utils import EngineArgs
model, how = sys.argv[1:]
args = json.loads('{"dtype": "float32", "enforce_eager": true, "max_model_len": 256,'
                  ' "block_size": 32, "kv_cache_memory_bytes": 33554432, "max_num_seqs": 2}')
if how == "hook":
    llm = vllm.LLM(model, scheduler="fastserve", **args)
else:
    import fastserve_vllm
    llm = fastserve_vllm.LLM(model, **args)
params = vllm.SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
outputs = llm.generate(["one", "two", "three", "four"], params, use_tqdm=False)
scheduler = llm.llm_engine.engine_core.engine_core.scheduler
print("RESULT " + json.dumps({
    "vllm": vllm.__file__,
    "scheduler": type(scheduler).__name__,
    "wrapped": EngineArgs.add_cli_args.__module__,
    "tokens": [list(o.outputs[0].token_ids) for o in outputs],
}))
"""


def generate(model, how, env):
    command = [sys.executable, "-c", GENERATE, model, how]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-3000:]
    return json.loads(lines[-1].removeprefix("RESULT "))


def test_scheduler_is_chosen_by_name_through_the_hook(
    tiny_model, patched, patched_env, subprocess_env
):
    """`vllm.LLM(scheduler="fastserve")` works where the hook is, and answers as without it."""
    hooked = generate(tiny_model, "hook", patched_env)
    plain = generate(tiny_model, "class", subprocess_env | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
    assert hooked["vllm"].startswith(str(patched))
    assert not plain["vllm"].startswith(str(patched))
    assert hooked["scheduler"] == plain["scheduler"] == "FastServeScheduler"
    assert hooked["wrapped"] == "vllm.engine.arg_utils", "the parser was patched all the same"
    assert plain["wrapped"] == "fastserve_vllm.plugin"
    assert hooked["tokens"] == plain["tokens"]


def test_command_line_is_the_same_through_the_hook(patched, patched_env):
    """Every test of the command line passes on the patched vLLM, too."""
    tests = str(ROOT / "tests" / "plugin" / "test_command_line.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests]
    chosen = ["-k", "not real_command", f"--rootdir={ROOT}"]
    done = subprocess.run(
        [*command, *chosen],
        env=patched_env,
        cwd=patched,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
