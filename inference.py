"""Talk with a model about one ultrasound image, in the terminal.

    python inference.py --run outputs/phantoms --image scan.png              # a conversation; /help lists what it takes
    python inference.py --endpoint http://127.0.0.1:8000/v1 --image scan.png
    python inference.py --run outputs/phantoms --image scan.png --question Q7 --json
    python inference.py --endpoint http://127.0.0.1:8000/v1 --data data/demo --question "Which side is up?"
    python inference.py --run outputs/phantoms --folder scans --out scans.xlsx      # a sheet of answers; resumable

One question and out: --question takes Q1 … Q8, all, report, or any text. A key for the endpoint is read from VLLM_API_KEY.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from sonovqa import cli, conversation, evaluation_flags
from sonovqa.cli import RESEARCH_NOTICE, UserError, console
from sonovqa.conversation import Conversation, Picture
from sonovqa.engines import EngineError
from sonovqa.likeness import likeness
from sonovqa.questions import QUESTIONS, REPORT_ID

HELP = """\
/image PATH    talk about this image
/q 7           ask Q7; /q lists the eight questions
/all           ask all eight
/report        ask for the combined report
/forget        forget what was said about this image
/help          this list
/quit          leave (or Ctrl-D)
Anything else is asked as it stands, with what was said before."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__)
    who = parser.add_argument_group("who answers")
    who.add_argument("--run", metavar="RUN_OR_MODEL", help="outputs/<run>, a model folder, a hub id or tiny")
    who.add_argument("--adapter", action="store_true", help="the run's base with its adapter instead of its merged weights")
    who.add_argument("--bits", type=int, choices=(4, 8, 16), default=16, help="precision a local model is loaded in")
    who.add_argument("--endpoint", metavar="URL", help="OpenAI-compatible server instead; key in VLLM_API_KEY")
    who.add_argument("--model", "--endpoint-model", metavar="NAME", help="its name at the endpoint (unset: the only one)")
    who.add_argument("--head", type=Path, metavar="RUN", help="the choice run that the endpoint serves: answer by its labels")
    evaluation_flags.add_elsewhere(who)
    what = parser.add_argument_group("what is asked")
    what.add_argument("--image", metavar="FILE", help="an image file; with --data an image_id (unset: the first)")
    what.add_argument("--data", type=Path, metavar="DIR", help="take the image from a prepared set's test split")
    what.add_argument("--context", help='line that belongs to the image: "Pixel size: 0.0897 mm" (unset: the set\'s)')
    what.add_argument("--question", help="ask this once and leave: Q1 … Q8, all, report, or any text")
    what.add_argument("--prompts", metavar="NAME", help="prompt variant, or one a question: Q7=simple,Q2=short (unset: its own)")
    what.add_argument("--max-new-tokens", type=int, default=128, help="an answer's limit in tokens; a report has eight times it")
    what.add_argument("--json", action="store_true", help="with --question: print the answer as JSON")
    many = parser.add_argument_group("a folder of images")
    many.add_argument("--folder", type=Path, metavar="DIR", help="ask Q1 … Q8 about every image below DIR and fill a sheet")
    many.add_argument("--out", type=Path, metavar="FILE.xlsx", help="the sheet; the same command goes on where it stopped")
    many.add_argument("--batch-images", type=int, default=8, help="images answered together by a local model")
    args = parser.parse_args(argv)
    check(args)
    args.prompts = conversation.prompts_line(args.prompts, args.run or args.head, "all" if args.folder else args.question)
    return args


