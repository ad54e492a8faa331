"""vLLM's command line for a run: which weights, which limits, which environment. Nothing here starts anything."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import ipaddress
import math
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sonovqa import (
    cli,
    credentials,
    families,
    files,
    images,
    serving_adapters,
    serving_flags,
    serving_memory,
    serving_origins,
    serving_sockets,
)
from sonovqa.cli import UserError
from sonovqa.serving_adapters import compact

ROOT = Path(__file__).resolve().parents[1]
TEXT_ROOM = 3072  # tokens beside the image: system text, a conversation's history and the answer
UNKNOWN_IMAGE = 4096  # tokens granted an image where the processor's files do not say how many it may take
GRACE = 20  # seconds that requests in flight have to finish when the server is stopped
NO_DOMAIN = "none.invalid"  # RFC 2606: never resolves; a domain list of one that is nobody's switches image URLs off


@dataclass(frozen=True)
class Weights:
    """What is served.

    Attributes:
        name: the model's name in the API; with adapters the base's.
        model: a model folder or hub id.
        adapters: folders of adapters on top of it, by the name each is served under.
        runs: folders of the runs among what is served, by name: their rows are asked once the server is up.
        log_folder: where vLLM's output goes.
    """

    name: str
    model: str
    adapters: Mapping[str, Path]
    runs: Mapping[str, Path]
    log_folder: Path

    @property
    def adapter(self) -> Path | None:
        """The first adapter, whose processor files hold for all; ``None`` for merged weights."""
        return next(iter(self.adapters.values()), None)


@dataclass(frozen=True)
class Plan:
    """A server as it would be started.

    Attributes:
        name: the model's name in the API; of several the first run's.
        command: program and arguments.
        env: what is set in the environment beside what is there; never a key.
        url: base URL of the API, as a client on this machine reaches it.
        log: file that takes vLLM's output.
        weights: what is served; ``None`` where nothing is known of it.
        grace: seconds that requests in flight have to finish at the end.
    """

    name: str
    command: list[str]
    env: dict[str, str]
    host: str
    port: int
    url: str
    log: Path
    weights: Weights | None = field(default=None, compare=False)
    grace: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that answers for a run: those of the adapters, else the model's."""
        return tuple(self.weights.adapters) if self.weights and self.weights.adapters else (self.name,)

    def shown(self) -> str:
        """The command as a shell takes it, one flag a line."""
        lines = []
        for word in self.command[3:]:
            if word.startswith("--"):
                lines.append(word)
            else:
                lines[-1] += " " + shlex.quote(word)
        settings = " ".join(f"{name}={shlex.quote(value)}" for name, value in self.env.items())
        return " \\\n  ".join([f"env {settings}", shlex.join(self.command[:3]), *lines])


def find_weights(run: Path, lora: bool) -> Weights:
    """The weights behind RUN: a run of train.py, its ``merged/``, or any model folder.

    Raises:
        UserError: if there are none, or files that vLLM needs are not beside them.
    """
    from sonovqa import models  # imports torch, which `--help` need not wait for

    if not run.is_dir():
        raise UserError(f"no such folder; {run}; a run of train.py or a model folder; see `ls outputs`")
    is_run = not (run / "config.json").exists()
    home = run if is_run else run.parent if run.name == "merged" else run
    name = home.resolve().name
    if lora:
        adapter = home / "adapter"
        if not (adapter / "adapter_config.json").exists():
            raise UserError(f"--lora; {home} holds no adapter/; it was trained with --full or not by train.py; leave --lora out")
        base = models.locate(serving_adapters.config(adapter)["base_model_name_or_path"])
        return Weights(f"{name}-base", base, {name: adapter.resolve()}, {name: home}, home)
    folder = run / "merged" if is_run else run
    if not folder.is_dir():
        if (run / "merged.unchecked").is_dir():
            raise UserError(f"the merge check of {run} failed, so it has no merged/; run `python -m sonovqa.merging {run}` again")
        raise UserError(f"{run} holds neither merged/ nor config.json; merge it first: python -m sonovqa.merging {run}")
    models.check_folder(folder)
    if not has_chat_template(folder):
        raise UserError(f"{folder} has no chat template; chat_template.jinja is needed; copy that of its base beside the weights")
    return Weights(name, str(folder.resolve()), {}, {name: home} if (home / "merge.json").exists() else {}, home)


