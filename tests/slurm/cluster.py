"""A SLURM of one node for the tests: real daemons, pretended GPUs, everything in one folder.

``python tests/slurm/cluster.py start FOLDER`` starts it, ``. FOLDER/env.sh`` lets a shell use it, ``stop FOLDER`` ends
it; ``install`` fetches Debian's packages. Needs root: slurmd refuses to run as anybody else. Nothing outside the folder
is written or read, so it stands beside any other SLURM, and no systemd, cgroup, database or GPU is needed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PACKAGES = {"munged": "munge", "slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client"}
"""Debian's packages by a program of each."""

PATIENCE_S = 900
"""Seconds that apt-get may take."""

MEMORY_MB = 64_000
"""Memory that the node claims to have, whatever is there: the jobs of the tests ask for more than they use."""

CONF = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmdPort={slurmd_port}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/ctld
SlurmdSpoolDir={folder}/slurmd
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
AccountingStorageType=accounting_storage/none
# No cgroups: containers seldom have them. Memory is polled instead, and a job that exceeds its share is ended.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2
ReturnToService=2
# Finished jobs stay known: Snakemake and the tests ask for them.
MinJobAge=7200
KillWait=2
EnforcePartLimits=ALL
PropagateResourceLimits=NONE
GresTypes=gpu
NodeName={host} NodeHostname={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} Gres=gpu:{gpus} State=UNKNOWN
PartitionName=cpu Nodes={host} Default=YES MaxTime=3-0 State=UP
PartitionName=gpu Nodes={host} MaxTime=3-0 State=UP
"""


class NoCluster(Exception):
    """SLURM cannot run here; the text says why."""


def missing_packages() -> list[str]:
    """Debian's packages that are not installed."""
    return [package for program, package in PACKAGES.items() if which(program) is None]


