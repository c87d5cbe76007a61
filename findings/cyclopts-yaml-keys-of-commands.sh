#!/usr/bin/env bash
# cyclopts 5.5.2 with config.Yaml(use_commands_as_keys=False): a key of the file that has the name of
# any command of the app is ignored without a message, although the called command has a parameter of
# that name. Here the file sets `manifest` and `workers` for the command `extract`. As soon as the app
# also has a command `manifest`, `extract` takes its default for the parameter `manifest` and the
# file's value for `workers`. Data nested under the command's name (use_commands_as_keys=True) is not
# affected. Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --disable-pip-version-check --quiet cyclopts==5.5.2 pyyaml==6.0.3
cd "$folder"
printf 'manifest: cohort.csv\nworkers: 3\n' > run.yaml
"$folder/venv/bin/python" - <<'PY'
from cyclopts import App
from cyclopts.config import Yaml


def call_extract(*, with_command: bool) -> tuple[str, int]:
    app = App(config=Yaml("run.yaml", use_commands_as_keys=False), result_action="return_value")

    @app.command
    def extract(*, manifest: str = "default.csv", workers: int = 1) -> tuple[str, int]:
        return manifest, workers

    if with_command:

        @app.command
        def manifest() -> None:
            """Write a manifest."""

    return app(["extract"])


alone, next_to_it = call_extract(with_command=False), call_extract(with_command=True)
print("without a command `manifest`:", alone)
print("with a command `manifest`:   ", next_to_it)
assert alone == ("cohort.csv", 3)
assert next_to_it == ("default.csv", 3), "the key is no longer ignored"
PY
