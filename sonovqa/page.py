"""A page for one ultrasound image: the eight answers as they stream, questions of one's own, a report to print, marks to keep.

    python -m sonovqa.page --endpoint http://127.0.0.1:8000/v1                 # then open http://127.0.0.1:8080
    SONOVQA_PAGE_KEY=… python -m sonovqa.page --endpoint http://127.0.0.1:8000/v1 --host 0.0.0.0 \\
        --tls-cert page.crt --tls-key page.key                                 # for others: a key is required

It talks to the endpoint only and loads no model; the endpoint's key is read from VLLM_API_KEY. The run behind it must generate
its answers: of a choice run ("head" in its run.json) the page would show noise, with percentages. Marked answers go to
<marks>/marks.xlsx, at once to a journal beside it and within seconds to minutes to the workbook. Up to the last mark it becomes
a data set by:

    python prepare_dataset.py sheet outputs/marks/marks.xlsx --images outputs/marks/images --out data/marks --group-column Patient
    # without --group-column where no patient code was given; three patients are the least, one a split

While a spreadsheet program has the workbook open, marks wait in the journal; close it, and they follow. Where the program leaves
no lock file beside it, whoever writes last wins: then stop the page first (`sonovqa.marks_book --again` mends what was lost). A
copy for elsewhere is whole once the page has stopped, or after `python -m sonovqa.marks_book outputs/marks/marks.xlsx`.
"""

from __future__ import annotations

import argparse
import os
import resource
import ssl
import sys
from pathlib import Path

from sonovqa import cli, conversation, credentials, serving_plan, serving_sockets
from sonovqa.cli import UserError, console

KEY_NAME = "SONOVQA_PAGE_KEY"
OPEN_FILES = 8192  # sockets; many systems allow a process 1,024 unless it asks
CONNECTIONS = 2048  # beyond these uvicorn answers 503 by itself


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(prog="python -m sonovqa.page", description=__doc__)
    who = parser.add_argument_group("who answers")
    who.add_argument("--endpoint", metavar="URL", required=True, help="OpenAI-compatible server; its key in VLLM_API_KEY")
    who.add_argument("--model", "--endpoint-model", metavar="NAME", help="its name at the endpoint (unset: the only one)")
    who.add_argument("--prompts", metavar="NAME", default="default", help="prompt variant, or one a question: Q7=simple,Q2=short")
    who.add_argument("--max-new-tokens", type=int, default=128, help="an answer's limit in tokens; a report has eight times it")
    who.add_argument("--timeout", type=float, default=120.0, help="seconds the endpoint may take for the next piece of an answer")
    what = parser.add_argument_group("what is shown and kept")
    what.add_argument("--unsure-below", type=float, default=0.5, help="answers of a lower probability are called unsure, 0 to 1")
    what.add_argument("--labels", action=argparse.BooleanOptionalAction, default=True,
                      help="probabilities of the labels of closed questions, by some 40 short requests an image")  # fmt: skip
    what.add_argument("--marks", type=Path, default=Path("outputs/marks"), metavar="DIR", help="marks.xlsx and images/ go here")
    where = parser.add_argument_group("where, and for how many")
    where.add_argument("--host", default="127.0.0.1", help=f"address to listen on; beyond loopback {KEY_NAME} must be set")
    where.add_argument("--port", type=int, default=8080, help="TCP port")
    where.add_argument("--tls-cert", type=Path, metavar="FILE", help="certificate: the page is then reached by https only")
    where.add_argument("--tls-key", type=Path, metavar="FILE", help="its private key")
    where.add_argument("--behind-tls", action="store_true", help="a proxy before the page speaks https: cookies by https only")
    where.add_argument("--largest-file", type=float, default=20.0, metavar="MB", help="of an upload, in megabytes")
    where.add_argument("--at-once", type=int, default=32, help="requests answered at a time; more are told to come again")
    where.add_argument("--in-flight", type=int, default=16, help="most requests open at the endpoint")
    args = parser.parse_args(argv)
    check(args)
    return args


