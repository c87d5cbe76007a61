"""A Ray cluster of several hosts on one machine: each a network namespace with its own address.

Needs root and iproute2. A host is lost by killing all that runs in its namespace; its network is
cut by taking its link down. All hosts share the machine's disks, as nodes do that mount one file
system.
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

PORT, DASHBOARD = 6379, 8265
HEAD = 0
MEBIBYTE = 2**20


def why_not():
    """Return why there can be no hosts here, or None."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "hosts are network namespaces, which only root may make"
    if shutil.which("ip") is None:
        return "hosts are network namespaces: iproute2 (the command ip) is needed"
    made = subprocess.run(["ip", "netns", "add", "scellst-probe"], capture_output=True, check=False)
    if made.returncode:
        return f"no network namespaces here: {made.stderr.decode().strip()}"
    subprocess.run(["ip", "netns", "delete", "scellst-probe"], check=True)
    return None


class Network:
    """What connects the hosts with each other and with this process; a context manager.

    Attributes:
        gateway: Address by which hosts reach this process, its S3 server for instance.
    """

    def __init__(self):
        self.name = f"scl{os.getpid() % 100_000}"
        self.prefix = f"198.18.{os.getpid() % 250}"
        self.gateway = f"{self.prefix}.1"

    def __enter__(self):
        ip("link", "add", self.name, "type", "bridge")
        ip("address", "add", f"{self.gateway}/24", "dev", self.name)
        ip("link", "set", self.name, "up")
        return self

    def __exit__(self, *_):
        ip("link", "delete", self.name)


