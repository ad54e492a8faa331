"""Which flags of vLLM serve.sh passes on: all but those it sets itself and those that would undo a guard."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from sonovqa.cli import UserError

#: Flags of vLLM that serve.sh sets itself: a second value could open a port without a key, show the key in `ps`, let adapters
#: in that nothing has looked at, or kill vLLM while it answers.
OURS = (
    "--host", "--port", "--model", "--served-model-name", "--config", "--enable-lora", "--lora-modules",
    "--no-enable-tower-connector-lora", "--shutdown-timeout",
)  # fmt: skip
_CODE = ("it runs a program of your own beside the weights and the key", "use a parser that vLLM has by itself")
_TENSORS = ("whoever may ask could send tensors, with which readers of them were broken into before", "send images and text")
_TLS = "put a proxy with TLS before it, see docs/serving.md"
#: Flags of vLLM that would undo a guard or cut serve.sh off from its own server: what they do, and the way out.
REFUSED = {
    "--api-key": ("it would show in every process list", "set it in the environment: export VLLM_API_KEY=…"),
    "--grpc-port": ("it opens a second port that asks nobody for a key", "leave it out"),
    "--root-path": ("under some prefixes vLLM no longer asks for its key", "have the proxy take its prefix off the path"),
    "--ssl-certfile": ("the server is asked without TLS on this machine", _TLS),
    "--ssl-keyfile": ("the server is asked without TLS on this machine", _TLS),
    "--uds": ("the server is asked on a port of this machine", "leave it out; have a proxy listen on the socket"),
    "--trust-remote-code": ("it runs whatever program lies beside the weights", "serve a family that vLLM knows by itself"),
    "--allowed-origins": ("the gate before vLLM would not know them", "name each page before the --: --allow-origin URL"),
    "--allowed-local-media-path": ("whoever may ask could have files of this machine read", "send images in the request"),
    "--middleware": ("it runs code of your own in front of the gate, with every key and image", "have a proxy do it"),
    "--tool-parser-plugin": _CODE,
    "--reasoning-parser-plugin": _CODE,
    "--enable-prompt-embeds": _TENSORS,
    "--enable-mm-embeds": _TENSORS,
    "--kv-events-config": ("it opens a port that tells anybody what was asked", "leave it out; /metrics counts requests"),
    "--load-format": ("other formats than safetensors may run code when they are loaded", "auto and safetensors are allowed"),
}
#: Values with which a refused flag does no harm.
HARMLESS = {"--load-format": ("auto", "safetensors")}
#: Flags of vLLM that a refused one begins with: no abbreviations of it.
WHOLE = ("--reasoning-parser",)


def check(extra: Sequence[str]) -> None:
    """Raise `UserError` for what is no flag of vLLM, and for flags that serve.sh sets itself, abbreviations included."""
    if extra and not extra[0].startswith("-"):
        raise UserError(f"after --; {extra[0]}; flags of `vllm serve` are allowed, the run stands before the --; "
                        "write -- --flag value, see ./serve.sh --help")  # fmt: skip
    for word, after in itertools.pairwise([*extra, ""]):
        name, equals, value = word.partition("=")
        flag = name.partition(".")[0].replace("_", "-")  # --flag.key value is vLLM's way to write one key of a JSON value
        if not flag.startswith("--") or flag in WHOLE:
            continue
        meant = [known for known in (*REFUSED, *OURS) if flag == known or (len(flag) > 3 and known.startswith(flag))]
        if meant and meant[0] in REFUSED:
            if (value if equals else after).lower() in HARMLESS.get(meant[0], ()):
                continue
            why, way_out = REFUSED[meant[0]]
            raise UserError(f"{meant[0]} after --; {why}; {way_out}")
        if meant:
            raise UserError(f"{word} after --; serve.sh sets {meant[0]} itself; give it before the --, see ./serve.sh --help")
