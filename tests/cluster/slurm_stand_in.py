"""Stand in for the parts of Slurm that run a batch script: sbatch, srun and scontrol.

Every node is this machine. `install` writes the programs; each is this file under another name.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

KNOWN = ("overlap", "nodes", "ntasks", "nodelist", "exclude", "no-kill", "kill-on-bad-exit", "wait")
MEMORY = {"M": 1, "G": 1024}


def install(folder):
    """Write the programs into a folder that belongs on PATH."""
    for name in ("sbatch", "srun", "scontrol"):
        program = folder / name
        program.write_text(f"#!{sys.executable} -SE\n{Path(__file__).read_text()}")
        program.chmod(0o755)


def options_of(words):
    """Return the leading --name[=value] as a dict, and the remaining words."""
    options = {}
    while words and words[0].startswith("--"):
        name, _, value = words.pop(0)[2:].partition("=")
        options[name] = value
    return options, words


def log_call(*words):
    """Append a call to the log."""
    with Path(os.environ["STAND_IN_LOG"]).open("a") as log:
        log.write(json.dumps(words) + "\n")


def sbatch(words):
    """Run a batch script as Slurm does on the first node: from a copy in another folder."""
    flags, (script, *arguments) = options_of(words)
    inside = re.findall(r"^#SBATCH (--.+)$", Path(script).read_text(), re.MULTILINE)
    options = options_of(inside)[0] | flags
    spooled = Path(os.environ["STAND_IN_SPOOL"]) / "slurm_script"
    shutil.copy(script, spooled)
    number = int(options["nodes"])
    memory = re.fullmatch(r"(\d+)([MG])", options["mem"])
    job_variables = {
        "SLURM_JOB_ID": os.environ.get("STAND_IN_JOB", "71"),
        "SLURM_JOB_NUM_NODES": str(number),
        "SLURM_JOB_NODELIST": f"node[1-{number}]",
        "SLURM_SUBMIT_DIR": str(Path.cwd()),
        "SLURM_CPUS_PER_TASK": options["cpus-per-task"],
        "SLURM_MEM_PER_NODE": str(int(memory[1]) * MEMORY[memory[2]]),
    }
    os.execvpe("bash", ["bash", spooled, *arguments], os.environ | job_variables)


def srun(words):
    """Run a step, whose tasks are processes of this machine and get the signals of the step."""
    options, command = options_of(words)
    assert set(options) <= set(KNOWN), options
    assert options["nodes"] == options["ntasks"]
    number = int(os.environ["SLURM_JOB_NUM_NODES"])
    nodes = [f"node{i + 1}" for i in range(number)]
    if "nodelist" in options:
        nodes = [options["nodelist"]]
    if "exclude" in options:
        nodes.remove(options["exclude"])
    assert len(nodes) == int(options["ntasks"])
    log_call("srun", nodes, command[:4], os.environ.get("SRUN_CPUS_PER_TASK"))
    if len(nodes) == 1:
        os.execvp(command[0], command)
    tasks = []
    signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in tasks])
    tasks += [subprocess.Popen(command) for _ in nodes]
    sys.exit(max(task.wait() for task in tasks))


def scontrol(words):
    """Print the names in a list of nodes."""
    show, hostnames, nodes = words
    assert (show, hostnames) == ("show", "hostnames")
    first, last = map(int, re.fullmatch(r"node\[(\d+)-(\d+)\]", nodes).groups())
    print(*(f"node{i}" for i in range(first, last + 1)), sep="\n", flush=True)


def ray(words):
    """Stand in for Ray: a node waits for its end; a job waits, then exits with the given status.

    The list of nodes holds those that have started, so that a job waits for them as with Ray.
    """
    log_call("ray", *words)
    if words[0] == "start":
        if os.environ.get("STAND_IN_HEAD") == "fails":
            sys.exit(1)
        ports = [int(word.split("=")[1]) for word in words if "--dashboard-port" in word]
        with ExitStack() as stack:
            for port in ports:
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
            time.sleep(60)
    if words[0] == "list":
        calls = map(json.loads, Path(os.environ["STAND_IN_LOG"]).read_text().splitlines())
        print('"node_id"\n' * sum(call[:2] == ["ray", "start"] for call in calls))
    if words[:2] == ["job", "submit"]:
        seconds, status = words[-2:]
        time.sleep(float(seconds))
        sys.exit(int(status))


if __name__ == "__main__":
    {"sbatch": sbatch, "srun": srun, "scontrol": scontrol, "ray": ray}[Path(sys.argv[0]).name](
        sys.argv[1:]
    )
