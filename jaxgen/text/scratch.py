"""A small BERT with fresh weights and a vocabulary of its own, to be trained together with the generator (text.adapt=full);
or a small GPT-2, to learn to write captions (configs/caption_lm.py).

    python -m jaxgen.text.scratch DIRECTORY [--captions=scenes | --captions=FILE] [--languages=en,zh] [--hidden_size=128]
        [--layers=2] [--heads=2] [--vocab=2000] [--max_length=64] [--seed=0] [--causal]

The way to captions in a language that no encoder at hand reads. Writes an ordinary Hugging Face directory (config.json,
model.safetensors, tokenizer.json, tokenizer_config.json), for text.source. FILE has a caption a line, in UTF-8. The encoder
knows the words (of Chinese: the characters) of those captions; it spells other words of Latin letters, and no others."""

import argparse
import json
import string
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from jaxgen.errors import UserError, cli
from jaxgen.nn.module import init_params
from jaxgen.storage import explain
from jaxgen.text import registry, sources, weights

SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
SCENES = 2000  # training scenes whose captions make a vocabulary: the rarest word comes a dozen times


def make_tokenizer(captions: Iterable[str], vocab: int, *, causal: bool = False) -> Any:
    """A `tokenizers` WordPiece tokenizer like BERT's of at most `vocab` tokens: the captions' characters, Latin letters and
    digits, then the commonest words. A Chinese character is a word. causal: a text is left open, for a model to go on with.
    Raises UserError where the characters are too many."""
    # Not tokenizers' own trainer: which word pieces it finds changes from call to call.
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    normalizer = normalizers.BertNormalizer(lowercase=True, handle_chinese_chars=True)
    splitter = pre_tokenizers.BertPreTokenizer()
    words = Counter(w for caption in captions for w, _ in splitter.pre_tokenize_str(normalizer.normalize_str(caption)))
    spelling = string.ascii_lowercase + string.digits
    inside = sorted({*spelling, *(letter for word in words for letter in word[1:])})
    characters = sorted({*inside, *(word[0] for word in words)})
    tokens = [*SPECIAL.values(), *characters, *(f"##{letter}" for letter in inside)]
    if len(tokens) > vocab:
        raise UserError(f"vocab={vocab}: the captions' characters alone are {len(tokens)} tokens; give more")
    common = sorted((word for word in words if len(word) > 1), key=lambda word: (-words[word], word))
    tokens += common[: vocab - len(tokens)]
    ids = {token: i for i, token in enumerate(tokens)}
    tokenizer: Any = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.add_special_tokens(list(SPECIAL.values()))
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = normalizer, splitter, decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A" if causal else "[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, ids[token]) for token in ("[CLS]", "[SEP]")],
    )
    return tokenizer


def write(
    directory: str | Path,
    captions: Iterable[str],
    *,
    hidden_size: int = 128,
    layers: int = 2,
    heads: int = 2,
    vocab: int = 2000,
    max_length: int = 64,
    seed: int = 0,
    causal: bool = False,
) -> None:
    """Make the tokenizer of the captions, draw the weights and write both: of a BERT, or of a GPT-2 (`causal`). Raises
    UserError for what makes no model."""
    for name, value in (("hidden_size", hidden_size), ("layers", layers), ("heads", heads), ("vocab", vocab)):
        if value < 1:
            raise UserError(f"--{name}={value}: at least 1")
    if max_length < 8:
        raise UserError(f"--max_length={max_length}: at least 8 tokens")
    if hidden_size % heads:
        raise UserError(f"--hidden_size={hidden_size} does not divide among --heads={heads}")
    target = Path(directory)
    try:
        sources.check_new(target)
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise explain(error, target) from error
    tokenizer = make_tokenizer(captions, vocab, causal=causal)
    values: dict[str, Any] = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden_size,
        "max_position_embeddings": max_length,
        "type_vocab_size": 2,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "pad_token_id": tokenizer.token_to_id("[PAD]"),
    }
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length, **SPECIAL}
    if causal:
        begin, end = SPECIAL["cls_token"], SPECIAL["sep_token"]
        values = {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "vocab_size": tokenizer.get_vocab_size(),
            "n_positions": max_length,
            "n_embd": hidden_size,
            "n_layer": layers,
            "n_head": heads,
            "bos_token_id": tokenizer.token_to_id(begin),
            "eos_token_id": tokenizer.token_to_id(end),
        }
        told |= {"bos_token": begin, "eos_token": end}
    architecture = registry.architecture(values, f"{target}/config.json", "lm" if causal else "")
    params = init_params(architecture.build, jax.random.key(seed))
    try:
        (target / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        (target / "tokenizer_config.json").write_text(json.dumps(told, indent=2))
        weights.save(target / "model.safetensors", params, architecture.tensors())
        (target / "config.json").write_text(json.dumps(values, indent=2))  # last: without it the directory is no model
    except OSError as error:
        raise explain(error, target) from error


def scene_captions(languages: tuple[str, ...]) -> list[str]:
    """Captions of the first training scenes, paraphrases included."""
    # The data sets lie above the text encoders: only this command, which stands above both, knows of them.
    from jaxgen.data import scenes
    from jaxgen.data.config import DataConfig

    DataConfig(languages=languages).validate()
    return [caption for i in range(SCENES) for caption in scenes.example("train", i, languages=languages)[1]]


def file_captions(file: Path) -> list[str]:
    """The lines of a file that are not blank."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise UserError(f"--captions={file} is not UTF-8 ({error})") from None
    except OSError as error:
        raise UserError(f"--captions={file} cannot be read ({error.strerror}): give a file, or scenes") from None
    captions = [line for line in lines if line]
    if not captions:
        raise UserError(f"--captions={file} has no caption: write one a line")
    return captions


@cli
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory")
    parser.add_argument("--captions", default="scenes", help="scenes, or a file with a caption a line")
    parser.add_argument("--languages", default="en,zh", help="of the scenes' captions")
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=2000, help="tokens at most")
    parser.add_argument("--max_length", type=int, default=64, help="tokens of a caption, [CLS] and [SEP] included")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--causal", action="store_true", help="a GPT-2, which writes, and no BERT")
    given = vars(parser.parse_args())
    directory, source, languages = given.pop("directory"), given.pop("captions"), given.pop("languages")
    captions = scene_captions(tuple(languages.split(","))) if source == "scenes" else file_captions(Path(source))
    write(directory, captions, **given)
    use = "--config=configs/caption_lm.py " if given["causal"] else ""
    print(f"wrote {directory}: train it with {use}--config.text.source={directory} --config.text.adapt=full")


if __name__ == "__main__":
    main()
