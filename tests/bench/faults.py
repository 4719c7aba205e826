"""Everything that a run may lose, lost for real on a Ray cluster of several nodes on this machine.

    python tests/bench/faults.py --out DIR [--only NAME ...]

It starts a head and three nodes of one or two CPUs (127.0.0.2 to .5). It quantizes a small random model undisturbed in
one process, and then once for each fault, and compares every byte of the results. As root it tries two more faults: a
small file system of the run directory that fills up and is freed, and a network cable of a node that is pulled and put
back. It prints Markdown. cluster/README.md lists what a run may lose.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.support.models import LLAMA, write_checkpoint  # noqa: E402

BLOCKS = 8
CABLE = "cable pulled"
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
HEAD = "127.0.0.2"
PORT = 6399
# Short, so that a node that is gone is noticed within seconds.
HEALTH = {
    "RAY_health_check_initial_delay_ms": "1000", "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000", "RAY_health_check_failure_threshold": "3",
}  # fmt: skip
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0", "RAY_enable_metrics_collection": "0",
    "RAY_memory_monitor_refresh_ms": "0", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
}  # fmt: skip


class Cluster:
    """Runs a head without CPUs, and nodes of one or two CPUs, each as a process of this script."""

    def __init__(self, folder: Path, prefix: Callable[[str], list[str]] = lambda name: [], head: str = HEAD) -> None:
        self.folder, self.head, self._prefix = folder, head, prefix
        token = folder / "token"
        folder.mkdir(parents=True, exist_ok=True)
        token.write_text(os.urandom(32).hex())
        token.chmod(0o600)
        self.fault = folder / "fault.json"
        # Ray wants short paths for its sockets.
        self._short = Path(tempfile.mkdtemp(prefix="f-"))
        self.environment = {
            **os.environ, **HEALTH, **QUIET, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token),
        }  # fmt: skip
        self.nodes: dict[str, subprocess.Popen] = {}

    def start_head(self) -> None:
        address = ["--head", f"--node-ip-address={self.head}", f"--port={PORT}", "--num-cpus=0"]
        self._start("head", [*address, "--include-dashboard=false"])
        time.sleep(6)

    def start_node(self, name: str, address: str) -> None:
        """Start a node. It has room for one worker, but w1 for two, so that it takes both with it."""
        cpus = 2 if name == "w1" else 1
        self._start(name, [f"--address={self.head}:{PORT}", f"--node-ip-address={address}", f"--num-cpus={cpus}"])

    def _start(self, name: str, arguments: list[str]) -> None:
        command = [*self._prefix(name), *RAY, "start", "--block", "--disable-usage-stats", *arguments]
        command += ["--object-store-memory=80000000", f"--temp-dir={self._short / name}"]
        hook = {"PYTHONPATH": f"{Path(__file__).parent / 'fault_hook'}:{ROOT}", "ASTRO_FAULT": str(self.fault)}
        with (self.folder / f"{name}.log").open("a") as log:
            self.nodes[name] = subprocess.Popen(
                command, env={**self.environment, **hook}, stdout=log, stderr=log, start_new_session=True
            )

    def processes(self, name: str) -> list[int]:
        """List the ids of a node's process and of all of its descendants."""
        listing = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True).stdout
        children: dict[int, list[int]] = {}
        for line in listing.splitlines():
            pid, parent = map(int, line.split())
            children.setdefault(parent, []).append(pid)
        pids = [self.nodes[name].pid]
        for pid in pids:
            pids += children.get(pid, [])
        return pids

    def signal(self, name: str, number: int) -> None:
        for pid in self.processes(name):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def close(self) -> None:
        for name in self.nodes:
            self.signal(name, signal.SIGKILL)
        shutil.rmtree(self._short, ignore_errors=True)


