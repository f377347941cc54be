"""A single-machine Slurm for tests: its daemons on loopback, in their own folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol")
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=cred_expire=5,socket={root}/munge.sock
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.log
SlurmctldPort={port}
SlurmdPort={node_port}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,requeue_delay=1
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=30
JobRequeue=1
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory=8000 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=debug Nodes={host} Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO GraceTime=60
PartitionName=urgent Nodes={host} MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=9
"""


def why_not() -> str:
    """Return the reason why Slurm cannot run here, or an empty string if it can."""
    if os.geteuid() != 0:
        return "Slurm's daemons need root"
    missing = [name for name in NEEDED if shutil.which(name) is None]
    return (
        f"not installed: {', '.join(missing)} (Debian: slurmctld slurmd munge)" if missing else ""
    )


@contextlib.contextmanager
def running(root: Path) -> Iterator[dict[str, str]]:
    """Run the daemons; yields the environment in which Slurm's commands find them."""
    root.chmod(0o755)
    for name in ("state", "spool"):
        (root / name).mkdir()
    config, host = root / "slurm.conf", socket.gethostname().split(".")[0]
    port, node_port = free_ports(2)
    config.write_text(CONFIG.format(root=root, host=host, port=port, node_port=node_port))
    (root / "munge.key").write_bytes(os.urandom(128))
    (root / "munge.key").chmod(0o400)
    environment = {**os.environ, "SLURM_CONF": str(config)}
    munge = [f"--{name}={root / f'munge.{end}'}" for name, end in (
        ("key-file", "key"), ("socket", "sock"), ("pid-file", "pid"),
        ("log-file", "log"), ("seed-file", "seed"),
    )]  # fmt: skip
    daemons = [["munged", "--foreground", "--force", *munge], ["slurmctld", "-D"], ["slurmd", "-D"]]
    started: list[subprocess.Popen[bytes]] = []
    try:
        for command in daemons:
            started.append(
                subprocess.Popen(
                    command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                )
            )
            time.sleep(0.5)
        hello = ["srun", "--immediate=20", "--ntasks=1", "true"]
        for _ in range(30):
            if subprocess.run(hello, env=environment, capture_output=True).returncode == 0:
                break
            time.sleep(0.5)
        else:
            raise RuntimeError(f"Slurm does not answer; its words are in {root}/*.log")
        yield environment
    finally:
        subprocess.run(["scancel", "--user=root"], env=environment, capture_output=True)
        for process in reversed(started):
            process.terminate()
        for process in started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for each in sockets:
        each.close()
    return ports
