#!/usr/bin/env bash
# Gradescope runs this once, while it builds the image of the autograder.
set -euo pipefail
root=${AUTOGRADER:-/autograder}
apt-get update
apt-get install -y python3-venv
python3 -m venv "$root/tools"
"$root/tools/bin/pip" install uv
"$root/tools/bin/uv" venv --python 3.12 "$root/venv"   # fetched, where the image has an older Python
"$root/tools/bin/uv" pip install --python "$root/venv/bin/python" --editable "$root/source"
