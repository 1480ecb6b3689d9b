"""The Kubernetes manifest: valid by Kubernetes' schemas, and its flags by vLLM's own parser."""

from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from fastserve_vllm.host import SUPPORTED
from fastserve_vllm.selection import CONFIG_KEY, SCHEDULER_CLASS

MANIFEST = Path(__file__).parents[2] / "examples" / "kubernetes" / "fastserve.yaml"


@pytest.fixture(scope="module")
def resources():
    """The resources of the manifest by kind."""
    documents = list(yaml.safe_load_all(MANIFEST.read_text()))
    return {document["kind"]: document for document in documents}


@pytest.fixture(scope="module")
def pod(resources):
    """The pod that the deployment makes."""
    return resources["Deployment"]["spec"]["template"]


@pytest.mark.parametrize("version", ["1.30", kubernetes_validate.latest_version()])
def test_it_is_valid(resources, version):
    """Strictly, so that no field is unknown, on a Kubernetes in wide use and on the newest."""
    for resource in resources.values():
        kubernetes_validate.validate(resource, version, strict=True)


def test_a_mistake_is_found(resources):
    """The schemas know the fields that the manifest uses."""
    broken = yaml.safe_load(yaml.safe_dump(resources["Deployment"]))
    broken["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readinesProbe"):
        kubernetes_validate.validate(broken, kubernetes_validate.latest_version(), strict=True)


def test_selectors_select_the_pod(resources, pod):
    """Of the service, of the deployment and of the disruption budget."""
    labels = pod["metadata"]["labels"].items()
    assert resources["Service"]["spec"]["selector"].items() <= labels
    for kind in ("Deployment", "PodDisruptionBudget"):
        assert resources[kind]["spec"]["selector"]["matchLabels"].items() <= labels


def test_ports_agree(resources, pod):
    """Of the server, the service, the probes and Prometheus."""
    (server,) = pod["spec"]["containers"]
    (port,) = server["ports"]
    assert f"--port={port['containerPort']}" in server["args"]
    assert resources["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]
    assert pod["metadata"]["annotations"]["prometheus.io/port"] == str(port["containerPort"])
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert server[probe]["httpGet"] == {"path": "/health", "port": port["name"]}


def test_volumes_are_there(pod):
    """What is mounted exists, and the plugin is where Python looks for it."""
    spec = pod["spec"]
    volumes = {volume["name"] for volume in spec["volumes"]}
    for container in (*spec["initContainers"], *spec["containers"]):
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    command = spec["initContainers"][0]["command"]
    paths = {entry["name"]: entry.get("value") for entry in spec["containers"][0]["env"]}
    assert command[command.index("--target") + 1] == paths["PYTHONPATH"]


def test_the_image_is_supported(pod):
    """Both containers use one vLLM, of a version that the plugin accepts."""
    spec = pod["spec"]
    images = {container["image"] for container in (*spec["initContainers"], *spec["containers"])}
    (image,) = images
    name, _, tag = image.partition(":v")
    assert name == "vllm/vllm-openai"
    low, high = SUPPORTED
    assert low <= tuple(int(part) for part in tag.split(".")[:2]) < high


def test_its_flags_are_vllms(pod, tiny_model):
    """vLLM's parser takes them, with the plugin's; they select FastServe, and memory is enough."""
    (server,) = pod["spec"]["containers"]
    _, *flags = (arg for arg in server["args"] if not arg.startswith("--port"))
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    args = AsyncEngineArgs.from_cli_args(parser.parse_args(["--model", str(tiny_model), *flags]))
    assert args.scheduler_cls == SCHEDULER_CLASS
    config = args.kv_transfer_config.kv_connector_extra_config[CONFIG_KEY]
    swap_gib = config["swap_space_gib"]
    assert args.max_num_active_seqs < args.max_num_seqs
    limit = server["resources"]["limits"]["memory"]
    assert swap_gib < int(limit.removesuffix("Gi")) / 2
    assert server["resources"]["limits"]["nvidia.com/gpu"] == 1
