"""Serve a run behind vLLM's OpenAI-compatible API: what serve.sh runs.

    ./serve.sh outputs/phantoms                                       # merged weights, on this machine only
    ./serve.sh outputs/phantoms --lora                                # base plus adapter
    ./serve.sh --adapters A=outputs/a B=outputs/b                     # several runs on the base they share
    VLLM_API_KEY=… ./serve.sh outputs/phantoms --host 0.0.0.0         # for others: a key is required
    VLLM_API_KEY_FILE=/run/secrets/key ./serve.sh outputs/phantoms --host 0.0.0.0
    ./serve.sh outputs/phantoms --dry-run                             # print the command
    ./serve.sh outputs/phantoms --then "python evaluate.py --endpoint http://127.0.0.1:8000/v1 --data data/phantoms"
    ./serve.sh outputs/phantoms -- --tensor-parallel-size 4           # more than one GPU; any flag of `vllm serve`

Once healthy it is asked a first question, then the rows that its merge was checked on; only then is it ready. Stopped by
SIGINT, SIGTERM or SIGHUP it finishes what it is answering, for at most --grace seconds; a second signal cuts that short.
Which weights, flags and environment, and why: `sonovqa.serving_plan`. For clients: docs/serving.md.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import http.client
import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from sonovqa import choosing, cli, served_check, serving_adapters, serving_examples, serving_plan, weights
from sonovqa.cli import UserError, console
from sonovqa.serving_plan import Plan
from sonovqa.serving_signals import HURRY, held_back, say, stopping_on_signals

END_GRACE = 10  # seconds vLLM gets to end its processes once its requests are answered
#: Ends the server of a process that could not: the kernel closes its input however that process died (kill -9, out of memory).
#: A dead process that nobody has waited for, as in containers without an init, has an id but no open files.
KEEPER = """
read -r _
kill -s TERM "$1"
while [ "$2" -gt 0 ] && [ -L "/proc/$1/fd/0" ]; do sleep 1; set -- "$1" $(($2 - 1)); done
kill -s KILL -- "-$1"
"""


def parse(argv: list[str]):
    """Split off what follows ``--`` for vLLM, then parse the rest."""
    own, extra = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = cli.Parser(prog="./serve.sh", description=__doc__)
    parser.add_argument("run", type=Path, nargs="?", help="a run of train.py, its merged/, or any model folder")
    parser.add_argument("--lora", action="store_true", help="serve the base plus the run's adapter instead of merged weights")
    parser.add_argument(
        "--adapters", nargs="+", default=[], metavar="NAME=RUN", help="serve the adapters of several runs instead"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; beyond loopback VLLM_API_KEY must be set")
    parser.add_argument("--port", type=int, default=8000, help="TCP port")
    parser.add_argument(
        "--allow-origin", action="append", default=[], metavar="URL",
        help="a web page that may ask from a browser, such as https://app.example; once for each (unset: none)",
    )  # fmt: skip
    parser.add_argument("--max-model-len", type=int, help="longest context in tokens (unset: one image and 3,072 of text)")
    parser.add_argument("--device", choices=("auto", "gpu", "cpu"), default="auto", help="auto: by the vLLM that is installed")
    parser.add_argument("--wait", type=float, default=1800.0, help="most seconds until the server must be healthy")
    parser.add_argument(
        "--grace", type=int, default=serving_plan.GRACE, help="seconds requests in flight have to finish at the end"
    )
    parser.add_argument("--check", action=argparse.BooleanOptionalAction, default=True, help="ask the rows of the merge check")
    parser.add_argument("--log", type=Path, metavar="FILE", help="vLLM's output (unset: serve-<port>.log in the run's folder)")
    parser.add_argument("--then", metavar="COMMAND", help="run this once the server is healthy, then stop; gives its exit status")
    parser.add_argument("--dry-run", action="store_true", help="print the command and start nothing")
    args = parser.parse_args(own)
    args.extra = tuple(extra)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    if not (math.isfinite(args.wait) and args.wait > 0):
        raise UserError(f"--wait; {args.wait}; seconds above 0 are allowed; leave it out for 1800")
    take_key()
    plan = serving_plan.make_plan(
        args.run,
        args.lora,
        args.host,
        args.port,
        args.device,
        args.max_model_len,
        args.extra,
        args.adapters,
        args.log,
        args.grace,
        args.allow_origin,
    )
    if told := serving_plan.memory_told(plan):
        cli.stderr.print(told, markup=False)
    if args.dry_run:
        print(plan.shown())
        return 0
    for note in filter(None, map(choosing.serving_note, plan.weights.runs.values() or [args.run])):
        console.print(note, markup=False, soft_wrap=True)
    return serve(plan, args.wait, args.then, args.check)


def take_key() -> None:
    """Put the key of ``VLLM_API_KEY_FILE`` into the environment, unless a key is there. It never stands on a command line.

    Raises:
        UserError: if the file cannot be read or holds no key.
    """
    name = os.environ.get("VLLM_API_KEY_FILE")
    if not name or os.environ.get("VLLM_API_KEY"):
        return
    try:
        key = Path(name).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as fault:
        raise UserError(f"VLLM_API_KEY_FILE; {name} cannot be read: {fault}; a file with the key in it") from None
    if not key or len(key.split()) > 1:
        raise UserError(f"VLLM_API_KEY_FILE; {name} holds no key; one word is allowed; openssl rand -hex 32 > {name}")
    os.environ["VLLM_API_KEY"] = key


def serve(plan: Plan, wait: float, then: str | None = None, check: bool = True) -> int:
    """Start a server, wait until it is healthy, and leave it running until a signal comes or ``then`` has run.

    Args:
        wait: most seconds until it must be healthy.
        then: a shell command; ``None``: print how to ask the server and go on until one of
            `serving_signals.SIGNALS`.
        check: ask the rows of the merge check before it counts as ready.

    Returns:
        The exit status of ``then``. A signal ends the program with status 0.

    Raises:
        UserError: if the server cannot be started, does not answer as its runs did, or ends by itself.
    """
    with stopping_on_signals(), Server(plan) as server:
        server.wait_until_healthy(wait)
        if plan.weights:
            make_ready(plan, check)
        if then:
            return subprocess.call(then, shell=True)
        console.print(serving_examples.greeting(plan), markup=False, soft_wrap=True)
        status = server.process.wait()
    raise UserError(f"vLLM stopped by itself with status {status}; its last words: {last_words(plan.log)}; see {plan.log}")


def make_ready(plan: Plan, check: bool) -> None:
    """See that all of an adapter is in use, warm every model up, and ask it the rows of its merge check.

    Raises:
        UserError: if a model lacks layers, does not answer, or answers otherwise than its run did (`served_check.BOUND`).
    """
    lost = serving_adapters.left_out(plan.log.read_text(errors="replace"), plan.weights.adapters)
    for name, layers in lost.items():
        raise UserError(f"vLLM ignores {len(layers)} layers of {name}; {', '.join(layers[:3])} …; {serving_adapters.MERGED}")
    reach_directly(plan.url)
    for name in plan.names:
        if weights.takes_no_images(plan.weights.model):
            told = f"{name}: takes texts, no images"
        else:
            with console.status(f"first request to {name}"):
                told = f"{name}: first answers after {served_check.warm_up(plan.url, name):.1f} s"
        if check and name in plan.weights.runs:
            with console.status(f"asking {name} the rows of its merge check"):
                told += "; " + answers_as_merged(plan, name)
        console.print(told, markup=False, soft_wrap=True)
    console.print(f"ready: {plan.url}", markup=False, soft_wrap=True)


def answers_as_merged(plan: Plan, name: str) -> str:
    """Ask a run's rows and say how it went; what could not be asked is said as well.

    Raises:
        UserError: if fewer answers than `served_check.BOUND` are those of the merge check.
    """
    found = served_check.check(plan.url, name, plan.weights.runs[name])
    if isinstance(found, str):
        return f"not compared with its merge check: {found}"
    if found.share < served_check.BOUND:
        wanted = f"at least {served_check.BOUND:.0%} are needed"
        raise UserError(
            f"{name} answers otherwise than when it was merged; {found.told()}; {wanted}; see {plan.log}, or --no-check"
        )
    return found.told() + (f" ({served_check.EXPECTED:.0%} and more are usual)" if found.share < served_check.EXPECTED else "")


def reach_directly(url: str) -> None:
    """Have this process ask ``url`` without a proxy: the server is on this machine, and no proxy could reach it."""
    kept = os.environ.get("NO_PROXY") or os.environ.get("no_proxy") or ""
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = ",".join(filter(None, (kept, urlsplit(url).hostname)))


class Server:
    """A vLLM server as a context manager: started on entry, stopped with all its processes on exit or if this process dies.

    Raises:
        UserError: on entry, if the port or the host cannot be had.
    """

    def __init__(self, plan: Plan):
        self.plan, self.process, self.keeper = plan, None, None

    def __enter__(self) -> Server:
        check_port(self.plan.host, self.plan.port)
        self.plan.log.parent.mkdir(parents=True, exist_ok=True)
        try:
            with held_back():
                self._start()
        except BaseException:  # a signal that was held back; or no keeper, for want of memory
            if self.process:
                self.__exit__()
            raise
        return self

    def _start(self) -> None:
        with open(self.plan.log, "wb") as log:
            # A session of its own: Ctrl-C in the terminal reaches this process only, which then stops vLLM in order.
            self.process = subprocess.Popen(
                self.plan.command, env=os.environ | self.plan.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        self.keeper = subprocess.Popen(
            ["/bin/sh", "-c", KEEPER, "keeper", str(self.process.pid), str(self.plan.grace + END_GRACE)], stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def __exit__(self, *fault) -> None:
        """SIGTERM lets vLLM finish what it is answering; what is left of its processes after its grace is killed."""
        open_, started = in_flight(self.plan.url), time.monotonic()
        if open_:
            say(f"requests in flight: {open_}; {self.plan.grace} s to finish, a second Ctrl-C cuts them off")
        self.process.terminate()
        while self.process.poll() is None and time.monotonic() - started < self.plan.grace + END_GRACE and not HURRY.is_set():
            open_ = open_ and in_flight(self.plan.url, open_)
            time.sleep(0.1)
        if open_ and (HURRY.is_set() or time.monotonic() - started >= self.plan.grace):
            say(f"cut off, not finished: {open_}")
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if self.keeper:
            self.keeper.kill()
            self.keeper.wait()
            self.keeper.stdin.close()

    def wait_until_healthy(self, seconds: float) -> float:
        """Wait for ``/health``, showing how long and what vLLM says. Returns the seconds it took.

        Raises:
            UserError: if vLLM ends before it is healthy, or is not after ``seconds``.
        """
        plan, started = self.plan, time.monotonic()
        with console.status(f"starting vLLM for {plan.name}") as status:
            while (waited := time.monotonic() - started) < seconds:
                if self.process.poll() is not None:
                    raise UserError(f"vLLM ended while starting; {last_words(plan.log)}; see {plan.log}")
                if is_healthy(plan.url):
                    told = f"{plan.name} is served at {plan.url} (healthy after {waited:.0f} s; log: {plan.log})"
                    console.print(told, markup=False, soft_wrap=True)
                    return waited
                status.update(f"starting vLLM for {plan.name}: {waited:.0f} s · {tail(plan.log)[-1][:80]}")
                time.sleep(0.5)
        raise UserError(f"vLLM is not healthy after {seconds:.0f} s; {tail(plan.log)[-1]}; see {plan.log}, or raise --wait")


def check_port(host: str, port: int) -> None:
    """Raise `UserError` if ``host:port`` cannot be listened on."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server itself does
            probe.bind((host, port))
    except OSError as fault:
        if fault.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} is in use on {host}; stop what listens there, or try --port {port + 1}") from None
        raise UserError(f"cannot listen on {host}:{port}; {fault.strerror}; give an address of this machine") from None


