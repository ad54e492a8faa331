"""Ask several model folders through vLLM's own engine, one after another in this process; answers as JSON on the last line.

    python tests/ask_vllm.py ASKED.json     # {folder: [[image file, prompt], …]}

One process for all: a server each would import vLLM each time.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1")

from sonovqa import chat, torchvision_ops

torchvision_ops.hide_unloadable("torchcodec")
torchvision_ops.declare()

NEW_TOKENS = 12


def answers(folder: str, asked: list[list[str]]) -> list[str]:
    """vLLM's greedy answers to ``asked``, as its chat API makes prompts."""
    from vllm import LLM, SamplingParams

    engine = LLM(model=folder, enforce_eager=True, dtype="float32", max_model_len=512, limit_mm_per_prompt={"image": 1}, seed=0,
                 generation_config="vllm")  # fmt: skip
    turns = [chat.openai_messages(Path(image).read_bytes(), prompt) for image, prompt in asked]
    made = engine.chat(turns, SamplingParams(temperature=0, max_tokens=NEW_TOKENS), use_tqdm=False)
    return [one.outputs[0].text.strip() for one in made]


def main() -> None:
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda inspect: inspect()  # nothing here needs a process of its own to look at a class
    told = {}
    for folder, asked in json.loads(Path(sys.argv[1]).read_text()).items():
        told[folder] = answers(folder, asked)
        gc.collect()
        cleanup_dist_env_and_memory()
    print(json.dumps(told))


if __name__ == "__main__":
    main()
