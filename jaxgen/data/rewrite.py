"""Training captions in other words, written ahead of time by a language model (LaCLIP, arXiv 2305.20088): each visit draws
the caption itself or one of its variants.

They lie beside the data set, in a file whose name is a digest of all that they hang on: the model's files, the template and
the settings. A caption's variants are drawn by the seed and the caption alone: a set that grows asks for new ones only."""

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxgen.data.config import DataConfig, RewriteConfig
from jaxgen.errors import UserError
from jaxgen.parallel.runtime import synchronise
from jaxgen.storage import Path, as_path, write_json

if TYPE_CHECKING:
    from jaxgen.text.generate import LanguageModel

# For a model that was not taught a template of its own.
TEMPLATE = """Captions of pictures, and the same in other words.
Caption: a dog in the snow
In other words: a snowy field with a dog in it
Caption: an old man sitting on a wooden chair
In other words: a wooden chair on which an elderly man sits
Caption: {}
In other words:"""
BATCH = 64
SAVED_EVERY = 60.0  # seconds between rewrites of the file: a large model takes hours


class Rewritings:
    """The variants of every caption of a set; `key` is a digest of all that they hang on."""

    def __init__(self, variants: dict[str, list[str]], share: float, key: str):
        self.variants, self.share, self.key = variants, share, key

    def draw(self, caption: str, rng: np.random.Generator) -> str:
        """The caption, or for `share` of all calls one of its variants."""
        if rng.random() >= self.share:
            return caption
        found = self.variants[caption]
        return found[int(rng.integers(len(found)))]


def rewritings(config: DataConfig, captions: Iterable[str]) -> Rewritings:
    """Variants of all captions, from the file where they are there, else from the language model of `config.rewrite`; in a
    run of several processes the first one asks it. Raises UserError where the model does not load, cannot do this, or takes
    fewer tokens."""
    from jaxgen.text.generate import fingerprint

    wanted = config.rewrite
    try:
        key = settings(wanted, fingerprint(wanted.source))
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        path = as_path(config.dir) / "rewritten" / config.name.replace("/", "_") / f"{name}.json"
        known, unique = _read(path, key), sorted({*captions})
        new = [caption for caption in unique if caption not in known]
        if new and jax.process_index() == 0:
            _ask(wanted, new, known, lambda: write_json(path, {"settings": key, "captions": known}))
    except UserError as error:
        raise UserError(f"data.rewrite: {str(error).replace('text.source', 'data.rewrite.source')}") from None
    if jax.process_count() > 1:
        synchronise(f"rewritten {name}")
        known = _read(path, key)
    return Rewritings({caption: known[caption] for caption in unique}, wanted.share, name)


def settings(config: RewriteConfig, model: str) -> dict[str, Any]:
    """What variants hang on besides their captions, `model` a digest of the language model's files."""
    chosen = {name: value for name, value in dataclasses.asdict(config).items() if name not in ("source", "share")}
    return {"version": 1, "model": model, **chosen, "template": config.template or TEMPLATE}


def _ask(config: RewriteConfig, captions: Sequence[str], known: dict[str, list[str]], keep: Any) -> None:
    """Puts each caption's variants into `known`, and keeps that from time to time."""
    from jaxgen.text.expand import filled, first_line
    from jaxgen.text.generate import load_language_model

    model = load_language_model(config.source)
    asked = model.tokenizer.encode(filled(_template(config, model), captions), 2**30)
    # Prompts of like length together, so that few programs are compiled; a caption's variants side by side.
    order = sorted(range(len(captions)), key=lambda i: len(asked[i]))
    jobs = [(i, k) for i in order for k in range(config.variants)]
    begun = told = kept = time.monotonic()
    drawing: dict[str, Any] = {name: getattr(config, name) for name in ("max_new_tokens", "temperature", "top_p")}
    found: dict[int, list[str]] = {}
    for start in range(0, len(jobs), BATCH):
        some = jobs[start : start + BATCH]
        full = some + some[:1] * (BATCH - len(some))  # one number of rows, so one program
        seeds = [_seed(config.seed, k, captions[i]) for i, k in full]
        answers = model.generate([asked[i] for i, _ in full], seed=seeds, ends=model.line_ends, **drawing)
        for (i, k), answer in zip(some, answers, strict=False):
            # Nothing, or no end to it: the caption as it was.
            line = first_line(model.tokenizer.decode(answer)) if len(answer) < config.max_new_tokens else ""
            found.setdefault(i, []).append(line or captions[i])
            if k == config.variants - 1:
                known[captions[i]] = list(dict.fromkeys(found.pop(i)))
        now = time.monotonic()
        if now - told > 5:
            told, done = now, start + len(some)
            left = (now - begun) / done * (len(jobs) - done)
            print(f"rewriting captions: {done} of {len(jobs)}, {left:.0f} s left", file=sys.stderr, flush=True)
        if now - kept > SAVED_EVERY:
            kept = now
            keep()
    keep()


def _template(config: RewriteConfig, model: "LanguageModel") -> str:
    if not config.template and "expand" in model.templates and "rewrite" not in model.templates:
        raise UserError(
            f"{config.source} was trained to write captions and not to reword them: train it with text.template (see "
            "configs/caption_lm.py), or give data.rewrite.template"
        )
    return config.template or model.templates.get("rewrite", TEMPLATE)


def _seed(seed: int, variant: int, caption: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {variant} {caption}".encode()).digest()[:4])


def _read(path: Path, key: dict[str, Any]) -> dict[str, list[str]]:
    """What is kept there; {} where that is nothing, or broken."""
    try:
        kept = json.loads(path.read_text())
        return dict(kept["captions"]) if kept["settings"] == key else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
