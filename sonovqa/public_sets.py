"""Flags and loaders of the sources that earlier projects used: PathVQA, PubMedVision, MedPix, pages of documents."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from sonovqa import documents, medpix, path_vqa, pubmedvision
from sonovqa.sources import Loaded

SourceParser = Callable[..., argparse.ArgumentParser]


def add(subparsers, source_parser: SourceParser) -> None:
    """Add a subparser for each of `LOADERS`; ``source_parser`` makes one with the flags that all sources share."""
    path = source_parser(subparsers, "path-vqa", "PathVQA: pathology questions (He et al., 2020)")
    _add_place(path, path_vqa.HUB_ID)
    figures = source_parser(subparsers, "pubmedvision", "PubMedVision: figures with long answers (Chen et al., 2024)")
    _add_place(figures, pubmedvision.HUB_ID)
    cases = source_parser(subparsers, "medpix", "MedPix: CT and MR teaching cases (Siragusa et al., 2024)")
    _add_place(cases, medpix.HUB_ID)
    for parser in (path, cases):
        parser.add_argument("--split", choices=("grouped", "official"), default="grouped", help="by image, or the makers' test")
    pages = source_parser(subparsers, "documents", "clinical pages for extraction: drawn forms, rendered transcriptions")
    pages.add_argument("--root", type=Path, help="folder with mtsamples.csv; unset: forms only")
    pages.add_argument("--forms", type=int, default=400, metavar="N", help="synthetic forms to draw; 0: none")
    pages.add_argument("--transcriptions", type=int, default=400, metavar="N", help="transcriptions to render at most")
    pages.set_defaults(ratios="80/10/10")


def _add_place(parser: argparse.ArgumentParser, hub_id: str) -> None:
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--root", type=Path, help="folder with the hub repository's files; unset: fetched from the hub")
    place.add_argument("--hub-id", default=hub_id, metavar="OWNER/NAME", help="data set repository to fetch")


def _pubmedvision(args: argparse.Namespace, beside: Path) -> Loaded:
    return pubmedvision.pubmedvision(args.root, args.hub_id, beside, args.max_images, args.seed)


#: By source, what loads it from parsed arguments and the folder that its images may be written to.
LOADERS: dict[str, Callable[[argparse.Namespace, Path], Loaded]] = {
    "path-vqa": lambda args, beside: path_vqa.path_vqa(args.root, args.hub_id, beside, args.split == "official"),
    "medpix": lambda args, beside: medpix.medpix(args.root, args.hub_id, beside, args.split == "official"),
    "pubmedvision": _pubmedvision,
    "documents": lambda args, beside: documents.documents(args.root, beside, args.forms, args.transcriptions, args.seed),
}
