"""Gets vLLM's own scheduler tests: its source distribution, by pip, kept in an ignored folder."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from pathlib import Path

# What the scheduler's tests import: nothing of vLLM's own conftest, which needs far more.
WANTED = ("tests/v1/core/", "tests/v1/kv_connector/unit/utils.py")
PACKAGES = ("tests", "tests/v1", "tests/v1/kv_connector", "tests/v1/kv_connector/unit")
# pip reads a source distribution's metadata by running its build, though nothing is built.
BUILD_TOOLS = (
    "setuptools>=77.0.3,<81",
    "setuptools-scm>=8",
    "setuptools-rust>=1.9",
    "cmake>=3.26.1",
    "ninja",
    "jinja2",
    "packaging",
    "wheel",
)


def vllm_tests(version: str, cache: Path) -> Path:
    """A folder with `tests/v1/core` of that vLLM version, fetched once.

    Args:
        version: e.g. "0.32.0".
        cache: where it is kept.

    Raises:
        subprocess.CalledProcessError: pip could not fetch it; its message is on stderr.
    """
    folder = cache / version
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        archive = _download(version, Path(scratch))
        staged = Path(scratch) / "staged"
        _unpack(archive, staged)
        staged.rename(folder)
    return folder


def _download(version: str, scratch: Path) -> Path:
    """Fetch the source distribution with a throw-away pip that borrows torch from this Python."""
    environment = scratch / "env"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python = str(environment / "bin" / "python")
    expression = "import sysconfig; print(sysconfig.get_path('purelib'))"
    found = subprocess.run([python, "-c", expression], check=True, capture_output=True, text=True)
    Path(found.stdout.strip(), "host.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [python, "-m", "pip", "--disable-pip-version-check", "-qq"]
    subprocess.run([*pip, "install", "--no-warn-conflicts", *BUILD_TOOLS], check=True)
    options = ["--no-deps", "--no-binary", "vllm", "--no-build-isolation", "--dest", str(scratch)]
    env = {**os.environ, "VLLM_TARGET_DEVICE": "empty", "VLLM_VERSION_OVERRIDE": version}
    env.pop("PYTHONPATH", None)
    subprocess.run([*pip, "download", *options, f"vllm=={version}"], check=True, env=env)
    (archive,) = scratch.glob("vllm-*.tar.gz")
    return archive


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack what is wanted, and make importable packages of the folders around it."""
    with tarfile.open(archive) as tar:
        for member in tar:
            _, _, name = member.name.partition("/")
            if member.isfile() and name.startswith(WANTED):
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                source = tar.extractfile(member)
                assert source is not None
                with source, target.open("wb") as file:
                    shutil.copyfileobj(source, file)
    for package in PACKAGES:
        (folder / package / "__init__.py").touch()


# Built for CUDA, torchvision loads on a CPU-only torch once its two operators have a schema. Models
# with images import it, and their scheduling needs no operator.
_OPERATORS = """\
import torch as _torch
_library = _torch.library.Library("torchvision", "FRAGMENT")
_library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def torchvision(version: str, cache: Path) -> Path:
    """A folder with a torchvision that can be imported beside a CPU-only torch, fetched once.

    Raises:
        subprocess.CalledProcessError: pip could not fetch it; its message is on stderr.
    """
    folder = cache / f"torchvision-{version}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        staged = Path(scratch) / "staged"
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-qq", "install"]
        target = ["--no-deps", "--target", str(staged), f"torchvision=={version}"]
        subprocess.run([*pip, *target], check=True)
        package = staged / "torchvision" / "__init__.py"
        package.write_text(_OPERATORS + package.read_text())
        staged.rename(folder)
    return folder
