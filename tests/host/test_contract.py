"""The contract with vLLM holds here, and says what is wrong where it does not."""

import ast
import inspect

import pytest
import vllm
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

import fastserve_vllm
from fastserve_vllm import demand, host, report, scheduler, swap_moves, tracing
from fastserve_vllm.contract import CONTRACT
from fastserve_vllm.host import HostContractError
from fastserve_vllm.kv_swap import exchange
from fastserve_vllm.seam import Seam, written_by_init


@pytest.mark.host_versions
def test_installed_vllm_fits():
    """The version is a supported one, and every seam is as expected."""
    host.check()


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1rc2", "0.33.0+cpu", "0.33.4.dev12+gabcdef"])
def test_supported_versions(monkeypatch, version):
    """Release segments decide; local and development suffixes do not."""
    monkeypatch.setattr(vllm, "__version__", version)
    host.check()


@pytest.mark.parametrize("version", ["0.31.0", "0.31.9+cpu", "0.34.0", "1.0", "dev"])
def test_other_versions_are_refused(monkeypatch, version):
    """The message names the version and the supported range."""
    monkeypatch.setattr(vllm, "__version__", version)
    with pytest.raises(HostContractError) as error:
        host.check()
    assert version in str(error.value)
    assert ">=0.32,<0.34" in str(error.value)


@pytest.mark.parametrize(
    "member", ["_enqueue_waiting_request", "_preempt_request", "_free_request"]
)
def test_missing_member_is_named(monkeypatch, member):
    """What is missing, and what it is needed for."""
    monkeypatch.delattr(Scheduler, member)
    (seam,) = [seam for seam in CONTRACT if seam.path.endswith(f":Scheduler.{member}")]
    with pytest.raises(HostContractError) as error:
        host.check()
    assert f"{seam.path} is missing" in str(error.value)
    assert seam.why in str(error.value)


def test_missing_module_is_named():
    """A module that moved is a violation, not an ImportError."""
    with pytest.raises(HostContractError, match=r"vllm\.nowhere:Thing is missing.*needed to fly"):
        host.check((Seam("vllm.nowhere:Thing", "fly"),))


@pytest.mark.parametrize(
    "changed",
    [
        lambda self, request: None,
        lambda self, request, when, drop_stale_output=False: None,
        lambda self, timestamp, request, drop_stale_output: None,
    ],
    ids=["fewer", "renamed", "reordered"],
)
def test_changed_signature_is_named(monkeypatch, changed):
    """Both signatures are in the message; trailing parameters may be added."""
    monkeypatch.setattr(Scheduler, "_preempt_request", changed)
    with pytest.raises(HostContractError) as error:
        host.check()
    assert "Scheduler._preempt_request takes ('self'" in str(error.value)
    assert "expected it to begin with ('self', 'request', 'timestamp'" in str(error.value)


def test_further_parameters_are_welcome(monkeypatch):
    """A host may grow parameters after those that are used."""
    monkeypatch.setattr(Scheduler, "shutdown", lambda self, timeout=None: None)
    host.check()


def test_attribute_that_is_no_longer_set_is_named(monkeypatch):
    """State that a class's `__init__` no longer assigns is a violation."""

    def init(self):
        self.request_id = ""

    monkeypatch.setattr(Request, "__init__", init)
    with pytest.raises(HostContractError) as error:
        host.check()
    assert "vllm.v1.request:Request does not set max_tokens" in str(error.value)
    assert "does not set request_id" not in str(error.value)


def test_all_violations_are_listed(monkeypatch):
    """One start-up tells of everything that moved."""
    monkeypatch.delattr(Scheduler, "_free_request")
    monkeypatch.delattr(Scheduler, "_preempt_request")
    with pytest.raises(HostContractError, match=r"(?s)_preempt_request is missing.*_free_request"):
        host.check()


def test_compiled_class_is_a_violation():
    """A class whose `__init__` cannot be read is reported instead of crashing the check."""
    assert list(Seam("builtins:int", "count", sets=("real",)).violations())


class Uses(ast.NodeVisitor):
    """Attributes that a module reads from vLLM's scheduler and requests."""

    def __init__(self, module):
        self.of_scheduler, self.of_request = set(), set()
        self.visit(ast.parse(inspect.getsource(module)))

    def visit_Attribute(self, node):
        owner = ast.unparse(node.value)
        if owner in ("request", "job.handle"):
            self.of_request.add(node.attr)
        elif owner in ("scheduler", "self._scheduler"):
            self.of_scheduler.add(node.attr)
        elif owner in ("self", "super()"):
            self.of_scheduler |= {node.attr} & (set(dir(Scheduler)) | host_state())
        self.generic_visit(node)


def host_state():
    """Instance attributes of vLLM's scheduler."""
    return set(written_by_init(Scheduler))


def listed(owner):
    """Members of a class that the contract lists."""
    paths = [seam for seam in CONTRACT if seam.path.split(":")[1].split(".")[0] == owner]
    return {seam.path.rpartition(".")[2] for seam in paths} | {n for s in paths for n in s.sets}


@pytest.mark.parametrize(
    "module", [scheduler, demand, exchange, swap_moves, report, tracing], ids=lambda m: m.__name__
)
def test_contract_is_complete(module):
    """What the code touches of vLLM's scheduler and requests is in the table."""
    uses = Uses(module)
    ours = set(vars(scheduler.FastServeScheduler)) - set(dir(Scheduler))
    ours |= set(written_by_init(scheduler.FastServeScheduler)) - host_state()
    assert uses.of_request <= listed("Request")
    assert uses.of_scheduler - ours - {"__init__"} <= listed("Scheduler")


def test_engine_is_refused_before_anything_is_loaded(monkeypatch):
    """`LLM` does not even look at the model."""
    monkeypatch.setattr(vllm, "__version__", "0.34.0")
    with pytest.raises(HostContractError, match=r"0\.34\.0 is installed"):
        fastserve_vllm.LLM("no/such/model")