def which(program: str) -> str | None:
    """A program's path, also where an ordinary PATH leaves out the system's programs."""
    return shutil.which(program, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")


def install() -> None:
    """Install the packages that are missing, without letting them start services.

    Raises
    ------
    NoCluster
        When that is not possible here.
    """
    wanted = missing_packages()
    if not wanted:
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise NoCluster(f"{', '.join(wanted)} not installed, and this is not root on Debian or Ubuntu")
    veto = Path("/usr/sbin/policy-rc.d")
    own_veto = not veto.exists()
    if own_veto:
        veto.write_text("#!/bin/sh\nexit 101\n")
        veto.chmod(0o755)
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    try:
        for command in (["update"], ["install", "-y", "--no-install-recommends", *wanted]):
            # The lock: of an attempt that was given up and has not ended yet, or of the system's own updates.
            line = ["apt-get", "-qq", "-o", f"DPkg::Lock::Timeout={PATIENCE_S}", *command]
            done = subprocess.run(
                line, env=environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False
            )
            if done.returncode != 0 and command[0] == "install":
                raise NoCluster(f"apt-get install {' '.join(wanted)} failed: {done.stderr.strip()[-300:]}")
    except subprocess.TimeoutExpired:
        if missing_packages():  # else it is about manual pages
            raise NoCluster(f"apt-get took longer than {PATIENCE_S // 60} minutes") from None
    finally:
        if own_veto:
            veto.unlink()


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until(ready: Callable[[], bool], what: str, seconds: float = 60) -> None:
    """Wait for something, or raise `NoCluster`."""
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            raise NoCluster(f"{what} within {seconds:g} s")
        time.sleep(0.1)


@dataclass(frozen=True)
class Cluster:
    """A SLURM of one node.

    Parameters
    ----------
    folder : pathlib.Path
        Absolute path of the folder that holds all of it.
    """

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables for the programs that use it."""
        path = f"{self.folder}/bin:{os.environ.get('PATH', os.defpath)}"
        return os.environ | {"SLURM_CONF": f"{self.folder}/slurm.conf", "PATH": path}

    def ask(self, *command: str) -> str:
        """Standard output of one of SLURM's programs."""
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=60, check=True
        ).stdout

    def jobs(self) -> list[dict[str, str]]:
        """All jobs that were submitted, in that order, as ``scontrol show job`` tells of them."""
        lines = self.ask("scontrol", "--oneliner", "show", "job").splitlines()
        fields = [dict(part.split("=", 1) for part in line.split() if "=" in part) for line in lines]
        return sorted((job for job in fields if "JobId" in job), key=lambda job: int(job["JobId"]))

    def start(self, cpus: int = 16, gpus: int = 2) -> None:
        """Start the daemons.

        Parameters
        ----------
        cpus, gpus : int
            What the node claims to have. A GPU is a null device: jobs get CUDA_VISIBLE_DEVICES, and find no GPU.

        Raises
        ------
        NoCluster
            When SLURM is not installed, this is not root, or a daemon does not come up.
        """
        if missing := missing_packages():
            raise NoCluster(f"not installed: {', '.join(missing)} (make slurm installs them)")
        if os.geteuid() != 0:
            raise NoCluster("slurmd has to be started by root")
        folder = self.folder
        for name in ("munge", "ctld", "slurmd", "dev", "bin"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        folder.chmod(0o755)
        key = folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        for index in range(gpus):
            os.mknod(folder / "dev" / f"gpu{index}", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        host = socket.gethostname().split(".")[0]
        devices = f"{folder}/dev/gpu[0-{gpus - 1}]"
        (folder / "gres.conf").write_text(f"AutoDetect=off\nNodeName={host} Name=gpu File={devices}\n")
        (folder / "slurm.conf").write_text(
            CONF.format(
                host=host,
                folder=folder,
                ctld_port=free_port(),
                slurmd_port=free_port(),
                cpus=cpus,
                gpus=gpus,
                memory=MEMORY_MB,
            )
        )
        # Snakemake's job step takes SLURM_CONF out of the environment of srun, which would look in /etc/slurm.
        srun = folder / "bin" / "srun"
        srun.write_text(f'#!/bin/sh\nSLURM_CONF={folder}/slurm.conf exec {which("srun")} "$@"\n')
        srun.chmod(0o755)
        (folder / "env.sh").write_text(f'export SLURM_CONF={folder}/slurm.conf PATH="{folder}/bin:$PATH"\n')
        try:
            files = {"key-file": "munge.key", "log-file": "munge.log", "pid-file": "munged.pid", "seed-file": "seed"}
            munge = [f"--{option}={folder}/{name}" for option, name in (files | {"socket": "munge/socket"}).items()]
            self._daemon("munged", *munge, "--num-threads=2")
            wait_until((folder / "munge" / "socket").exists, "munged did not come up")
            self._daemon("slurmctld")
            wait_until(lambda: "is UP" in self._try("scontrol", "ping"), "slurmctld did not come up")
            self._daemon("slurmd")
            wait_until(lambda: self._try("sinfo", "-hNo", "%T").split()[:1] == ["idle"], "the node did not come up")
        except NoCluster as error:
            tails = [f"{log.name}: {log.read_text()[-600:]}" for log in sorted(folder.glob("*.log"))]
            self.stop()
            raise NoCluster("\n".join([str(error), *tails])) from None

    def _daemon(self, program: str, *options: str) -> None:
        done = subprocess.run(
            [which(program) or program, *options],
            env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=60, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise NoCluster(f"{program} did not start: {done.stderr.strip()[-300:]}")

    def _try(self, *command: str) -> str:
        try:
            return self.ask(*command)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
            return ""

    def stop(self) -> None:
        """Cancel all jobs and end the daemons; nothing happens where they do not run."""
        if self._pid("slurmctld") is not None:
            self._try("scancel", "--user=root")
            wait_quietly(lambda: not self._try("squeue", "-h").strip(), 20)
        for program in ("slurmd", "slurmctld", "munged"):
            if (pid := self._pid(program)) is not None:
                os.kill(pid, 15)
                wait_quietly(lambda program=program: self._pid(program) is None, 20)  # type: ignore[misc]
            if (pid := self._pid(program)) is not None:
                os.kill(pid, 9)

    def _pid(self, program: str) -> int | None:
        """The process of a daemon of ours, where it lives."""
        try:
            pid = int((self.folder / f"{program}.pid").read_text())
            alive = Path(f"/proc/{pid}/comm").read_text().strip() == program
        except (OSError, ValueError):
            return None
        return pid if alive else None


def wait_quietly(ready: Callable[[], bool], seconds: float) -> None:
    """Wait for something, and no longer."""
    with suppress(NoCluster):
        wait_until(ready, "not ready", seconds)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("action", choices=("install", "start", "stop"))
    parser.add_argument("folder", type=Path, nargs="?", help="where it lives, for start and stop")
    args = parser.parse_args()
    if args.action != "install" and args.folder is None:
        parser.error(f"{args.action} needs a folder")
    try:
        if args.action == "install":
            install()
        elif args.action == "start":
            Cluster(args.folder.absolute()).start()
            print(f". {args.folder.absolute()}/env.sh")
        else:
            Cluster(args.folder.absolute()).stop()
    except NoCluster as error:
        print(f"no SLURM: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
