"""The real tiny model, loaded once: tests that change it copy it."""

import pytest
import torch

from trainer.policy import load_policy


@pytest.fixture(scope="session")
def model(tiny_math):
    torch.set_num_threads(1)
    return load_policy(tiny_math)
