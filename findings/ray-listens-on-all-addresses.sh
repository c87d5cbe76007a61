#!/usr/bin/env bash
# Ray 2.60.0 on Linux: a local cluster (`ray.init(address="local")`) listens on all addresses of the
# machine, whatever `dashboard_host` says. `_node_ip_address="127.0.0.1"` changes nothing: Ray replaces
# it by the machine's own address. Only the variable RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0, which by its
# name is about other systems, makes every process listen on 127.0.0.1 alone. Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --disable-pip-version-check --quiet 'ray[default]==2.60.0' psutil==7.2.2
cat >"$folder/listen.py" <<'PY'
import sys

import psutil
import ray

address = {"_node_ip_address": sys.argv[1]} if len(sys.argv) > 1 else {}
ray.init(address="local", num_cpus=1, dashboard_host="127.0.0.1", logging_level="ERROR", **address)
ray.get(ray.remote(lambda: 1).remote())
me = psutil.Process()
found = {
    connection.laddr.ip.removeprefix("::ffff:")
    for process in [me, *me.children(recursive=True)]
    for connection in process.net_connections("inet")
    if connection.status == "LISTEN"
}
print(*sorted(found))
PY
export RAY_TMPDIR=$folder/r HOME=$folder
mkdir "$RAY_TMPDIR"
listen() { "$folder/venv/bin/python" "$folder/listen.py" "$@" 2>/dev/null | tail -n 1; }
default=$(listen)
node=$(listen 127.0.0.1)
other=$(RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 listen)
echo "by default: $default; with _node_ip_address=127.0.0.1: $node; with the variable: $other"
[[ " $default " == *" :: "* && " $node " == *" :: "* && $other == 127.0.0.1 ]]
