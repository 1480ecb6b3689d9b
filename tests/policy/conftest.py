"""Settings of the property tests."""

from typing import ClassVar

import pytest
from hypothesis import HealthCheck, settings

from fastserve_vllm.policy.job import Job

settings.register_profile(
    "policy", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("policy")


@pytest.fixture
def watched_job():
    """A class of jobs that remembers which of its instances were looked at."""

    class WatchedJob(Job):
        touched: ClassVar[set[int]] = set()

        def __getattribute__(self, name):
            WatchedJob.touched.add(id(self))
            return super().__getattribute__(name)

        def __setattr__(self, name, value):
            WatchedJob.touched.add(id(self))
            super().__setattr__(name, value)

    return WatchedJob
