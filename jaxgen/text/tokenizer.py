"""Captions to token ids, with the model's own tokenizer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxgen.errors import UserError
from jaxgen.text import sentencepiece, sources

BATCH = 10_000  # captions a call: a call's results are large Python objects


class Tokenizer:
    """Reads tokenizer.json with `tokenizers`; where a model has none, transformers' own tokenizer is asked.

    template: "... {} ...", put around each caption. cut: how many tokens stand before the caption in it."""

    def __init__(self, directory: Path, template: str | None = None):
        file = directory / "tokenizer.json"
        if file.is_file():
            import tokenizers

            try:
                self._fast: Any = tokenizers.Tokenizer.from_file(str(file))
            except Exception as error:  # tokenizers raises bare Exceptions
                raise UserError(f"{file} is no valid tokenizer ({error}); download it again") from None
        else:
            self._fast = _from_transformers(directory)
        # Files may carry the truncation and padding of their last use.
        self._fast.no_truncation()
        self._fast.no_padding()
        named = sources.special_tokens(directory)
        self._unknown = self._first("[UNK]", "<unk>", named.get("unk_token"))
        self.end = self._first(named.get("eos_token"), "</s>", "<|endoftext|>", "[SEP]")
        padding = self._first(named.get("pad_token"), "[PAD]", "<pad>")
        self.padding: int = next((i for i in (padding, self.end) if i is not None), 0)
        self._before, self._after, self.cut = "", "", 0
        if template is not None:
            self._template(template)

    def encode(self, captions: Sequence[str], max_length: int) -> list[list[int]]:
        """Token ids of each caption, its special tokens included, truncated to max_length (besides a template's tokens).

        What the tokenizer puts at the end of a caption (or the template after it) is kept. None is empty: a caption without any
        token is one padding token."""
        out = []
        for start in range(0, len(captions), BATCH):
            texts = [f"{self._before}{caption}{self._after}" for caption in captions[start : start + BATCH]]
            for encoding in self._fast.encode_batch(texts):
                out.append(self._truncated(encoding, max_length) or [self.padding])
        return out

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return self._fast.decode([int(i) for i in ids], skip_special_tokens=True)

    def count(self, caption: str) -> int:
        """Tokens of the caption, special ones included, before any truncation."""
        return len(self._fast.encode(caption).ids)

    def unknown_fraction(self, caption: str) -> float:
        """Share of the caption's own tokens that the vocabulary does not have."""
        encoding = self._fast.encode(caption, add_special_tokens=False)
        return float(np.mean([i == self._unknown for i in encoding.ids])) if encoding.ids else 0.0

    def _truncated(self, encoding: Any, max_length: int) -> list[int]:
        ids, limit = encoding.ids, max_length + self.cut
        if len(ids) <= limit:
            return ids
        kept = self._kept if self._after else int(encoding.special_tokens_mask[-1])
        return [*ids[: limit - kept], *ids[len(ids) - kept :]]

    def _template(self, template: str) -> None:
        if template.count("{}") != 1:
            raise UserError(f"text.template={template!r} needs {{}} once, where the caption goes")
        self._before, self._after = template.split("{}")
        with_special, bare = (self._fast.encode(self._before, add_special_tokens=on) for on in (True, False))
        # Special tokens that the tokenizer puts in front count; those it puts behind come after the caption.
        leading = next((i for i, special in enumerate(with_special.special_tokens_mask) if not special), 0)
        self.cut = leading + len(bare.ids) if bare.ids else leading
        trailing = len(with_special.ids) - leading - len(bare.ids)
        self._kept = max(trailing, 0) + len(self._fast.encode(self._after, add_special_tokens=False).ids)

    def _first(self, *tokens: str | None) -> int | None:
        """The id of the first of the tokens that the vocabulary has."""
        return next((i for token in tokens if token and (i := self._fast.token_to_id(token)) is not None), None)


def _from_transformers(directory: Path) -> Any:
    if not sources.tokenizer_files(directory):
        names = ", ".join(sources.VOCABULARIES)
        raise UserError(f"{directory} has no tokenizer: tokenizer.json (or {names}) belongs beside the weights")
    if (directory / "spiece.model").is_file():
        return sentencepiece.read(directory / "spiece.model")
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise UserError(f'{directory} has no tokenizer.json: `pip install "jaxgen[train]"` for its older format') from None
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
        return tokenizer.backend_tokenizer
    except Exception as error:
        raise UserError(f"{directory}: its tokenizer does not load ({error})") from None