@dataclasses.dataclass
class Job:
    """Describes a run of the command line on a cluster, and follows it."""

    cluster: Cluster
    config: Path
    run: Path
    prefix: list[str]

    def start(self) -> subprocess.Popen:
        environment = {
            **self.cluster.environment,
            "RAY_ADDRESS": f"{self.cluster.head}:{PORT}",
            "PYTHONPATH": str(ROOT),
        }
        command = [*self.prefix, sys.executable, "-m", "astro_dist", "quantize", str(self.config), "--json"]
        log = (self.run.parent / f"{self.run.name}.log").open("a")
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def journal(self) -> list[dict]:
        path = self.run / "journal.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def wait_for(self, event: str, unit: str, timeout_s: float = 120) -> None:
        end = time.monotonic() + timeout_s
        while not any(line["event"] == event and unit in line.get("unit", "") for line in self.journal()):
            if time.monotonic() > end:
                raise TimeoutError(f"{event} {unit}: {self.journal()[-3:]}")
            time.sleep(0.05)

    def wait_for_workers(self, number: int) -> None:
        """Wait until so many workers are up and have something to do."""
        end = time.monotonic() + 120
        while sum(line["event"] == "joined" for line in self.journal()) < number and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(2)


def write_config(out: Path, name: str, model: Path, samples: int = 24, **execution: object) -> tuple[Path, Path]:
    run = out / name
    content = {
        "model": {"source": str(model)},
        "quantization": {"group_size": 32, "bits": 3},
        "calibration": {"samples": samples, "sequence_length": 96, "chunk_samples": 4, "holdout_samples": 4},
        "execution": {"device": "cpu", "workers": "auto", "worker_timeout_s": 90, **execution},
        "output": {"dir": str(run)},
    }
    path = out / f"{name}.yaml"
    path.write_text(json.dumps(content))
    return path, run


def hashes(folder: Path) -> dict[str, str]:
    """Compute the SHA-256 of every file but the card, which tells hardware and seconds."""
    files = (path for path in sorted(folder.glob("*")) if path.name != "README.md")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def worker_fault(phase: str, call: int, action: str) -> Callable[[Job], str]:
    """Return a fault in which one call of one worker goes wrong."""

    def happen(job: Job) -> str:
        plan = job.cluster.fault
        plan.with_suffix(".new").write_text(json.dumps({"phase": phase, "call": call, "action": action}))
        plan.with_suffix(".new").rename(plan)
        code = job.start().wait()
        if not plan.with_suffix(".done").exists():
            plan.unlink()
            return f"{code}, but the fault never happened"
        plan.with_suffix(".done").unlink()
        return str(code)

    return happen


def node_killed(job: Job) -> str:
    driver = job.start()
    job.wait_for_workers(4)
    job.cluster.signal("w1", signal.SIGKILL)
    code = driver.wait()
    job.cluster.start_node("w1", "127.0.0.3")
    time.sleep(8)
    return str(code)


def node_frozen(job: Job) -> str:
    """Freeze all processes of a node until the node is declared dead, and then let them go on."""
    driver = job.start()
    job.wait_for_workers(4)
    job.cluster.signal("w1", signal.SIGSTOP)
    time.sleep(12)
    job.cluster.signal("w1", signal.SIGCONT)
    code = driver.wait()
    job.cluster.signal("w1", signal.SIGKILL)
    job.cluster.start_node("w1", "127.0.0.3")
    time.sleep(8)
    return str(code)


def node_joins(job: Job) -> str:
    job.cluster.signal("w3", signal.SIGKILL)
    time.sleep(6)
    driver = job.start()
    job.wait_for("finished", "embed")
    before = {line["worker"] for line in job.journal() if line["event"] == "joined"}
    job.cluster.start_node("w3", "127.0.0.5")
    code = driver.wait()
    did = [line["worker"] for line in job.journal() if line["event"] == "finished"]
    return f"{code}, the new worker did {sum(worker not in before for worker in did)} units"


def driver_killed(job: Job) -> str:
    driver = job.start()
    job.wait_for("finished", "block-0002")
    driver.kill()
    driver.wait()
    return f"killed; again: {job.start().wait()}"