def is_healthy(url: str) -> bool:
    """Whether the server answers its health check; ``url`` is the API's base URL. Loopback never goes through a proxy."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url.removesuffix("/v1") + "/health", timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


def in_flight(url: str, unknown: int = 0) -> int:
    """Requests that the server is answering or holds in its queue, by its metrics; ``unknown`` where it does not tell."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url.removesuffix("/v1") + "/metrics", timeout=2) as response:
            lines = response.read().decode(errors="replace").splitlines()
    except (urllib.error.URLError, OSError, http.client.HTTPException):
        return unknown
    counted = [line for line in lines if line.startswith(("vllm:num_requests_running{", "vllm:num_requests_waiting{"))]
    return round(sum(float(line.rpartition(" ")[2]) for line in counted))


def tail(log: Path, lines: int = 1) -> list[str]:
    """The last lines of a log that are not blank; one empty line if there are none."""
    with open(log, "rb") as stream:
        stream.seek(max(0, log.stat().st_size - 20_000))
        told = stream.read().decode(errors="replace").splitlines()
    return [line.strip() for line in told if line.strip()][-lines:] or [""]


def last_words(log: Path) -> str:
    """The line of a log that says best why its program ended: the first error of the last traceback's kind, else the end."""
    told = tail(log, 200)
    errors = [line.split(") ", 1)[-1] if line.startswith("(") else line for line in told]
    errors = [line for line in errors if line.split(":")[0].endswith(("Error", "Exception", "error"))]
    return (errors[0] if errors else told[-1])[:300]


if __name__ == "__main__":
    cli.run(main)
