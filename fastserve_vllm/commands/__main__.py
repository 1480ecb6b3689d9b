"""`python -m fastserve_vllm.commands`: the `fastserve` command without its console script."""

from fastserve_vllm.commands import main

main(prog_name="fastserve")
