"""A training step on a GPU: train.py's loop and loops by hand, each also captured in a graph.

All train with AdamW, gradients clipped at norm 1, a learning rate set at every step and running
sums, without augmentation. The loops by hand take their batches from normalised examples on the
device. A graph by hand is neither compared with uncaptured steps nor able to skip one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.configured import config_of
from benchmarks.measure import Table, in_turn
from benchmarks.step import TOTAL, now, train_py
from regrow.distributed.parallel import World

EAGER, OURS, OURS_COMPILED = "train.py, uncaptured", "train.py", "train.py, compiled"
FIXED = "train.py with one batch for all steps"
BARE, CAPTURED, COMPILED = "bare loop", "captured by hand", "compiled and captured by hand"
SETTINGS: dict[str, tuple[str, ...]] = {
    EAGER: ("trainer.capture=false",),
    OURS: (),
    OURS_COMPILED: ("trainer.compile=true",),
    FIXED: (),
}
RATE = 1e-3


@dataclass(frozen=True)
class Case:
    """A model and its data, and what to measure with them."""

    title: str
    overrides: tuple[str, ...]
    batch: int
    steps: int  # of a round
    rounds: int
    before: int  # untimed steps; with whole epochs a round, captured ones are compared in these
    candidates: tuple[str, ...]
    note: str = ""


def measure(case: Case, device: torch.device) -> dict[str, Any]:
    """Return the table of the case, its memory, and the arithmetic of a step."""
    runs: dict[str, Callable[[], float]] = {}
    memory: dict[str, float] = {}
    data: list[Tensor] = []
    left_out = () if device.type == "cuda" else (EAGER, OURS_COMPILED, CAPTURED, COMPILED)
    for name in (name for name in case.candidates if name not in left_out):
        held = empty_cache(device)
        if name in SETTINGS:
            runs[name], *data = train_py(
                World(device=device), f"trainer.device={device.type}", *case.overrides,
                *SETTINGS[name], steps=case.steps, before=case.before,
                feed=Repeated if name == FIXED else None,
            )  # fmt: skip
        else:
            loop = ByHand(case, *data, graph=name != BARE, compiles=name == COMPILED)
            runs[name] = loop.run
        runs[name]()  # warms up
        if device.type == "cuda":
            memory[name] = (torch.cuda.max_memory_reserved() - held) / 2**20
    seconds = in_turn(runs, rounds=case.rounds, warm_up=False)
    against = {OURS: CAPTURED, OURS_COMPILED: COMPILED}
    table = Table(
        title=f"A training step of {case.title}",
        note=f"{case.steps} steps a round, {case.rounds} rounds in turn. {case.note}".strip(),
        unit="ms a step",
        reference=BARE,
        seconds=seconds,
        against={name: other for name, other in against.items() if {name, other} <= {*seconds}},
        per=case.steps,
        scale=1e3,
    )
    flops = flops_of(loop.model, *(each[: case.batch] for each in data))
    return {"table": dataclasses.asdict(table), "memory": memory, "flops": flops}


def empty_cache(device: torch.device) -> int:
    """Give back memory that nothing uses. Return the bytes that this process still holds."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_reserved()


def flops_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> int:
    """Return the floating-point operations of a forward and a backward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(inputs), targets).backward()
    return counter.get_total_flops()


class Repeated:
    """A feed that gathers nothing: its first batch, as often as there are batches."""

    def __init__(self, feed: Any) -> None:
        self.feed = feed
        self.batch = next(iter(feed.epoch(0)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.feed, name)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Any]:
        yield from (self.batch for _ in range(start, self.feed.steps_per_epoch))


class ByHand:
    """A loop written for one model. With `graph`, a whole step is recorded once and replayed."""

    def __init__(
        self, case: Case, inputs: Tensor, targets: Tensor, *, graph: bool, compiles: bool
    ) -> None:
        self.case, self.inputs, self.targets = case, inputs, targets
        device = inputs.device
        options = config_of(*case.overrides)
        self.precision, self.clips = options["trainer"]["precision"], 1.0
        self.channels_last = options["trainer"]["channels_last"]
        self.model = network(*case.overrides).to(device)
        if self.channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.forward = torch.compile(self.model) if compiles else self.model
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        vectors = [p for p in self.model.parameters() if p.ndim == 1]
        groups: list[dict[str, Any]] = [
            {"params": matrices},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=torch.tensor(RATE, device=device) if graph else RATE,
            capturable=graph,
            fused=True,
        )
        self.sums = torch.zeros(2, device=device)
        self.indices = torch.arange(case.batch, device=device)
        self.graph = self.recorded() if graph else None

    def update(self) -> None:
        x, y = self.inputs.index_select(0, self.indices), self.targets[self.indices]
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        self.optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            outputs = self.forward(x)
            loss = F.cross_entropy(outputs, y)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clips)
        self.optimizer.step()
        self.sums += torch.stack([loss.detach(), (outputs.argmax(1) == y).sum()])

    def recorded(self) -> torch.cuda.CUDAGraph:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # allocates, chooses kernels and compiles
            for _ in range(3):
                self.update()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.update()
        return graph

    def run(self) -> float:
        device, batch = self.inputs.device, self.case.batch
        started, step = now(device), 0
        while True:
            order = torch.randperm(len(self.inputs), device=device)
            for indices in order.split(batch):
                if len(indices) < batch:
                    continue
                if step == self.case.steps:
                    return now(device) - started
                rate = RATE * (1 + math.cos(math.pi * step / TOTAL)) / 2
                for group in self.optimizer.param_groups:
                    if self.graph:
                        group["lr"].fill_(rate)
                    else:
                        group["lr"] = rate
                if self.graph:
                    self.indices.copy_(indices)
                    self.graph.replay()
                else:
                    self.indices = indices
                    self.update()
                step += 1


def network(*overrides: str) -> nn.Module:
    from regrow.config.targets import instantiate

    model: nn.Module = instantiate(config_of(*overrides)["model"])
    return model.train()