def check(args: argparse.Namespace) -> None:
    """Every problem with the arguments at once, before anything is loaded."""
    asked, run = args.question is not None, args.run
    has_adapter = run and any((Path(run) / at / "adapter_config.json").exists() for at in ("adapter", "../adapter"))
    found = {
        "nobody, or two, to answer; name either --run RUN_OR_MODEL or --endpoint URL": bool(run) == bool(args.endpoint),
        f"--model is a name at an endpoint; {args.model!r}; name a local one with --run": args.model and not args.endpoint,
        f"--adapter; {run or 'an endpoint'} has none; only a run's folder has; leave it out": args.adapter and not has_adapter,
        f"--bits {args.bits}; an endpoint has its own; only with --run; leave it out": args.bits != 16 and args.endpoint,
        "--json; there is no question; one with --question": args.json and not asked,
        "--question; there is no image; one with --image FILE or --data DIR": asked
        and not (args.image or args.data or conversation.is_of_texts(run or args.head)),
        f"--head {args.head}; it is for --endpoint; a local run knows its own; leave it out": args.head and not args.endpoint,
        conversation.problem_of_folder(run or args.head): args.folder,
        conversation.problem_of_question(args.question or ""): asked,
        "--folder and --out; only one of them; name both: --folder DIR --out FILE.xlsx": bool(args.folder) != bool(args.out),
        "--folder asks Q1 … Q8; leave out --image, --data and --question": args.folder and (args.image or args.data or asked),
        f"--max-new-tokens; {args.max_new_tokens}; 1 or more is allowed; leave it out for 128": args.max_new_tokens < 1,
        f"--batch-images; {args.batch_images}; 1 or more is allowed; leave it out for 8": args.batch_images < 1,
    }
    cli.check([problem for problem, holds in found.items() if problem and holds])


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.folder:
        fill_sheet(args)
        return
    picture = first_picture(args)
    talk = Conversation(answerer(args), args.prompts, args.max_new_tokens)
    if picture:
        talk.look_at(picture)
    if args.question:
        answer_once(talk, args.question, args.json)
        return
    console.print(Panel(f"{talk.answerer.name}\n{RESEARCH_NOTICE}", title="SonoVQA", border_style="cyan"))
    if picture and picture.data:
        show_picture(picture)
    console.print(HELP, style="dim", markup=False)
    converse(talk, args.context)


def fill_sheet(args: argparse.Namespace) -> None:
    from sonovqa import folder_sheet

    options = args.prompts, args.max_new_tokens, args.context
    folder_sheet.check(args)  # before a model is loaded
    told = folder_sheet.fill(args.folder, args.out, answerer(args).engine(), *options)
    console.print("{images} images: {answered} answered, {failed} failed (why: column Status)".format(**told))
    console.print(f"{args.out}\n{RESEARCH_NOTICE}", markup=False, soft_wrap=True)


def first_picture(args: argparse.Namespace) -> Picture | None:
    """The image of the command line, checked before a model is loaded."""
    if conversation.is_of_texts(args.run or args.head):
        return conversation.NO_PICTURE
    if args.data:
        return conversation.picture_of_set(args.data, args.image, context=args.context)
    return conversation.read_picture(Path(args.image), args.context) if args.image else None


def answerer(args: argparse.Namespace) -> conversation.Answerer:
    if args.endpoint:
        return conversation.EndpointAnswerer(args.endpoint, args.model, args.head, args.api_key_env)
    with cli.stderr.status(f"loading {args.run}"):
        return conversation.LocalAnswerer(args.run, args.bits, args.adapter, conversation.batch_of(args))


def answer_once(talk: Conversation, question: str, as_json: bool) -> None:
    """One-shot: the answer, or all eight, on standard output; the notice on standard error, or within the JSON.

    Raises:
        UserError: if the engine could not answer. Nothing that looks like an answer is printed then.
    """
    ids = list(QUESTIONS) if question.strip().lower() == "all" else [conversation.question_id_of(question)]
    answers = []
    for question_id in ids:
        try:
            text = "".join(talk.ask_standard(question_id) if question_id else talk.ask(question)).strip()
        except EngineError as fault:
            raise UserError(f"no answer; {fault}") from fault
        told = {"probabilities": talk.probabilities} if talk.probabilities else {}
        answers.append({"question_id": question_id, "question": talk.history[-2], "answer": text} | told)
    if as_json:
        told = {"image": talk.picture.name, "model": talk.answerer.name, "answers": answers, "notice": RESEARCH_NOTICE}
        print(json.dumps(told, indent=2, ensure_ascii=False))
        return
    for answer in answers:
        text = answer["answer"] + conversation.chances(answer.get("probabilities"))
        print(f"{answer['question_id']}: {text}" if len(answers) > 1 else text)
    cli.stderr.print(RESEARCH_NOTICE, style="dim")


def converse(talk: Conversation, context: str | None) -> None:
    """Read lines until the end of input; a mistake or a fault is told in one line and the conversation goes on."""
    if sys.stdin.isatty():
        import readline  # noqa: F401 - gives input() editing and a history
    while (line := next_line()) is not None:
        try:
            if not step(talk, line, context):
                return
        except (UserError, EngineError) as fault:
            console.print(f"error: {fault}", style="red", markup=False, soft_wrap=True)
        except KeyboardInterrupt:
            console.print("\nstopped; ask on, or /quit", style="yellow")


