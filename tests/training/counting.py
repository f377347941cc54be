"""Runs in its own network namespace: how many bytes a step of two processes sends, as JSON.

There is no other traffic, so the kernel's counter of the loopback device counts the step alone.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
import sys
from pathlib import Path

import torch.distributed as dist
import torch.multiprocessing as mp
from in_ranks import WIDTH, Config, communicated, joined
from running import TINY, config_of

SIOCSIFFLAGS, IFF_UP, IFF_RUNNING = 0x8914, 0x1, 0x40  # linux/sockios.h, linux/if.h
STEPS = 8
CONFIG = (
    *TINY,
    f"model.hidden=[{WIDTH},{WIDTH}]",
    "trainer.max_epochs=null",
    "trainer.max_steps=99",
)


def part(rank: int, size: int, port: int, config: Config, file: Path) -> None:
    world = joined(rank, size, port)
    found = communicated(world, config, lambda: sent() // size, STEPS)
    if rank == 0:
        file.write_text(json.dumps(found))
    os._exit(0)  # as real runs end: the threads of a process group may crash at exit


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
