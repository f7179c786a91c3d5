"""T5's older tokenizer file, spiece.model, read without the sentencepiece package: a unigram vocabulary (Kudo and
Richardson, arXiv 1808.06226) in a protobuf message."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxgen.errors import UserError
from jaxgen.text import sources

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # kinds of pieces
END = "</s>"
EXTRA = 100  # tokens <extra_id_0>, ... behind the pieces, unless tokenizer_config.json gives another number


def read(file: Path) -> Any:
    """The tokenizers.Tokenizer that transformers' T5Tokenizer makes of the file; raises UserError where it is broken or of
    another kind."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    extra = sources.read_json(file.parent / "tokenizer_config.json", {}).get("extra_ids", EXTRA)
    try:
        pieces, kind, characters = _parse(file.read_bytes())
        more = [f"<extra_id_{i}>" for i in range(extra - 1, -1, -1)]
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, struct.error) as error:
        raise UserError(f"{file} is no valid tokenizer ({error!r}); download it again") from None
    unknown = next((i for i, piece in enumerate(pieces) if piece[2] == UNKNOWN), None)
    if kind != 1 or unknown is None or END not in (text for text, _, _ in pieces):
        raise UserError(f"{file} is no unigram vocabulary with {END} and a token for what is unknown, as T5's are")
    vocabulary = [*((text, score) for text, score, _ in pieces), *((text, 0.0) for text in more)]
    try:
        made: Any = Tokenizer(models.Unigram(vocabulary, unknown, byte_fallback=False))
        if characters:
            made.normalizer = normalizers.Precompiled(characters)
    except Exception as error:  # tokenizers raises bare Exceptions
        raise UserError(f"{file} is no valid tokenizer ({error}); download it again") from None
    words = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), words])
    made.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    special = [text for text, _, kind in pieces if kind in (UNKNOWN, CONTROL)] + more
    made.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    made.add_tokens([AddedToken(text, normalized=False) for text, _, kind in pieces if kind == USER_DEFINED])
    made.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, made.token_to_id(END))])
    return made


def _parse(data: bytes) -> tuple[list[tuple[str, float, int]], int, bytes]:
    """(text, score, kind) of each piece, the model's kind, and the compiled table of characters to replace (or b"")."""
    pieces, model, characters = [], 1, b""
    for number, value in _fields(data):
        if number == 1:
            piece = dict(_fields(value))
            pieces.append((piece[1].decode(), struct.unpack("<f", piece.get(2, bytes(4)))[0], piece.get(3, NORMAL)))
        elif number == 2:
            model = dict(_fields(value)).get(3, 1)
        elif number == 3:
            characters = dict(_fields(value)).get(2, b"")
    return pieces, model, characters


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a message: an int, or the bytes of a fixed-size number, a string or a message."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
            if byte < 128:
                return value

    while at < len(data):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
            continue
        size = {1: 8, 2: None, 5: 4}[wire]
        size = varint() if size is None else size
        if at + size > len(data):
            raise ValueError("it ends in the middle")
        yield number, data[at : at + size]
        at += size
