"""CIFAR-10 to 94 %: `experiment=cifar10_fast` and its method in a script tuned by hand.

A full `make bench` does not include it: it needs the data and, without a GPU, half an hour per
round. The method is that of the airbench records (Jordan, "94% on CIFAR-10 in 3.29 seconds on a
single GPU", 2024, and its later variant with Muon), written from scratch. A round is a seed; only
training time is measured.
"""

from __future__ import annotations

import math
import sys
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.accuracy import ours, race, whole
from benchmarks.configured import build, config_of, world_of
from benchmarks.measure import Table

EPOCHS, BATCH, SMOOTHING = 8, 2000, 0.2
SIZE, PAD = 32, 2  # pixels
SHIFT_RATE, HEAD_RATE, DECAY = 106.0, 0.0204, 0.004  # of the mean loss; decay per step
KERNEL_RATE, MOMENTUM = 0.24, 0.6
PLACES = ("data.root=", "data.source.", "trainer.device=", "trainer.num_threads=")
OURS, BY_HAND = "train.py experiment=cifar10_fast", "hand-tuned, in memory"


def measure(*arguments: str) -> Table:
    """`seeds=5` runs five rounds; the other arguments give the data's folder and the device."""
    rounds = [a.removeprefix("seeds=") for a in arguments if a.startswith("seeds=")]
    if not all(number.isdigit() and int(number) for number in rounds):
        sys.exit(f"benchmarks: seeds={rounds[0]} must be a number of at least 1")
    places = tuple(a for a in arguments if not a.startswith("seeds="))
    if foreign := [a for a in places if not a.startswith(PLACES)]:
        sys.exit(
            f"benchmarks: {foreign[0]} changes one side alone; cifar10 takes {', '.join(PLACES)}"
        )
    return table(range(int(rounds[0]) if rounds else 1), *places)


def table(seeds: range, *places: str) -> Table:
    options = ("experiment=cifar10_fast", *places)
    device, epochs = world_of(*options).device, config_of(*options)["trainer"]["max_epochs"]
    on_gpu = device.type == "cuda"
    runners = {OURS: ours, BY_HAND: by_hand}
    seconds, said = race(runners, options, seeds, warm_up=on_gpu)  # half an hour on a CPU
    where = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} CPU threads"
    return Table(
        title="CIFAR-10 to 94 %",
        note=f"{where}, {epochs} epochs, by hand {EPOCHS}. Test accuracy of {len(seeds)}: {said}.",
        unit="s of training",
        reference=BY_HAND,
        seconds=seconds,
    )


def by_hand(*options: str) -> tuple[float, float]:
    world = world_of(*options)
    objects, config = build(world, *options)  # the same examples, threads and first weights
    data, device = objects.data, world.device
    images, targets = data.source.train.inputs.to(device), data.source.train.targets.to(device)
    mean, std = (
        torch.tensor(values, device=device).view(1, -1, 1, 1)
        for values in (data.preprocessing.mean, data.preprocessing.std)
    )
    model = objects.state.model
    started = time.perf_counter()
    train(model, images, targets, mean * 255, std * 255, config["seed"])
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    inputs, targets = whole(data.evaluation("test", device=device))
    model.eval()
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        outputs = torch.cat([model(part) for part in inputs.split(1000)])
    return seconds, (outputs.argmax(1) == targets).double().mean().item()


def train(
    model: Any, images: Tensor, targets: Tensor, mean: Tensor, std: Tensor, seed: int
) -> None:
    """Muon keeps kernels at one norm, SGD trains the rest; the first layer's bias freezes later."""
    generator = torch.Generator(images.device).manual_seed(seed)
    kernels = [p for p in model.stages.parameters() if p.ndim == 4]
    shifts = [p for p in model.parameters() if p.ndim == 1 and p.requires_grad]
    groups = [
        {"params": shifts, "lr": SHIFT_RATE, "weight_decay": DECAY / SHIFT_RATE},
        {"params": [model.head.weight], "lr": HEAD_RATE, "weight_decay": DECAY / HEAD_RATE},
    ]
    sgd = torch.optim.SGD(groups, momentum=0.85, nesterov=True, fused=True)
    rates = [group["lr"] for group in sgd.param_groups]
    momenta = [torch.zeros_like(kernel) for kernel in kernels]
    padded = F.pad(images.float(), (PAD, PAD, PAD, PAD), mode="reflect").to(torch.uint8)
    crops = padded.unfold(2, SIZE, 1).unfold(3, SIZE, 1)  # (N, C, 5, 5, 32, 32), a view
    first = torch.randint(0, 2, (len(images),), generator=generator, device=images.device)
    model.train()
    per_epoch = math.ceil(len(images) / BATCH)
    step = 0
    for epoch in range(EPOCHS):
        model.whiten.bias.requires_grad_(epoch < 3)
        order = torch.randperm(len(images), generator=generator, device=images.device)
        for indices in order.split(BATCH):
            size = (2, len(indices))
            top, left = torch.randint(
                0, 2 * PAD + 1, size, generator=generator, device=images.device
            )
            inputs = crops[indices, :, top, left]
            mirrored = ((first[indices] + epoch) % 2 == 1).view(-1, 1, 1, 1)
            inputs = (torch.where(mirrored, inputs.flip(3), inputs) - mean) / std
            inputs = inputs.contiguous(memory_format=torch.channels_last)
            factor = 1 - step / (EPOCHS * per_epoch)
            for group, rate in zip(sgd.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            with torch.autocast(images.device.type, torch.bfloat16):
                outputs = model(inputs)
            goal = targets[indices]
            F.cross_entropy(outputs.float(), goal, label_smoothing=SMOOTHING).backward()
            sgd.step()
            muon(kernels, momenta, KERNEL_RATE * factor)
            model.zero_grad()
            step += 1


@torch.no_grad()
def muon(kernels: list[nn.Parameter], momenta: list[Tensor], rate: float) -> None:
    for kernel, momentum in zip(kernels, momenta, strict=True):
        assert kernel.grad is not None
        momentum.mul_(MOMENTUM).add_(kernel.grad)
        update = orthogonal(kernel.grad.add(momentum, alpha=MOMENTUM).flatten(1))
        kernel.mul_(len(kernel) ** 0.5 / kernel.norm())
        kernel.sub_(update.view(kernel.shape), alpha=rate)


def orthogonal(matrix: Tensor) -> Tensor:
    """Make all singular values near one, by the Newton-Schulz iteration of Jordan et al. (Muon)."""
    near = matrix.bfloat16()
    near /= near.norm() + 1e-7
    for _ in range(5):
        square = near @ near.T
        near = 3.4445 * near + (-4.7750 * square + 2.0315 * square @ square) @ near
    return near.float()