class Hosts:
    """A head, which takes no work, and hosts that do; a context manager.

    Attributes:
        environment: Environment of every process on a host.
        folder: Folder of logs, the token and files of Ray.
    """

    def __init__(
        self,
        network,
        num=2,
        num_cpus=2,
        num_gpus=0,
        store_mib=100,
        *,
        quick_health=False,
        environment=None,
    ):
        """Describe the cluster.

        Args:
            network: What connects them; variables of this process, such as those that tell where
                S3 is, are the hosts' too.
            num: Number of hosts that work.
            num_cpus: CPUs that Ray counts on each.
            num_gpus: GPUs that Ray counts on each; there are none.
            store_mib: Size of each object store in MiB.
            quick_health: Whether a host that does not answer for three seconds is given up.
            environment: More variables of the hosts' processes.
        """
        self.network = network
        self.num, self.num_cpus, self.num_gpus, self.store_mib = num, num_cpus, num_gpus, store_mib
        # Short: sockets lie in it.
        self.folder = Path(tempfile.mkdtemp(prefix="scl"))
        (self.folder / "token").write_text(secrets.token_hex(32))
        self.environment = {
            k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYTEST_"))
        }
        self.environment |= {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / "token"),
            "RAY_TMPDIR": str(self.folder),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
        }
        if quick_health:
            names = ("period_ms", "timeout_ms", "initial_delay_ms")
            self.environment |= {f"RAY_health_check_{name}": "1000" for name in names}
            self.environment["RAY_health_check_failure_threshold"] = "3"
        self.environment |= environment or {}
        self.started = {}

    def __enter__(self):
        try:
            for host in range(self.num + 1):
                self._make(host)
                # One after another: they share a folder, in which each looks for free names.
                self.start(host)
                self.wait_for(host + 1)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for host in range(self.num + 1):
            with suppress(subprocess.CalledProcessError):
                self.kill(host)
            for kind, name in (("netns", self.space(host)), ("link", self.link(host))):
                with suppress(subprocess.CalledProcessError):
                    ip(kind, "delete", name)
        shutil.rmtree(self.folder)

    def space(self, host):
        """Return the name of a host's namespace."""
        return f"{self.network.name}-{host}"

    link = space  # and of its link to the others

    def address(self, host):
        """Return a host's address."""
        return f"{self.network.prefix}.{10 + host}"

    def _make(self, host):
        space, inner = self.space(host), f"{self.network.name}i{host}"
        ip("netns", "add", space)
        ip("link", "add", self.link(host), "type", "veth", "peer", "name", inner)
        ip("link", "set", inner, "netns", space)
        ip("link", "set", self.link(host), "master", self.network.name, "up")
        for words in (
            ("address", "add", f"{self.address(host)}/24", "dev", inner),
            ("link", "set", inner, "up"),
            ("link", "set", "lo", "up"),
        ):
            ip("-n", space, *words)

    def start(self, host, before="", environment=None):
        """Start Ray on a host that has none.

        Args:
            host: Number of the host.
            before: Shell commands of its own mount namespace, run first.
            environment: Variables of this host's processes.
        """
        words = ["ray", "start", "--block", "--disable-usage-stats"]
        words += [f"--node-ip-address={self.address(host)}"]
        words += [f"--object-store-memory={self.store_mib * MEBIBYTE}"]
        if host == HEAD:
            words += ["--head", f"--port={PORT}", "--num-cpus=0", f"--temp-dir={self.folder}/ray"]
            words += [f"--dashboard-host={self.address(HEAD)}", f"--dashboard-port={DASHBOARD}"]
        else:
            words += [f"--address={self.address(HEAD)}:{PORT}", f"--num-cpus={self.num_cpus}"]
            words += [f"--num-gpus={self.num_gpus}", f"--memory={4 * 1024 * MEBIBYTE}"]
        script = f"{before}\nexec " + " ".join(words)
        with (self.folder / f"host{host}.log").open("ab") as log:
            self.started[host] = subprocess.Popen(
                ["ip", "netns", "exec", self.space(host), "bash", "-ec", script],
                env=self.environment | (environment or {}),
                stdout=log,
                stderr=log,
            )

    @property
    def api(self):
        """Address of the dashboard and the job server."""
        return f"http://{self.address(HEAD)}:{DASHBOARD}"

    def popen(self, command, host=HEAD, **more):
        """Start a command on a host, connected to the cluster."""
        environment = self.environment | {"RAY_ADDRESS": f"{self.address(HEAD)}:{PORT}"}
        environment |= more.pop("environment", {})
        return subprocess.Popen(
            ["ip", "netns", "exec", self.space(host), *map(str, command)], env=environment, **more
        )

    def processes(self, host):
        """Return all processes on a host."""
        listing = subprocess.run(
            ["ip", "netns", "pids", self.space(host)], capture_output=True, text=True, check=True
        )
        found = []
        for pid in map(int, listing.stdout.split()):
            with suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(pid))
        return found

    def titled(self, host, title):
        """Return the processes on a host whose command line has these words."""
        found = []
        for process in self.processes(host):
            with suppress(psutil.NoSuchProcess):
                if title in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def kill(self, host):
        """End all that runs on a host, at once."""
        while processes := self.processes(host):
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
            time.sleep(0.05)
        if host in self.started:
            self.started.pop(host).wait()

    def cut(self, host):
        """Take a host off the network."""
        ip("link", "set", self.link(host), "down")

    def join(self, host):
        """Put a host back on the network."""
        ip("link", "set", self.link(host), "up")

    def num_alive(self):
        """Return the number of hosts that Ray counts."""
        command = [sys.executable, "-c", COUNT, f"{self.address(HEAD)}:{PORT}"]
        running = self.popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        output, _ = running.communicate(timeout=60)
        return int(output) if running.returncode == 0 else 0

    def wait_for(self, num, timeout_s=120):
        """Wait until Ray counts this number of hosts."""
        deadline = time.monotonic() + timeout_s
        while (found := self.num_alive()) != num:
            if time.monotonic() > deadline:
                logs = "\n".join(path.read_text() for path in self.folder.glob("host*.log"))
                message = f"{found} hosts in {timeout_s} s, not {num}:\n{logs}"
                raise TimeoutError(message)
            time.sleep(0.5)


COUNT = """
import sys
from ray._raylet import GcsClient
client = GcsClient(address=sys.argv[1])
print(sum(info.state == 0 for info in client.get_all_node_info().values()))
"""


def ip(*words):
    """Run `ip`."""
    subprocess.run(["ip", *words], check=True, capture_output=True)
