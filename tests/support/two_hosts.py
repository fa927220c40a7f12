"""Run every launcher on two hosts, and check the messages when the hosts do not come together.

    python -m tests.support.two_hosts

The hosts are two network namespaces, joined by a pair of virtual interfaces, if this process may make them (as root). If it
may not, both hosts are this machine, and the network between hosts is not tested.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.launch import ROOT, free_port

TRAIN = str(ROOT / "fastjepa" / "train.py")
SMALL = ["global_batch_size=8", "micro_batch_size=4", "epochs=0.006", "log_interval=1", "model.depth=1"]
CPU = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
ZERO = ["--ds_config", str(ROOT / "configs" / "zero2.json")]


@dataclass
class Host:
    """A machine that can start a command."""

    prefix: list[str]
    """Words before a command that make it run on this host."""
    address: str
    environment: dict[str, str] = field(default_factory=dict)

    def start(self, command: list[str], **environment: str) -> subprocess.Popen[str]:
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
        return subprocess.Popen(
            [*self.prefix, *command],
            env={**os.environ, "PYTHONPATH": path, **CPU, **self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


@contextmanager
def two_hosts() -> Iterator[list[Host]]:
    names = [f"fastjepa-{os.getpid()}-{side}" for side in "ab"]
    links = [f"fj{os.getpid() % 100_000}{side}" for side in "ab"]
    made = _ip("netns", "add", names[0])
    if made:
        print("hosts: two network namespaces")
        try:
            _ip("netns", "add", names[1])
            _ip("link", "add", links[0], "netns", names[0], "type", "veth", "peer", "name", links[1], "netns", names[1])
            hosts = []
            for number, (name, link) in enumerate(zip(names, links, strict=True), start=1):
                address = f"10.231.77.{number}"
                inside = ["ip", "netns", "exec", name]
                for command in (
                    ["ip", "addr", "add", f"{address}/24", "dev", link],
                    ["ip", "link", "set", link, "up"],
                    ["ip", "link", "set", "lo", "up"],
                ):
                    subprocess.run([*inside, *command], check=True)
                hosts.append(Host(inside, address, {"GLOO_SOCKET_IFNAME": link}))
            yield hosts
        finally:
            for name in names:
                _ip("netns", "del", name)
    else:
        print("hosts: no network namespaces may be made here, so both are this machine")
        yield [Host([], "127.0.0.1"), Host([], "127.0.0.1")]


def _ip(*arguments: str) -> bool:
    return shutil.which("ip") is not None and subprocess.run(["ip", *arguments], capture_output=True).returncode == 0


def torchrun(node: int, master: str, port: int) -> list[str]:
    where = ["--nnodes", "2", "--node_rank", str(node), "--master_addr", master, "--master_port", str(port)]
    return [sys.executable, "-m", "torch.distributed.run", *where, "--nproc_per_node", "1", TRAIN]


def deepspeed(port: int, hostfile: Path, *where: str) -> list[str]:
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile)]
    return [*launcher, "--master_port", str(port), *where, TRAIN, *ZERO]


def srun(node: int, master: str, port: int, tasks: int = 2) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": str(tasks),
        "SLURM_STEP_TASKS_PER_NODE": f"1(x{tasks})",
        "SLURM_STEP_NODELIST": master,
        "SLURM_NODEID": str(node),
        "SLURM_PROCID": str(node),
        "SLURM_LOCALID": "0",
        "MASTER_PORT": str(port),
    }


def ssh_and_pdsh(hosts: list[Host], folder: Path) -> dict[str, str]:
    """Write an ssh and a pdsh with which DeepSpeed's launcher starts both hosts from one; return the PATH to find them.

    They know the hosts by their order. As with the real programs, a shell on the host reads the command, and only variables
    that the launcher exports arrive there.
    """
    reach = [
        [*host.prefix, "env", "-i", f"PATH={os.environ['PATH']}", f"HOME={folder}"]
        + [f"{name}={value}" for name, value in {**CPU, **host.environment}.items()]
        for host in hosts
    ]
    programs = {
        "ssh": f"#!/bin/sh\necho {hosts[0].address}\n",  # the launcher asks it only for the first host's address
        "pdsh": f"""#!{sys.executable}
