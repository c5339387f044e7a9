"""The same examples on every run, without a deadline, on one thread: machines are shared."""

import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "core",
    deadline=None,
    derandomize=True,
    max_examples=25,
    # Every example writes its own files over those of the one before.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("core")
torch.set_num_threads(1)
