"""Run in a network namespace of its own: how many bytes a step of two processes sends, as JSON.

Nothing else speaks there, so the kernel's counter of the loopback device counts the step alone.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist
import torch.multiprocessing as mp
from in_ranks import Config, joined, sharded, steps
from running import TINY, config_of

from regrow import run as runs
from regrow.training.interrupt import StopRequest

SIOCSIFFLAGS, IFF_UP, IFF_RUNNING = 0x8914, 0x1, 0x40  # linux/sockios.h, linux/if.h
WIDTH, STEPS = 512, 8
CONFIG = (
    *TINY,
    f"model.hidden=[{WIDTH},{WIDTH}]",
    "trainer.max_epochs=null",
    "trainer.max_steps=99",
)
CASES: dict[str, tuple[bool, int, dict[str, Any]]] = {  # sharded, slices, options of FSDP
    "ddp": (False, 1, {}),
    "ddp, 4 slices": (False, 4, {}),
    "fsdp": (True, 1, {}),
    "fsdp, kept gathered": (True, 1, {"reshard_after_forward": False}),
    "fsdp, gathered in bf16": (True, 1, {"param_dtype": "bf16", "reduce_dtype": "fp32"}),
    "fsdp, 4 slices": (True, 4, {}),
}


def part(rank: int, size: int, port: int, config: Config, file: Path) -> None:
    world = joined(rank, size, port)
    found: dict[str, float] = {}
    for name, (is_sharded, slices, fsdp) in CASES.items():
        trainer = {**config["trainer"], "accumulation_steps": slices}
        trainer["fsdp"] = {**trainer["fsdp"], "modules": ["body.*"], **fsdp}
        its = sharded(world) if is_sharded else world
        objects = runs.build({**config, "trainer": trainer}, its)
        saved = SimpleNamespace(saved=None)
        plan = runs.plan_of(objects, 0, its, StopRequest(), record=None, checkpoints=saved)
        steps(objects, plan, 2, whole_weights=False)  # connections are made, buckets built anew
        before = sent_by_now()
        steps(objects, plan, 2 + STEPS, whole_weights=False)
        parameters = sum(p.numel() for p in objects.state.model.parameters())
        found[name] = (sent_by_now() - before) / STEPS / size / (4 * parameters)
    if rank == 0:
        file.write_text(json.dumps(found))
    os._exit(0)  # as real runs end: the threads of a process group may fall over each other


def sent_by_now() -> int:
    """What all processes have sent, at an instant at which none of them sends."""
    dist.barrier()
    count = sent()
    dist.barrier()  # nobody goes on before all have looked
    return count


def sent() -> int:
    (line,) = [x for x in Path("/proc/self/net/dev").read_text().splitlines() if " lo:" in f" {x}"]
    return int(line.split(":")[1].split()[8])


def main(size: int, file: str) -> None:
    with socket.socket() as any_socket:  # the loopback device of a new namespace is down
        request = struct.pack("16sh14x", b"lo", IFF_UP | IFF_RUNNING)
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, request)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    mp.spawn(part, args=(size, store.port, config_of(*CONFIG), Path(file)), nprocs=size)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