import subprocess, sys
words = " ".join(sys.argv[sys.argv.index("-w") + 2 :])
hosts = [subprocess.Popen([*reach, "bash", "-c", words.replace("%n", str(n))]) for n, reach in enumerate({reach})]
sys.exit(max(host.wait() for host in hosts))
""",
    }
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def check(name: str, good: bool, detail: str) -> bool:
    print(f"{'ok  ' if good else 'FAIL'}  {name}: {detail}", flush=True)
    return good


def trains(hosts: list[Host], folder: Path) -> Iterator[bool]:
    """Check that each launcher's run has the losses of a single process."""
    config = ["--config", str(ROOT / "configs" / "debug.yaml"), *SMALL]
    hostfile = folder / "hosts.txt"
    hostfile.write_text("node-a slots=1\nnode-b slots=1\n")
    ended([Host([], "").start([sys.executable, TRAIN, *config, f"output_dir={folder}/single"])])
    expected = losses(folder / "single")
    for launcher in ("torchrun", "deepspeed by ssh", "deepspeed --no_ssh", "srun"):
        run, port, master = folder / f"run by {launcher}".replace(" ", "_"), free_port(), hosts[0].address
        rest = [*config, f"output_dir={run}"]
        processes = []
        if launcher == "deepspeed by ssh":
            processes.append(hosts[0].start([*deepspeed(port, hostfile), *rest], **ssh_and_pdsh(hosts, folder)))
        for node, host in enumerate(hosts):
            if launcher == "torchrun":
                processes.append(host.start([*torchrun(node, master, port), *rest]))
            elif launcher == "deepspeed --no_ssh":
                where = ["--no_ssh", "--node_rank", str(node), "--master_addr", master]
                processes.append(host.start([*deepspeed(port, hostfile, *where), *rest]))
            elif launcher == "srun":
                processes.append(host.start([sys.executable, TRAIN, *ZERO, *rest], **srun(node, master, port)))
        results = ended(processes)
        if any(status for status, _ in results):
            yield check(launcher, False, "\n".join(output[-2000:] for _, output in results))
            continue
        difference = max(abs(a - b) / abs(b) for a, b in zip(losses(run), expected, strict=True))
        yield check(
            launcher, difference < 1e-5, f"{len(expected)} steps, losses within {difference:.1e} of one process"
        )


def fails(hosts: list[Host], folder: Path) -> Iterator[bool]:
    """Check what each host says when the two do not come together."""
    base = [
        sys.executable,
        TRAIN,
        "--config",
        str(ROOT / "configs" / "debug.yaml"),
        *SMALL,
        f"output_dir={folder}/failed",
    ]
    # A copy of the package with one more file, which the ranks must take for another version.
    other = folder / "other"
    shutil.copytree(ROOT / "fastjepa", other / "fastjepa", ignore=shutil.ignore_patterns("__pycache__"))
    (other / "fastjepa" / "changed.py").write_text("# one file more\n")
    old = {"PYTHONPATH": os.pathsep.join([str(other), str(ROOT / "kernels")])}
    old_base = [sys.executable, str(other / "fastjepa" / "train.py"), *base[2:]]
    a, b = hosts
    master = a.address
    # Name -> for each process its host, command, variables of its launcher and further variables; the message of all.
    cases: dict[str, tuple[list[tuple[Host, list[str], dict[str, str], dict[str, str]]], str]] = {
        "second host absent": ([(a, base, srun(0, master, 0), {})], r"rank 1 of 2 did not come to"),
        "first host absent": ([(b, base, srun(1, master, 0), {})], r"rank 1 on \S+ could not reach"),
        "different world sizes": (
            [(a, base, srun(0, master, 0), {}), (b, base, srun(1, master, 0, tasks=3), {})],
            r"different WORLD_SIZE: 2 on rank 0 \(.*\), 3 on rank 1",
        ),
        "MASTER_ADDR is the second host's": (
            [(a, base, srun(0, b.address, 0), {}), (b, base, srun(1, b.address, 0), {})],
            r"rank 0 runs on \S+, which MASTER_ADDR = \S+ does not lead to|rank 1 on \S+ could not reach",
        ),
        "another version on the second host": (
            [(a, base, srun(0, master, 0), {}), (b, old_base, srun(1, master, 0), old)],
            r"not alike: sources of fastjepa: \w+ on rank 0 \(.*\), \w+ on rank 1",
        ),
        "another configuration on the second host": (
            [(a, base, srun(0, master, 0), {}), (b, [*base, "seed=7"], srun(1, master, 0), {})],
            r"not alike: seed: 0 on rank 0 \(.*\), 7 on rank 1",
        ),
    }
    for name, (starts, expected) in cases.items():
        port = str(free_port())
        processes = [
            host.start(command, **{**slurm, "MASTER_PORT": port, "FASTJEPA_RENDEZVOUS_SECONDS": "12", **more})
            for host, command, slurm, more in starts
        ]
        results = ended(processes)
        good = all(status == 2 and re.search(expected, out) and "Traceback" not in out for status, out in results)
        yield check(
            name, good, "\n      ".join(out.strip().splitlines()[-1] if out.strip() else "-" for _, out in results)
        )


def main() -> int:
    with tempfile.TemporaryDirectory() as folder, two_hosts() as hosts:
        good = [*trains(hosts, Path(folder)), *fails(hosts, Path(folder))]
    print(f"{sum(good)} of {len(good)} as expected")
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