def cable_pulled(job: Job) -> str:
    """Take the network from a node until the node is declared dead, and then give it back."""
    driver = job.start()
    job.wait_for_workers(3)
    subprocess.run(["ip", "-n", namespace("w1"), "link", "set", "eth0", "down"], check=True)
    time.sleep(15)
    subprocess.run(["ip", "-n", namespace("w1"), "link", "set", "eth0", "up"], check=True)
    return str(driver.wait())


def namespace(name: str) -> str:
    return f"astro-{name}"


class Network:
    """Makes a network namespace for each node, and joins them by a bridge in another one."""

    def __init__(self, names: list[str]) -> None:
        self._all = [namespace(name) for name in ("switch", *names)]
        self.addresses = {name: f"10.77.0.{number + 11}" for number, name in enumerate(names)}

    def __enter__(self) -> "Network":
        for space in self._all:
            self._ip("netns", "add", space)
        switch = self._all[0]
        self._ip("-n", switch, "link", "add", "br0", "type", "bridge")
        self._ip("-n", switch, "addr", "add", "10.77.0.1/24", "dev", "br0")
        self._ip("-n", switch, "link", "set", "br0", "up")
        for name, address in self.addresses.items():
            space, port = namespace(name), f"to-{name}"
            self._ip("link", "add", port, "netns", switch, "type", "veth", "peer", "name", "eth0", "netns", space)
            self._ip("-n", switch, "link", "set", port, "master", "br0", "up")
            self._ip("-n", space, "link", "set", "lo", "up")
            self._ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
            self._ip("-n", space, "link", "set", "eth0", "up")
            self._ip("-n", space, "route", "add", "default", "via", "10.77.0.1")
        return self

    def __exit__(self, *_: object) -> None:
        for space in self._all:
            subprocess.run(["ip", "netns", "del", space], check=False)

    def _ip(self, *arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True)


def disk_full(job: Job) -> str:
    """Run on a file system of 16 MB that something else fills up, and frees after a while."""
    job.run.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(job.run)], check=True)
    driver = job.start()
    job.wait_for("finished", "block-0001")
    filler = job.run / ".filler.part"
    with filler.open("wb", buffering=0) as handle, contextlib.suppress(OSError):
        while handle.write(bytes(4096)):
            continue
    job_failed = time.monotonic() + 60
    while not any(line["event"] == "failed" for line in job.journal()) and time.monotonic() < job_failed:
        log = (job.run.parent / f"{job.run.name}.log").read_text()
        if "No space left" in log:
            break
        time.sleep(0.2)
    filler.unlink()
    return str(driver.wait())


FAULTS: dict[str, tuple[str, Callable[[Job], str], dict]] = {
    **{
        f"worker killed, {phase}": (f"kill -9 in the phase `{phase}`", worker_fault(phase, call, "kill"), {})
        for phase, call in (
            ("reading", 2), ("forward", 9), ("Hessian", 9), ("solve", 2), ("write", 2), ("rename", 9), ("record", 2),
        )
    },
    "worker killed, tile": (
        "kill -9 in a tile of mode `sequential`", worker_fault("tile", 3, "kill"), {"mode": "sequential"},
    ),
    "tile of a block": (
        "kill -9 in a tile of a block that workers solve together", worker_fault("tile", 1, "kill"),
        {"samples": 480, "workers": 3},
    ),
    "worker raises": ("an exception in a solve", worker_fault("solve", 2, "raise"), {}),
    "worker hangs": ("a solve that never ends", worker_fault("solve", 2, "hang"), {"call_timeout_s": 15}),
    "node killed": ("kill -9 of every process of a node with two workers", node_killed, {"samples": 480}),
    "node killed, sequential": ("the same in mode `sequential`", node_killed, {"samples": 480, "mode": "sequential"}),
    "node frozen": ("a node that stands still for 12 s and goes on", node_frozen, {"samples": 480}),
    "node joins": ("a node that joins late", node_joins, {"samples": 2400}),
    "driver killed": ("kill -9 of the driver, same command again", driver_killed, {}),
    "driver killed, sequential": ("the same in mode `sequential`", driver_killed, {"mode": "sequential"}),
    CABLE: ("the cable of a node pulled for 15 s and put back", cable_pulled, {"samples": 480}),
    "disk full": ("the run directory's disk fills up and is freed", disk_full, {}),
}  # fmt: skip


