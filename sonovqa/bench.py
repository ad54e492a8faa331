"""The project's benchmarks: training, answering, and the endpoint under load. Each writes a record and prints a table.

    python -m sonovqa.bench train --data data/phantoms --model tiny              # shared against separate, raw steps
    python -m sonovqa.bench train --data data/phantoms --model tiny --end-to-end # train.py against the peers' way
    python -m sonovqa.bench answer --help
    python -m sonovqa.bench load --help

A record (outputs/bench/*.json) holds hardware, versions, commit, sizes, settings and rows. It is whole after every row:
stopped by whatever means, the same command goes on after the rows that are there. Benchmarks on one device take turns: they load
and warm up side by side, and wait while one is timed.
"""

from __future__ import annotations

from sonovqa import bench_answer, bench_load, bench_train, cli

BENCHMARKS = {
    "train": (bench_train, "QA pairs a second and peak memory of training"),
    "answer": (bench_answer, "questions a second of answering"),
    "load": (bench_load, "an endpoint under load"),
}


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark that the command line names."""
    parser = cli.Parser(prog="python -m sonovqa.bench", description=__doc__)
    subparsers = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for name, (module, summary) in BENCHMARKS.items():
        module.add_arguments(subparsers.add_parser(name, help=summary, description=module.__doc__))
    args = parser.parse_args(argv)
    return BENCHMARKS[args.benchmark][0].run(args)


if __name__ == "__main__":
    cli.run(main)
