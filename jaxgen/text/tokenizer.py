"""Captions to token ids, with the model's own tokenizer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxgen.errors import UserError


class Tokenizer:
    """Reads tokenizer.json with `tokenizers`; where a model has none, transformers' own tokenizer is asked."""

    def __init__(self, directory: Path):
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
        self._unknown = next((i for t in ("[UNK]", "<unk>") if (i := self._fast.token_to_id(t)) is not None), None)
        self.padding = next((i for t in ("[PAD]", "<pad>") if (i := self._fast.token_to_id(t)) is not None), 0)

    def encode(self, captions: Sequence[str], max_length: int) -> list[list[int]]:
        """Token ids of each caption, its special tokens included, truncated to max_length (the last token is kept)."""
        out = []
        for encoding in self._fast.encode_batch(list(captions)):
            ids = encoding.ids
            if len(ids) > max_length:
                special = encoding.special_tokens_mask[-1]
                ids = [*ids[: max_length - 1], ids[-1]] if special else ids[:max_length]
            out.append(ids)
        return out

    def count(self, caption: str) -> int:
        """Tokens of the caption, special ones included, before any truncation."""
        return len(self._fast.encode(caption).ids)

    def unknown_fraction(self, caption: str) -> float:
        """Share of the caption's own tokens that the vocabulary does not have."""
        encoding = self._fast.encode(caption, add_special_tokens=False)
        return float(np.mean([i == self._unknown for i in encoding.ids])) if encoding.ids else 0.0


def _from_transformers(directory: Path) -> Any:
    names = ("vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model")
    if not any((directory / name).is_file() for name in names):
        raise UserError(f"{directory} has no tokenizer: tokenizer.json (or {', '.join(names)}) belongs beside the weights")
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise UserError(f'{directory} has no tokenizer.json: `pip install "jaxgen[train]"` for its older format') from None
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
        return tokenizer.backend_tokenizer
    except Exception as error:
        raise UserError(f"{directory}: its tokenizer does not load ({error})") from None
