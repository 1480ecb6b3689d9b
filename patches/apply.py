#!/usr/bin/env python3
"""Check or apply the patches of this folder to a tree that holds vLLM's `vllm/` package.

    python patches/apply.py --check DIR      does every patch apply? (default: the installed vLLM)
    python patches/apply.py --apply DIR      apply those that are not applied yet

FastServe needs none of them; README.md says what each is for. Needs git, and writes to DIR only.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

PATCHES = sorted(Path(__file__).parent.glob("*.patch"))


def git_apply(patch: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run `git apply` in a folder that is not taken for part of a repository around it."""
    env = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent.resolve())}
    command = ["git", "apply", *options, str(patch.resolve())]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def state(patch: Path, folder: Path) -> str:
    """`applies`, `applied`, or git's reason why it does neither."""
    forward = git_apply(patch, folder, "--check")
    if forward.returncode == 0:
        return "applies"
    if git_apply(patch, folder, "--check", "--reverse").returncode == 0:
        return "applied"
    return forward.stderr.strip()


def installed() -> Path:
    """The folder that holds the installed `vllm` package, which is not imported."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        sys.exit("vLLM is not installed; name the folder that holds vllm/")
    return Path(spec.origin).parent.parent


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Check or apply the patches against vLLM.")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true", help="say what would happen")
    action.add_argument("--apply", action="store_true", help="change the tree")
    parser.add_argument("folder", type=Path, nargs="?", help="holds vllm/")
    options = parser.parse_args()
    if options.apply and options.folder is None:
        parser.error("--apply changes a tree, so it has to be named")
    folder = options.folder or installed()
    if not (folder / "vllm").is_dir():
        parser.error(f"{folder} holds no vllm/")
    failed = False
    for patch in PATCHES:
        found = state(patch, folder)
        if found == "applies" and options.apply:
            done = git_apply(patch, folder)
            found = "applied" if done.returncode == 0 else done.stderr.strip()
        failed |= found not in ("applies", "applied")
        sys.stdout.write(f"{patch.name}: {found}\n")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