def find_adapters(words: Sequence[str]) -> Weights:
    """The base and adapters behind ``--adapters A=outputs/a B=outputs/b``; the base is served under its own name as well.

    Raises:
        UserError: if one of them is no adapter, or they cannot share a server.
    """
    adapters = serving_adapters.named(words)
    base = serving_adapters.base_of(adapters)
    name = Path(base).name
    if name in adapters:
        raise UserError(f"--adapters {name}=…; the base has that name; another for the adapter; such as {name}-tuned=…")
    homes = {name: folder.parent for name, folder in adapters.items()}
    return Weights(name, base, adapters, homes, next(iter(homes.values())))


def has_chat_template(folder: Path) -> bool:
    """Whether vLLM will find a chat template in a model folder: a file of its own, or within the tokenizer's settings."""
    tokenizer = folder / "tokenizer_config.json"
    return (folder / "chat_template.jinja").exists() or (tokenizer.exists() and "chat_template" in files.read_json(tokenizer))


def make_plan(run: Path | None, lora: bool = False, host: str = "127.0.0.1", port: int = 8000, device: str = "auto",
              max_model_len: int | None = None, extra: tuple[str, ...] = (), adapters: Sequence[str] = (),
              log: Path | None = None, grace: int = GRACE, origins: Sequence[str] = ()) -> Plan:  # fmt: skip
    """Put vLLM's command together.

    Args:
        run: see `find_weights`; ``None`` with ``adapters``.
        lora: serve base plus adapter instead of merged weights; both have a name then, the base's is ``<run>-base``.
        device: ``gpu``, ``cpu`` or ``auto``, which goes by the vLLM that is installed.
        max_model_len: longest context in tokens; ``None`` takes one image and `TEXT_ROOM`.
        extra: further flags for vLLM, which win over those chosen here.
        adapters: see `find_adapters`.
        log: file for vLLM's output; ``None``: ``serve-<port>.log`` in the run's folder.
        grace: see `Plan`.
        origins: web pages that may ask from a browser (`serving_origins.checked`).

    Raises:
        UserError: for weights that cannot be served, a host beyond loopback without a key, a port or length that cannot be, or
            flags that are not theirs to give.
    """
    check_host(host)
    check_numbers(port, max_model_len, grace)
    serving_flags.check(extra)
    origins = serving_origins.checked(origins)
    if bool(adapters) == (run is not None) or (adapters and lora):
        raise UserError(
            "a run or --adapters; one of the two; ./serve.sh outputs/a, or ./serve.sh --adapters A=outputs/a B=outputs/b"
        )
    weights = find_adapters(adapters) if adapters else find_weights(run, lora)
    check_family(weights)
    device = installed_device() if device == "auto" else device
    command = [sys.executable, "-m", "sonovqa.vllm_server", "--model", weights.model, "--served-model-name", weights.name]
    command += ["--host", host, "--port", str(port)]
    command += ["--max-model-len", str(max_model_len or context_length(weights))]
    command += ["--limit-mm-per-prompt", compact({"image": 1, "video": 0})]
    command += ["--enable-prefix-caching", "--generation-config", "vllm"]
    command += ["--structured-outputs-config", compact({"backend": "xgrammar", "disable_any_whitespace": True})]
    command += ["--allowed-media-domains", NO_DOMAIN]
    command += ["--middleware", "sonovqa.serving_gate.Gate", "--disable-fastapi-docs"]
    command += ["--shutdown-timeout", str(grace), *serving_origins.flags(origins)]
    if weights.adapters:
        command += serving_adapters.flags(weights.adapters, weights.model, _config(weights.model).get("model_type"))
    env = {"PYTHONPATH": str(ROOT), "VLLM_NO_USAGE_STATS": "1", "VLLM_MAX_IMAGE_PIXELS": str(images.LARGEST_AREA)}
    env |= serving_origins.environment(origins) | serving_sockets.settings(extra)
    if Path(weights.model).is_dir():
        env["HF_HUB_OFFLINE"] = "1"
    if device == "cpu":
        command += ["--enforce-eager", "--dtype", cpu_dtype(weights.model)]
        env["VLLM_CPU_KVCACHE_SPACE"] = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; unset, vLLM takes most of the memory
    log = log or weights.log_folder / f"serve-{port}.log"
    name, url = next(iter(weights.adapters), weights.name), f"http://{address(host)}:{port}/v1"
    return Plan(name, [*command, *extra], env, host, port, url, log, weights, grace)


