"""Push a finished run to the Hugging Face hub: adapter or merged weights, with a model card made from its records.

    HF_TOKEN=… python -m sonovqa.hub outputs/clinic ORG/clinic                   # adapter/, into a private repository
    HF_TOKEN=… python -m sonovqa.hub outputs/clinic ORG/clinic-merged --merged   # merged/, as vLLM loads it
    python -m sonovqa.hub outputs/clinic ORG/clinic --dry-run                    # print card and files, send nothing

The token comes from HF_TOKEN, from nowhere else. What leaves the machine: weights and processor files, the labels of a choice
head, and the card. No image, no other answer, no file name, no run.json. HF_ENDPOINT names another hub.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from sonovqa import choice, cli, credentials, files, model_card, records
from sonovqa.cli import UserError, console

TOKEN = "HF_TOKEN"
#: What a model folder may send: weights that run no code when loaded, and the texts beside them.
SENT = (".safetensors", ".json", ".jinja", ".txt")
ADAPTER = "adapter_config.json"
TINY_LICENCE = "apache-2.0"  # this project's own


def check(repo: str | None, public: bool = False, merged: bool = False):
    """Settle before any training that a push can work: name, token, its right to write, and what is there already.

    Args:
        repo: ``owner/name``; ``None`` does nothing.
        public: whether the repository may be public.
        merged: whether whole weights are to be pushed rather than an adapter.

    Returns:
        The `huggingface_hub.HfApi` to push with, or ``None``.

    Raises:
        UserError: if it cannot; the token is never part of the message.
    """
    if repo is None:
        return None
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError:
        repo = ""
    if repo.count("/") != 1:
        raise UserError("--push-to-hub; that is no repository's name; OWNER/NAME is allowed; mend it")
    token = credentials.key(TOKEN)
    if token is None:
        raise UserError(f"--push-to-hub {repo}; {TOKEN} is not set; a token with write access is needed; export {TOKEN}=hf_…")
    api = HfApi(token=token)
    with _faults(repo, api):
        _check_rights(repo, api.whoami())
        _check_there(repo, _there(api, repo), public, merged)
    return api


def _check_rights(repo: str, who: Mapping) -> None:
    """Raise `UserError` unless a token may write to ``repo``. Source: the hub's ``/api/whoami-v2``."""
    owner, orgs = repo.partition("/")[0], {org["name"]: org.get("roleInOrg") for org in who.get("orgs", ())}
    told = who.get("auth", {}).get("accessToken", {})
    way_out = f"make one with write access to {owner} in the hub's settings and export {TOKEN} anew"
    if told.get("role") == "read":
        raise UserError(f"--push-to-hub {repo}; the token in {TOKEN} may only read; {way_out}")
    if owner != who["name"] and orgs.get(owner, "read") == "read":
        mine = ", ".join([who["name"], *(name for name, role in orgs.items() if role != "read")])
        raise UserError(f"--push-to-hub {repo}; the token's owner cannot write to {owner}; {mine} can be written to; {way_out}")
    if told.get("role") == "fineGrained":
        scopes = told.get("fineGrained", {}).get("scoped", ())
        may = {scope["entity"].get("name") for scope in scopes if "repo.write" in scope.get("permissions", ())}
        if not may & {owner, repo}:
            raise UserError(f"--push-to-hub {repo}; the token in {TOKEN} lacks the permission repo.write on {owner}; {way_out}")


def _there(api, repo: str):
    """What the hub knows of a repository, or ``None`` if there is none that the token may see."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return api.model_info(repo)
    except RepositoryNotFoundError:
        return None


def _check_there(repo: str, there, public: bool, merged: bool) -> None:
    if there is None:
        return
    if not there.private and not public:
        raise UserError(f"--push-to-hub {repo}; that repository is public; private ones only, unless --public is given; "
                        "give it, or choose another name")  # fmt: skip
    names = {sibling.rfilename for sibling in there.siblings or ()}
    if (ADAPTER in names) if merged else ("config.json" in names):
        held, given = ("an adapter", "merged weights") if merged else ("whole weights", "an adapter")
        raise UserError(
            f"--push-to-hub {repo}; it holds {held}; {given} beside them would be loaded together; choose another name"
        )


@contextmanager
def _faults(repo: str, api) -> Iterator[None]:
    """Turn the hub's and the connection's faults into one line without the token."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except OfflineModeIsEnabled:
        raise UserError(
            f"--push-to-hub {repo}; HF_HUB_OFFLINE is set; nothing can be pushed offline; unset HF_HUB_OFFLINE"
        ) from None
    except (HfHubHTTPError, httpx.HTTPError, ValueError, RuntimeError) as fault:
        status = getattr(getattr(fault, "response", None), "status_code", None)
        told = credentials.hidden(str(fault.__cause__ or fault), api.token, 200)
        way_out = (
            f"set {TOKEN} to a token that is valid" if status == 401 else "mend it, then push again: python -m sonovqa.hub RUN ID"
        )
        raise UserError(f"--push-to-hub {repo}; the hub at {api.endpoint} says: {told}; {way_out}") from None


