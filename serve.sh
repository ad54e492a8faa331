#!/usr/bin/env bash
# Serve a run behind vLLM's OpenAI-compatible API: merged weights (or --lora: base plus adapter), on this machine
# only unless VLLM_API_KEY is set. Waits until the server is healthy, warms it up, asks it the rows its merge was checked
# on, prints how to ask it, and on Ctrl-C stops it once it has answered what it was asked.
#
#   ./serve.sh outputs/phantoms
#   ./serve.sh outputs/phantoms --lora --port 8001
#   ./serve.sh --adapters A=outputs/a B=outputs/b               # several runs on the base they share
#   export VLLM_API_KEY=$(openssl rand -hex 32)                 # for others: the key that you then give them
#   ./serve.sh outputs/phantoms --host 0.0.0.0
#   ./serve.sh outputs/phantoms --dry-run
#   ./serve.sh outputs/phantoms -- --tensor-parallel-size 4      # any flag of `vllm serve`
#   ./serve.sh --help
#
# What it runs and why is in sonovqa/serving_plan.py. PYTHON chooses another interpreter than .venv's.
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-$here/.venv/bin/python}
[[ -n ${PYTHON:-} || -x $python ]] || python=python3
command -v -- "$python" >/dev/null || {
  echo "error: no such Python; $python; a program or its path is allowed; run make install, or set PYTHON" >&2
  exit 2
}
"$python" -c "import rich" 2>/dev/null || {
  echo "error: $python lacks the project's packages; run make install, or set PYTHON to a Python that has them" >&2
  exit 2
}

# exec: the signals that stop a server reach the process that stops vLLM.
export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m sonovqa.serving "$@"
