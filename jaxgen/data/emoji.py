"""Emoji: Noto (Apache-2.0) and Fluent 3D (MIT) pictures with their names and keywords.

Layout: SOURCE/{noto_emoji,fluent_emoji_3d}/captions.jsonl, a line {"file", "name", "keywords", ...} a picture."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

from jaxgen.data.recipe import Example
from jaxgen.errors import UserError
from jaxgen.storage import Path, read_text

STYLES = {"noto_emoji": "flat", "fluent_emoji_3d": "3D"}


@dataclass(frozen=True)
class Emoji:
    """Not mirrored: arrows, letters, clocks and hands have sides. Not cropped: every picture is framed tightly."""

    source: Path
    skin_tones: bool = True
    flip = False
    crop = False

    def identity(self) -> str:
        lines = [line for style in self._styles() for line in self._lines(style)]
        digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]
        return f"v1_{digest}{'' if self.skin_tones else '_plain'}"

    def splits(self) -> tuple[str, ...]:
        return ("train", "validation", "test")

    def examples(self, split: str) -> Iterator[Example]:
        for style in self._styles():
            for number, line in enumerate(self._lines(style)):
                try:
                    entry = json.loads(line)
                    file, name = str(entry["file"]), str(entry["name"])
                    keywords = [str(keyword) for keyword in entry.get("keywords", [])]
                    toned = bool(entry.get("skin_tone", False))
                except (ValueError, KeyError, TypeError) as error:
                    raise UserError(f"{self.source / style}/captions.jsonl, line {number + 1}: {error}") from None
                if toned and not self.skin_tones:
                    continue
                # By the name, so that both styles and all skin tones of an emoji fall into the same split.
                share = int(hashlib.sha256(name.split(":")[0].encode()).hexdigest()[:8], 16) % 100
                if split != ("test" if share < 5 else "validation" if share < 10 else "train"):
                    continue
                path = self.source / file
                plain = f"a {STYLES[style]} emoji of {name}"
                captions = [plain, *(f"{plain}, {', '.join(keywords[:5])}" for _ in keywords[:1])]
                yield Example(file, path.read_bytes() if path.exists() else b"", captions, json.dumps({"name": name}))

    def _styles(self) -> list[str]:
        found = [style for style in STYLES if (self.source / style / "captions.jsonl").exists()]
        if not found:
            raise UserError(f"data.source={self.source} has neither {' nor '.join(STYLES)} with a captions.jsonl")
        return found

    def _lines(self, style: str) -> list[str]:
        return [line for line in read_text(self.source / style / "captions.jsonl").splitlines() if line.strip()]
