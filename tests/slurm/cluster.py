"""A Slurm of two nodes on this machine: its own daemons, key, ports and folder, all gone afterwards."""

import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol")
CONF = """
ClusterName=longspan
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/linear
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1
ReturnToService=2
KillWait=20
MpiDefault=none
MailProg=/bin/true
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters={parameters}
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 RealMemory=100
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 RealMemory=100
PartitionName=low Nodes=n1,n2 Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=120 MaxTime=60 State=UP
PartitionName=urgent Nodes=n1,n2 PriorityTier=2 PreemptMode=OFF MaxTime=60 State=UP
"""


class Cluster:
    """Talks to a running one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def ask(self, *command: str, cwd: Path | None = None, **environment: str) -> str:
        """What a Slurm command prints; an error if it fails."""
        result = subprocess.run(
            command, cwd=cwd, env=self.environment | environment, capture_output=True, text=True, timeout=60
        )
        assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """Facts about a job."""
        return dict(re.findall(r"(\w+)=(\S*)", self.ask("scontrol", "show", "job", "--oneliner", number)))

    def wait(self, what: str, is_true: Callable[[], object], seconds: float = 600) -> None:
        """Return when it is true; fail with the daemons' last words if that takes too long."""
        deadline = time.monotonic() + seconds
        while not is_true():
            assert time.monotonic() < deadline, f"waited {seconds} s for: {what}\n{self.last_words()}"
            time.sleep(0.2)

    def last_words(self) -> str:
        """The end of each log."""
        logs = sorted(self.folder.glob("*.log"))
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-2000:]}" for log in logs)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    with ExitStack() as stack:
        listeners = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in listeners]


@contextmanager
def running_cluster(folder: Path) -> Iterator[Cluster]:
    """Start the daemons, hand out the cluster, end what it runs, end the daemons."""
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    assert not missing, f"not installed: {', '.join(missing)}; `make test-slurm` installs slurm-wlm and munge"
    folder.chmod(0o755)
    for name in ("state", "spool.n1", "spool.n2"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    parameters = "preempt_send_user_signal"
    conf = CONF.format(folder=folder, user=getpass.getuser(), ports=free_ports(3), parameters=parameters)
    (folder / "slurm.conf").write_text(conf)
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    cluster = Cluster(folder)
    daemons = [
        ["munged", "--foreground", f"--socket={folder}/munge.socket", f"--key-file={key}",
         f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log",
         f"--seed-file={folder}/munged.seed"],
        ["slurmctld", "-D", "-f", f"{folder}/slurm.conf"],
        *(["slurmd", "-D", "-N", name, "-f", f"{folder}/slurm.conf"] for name in ("n1", "n2")),
    ]  # fmt: skip
    with ExitStack() as stack:
        for number, command in enumerate(daemons):
            output = stack.enter_context((folder / f"daemon-{number}.log").open("w"))
            process = subprocess.Popen(command, env=cluster.environment, stdout=output, stderr=output)
            stack.callback(end, process)
            if number == 0:
                cluster.wait("munged's socket", (folder / "munge.socket").exists, 20)
        cluster.wait("idle nodes", lambda: is_idle(cluster), 60)
        stack.callback(end_jobs, cluster)
        yield cluster


def is_idle(cluster: Cluster) -> bool:
    """Whether both nodes wait for work."""
    result = subprocess.run(
        ["sinfo", "-h", "-N", "-p", "low", "-o", "%T"],
        env=cluster.environment,
        capture_output=True,
        text=True,
    )
    return result.stdout.split() == ["idle", "idle"]


def end_jobs(cluster: Cluster) -> None:
    """Cancel what is left and wait for its processes."""
    cluster.ask("scancel", "--user", getpass.getuser())
    cluster.wait("an empty queue", lambda: not cluster.ask("squeue", "--noheader"), 60)


def end(process: subprocess.Popen) -> None:
    """Ask a daemon to end; insist."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