def sent(folder: Path, merged: bool) -> dict[str, Path | bytes]:
    """What is pushed of a run: files by their name in the repository, in place of some their content.

    An adapter's configuration names its base; where that is a folder of this machine, `model_card.LOCAL_BASE` is sent. What
    run.json says of a choice head goes along as `choice.FILE`.

    Raises:
        UserError: if the run has no such weights, or holds pickled ones.
    """
    home, run = folder / ("merged" if merged else "adapter"), records.read_run(folder) or {}
    if not home.is_dir():
        way_out = f"merge it: python -m sonovqa.merging {folder}" if merged else "push its weights: --merged"
        raise UserError(f"{folder} has no {home.name}/; a finished run with such weights is allowed; {way_out}")
    found: dict[str, Path | bytes] = {path.name: path for path in sorted(home.iterdir()) if path.suffix in SENT}
    if not any(name.endswith(".safetensors") for name in found):
        raise UserError(f"{home} holds no safetensors; other weights run code when loaded and are not pushed; train it again")
    if ADAPTER in found:
        config = files.read_json(home / ADAPTER)
        told = run or {"arguments": {"model": str(config["base_model_name_or_path"])}}
        if config["base_model_name_or_path"] != model_card.base_for_others(told):
            found[ADAPTER] = _as_file(config | {"base_model_name_or_path": model_card.base_for_others(told)})
    if head := run.get("head"):
        found[choice.FILE] = _as_file(head)
    return found


def _as_file(value: Mapping) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def card(folder: Path, repo: str, merged: bool, licence: str | None):
    """The run's model card, see `model_card.make`. Raises `UserError` if the run is not finished."""
    run = records.read_run(folder)
    if run is None:
        raise UserError(
            f"{folder} has no run.json, so it is no finished run; a run that train.py finished is allowed; train it first"
        )
    about = Path(run["arguments"]["data"]) / "dataset.json"
    data = files.read_json(about) if about.exists() else {}
    data = data if data.get("fingerprint") == run["data"] else {}  # another set has taken its place since
    return model_card.make(run, model_card.scores_of(folder, merged), data, repo, merged, licence)


def licence_of(run: Mapping, api=None) -> str | None:
    """The licence of a run's base model as the hub has it; ``None`` where that is not known."""
    from huggingface_hub.errors import HfHubHTTPError

    if model_card.is_tiny(run["arguments"]["model"]):
        return TINY_LICENCE
    name = model_card.hub_base(run)
    try:
        about = api.model_info(name).card_data if api and name else None
    except HfHubHTTPError:
        return None
    return about.get("license") if about else None


def push(folder: Path, repo: str, merged: bool = False, public: bool = False, licence: str | None = None) -> str:
    """Push a finished run. The repository is made if it is not there, private unless ``public``; one commit holds all.

    Args:
        folder: the run's.
        repo: ``owner/name``.
        licence: of the weights; ``None``: the base model's, see `licence_of`.

    Returns:
        The repository's URL.

    Raises:
        UserError: as `check`, `sent` and `card` do, or if the upload fails; what was uploaded before is found again.
    """
    from huggingface_hub import CommitOperationAdd

    api, found = check(repo, public, merged), sent(folder, merged)
    run = records.read_run(folder) or {"arguments": {"model": ""}}
    with _faults(repo, api):
        found["README.md"] = str(card(folder, repo, merged, licence or licence_of(run, api))).encode()
        url = api.create_repo(repo, private=not public, exist_ok=True)
        added = [CommitOperationAdd(name, content) for name, content in found.items()]
        api.create_commit(repo, added, commit_message=f"{'Merged weights' if merged else 'Adapter'} of run {folder.name}")
        seen = "private" if api.model_info(repo).private else "PUBLIC"
    console.print(f"pushed {len(found)} files, {_size(found)}, to {url} ({seen})", soft_wrap=True, markup=False)
    return str(url)


def check_asked(args) -> None:
    """What train.py does before it loads anything, see `check`. Raises `UserError` for flags that do not go together too."""
    if args.public and not args.push_to_hub:
        raise UserError("--public goes with --push-to-hub; there is none; leave it out, or add --push-to-hub OWNER/NAME")
    if args.push_to_hub and args.full and not args.merge:
        raise UserError("--push-to-hub with --full pushes merged weights; --no-merge makes none; leave --no-merge out")
    check(args.push_to_hub, args.public, args.full)


def push_if_asked(args, folder: Path) -> None:
    """What train.py does at its end: push the adapter, after ``--full`` the merged weights, if ``--push-to-hub`` says so."""
    if args.push_to_hub:
        push(folder, args.push_to_hub, merged=args.full, public=args.public)
        console.print(f"its card has no scores yet: evaluate it, then python -m sonovqa.hub {os.path.relpath(folder)} "
                      f"{args.push_to_hub}{' --merged' * args.full}", soft_wrap=True)  # fmt: skip


def _size(found: Mapping[str, Path | bytes]) -> str:
    count = sum(one.stat().st_size if isinstance(one, Path) else len(one) for one in found.values())
    return f"{count / 1e6:.1f} MB"


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(prog="python -m sonovqa.hub", description=__doc__)
    parser.add_argument("run", type=Path, help="outputs/<run>, finished")
    parser.add_argument("repo", metavar="OWNER/NAME", help="repository on the hub; made if it is not there")
    parser.add_argument("--merged", action="store_true", help="push merged/ instead of adapter/")
    parser.add_argument("--public", action="store_true", help="everybody may read it (unset: private)")
    parser.add_argument("--licence", metavar="ID", help="the hub's identifier of the weights' licence (unset: the base model's)")
    parser.add_argument("--dry-run", action="store_true", help="print the card and the files, send nothing")
    args = parser.parse_args(argv)
    if args.dry_run:
        found = sent(args.run, args.merged)
        run = records.read_run(args.run) or {"arguments": {"model": ""}}
        print(card(args.run, args.repo, args.merged, args.licence or licence_of(run)))
        console.print(f"would be pushed: {', '.join(sorted([*found, 'README.md']))}; {_size(found)}", soft_wrap=True)
        return
    push(args.run, args.repo, args.merged, args.public, args.licence)


if __name__ == "__main__":
    cli.run(main)
