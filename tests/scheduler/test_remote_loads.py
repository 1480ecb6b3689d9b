"""KV cache that a user's connector loads while its request waits, on a device that is too small."""

import pytest
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import RequestStatus

from fastserve_vllm.testing import ModelFreeEngine, vllm_config

pytestmark = pytest.mark.host_versions

LOADED = 128  # prompt tokens that the connector has of every request


class LoadingEngine(ModelFreeEngine):
    """FastServe's connector stands for the user's: it offers tokens, and has them a step later."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        connector = self.scheduler.connector
        connector.get_num_new_matched_tokens = lambda request, num_computed_tokens: (
            max(LOADED - num_computed_tokens, 0),
            True,
        )
        connector.update_state_after_alloc = lambda request, blocks, num_external_tokens: None
        self._loading = set()

    def _copy(self, metadata):
        arrived, self._loading = (
            self._loading,
            {
                request.request_id
                for request in self.scheduler.requests.values()
                if request.status == RequestStatus.WAITING_FOR_REMOTE_KVS
            },
        )
        arrived &= self._loading
        self._loading -= arrived
        return KVConnectorOutput(finished_recving=arrived) if arrived else None


@pytest.mark.parametrize("prompts", [(256, 160), (160, 256), (256, 256), (200, 200, 200)])
@pytest.mark.parametrize("policy", ["fastserve", "fcfs"])
def test_who_has_loaded_gets_to_run(tiny_model, prompts, policy):
    """VLLM refuses a load that would leave no room for who has loaded already; that one goes on,
    though the other stands before it. Nobody waits for ever.
    """
    fastserve = {"policy": policy, "swap_mode": "recompute"}
    config = vllm_config(tiny_model, fastserve, max_num_seqs=4, enable_prefix_caching=False)
    engine = LoadingEngine(config, num_blocks=10)
    for number, prompt in enumerate(prompts):
        engine.add(f"r{number}", prompt, 3)
    for _ in range(200):
        if not engine.busy:
            break
        engine.step()
        engine.scheduler.check_integrity()
    assert {name: len(tokens) for name, tokens in engine.outputs.items()} == {
        f"r{number}": 3 for number in range(len(prompts))
    }
