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

    template: "... {} ...", put around each caption. cut: how many tokens stand before the caption in it. source: what messages
    call the tokenizer; the directory by default."""

    def __init__(self, directory: Path, template: str | None = None, source: str | None = None):
        self.source = source or str(directory)
        self._beyond: dict[int, str] = {}
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
        token is one padding token. Raises UserError for a token that the weights have no row for (see `fit`)."""
        out = []
        for start in range(0, len(captions), BATCH):
            texts = [f"{self._before}{caption}{self._after}" for caption in captions[start : start + BATCH]]
            for encoding in self._fast.encode_batch(texts):
                out.append(self._known(self._truncated(encoding, max_length)) or [self.padding])
        return out

    def encode_pairs(self, texts: Sequence[Any], max_length: int) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids of each text, or pair of texts, and which of the two each is of; truncated to max_length, of a pair the
        longer one first."""
        self._fast.enable_truncation(max_length, strategy="longest_first")
        encodings = self._fast.encode_batch(list(texts))
        self._fast.no_truncation()
        return [self._known(encoding.ids) for encoding in encodings], [encoding.type_ids for encoding in encodings]

    def fit(self, rows: int) -> None:
        """Raises UserError where captions have token ids beyond the `rows` of an embedding, which would read another row.

        Special tokens that a caption has only if it spells them may lie there (those for pictures, of models that also come
        without their eyes); such a caption is refused."""
        added = self._fast.get_added_tokens_decoder()
        self._beyond = {i: token.content for i, token in added.items() if token.special and i >= rows}
        ordinary = max((i for i in self._fast.get_vocab().values() if i not in self._beyond), default=0)
        largest = max(ordinary, self.padding, *self._fast.encode("").ids)
        if largest >= rows:
            raise UserError(
                f"{self.source}: the tokenizer has a token with id {largest}, and the embedding of the weights {rows} rows: "
                "they belong to different models"
            )

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

    def _known(self, ids: list[int]) -> list[int]:
        if self._beyond and not self._beyond.keys().isdisjoint(ids):
            token = next(self._beyond[i] for i in ids if i in self._beyond)
            raise UserError(f"a caption has the special token {token}, which these weights were not trained with: leave it out")
        return ids

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