def main() -> None:
    """Run every fault, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=list(FAULTS), choices=list(FAULTS), metavar="NAME")
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True)
    torch.set_num_threads(1)
    shape = {**LLAMA, "num_hidden_layers": BLOCKS, "hidden_size": 128, "intermediate_size": 256}
    model = write_checkpoint(out / "source", transformers.LlamaConfig(**shape), shard="500KB")
    expected: dict[tuple, dict[str, str]] = {}

    def undisturbed(mode: str = "blocks", samples: int = 24, **_: object) -> dict[str, str]:
        """Return the hashes of a run in one process that nothing happens to."""
        if (mode, samples) not in expected:
            config, run = write_config(
                out, f"whole-{mode}-{samples}", model, samples, executor="local", workers=1, mode=mode
            )
            command = [sys.executable, "-m", "astro_dist", "quantize", str(config), "--json"]
            subprocess.run(command, check=True, capture_output=True, env={**os.environ, **QUIET}, cwd=ROOT)
            expected[mode, samples] = hashes(run / "model")
        return expected[mode, samples]

    rows: list[str] = []
    failures: list[str] = []

    def suffer(name: str, cluster: Cluster, prefix: list[str]) -> None:
        what, happen, changes = FAULTS[name]
        config, run = write_config(out, name.replace(" ", "-").replace(",", ""), model, **changes)
        job, start = Job(cluster, config, run, prefix), time.monotonic()
        try:
            code = happen(job)
            equal = (run / "model").is_dir() and hashes(run / "model") == undisturbed(**changes)
            failed = [line for line in job.journal() if line["event"] == "failed"]
        finally:
            if run.is_mount():
                subprocess.run(["umount", "--lazy", str(run)], check=True)
        seconds = time.monotonic() - start
        retried = "; ".join(f"{line['kind']} at {line['unit']}, {line['method']}" for line in failed)
        failures.extend([] if equal else [name])
        rows.append(f"| {what} | {code} | {retried or '-'} | {seconds:.0f} | {'yes' if equal else '**no**'} |")
        print(rows[-1], file=sys.stderr, flush=True)

    needs_root = {"disk full", CABLE}
    chosen = [name for name in options.only if name not in needs_root or os.geteuid() == 0]
    ordinary = [name for name in chosen if name != CABLE]
    if ordinary:
        cluster = Cluster(out / "cluster")
        try:
            cluster.start_head()
            for number in (1, 2, 3):
                cluster.start_node(f"w{number}", f"127.0.0.{number + 2}")
            time.sleep(10)
            for name in ordinary:
                suffer(name, cluster, [])
        finally:
            cluster.close()
    if CABLE in chosen:
        with Network(["head", "w1", "w2"]) as network:
            enter = {name: ["ip", "netns", "exec", namespace(name)] for name in network.addresses}
            cluster = Cluster(out / "networked", enter.__getitem__, network.addresses["head"])
            try:
                cluster.start_head()
                for name in ("w1", "w2"):
                    cluster.start_node(name, network.addresses[name])
                time.sleep(12)
                suffer(CABLE, cluster, enter["head"])
            finally:
                cluster.close()
    print("| what was lost | exit code | what was retried | seconds | bytes equal |\n|---|---|---|---|---|")
    print("\n".join(rows))
    sys.exit(f"not the same bytes: {', '.join(failures)}" if failures else 0)


if __name__ == "__main__":
    main()
