"""Replicas of a FastServe engine behind one OpenAI-compatible endpoint, with Ray Serve's LLM API.

    python examples/ray_serve/app.py --model MODEL --replicas 2          # a GPU for each replica
    python examples/ray_serve/app.py --model MODEL --replicas 2 --cpu    # on this machine's cores

Ray Serve hands `engine_kwargs` to vLLM's engine arguments, which know no `scheduler`;
`fastserve_vllm.engine_overrides` says the same in those that they do know.
"""

import argparse
import json
import time

import ray
from ray import serve
from ray.serve.llm import LLMConfig, build_openai_app

from fastserve_vllm import engine_overrides


def application(args: argparse.Namespace) -> serve.Application:
    """The replicas and the router in front of them."""
    accelerator = {"accelerator_config": {"kind": "cpu"}} if args.cpu else {}
    config = LLMConfig(
        model_loading_config={"model_id": args.name, "model_source": args.model},
        deployment_config={"num_replicas": args.replicas, "max_ongoing_requests": 512},
        engine_kwargs={**args.engine, **engine_overrides(args.fastserve)},
        **accelerator,
    )
    return build_openai_app({"llm_configs": [config]})


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or name of the model")
    parser.add_argument("--name", default="model", help="as clients call it")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--cpu", action="store_true", help="replicas on cores instead of GPUs")
    parser.add_argument("--engine", type=json.loads, default={}, help="vLLM's arguments, JSON")
    parser.add_argument("--fastserve", type=json.loads, default={}, help="FastServe's, JSON")
    args = parser.parse_args()
    if args.cpu:
        # A core for each replica and each router, though the machine may have fewer.
        ray.init(num_cpus=2 * args.replicas + 2, include_dashboard=False)
    serve.start(http_options={"host": "127.0.0.1", "port": args.port})
    serve.run(application(args))
    print(f"ready: http://127.0.0.1:{args.port}/v1", flush=True)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        serve.shutdown()


if __name__ == "__main__":
    main()
