"""An OpenAI-compatible endpoint under load: so many users at once, each asking one question after another.

    python -m sonovqa.bench load --endpoint http://127.0.0.1:8000/v1 --users 1 4 16 --requests 128 --data data/phantoms
    python -m sonovqa.bench load --endpoint URL --users 64 --order image-first question-first --caches both image none
    python -m sonovqa.bench load --endpoint URL --api-key-env MY_KEY --model NAME --users 8

Every user waits for an answer before asking on. Questions and images are mixed at random (--mix images: an image's
eight questions follow one another). Failed requests are tried again as evaluation does, and counted by kind.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

from sonovqa import (
    bench_caches,
    bench_crowd,
    bench_images,
    bench_records,
    bench_turns,
    cli,
    endpoint_cost,
    evaluation_flags,
    files,
)
from sonovqa.bench_caches import BOTH, KEPT
from sonovqa.bench_crowd import MIXES, Level
from sonovqa.bench_streaming import ORDERS, Users
from sonovqa.cli import UserError, console

MOST_USERS = 1000  # connections that the openai client opens at most
SETTINGS = ("new_tokens", "ignore_eos", "requests", "mix", "stream", "timeout", "retries", "seed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``bench load``."""
    flag = argparse.BooleanOptionalAction
    where = parser.add_argument_group("endpoint")
    where.add_argument("--endpoint", required=True, metavar="URL", help="OpenAI-compatible server")
    where.add_argument("--model", metavar="NAME", help="its name there (unset: the only one)")
    evaluation_flags.add_elsewhere(where)
    where.add_argument("--label", metavar="TEXT", help='what the record calls it, such as "4 API servers" (unset: model and URL)')
    where.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS", help="most time for one try")
    where.add_argument("--retries", type=int, default=5, help="further tries after a passing fault")
    load = parser.add_argument_group("load")
    load.add_argument("--users", nargs="+", type=int, required=True, metavar="N", help="users at once, one level after another")
    load.add_argument("--clients", type=int, default=1, metavar="N", help="processes the users are spread over")
    load.add_argument("--requests", type=int, metavar="M", help="of a level, all users together (unset: each question once)")
    load.add_argument("--order", nargs="+", choices=ORDERS, default=[ORDERS[0]], help="what comes first in a prompt")
    load.add_argument("--caches", nargs="+", choices=KEPT, default=[BOTH], help="which of vLLM's two caches may help")
    load.add_argument("--mix", choices=MIXES, default="questions", help="drawn at random: questions, or images with all theirs")
    load.add_argument("--new-tokens", type=int, default=32, help="most tokens of an answer")
    load.add_argument("--ignore-eos", action=flag, default=False, help="exactly --new-tokens an answer (vLLM only)")
    load.add_argument("--stream", action=flag, default=True, help="stream answers and time the first token")
    bench_images.add_arguments(parser)
    load.add_argument("--record", type=Path, default=Path("outputs/bench/load.json"), help="JSON file of all rows, added to")


