"""Tests of GPU code: on a GPU where there is one, else on the CPU in Triton's interpreter."""

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
