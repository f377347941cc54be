"""How fast a run trains, as its log shows it: examples per second, and the share of waiting."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


class Meter:
    """The training steps since the last log line, by this process's clock."""

    def __init__(self, peak: float | None = None) -> None:
        """`peak`: FLOP/s that all processes could do together, if that is known."""
        self._peak = peak
        self._flops: float | None = None  # per example
        self._examples, self._seconds, self._waited = 0, 0.0, 0.0

    def counting(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Return the step (state, batch, plan), which counts its FLOPs at its first call."""
        if self._peak is None:
            return step

        def counted(state: Any, batch: Any, plan: Any) -> Any:
            if self._flops is not None:
                return step(state, batch, plan)
            from torch.utils.flop_counter import FlopCounterMode

            with FlopCounterMode(display=False) as counter:
                result = step(state, batch, plan)
            self._flops = counter.get_total_flops() / max(1, batch.num_local)
            return result

        return counted

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield the batches, and measure how long each one takes to come."""
        coming = iter(batches)
        while True:
            begun = time.perf_counter()
            try:
                batch = next(coming)
            except StopIteration:
                return
            self._waited += time.perf_counter() - begun
            yield batch

    def add(self, num_examples: int, seconds: float) -> None:
        """Count a step of `num_examples`, over all processes, that took `seconds`."""
        self._examples += num_examples
        self._seconds += seconds

    def read(self) -> dict[str, float]:
        """Return the rates since the last call, and begin again. Empty if no time has passed.

        `waiting_for_data` is the share, 0 … 1, of the time in which this process waited for its
        next batch. On a GPU the host runs ahead, so it is the share of the host's time. `mfu` is
        the share of the peak that the model's FLOPs take (Chowdhery et al., "PaLM", 2022, app. B):
        products and convolutions, forward and backward.
        """
        examples, seconds, waited = self._examples, self._seconds, self._waited
        self._examples, self._seconds, self._waited = 0, 0.0, 0.0
        if seconds <= 0:
            return {}
        rates = {
            "time/examples_per_second": examples / seconds,
            "time/waiting_for_data": min(1.0, waited / seconds),
        }
        if self._peak is not None and self._flops is not None:
            rates["time/mfu"] = self._flops * examples / seconds / self._peak
        return rates