def context_length(weights: Weights) -> int:
    """Tokens of one image at the pixel budget's upper end plus `TEXT_ROOM`, in whole thousands, within the model's own limit."""
    image = serving_memory.image_tokens(weights.adapter or Path(weights.model), UNKNOWN_IMAGE)
    wanted = math.ceil((image + TEXT_ROOM) / 1024) * 1024
    config = _config(weights.model)
    limit = (config.get("text_config") or config).get("max_position_embeddings")
    return min(wanted, limit) if limit else wanted


def memory_told(plan: Plan) -> str:
    """What fits on this machine, in words (`serving_memory.told`); "" where weights or machine tell nothing."""
    weights = plan.weights
    image = serving_memory.image_tokens(weights.adapter or Path(weights.model), UNKNOWN_IMAGE)
    context = int(plan.command[plan.command.index("--max-model-len") + 1])
    needs = serving_memory.needs_of(weights.model, list(weights.adapters.values()), image, context)
    if needs is None:
        return ""
    if space := plan.env.get("VLLM_CPU_KVCACHE_SPACE"):
        from sonovqa import memory

        return serving_memory.cpu_told(needs, float(space), memory.free(cuda=False))
    gpus = serving_memory.gpus()
    return serving_memory.told(needs, gpus) if gpus else ""


def cpu_dtype(model: str) -> str:
    """``float32`` for weights stored in it, else ``bfloat16``; fp16 is slow on CPUs. From config.json, never from a name."""
    config = _config(model)
    return "float32" if (config.get("dtype") or config.get("torch_dtype")) == "float32" else "bfloat16"


def installed_device() -> str:
    """``cpu`` or ``gpu`` by the vLLM that is installed. Raises `UserError` if there is none."""
    for package in ("vllm-cpu", "vllm"):
        try:
            return "cpu" if "cpu" in f"{package} {importlib.metadata.version(package)}" else "gpu"
        except importlib.metadata.PackageNotFoundError:
            continue
    if importlib.util.find_spec("vllm"):  # copied into place without metadata
        return "gpu"
    raise UserError("vLLM is not installed; none found; pip install -r requirements.txt (GPU) or -r requirements-cpu.txt")


def check_host(host: str) -> None:
    """Raise `UserError` if the server would listen beyond this machine without a key, or with one that keeps nobody out.

    A poor key is refused on loopback too: who sets one has a proxy there, or others on this machine, to keep out.
    """
    key = os.environ.get("VLLM_API_KEY")
    if key and (told := credentials.unfit("VLLM_API_KEY", key)):
        raise UserError(told)
    if not serving_sockets.is_loopback(host) and not key:
        raise UserError(f"a host beyond loopback needs a key; --host {host}; export VLLM_API_KEY=$(openssl rand -hex 32)")


def check_family(weights: Weights) -> None:
    """Raise `UserError` for a family that vLLM does not serve (`families.Family.not_served`)."""
    family = families.of_type(_config(weights.model).get("model_type"))
    if family.not_served:
        way_out = f"ask it without a server: python inference.py --run {next(iter(weights.runs.values()), weights.model)}"
        raise UserError(f"{weights.name}; {family.name} cannot be served: {family.not_served}; {way_out} --image scan.png")


def check_numbers(port: int, max_model_len: int | None, grace: int) -> None:
    """Raise `UserError` for a port, a context length (tokens, ``None``: chosen here) or a grace (seconds) that cannot be."""
    problems = []
    if not 1 <= port <= 65535:
        problems.append(f"--port; {port}; 1 to 65535 is allowed; leave it out for 8000")
    if max_model_len is not None and max_model_len < 1:
        problems.append(f"--max-model-len; {max_model_len}; 1 token or more is allowed; leave it out for one image and its text")
    if grace < 1:
        problems.append(f"--grace; {grace}; 1 second or more is allowed; leave it out for {GRACE}")
    cli.check(problems)


def address(host: str) -> str:
    """Where a client on this machine reaches a server on ``host``, as a URL writes it."""
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return host
    if ip.is_unspecified:  # 0.0.0.0 and :: listen everywhere but are nowhere
        return "127.0.0.1" if ip.version == 4 else "[::1]"
    return host if ip.version == 4 else f"[{host}]"


def _config(model: str) -> dict:
    """A model's config.json: of a folder, or of a hub id through the hub's cache."""
    if Path(model).is_dir():
        return files.read_json(Path(model) / "config.json")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return files.read_json(Path(hf_hub_download(model, "config.json")))
    except (HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError) as fault:
        why = credentials.hub_fault(fault, 200)
        raise UserError(f"the base cannot be had; {model}: {why}; leave --lora out, or run hf download {model}") from None