def check(args: argparse.Namespace) -> None:
    """Every problem with the arguments at once, before anything listens.

    Raises:
        UserError: if there is one; also where the page would be open to others without a key.
    """
    found = cli.out_of_range(args, counts=("max_new_tokens", "at_once", "in_flight"), positive=("timeout", "largest_file"))
    if not 0 <= args.unsure_below <= 1:
        found.append(f"--unsure-below; {args.unsure_below}; a probability, 0 to 1; leave it out for 0.5")
    if not 1 <= args.port <= 65535:
        found.append(f"--port; {args.port}; 1 to 65535; leave it out for 8080")
    if bool(args.tls_cert) != bool(args.tls_key):
        found.append("--tls-cert and --tls-key; only one of them; name both files")
    key = os.environ.get(KEY_NAME)
    if key is None and (args.behind_tls or not serving_sockets.is_loopback(args.host)):
        way_out = f"{KEY_NAME}=$(openssl rand -hex 16), and give it to those who may use the page"
        flag = "--behind-tls" if args.behind_tls else f"--host {args.host}"
        found.append(f"{flag}; others could use the page without a key; loopback without a proxy is allowed, or set {way_out}")
    if key is not None and (told := credentials.unfit(KEY_NAME, key)):
        found.append(told)
    cli.check(found)
    if args.tls_cert:
        check_certificate(args.tls_cert, args.tls_key)
    conversation.prompts_line(args.prompts, None)


def check_certificate(certificate: Path, key: Path) -> None:
    """Raise `UserError` if uvicorn could not use the two files."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as fault:
        told = fault.strerror or str(fault)
        raise UserError(f"--tls-cert, --tls-key; {certificate}, {key}: {told}; a PEM certificate and its key") from None


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    import uvicorn

    from sonovqa import serving

    serving.check_port(args.host, args.port)
    allow_many_connections()
    page = make(args)
    console.print(greeting(args), markup=False, soft_wrap=True)
    sys.stdout.flush()
    uvicorn.Server(server_config(args, page)).run()


def make(args: argparse.Namespace):
    """The page of a command line, for `uvicorn` or a test."""
    from sonovqa import page_answers, page_app, page_marks

    options = {"in_flight": args.in_flight, "timeout": args.timeout, "max_new_tokens": args.max_new_tokens}
    options |= {"variant": args.prompts, "labels": args.labels}
    settings = page_app.Settings(
        unsure_below=args.unsure_below, largest_file=int(args.largest_file * 1e6), at_once=args.at_once,
        key=os.environ.get(KEY_NAME), secure=args.behind_tls or args.tls_cert is not None, host=serving_plan.address(args.host),
    )  # fmt: skip
    endpoint = page_answers.PageEndpoint(args.endpoint, args.model, **options)
    return page_app.Page(endpoint, page_marks.MarksSheet(args.marks, args.prompts), settings)


def server_config(args: argparse.Namespace, page):
    """How `uvicorn` serves a page: one process, because the images held and the places taken are its own.

    There is no access log: it would name who looked at what.
    """
    import uvicorn

    from sonovqa import page_guard

    return uvicorn.Config(
        page.application(), host=args.host, port=args.port, http=page_guard.Protocol, ws="none", access_log=False,
        log_level="warning", limit_concurrency=CONNECTIONS, server_header=False, timeout_graceful_shutdown=5,
        ssl_certfile=args.tls_cert, ssl_keyfile=args.tls_key,
    )  # fmt: skip


def allow_many_connections() -> None:
    """Raise this process's limit of open files, as far as the system lets it: a connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def greeting(args: argparse.Namespace) -> str:
    """Where the page is, where marks go, and how they become a data set."""
    host = serving_plan.address(args.host)
    scheme = "https" if args.tls_cert else "http"
    marks = args.marks / "marks.xlsx"
    out = Path("data") / (args.marks.resolve().name or "marks")  # not data/sheet, where the clinic's own set may lie
    lines = [
        f"the page is at {scheme}://{host}:{args.port}, asking {args.endpoint}",
        f"marks go to {marks}; a data set of them: python prepare_dataset.py sheet {marks} --images {args.marks / 'images'} "
        f"--out {out} --group-column Patient (without --group-column where no patient code was given)",
    ]
    if not (args.tls_cert or args.behind_tls or serving_sockets.is_loopback(args.host)):
        lines.append("without --tls-cert images and key travel unencrypted: for a trusted network only, or with --behind-tls")
    return "\n".join([*lines, f"{cli.RESEARCH_NOTICE} Ctrl-C stops the page."])


if __name__ == "__main__":
    cli.run(main, resume="start the page again; marks that were saved are kept")
