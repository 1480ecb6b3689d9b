#!/usr/bin/env bash
# Serves a model on the CPU, on 127.0.0.1, with sizes that suit a small machine.
#
#   scripts/serve.sh MODEL [VLLM_SERVE_ARGUMENT...]
#
# MODEL is a folder or a model hub's name. Arguments given win over the ones here. Environment:
#   PORT (8000), VENV (.venv), SCHEDULER_ARGS ("--scheduler fastserve"; empty for vLLM's scheduler).
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
python=${VENV:-$root/.venv}/bin/python
port=${PORT:-8000}
model=$1
shift

if (: >"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
  echo "serve: something already listens on port $port; choose another with PORT=..." >&2
  exit 1
fi

. "$root/scripts/cpu_env.sh"
name=()
if [ -d "$model" ]; then
  export HF_HUB_OFFLINE=1 # a folder has all that is needed
  name=(--served-model-name "$(basename "$(realpath "$model")")")
fi
read -ra scheduler <<<"${SCHEDULER_ARGS---scheduler fastserve}"

# The announcement outlives this script, which becomes the server: signals reach vLLM itself, and
# nothing else is left to stop. Detached twice, so that it is not a child of the server's.
("$python" "$root/scripts/announce.py" "http://127.0.0.1:$port" $$ &)

# vLLM's default share of memory for the KV cache is meant for a whole machine, and its default of
# compiling the model costs minutes on a CPU.
exec "$python" -m vllm.entrypoints.cli.main serve "$model" "${name[@]}" \
  --host 127.0.0.1 --port "$port" "${scheduler[@]}" --enforce-eager --block-size 32 \
  --max-model-len 2048 --max-num-seqs 16 --kv-cache-memory-bytes 512M "$@"
