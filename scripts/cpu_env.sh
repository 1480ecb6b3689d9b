# shellcheck shell=sh
# Sourced: the environment variables under which vLLM runs well on a few CPU cores. Values already
# set win.
#
# One OpenMP thread, not pinned to a core: with two threads on a shared machine a step swings from 2
# to 280 ms.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export VLLM_CPU_OMP_THREADS_BIND="${VLLM_CPU_OMP_THREADS_BIND:-nobind}"
# Huge pages for tensors of 2 MiB and more: requests that take turns reach more KV cache than the
# processor can keep the small pages of in mind, and their steps are 2 % longer for that.
export THP_MEM_ALLOC_ENABLE="${THP_MEM_ALLOC_ENABLE:-1}"
export VLLM_NO_USAGE_STATS="${VLLM_NO_USAGE_STATS:-1}"
