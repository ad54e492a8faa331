"""Serve a run behind vLLM's OpenAI-compatible API: what serve.sh runs.

    ./serve.sh outputs/phantoms                                       # merged weights, on this machine only
    ./serve.sh outputs/phantoms --lora                                # base plus adapter
    VLLM_API_KEY=… ./serve.sh outputs/phantoms --host 0.0.0.0         # for others: a key is required
    ./serve.sh outputs/phantoms --dry-run                             # print the command
    ./serve.sh outputs/phantoms --then "python evaluate.py --endpoint http://127.0.0.1:8000/v1 --data data/phantoms"
    ./serve.sh outputs/phantoms -- --tensor-parallel-size 4           # more than one GPU; any flag of `vllm serve`

Which weights, flags and environment, and why: `sonovqa.serving_plan`.
"""

from __future__ import annotations

import contextlib
import errno
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

from sonovqa import chat, choosing, cli, serving_plan
from sonovqa.cli import UserError, console
from sonovqa.serving_plan import Plan

STOP_GRACE = 30  # seconds vLLM gets to end its requests and its processes
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C, `kill`, a terminal or connection that closed
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
    parser.add_argument("run", type=Path, help="a run of train.py, its merged/, or any model folder")
    parser.add_argument("--lora", action="store_true", help="serve the base plus the run's adapter instead of merged weights")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; beyond loopback VLLM_API_KEY must be set")
    parser.add_argument("--port", type=int, default=8000, help="TCP port")
    parser.add_argument("--max-model-len", type=int, help="longest context in tokens (unset: one image and 3,072 of text)")
    parser.add_argument("--device", choices=("auto", "gpu", "cpu"), default="auto", help="auto: by the vLLM that is installed")
    parser.add_argument("--wait", type=float, default=1800.0, help="most seconds until the server must be healthy")
    parser.add_argument("--then", metavar="COMMAND", help="run this once the server is healthy, then stop; gives its exit status")
    parser.add_argument("--dry-run", action="store_true", help="print the command and start nothing")
    args = parser.parse_args(own)
    args.extra = tuple(extra)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    if not (math.isfinite(args.wait) and args.wait > 0):
        raise UserError(f"--wait; {args.wait}; seconds above 0 are allowed; leave it out for 1800")
    plan = serving_plan.make_plan(args.run, args.lora, args.host, args.port, args.device, args.max_model_len, args.extra)
    if args.dry_run:
        print(plan.shown())
        return 0
    if note := choosing.serving_note(args.run):
        console.print(note, markup=False, soft_wrap=True)
    return serve(plan, args.wait, args.then)


def serve(plan: Plan, wait: float, then: str | None = None) -> int:
    """Start a server, wait until it is healthy, and leave it running until a signal comes or ``then`` has run.

    Args:
        wait: most seconds until it must be healthy.
        then: a shell command; ``None``: print how to ask the server and go on until one of `SIGNALS`.

    Returns:
        The exit status of ``then``. A signal ends the program with status 0.

    Raises:
        UserError: if the server cannot be started or ends by itself.
    """
    with stopping_on_signals(), Server(plan) as server:
        server.wait_until_healthy(wait)
        if then:
            return subprocess.call(then, shell=True)
        console.print(greeting(plan), markup=False, soft_wrap=True)
        status = server.process.wait()
    raise UserError(f"vLLM stopped by itself with status {status}; its last words: {last_words(plan.log)}; see {plan.log}")


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
        with open(self.plan.log, "wb") as log:
            # A session of its own: Ctrl-C in the terminal reaches this process only, which then stops vLLM in order.
            self.process = subprocess.Popen(
                self.plan.command, env=os.environ | self.plan.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        self.keeper = subprocess.Popen(
            ["/bin/sh", "-c", KEEPER, "keeper", str(self.process.pid), str(STOP_GRACE)], stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        return self

    def __exit__(self, *fault) -> None:
        """SIGTERM lets vLLM end what it is answering; what is left of its processes after `STOP_GRACE` is killed."""
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_GRACE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
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


@contextlib.contextmanager
def stopping_on_signals():
    """Turn `SIGNALS` into an ordinary end with status 0: whoever starts a server stops it so."""

    def stop(number, frame):
        for each in SIGNALS:  # an impatient second Ctrl-C would leave vLLM behind
            signal.signal(each, signal.SIG_IGN)
        with contextlib.suppress(OSError):  # after SIGHUP there may be no terminal to write to
            console.print("stopping vLLM")
        sys.exit(0)

    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # `nohup ./serve.sh` goes on
            signal.signal(number, stop)
    yield


def greeting(plan: Plan) -> str:
    """A ``curl`` call, a Python call and the terminal conversation, each ready to be pasted."""
    return f"""
curl:
{curl_example(plan)}

Python:
{python_example(plan)}

Conversation in a terminal:
python inference.py --endpoint {plan.url} --endpoint-model {plan.name} --image image.png

{cli.RESEARCH_NOTICE} Ctrl-C stops the server.
"""


def curl_example(plan: Plan) -> str:
    """A question about ``image.png`` with curl; the shell puts in image and key."""
    import json

    messages = chat.openai_messages(b"", chat.prompt_for("Q7", ""))
    body = json.dumps({"model": plan.name, "messages": messages, "max_tokens": 128, "temperature": 0})
    body = body.replace("base64,", "base64,$(base64 < image.png | tr -d '\\n')")
    return f"""curl -sS {plan.url}/chat/completions -d @- \\
  -H 'Content-Type: application/json' -H "Authorization: Bearer $VLLM_API_KEY" <<JSON
{body}
JSON"""


def python_example(plan: Plan) -> str:
    """The same question with the ``openai`` package."""
    system, user = chat.openai_messages(b"", chat.prompt_for("Q7", ""))
    return f"""import base64, os
from openai import OpenAI
client = OpenAI(base_url="{plan.url}", api_key=os.environ.get("VLLM_API_KEY", "none"))
image = "data:image/png;base64," + base64.b64encode(open("image.png", "rb").read()).decode()
answer = client.chat.completions.create(model="{plan.name}", temperature=0, max_tokens=128, messages=[
    {{"role": "system", "content": {system["content"]!r}}},
    {{"role": "user", "content": [{{"type": "image_url", "image_url": {{"url": image}}}},
                                 {{"type": "text", "text": {user["content"][1]["text"]!r}}}]}}])
print(answer.choices[0].message.content)"""


if __name__ == "__main__":
    cli.run(main)