def run(args: argparse.Namespace) -> int:
    """Measure every level, writing and printing rows as they come; 1 if no request of any level was answered.

    Raises:
        UserError: for arguments that do not go together, an endpoint that cannot be had, or a record of other settings.
    """
    args.requests = args.rows * len(bench_images.PROMPTS) if args.requests is None else args.requests
    check(args)
    images = {name: getattr(args, name) for name in ("data", "split", "rows", "size", "seed")}
    requests = bench_images.make(**images)
    agree(requests, args)
    client = Users(args.endpoint, args.model, key_env=args.api_key_env)
    client.check()
    known = bench_caches.is_vllm(client.base_url, client.key_names)
    if (args.ignore_eos or args.caches != [BOTH]) and not known:
        raise UserError(f"--ignore-eos and --caches; the server at {client.base_url} is not vLLM, which alone knows them; "
                        "leave them out")  # fmt: skip
    about = bench_images.described(requests)
    settings = {name: getattr(args, name) for name in SETTINGS}
    bench_records.start(args.record, "load", settings, about)
    title = bench_images.in_words(about, args.new_tokens, args.ignore_eos)
    console.print(f"{client.name}: {title}; {args.requests} requests a level", markup=False, soft_wrap=True)
    if (again := args.requests / (about["images"] * about["questions"])) > 1:
        console.print(f"every question is asked {again:.1f} times a level, which caches make cheap: raise --rows")
    for order, kept, users in itertools.product(args.order, args.caches, args.users):
        row = {"server": args.label or client.name, "order": order, "caches": kept, "users": users, "clients": args.clients}
        if any(done["answered"] and row == {key: done[key] for key in row} for done in bench_records.rows(args.record)):
            continue
        endpoint = {"base_url": args.endpoint, "model": client.model, "timeout": args.timeout, "retries": args.retries,
                    "key_env": args.api_key_env, "stream": args.stream, "kept": kept, "ignore_eos": args.ignore_eos,
                    "vllm": known}  # fmt: skip
        level = Level(endpoint, images, order, args.mix, users, args.requests, args.clients, args.new_tokens)
        with bench_turns.alone():
            row |= bench_crowd.measure(level)
        bench_records.add(args.record, row | {"vllm": bench_caches.version(client.base_url, client.key_names) if known else None})
        console.print(line(row), markup=False, soft_wrap=True)
    found = bench_records.rows(args.record)
    bench_records.show(title, found, COLUMNS)
    files.write_text(args.record.with_suffix(".md"), bench_records.markdown(found, COLUMNS))
    console.print(f"written: {args.record}", soft_wrap=True)
    return 0 if any(row["answered"] for row in found) else 1


def agree(requests: list, args: argparse.Namespace) -> None:
    """`endpoint_cost.consent` to all levels, warm-ups aside: how many of them the record holds is not known yet."""
    levels = len(args.order) * len(args.caches) * len(args.users)
    often = levels * args.requests / sum(len(request.prompts) for request in requests)
    endpoint_cost.consent(args, endpoint_cost.of_requests(requests, args.new_tokens, often), "; a warm-up a level besides")


def check(args: argparse.Namespace) -> None:
    """Every problem with the arguments at once. Raises `UserError`."""
    problems = cli.out_of_range(args, ("requests", "new_tokens", "rows", "timeout", "clients"),
                                ("retries", "price_input", "price_output"))  # fmt: skip
    problems += [f"--users; {n}; 1 to {MOST_USERS} is allowed" for n in args.users if not 1 <= n <= MOST_USERS]
    problems += [f"--clients {args.clients} are more than --users {n}; one user each at least; lower --clients"
                 for n in args.users if n < args.clients]  # fmt: skip
    problems += [f"--requests {args.requests} are fewer than --users {n}: some would never ask; raise --requests"
                 for n in args.users if args.requests < n <= MOST_USERS]  # fmt: skip
    cli.check(problems)


def _quantiles(told: dict | None) -> str:
    return "/".join(f"{told[name]:.3g}" for name in ("median", "p95", "p99")) if told else "–"


def _kinds(told: dict[str, int]) -> str:
    return ", ".join(f"{times} x {kind}" for kind, times in told.items()) or "0"


COLUMNS: bench_records.Columns = {
    "server": lambda row: row["server"] + (f", vLLM {row['vllm']}" if row.get("vllm") else ""),
    "order": lambda row: row["order"],
    "caches": lambda row: row["caches"],
    "users": lambda row: str(row["users"]) + (f" in {row['clients']} clients" if row["clients"] > 1 else ""),
    "answers/s": lambda row: f"{row['answers_per_second']:.2f}",
    "tokens/s": lambda row: "–" if row["tokens_per_second"] is None else f"{row['tokens_per_second']:.1f}",
    "s: p50/p95/p99": lambda row: _quantiles(row["seconds"]),
    "first token s: p50/p95/p99": lambda row: _quantiles(row["first_token"]),
    "hits: prefix/image": lambda row: "/".join("–" if rate is None else f"{rate:.0%}" for rate in row["cache_hits"].values()),
    "failed": lambda row: _kinds(row["errors"]),
    "retries": lambda row: _kinds(row["retries"]),
    "client CPU": lambda row: f"{row['client_cpu']:.0%}",
}


def line(row: dict) -> str:
    """A row as it is printed while others are still to come."""
    return " · ".join(f"{name} {cell(row)}" for name, cell in COLUMNS.items())
