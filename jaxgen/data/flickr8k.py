"""Flickr8k (Hodosh et al., 2013): photographs with five captions each; for research only.

Layout, as published: SOURCE/Flickr8k.token.txt, Flickr_8k.{train,dev,test}Images.txt, Flicker8k_Dataset/*.jpg (the
folder's name is spelt so). Lists that are missing leave their split out."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from jaxgen.data.recipe import Example
from jaxgen.errors import UserError
from jaxgen.storage import Path, read_text

LISTS = {"train": "train", "validation": "dev", "test": "test"}


@dataclass(frozen=True)
class Flickr8k:
    """Not mirrored, as captions speak of left and right; a cut at the border leaves them true."""

    source: Path
    flip = False
    crop = True

    def identity(self) -> str:
        self.splits()
        text = self._read("Flickr8k.token.txt") + "".join(self._read(self._list(split)) for split in self.splits())
        return "v1_" + hashlib.sha256(text.encode()).hexdigest()[:12]

    def splits(self) -> tuple[str, ...]:
        found = tuple(split for split in LISTS if (self.source / self._list(split)).exists())
        if not found:
            raise UserError(f"data.source={self.source} has no Flickr_8k.trainImages.txt: give the unpacked Flickr8k")
        return found

    def examples(self, split: str) -> Iterator[Example]:
        captions: dict[str, list[str]] = {}
        for number, line in enumerate(self._read("Flickr8k.token.txt").splitlines()):
            name, tab, caption = line.partition("\t")
            if not tab:
                raise UserError(f"{self.source}/Flickr8k.token.txt, line {number + 1}: no tab between picture and caption")
            captions.setdefault(name.split("#")[0], []).append(caption.strip().removesuffix(" ."))
        for name in self._read(self._list(split)).split():
            path = self.source / "Flicker8k_Dataset" / name
            yield Example(name, path.read_bytes() if path.exists() else b"", captions.get(name, []))

    def _list(self, split: str) -> str:
        return f"Flickr_8k.{LISTS[split]}Images.txt"

    def _read(self, name: str) -> str:
        path = self.source / name
        if not path.exists():
            raise UserError(f"data.source={self.source} has no {name}: give the unpacked Flickr8k")
        return read_text(path)
