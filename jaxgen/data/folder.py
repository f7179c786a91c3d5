"""Users' own pictures: a folder with captions.jsonl, or with a .txt of the same name beside each picture.

captions.jsonl: a line {"file": "cat.jpg", "caption": "a cat"} a picture, or "captions": ["a cat", ...]; paths are
relative to the folder. In a .txt every line is a caption."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from jaxgen.data.recipe import Example, decode
from jaxgen.errors import UserError
from jaxgen.storage import Path, read_text

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class Folder:
    """One picture in twenty, chosen by its name, is kept for validation. Not mirrored or cropped unless asked."""

    source: Path
    flip = False
    crop = False

    def identity(self) -> str:
        listing = [f"{file}:{(self.source / file).stat().length}:{captions}" for file, captions in self.pairs()]
        return "v1_" + hashlib.sha256("\n".join(listing).encode()).hexdigest()[:12]

    def splits(self) -> tuple[str, ...]:
        return ("train", "validation")

    def examples(self, split: str) -> Iterator[Example]:
        for file, captions in self.pairs():
            held = int(hashlib.sha256(file.encode()).hexdigest()[:8], 16) % 20 == 0
            if held == (split == "validation"):
                yield Example(file, (self.source / file).read_bytes(), captions)

    def pairs(self) -> list[tuple[str, list[str]]]:
        """(file, captions) of every picture that has both; raises UserError where there is none."""
        pictures, captions = self.listing()
        both = [(file, captions[file]) for file in pictures if captions.get(file)]
        if not both:
            raise UserError(
                f"{self.source}: {len(pictures)} pictures and {len(captions)} captions, and not one pair: give a "
                'captions.jsonl with lines {"file": "cat.jpg", "caption": "a cat"}, or cat.txt beside cat.jpg'
            )
        return both

    def listing(self) -> tuple[list[str], dict[str, list[str]]]:
        """(pictures, captions by picture), each also where the other is missing."""
        if not self.source.is_dir():
            raise UserError(f"data.name=folder:{self.source}: no such directory")
        pictures = sorted(_walk(self.source, ""))
        if not pictures:
            raise UserError(f"data.name=folder:{self.source}: no pictures in it ({', '.join(ENDINGS)})")
        index = self.source / "captions.jsonl"
        if not index.exists():
            stems = {file: self.source / (file.rsplit(".", 1)[0] + ".txt") for file in pictures}
            return pictures, {file: _lines(path) for file, path in stems.items() if path.exists()}
        captions: dict[str, list[str]] = {}
        for number, line in enumerate(read_text(index).splitlines()):
            if not line.strip():
                continue
            try:
                entry: Any = json.loads(line)
                said = entry["captions"] if "captions" in entry else [entry["caption"]]
                captions.setdefault(entry["file"], []).extend(str(caption) for caption in said)
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f'{index}, line {number + 1}: want {{"file": ..., "caption": ...}} ({type(error).__name__}: {error})'
                ) from None
        return pictures, captions


@dataclass
class Report:
    """What a dry run finds."""

    pictures: int = 0
    pairs: int = 0
    captions: int = 0
    problems: dict[str, list[str]] = field(default_factory=dict)
    sheet: list[tuple[Any, str]] = field(default_factory=list)  # up to 16 (picture uint8 [H, W, 3], caption)

    def lines(self) -> list[str]:
        told = [f"{self.pictures} pictures, {self.pairs} with captions ({self.captions} captions)"]
        for problem, files in self.problems.items():
            told.append(f"{problem}: {len(files)} ({', '.join(files[:3])}{', …' if len(files) > 3 else ''})")
        return told


def dry_run(folder: Folder, image_size: int) -> Report:
    """Look at every picture and caption without preparing anything."""
    pictures, captions = folder.listing()
    report = Report(pictures=len(pictures))
    seen: dict[str, str] = {}

    def problem(name: str, file: str) -> None:
        report.problems.setdefault(name, []).append(file)

    for file in captions.keys() - set(pictures):
        problem("captions without a picture", file)
    for file in pictures:
        if not captions.get(file):
            problem("pictures without a caption", file)
            continue
        data = (folder.source / file).read_bytes()
        image = decode(data)
        if image is None:
            problem("unreadable pictures", file)
            continue
        report.pairs += 1
        report.captions += len(captions[file])
        if min(image.shape[:2]) < image_size:
            problem(f"smaller than data.image_size={image_size}, will be enlarged", file)
        if max(image.shape[:2]) > 2 * min(image.shape[:2]):
            problem("more than twice as long as wide, the ends will be cut", file)
        digest = hashlib.sha256(data).hexdigest()
        if digest in seen:
            problem("the same picture twice", file)
        seen[digest] = file
        if len(report.sheet) < 16:
            report.sheet.append((image, captions[file][0]))
    return report


def _walk(directory: Path, prefix: str) -> Iterator[str]:
    for path in directory.iterdir():
        if path.is_dir():
            yield from _walk(path, f"{prefix}{path.name}/")
        elif path.name.lower().endswith(ENDINGS):
            yield prefix + path.name


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]
