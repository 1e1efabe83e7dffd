#!/usr/bin/env bash
# One command for a run on several hosts; looks at all of them first. Run it on one of them, in the repository:
#
#   launch/multinode.sh --hostfile hosts --launcher pdsh launch/train.py --deepspeed configs/zero2.json ...
#
# PYTHON=... names the interpreter; otherwise that of the active or the repository's virtual environment.
# --help lists all flags, docs/multinode.md says what matters.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -n ${PYTHON:-} ]]; then
  python=$PYTHON
elif [[ -n ${VIRTUAL_ENV:-} ]]; then
  python=$VIRTUAL_ENV/bin/python
elif [[ -x $root/.venv/bin/python ]]; then
  python=$root/.venv/bin/python
else
  python=python3
fi
exec "$python" "$root/launch/cluster/multinode.py" "$@"