def next_line() -> str | None:
    """The next line typed; ``None`` at the end of input or after Ctrl-C at the prompt."""
    try:
        return input("\n> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        console.print()
        return None


def step(talk: Conversation, line: str, context: str | None) -> bool:
    """Do what one line says; false if it says to leave.

    Raises:
        UserError: for what cannot be done; `EngineError` if there is no answer.
    """
    command, _, rest = line.partition(" ")
    rest = rest.strip()
    if not line.startswith("/"):
        if line:
            show_stream(line, talk.ask(line), talk)
    elif command == "/quit":
        return False
    elif command == "/help":
        console.print(HELP, markup=False)
    elif command == "/image":
        talk.look_at(conversation.read_picture(path_of(rest), context))
        show_picture(talk.picture)
    elif command == "/q":
        ask_numbered(talk, rest)
    elif command == "/all":
        show_all(talk)
    elif command == "/report":
        show_stream("Combined report", talk.ask_standard(REPORT_ID), talk)
    elif command == "/forget":
        talk.history.clear()
        console.print("forgotten", style="dim")
    else:
        raise UserError(f"unknown command {command}; /image, /q, /all, /report, /forget, /help and /quit are known")
    return True


def path_of(text: str) -> Path:
    """A path as typed or dropped into a terminal: quoted, with escaped spaces, or plain with spaces in it."""
    if not text:
        raise UserError("/image; no path; such as /image scans/femur 1.png")
    try:
        words = shlex.split(text)
    except ValueError:  # a lone quote: part of the name
        words = []
    return Path(words[0] if len(words) == 1 else text)


def ask_numbered(talk: Conversation, text: str) -> None:
    question_id = conversation.question_id_of(text, allow_number=True)
    if text and question_id is None:
        raise UserError(f"/q; there is no question {text!r}; 1 to 8 are allowed; /q lists them")
    if question_id is None:
        for question in QUESTIONS.values():
            console.print(f"{question.id}  {question.title}", markup=False)
        return
    title = QUESTIONS[question_id].title if question_id in QUESTIONS else "Combined report"
    show_stream(f"{question_id} · {title}", talk.ask_standard(question_id), talk)


def show_stream(title: str, pieces: Iterator[str], talk: Conversation) -> None:
    """An answer as it comes, its last lines where it outgrows the terminal; then, or after Ctrl-C, the whole of it, behind it
    the probabilities of its labels where a choice head gave it."""
    with console.status("asking"):
        text = Text(next(pieces, ""))
    with Live(console=console, refresh_per_second=12, transient=True) as live:
        try:
            for piece in pieces:
                text.append(piece)
                last = text.wrap(console, console.width - 4)[-max(1, console.height - 4) :]
                live.update(answer_panel(title, Text("\n").join(last)))
        finally:
            live.update(Text(""))
            console.print(answer_panel(title, text.append(conversation.chances(talk.probabilities))))


def answer_panel(title: str, text: Text) -> Panel:
    return Panel(text, title=Text(title[:70]), title_align="left", border_style="green")


def show_all(talk: Conversation) -> None:
    """The eight answers in a table that fills in as they stream."""
    answers = dict.fromkeys(QUESTIONS, "")
    with Live(answer_table(answers), console=console, refresh_per_second=12, transient=True) as live:
        try:
            for question_id in QUESTIONS:
                for piece in talk.ask_standard(question_id):
                    answers[question_id] += piece
                    live.update(answer_table(answers))
        finally:
            live.update(Text(""))
            console.print(answer_table(answers))


def answer_table(answers: dict[str, str]) -> Table:
    table = Table(show_lines=False, header_style="bold", expand=True)
    table.add_column("", style="cyan", no_wrap=True)
    table.add_column("Question", ratio=2)
    table.add_column("Answer", ratio=5)
    for question_id, answer in answers.items():
        table.add_row(question_id, QUESTIONS[question_id].title, Text(answer.strip()))
    return table


def show_picture(picture: Picture) -> None:
    """A small likeness of the image, so that nobody asks about the wrong one, beside its name and size."""
    from sonovqa import chat

    image = chat.open_image(picture.data)
    about = Text.assemble((picture.name, "bold"), f"\n{image.width} x {image.height} pixels\n{picture.context or ''}")
    grid = Table.grid(padding=(0, 2))
    grid.add_row(likeness(image) if console.is_terminal else "", about)
    console.print(grid)


if __name__ == "__main__":
    cli.run(main, resume="ask again")
