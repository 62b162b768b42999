"""Small things on their way between host and device, neither of which waits for the other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Download", "upload"]


def upload(
    values: Sequence[float] | Sequence[Sequence[float]] | NDArray[np.int32],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """These numbers as a tensor on the device, through pinned memory: from any other the host waits for the copy."""
    if device.type == "cpu":
        return torch.tensor(values, dtype=dtype)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


class Download:
    """A tensor that is being copied to the host. The copy is ordered after all that the stream was given before."""

    def __init__(self, values: Tensor) -> None:
        """The tensor must not change any more, except by what is given to the same stream later."""
        self._copied: torch.cuda.Event | None = None
        if values.device.type == "cpu":
            self._host = values.clone()
            return
        self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        self._host.copy_(values, non_blocking=True)
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._copied.record()

    def wait(self) -> Tensor:
        """The values, on the CPU."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host
