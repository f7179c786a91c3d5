"""Writes tests/text/references/minilm.npz: hidden states of all-MiniLM-L6-v2 from transformers and PyTorch.

    python scripts/make_minilm_references.py MODEL_DIRECTORY

Needs torch and transformers (extra `torch`). Every 24th feature of each real token is kept, and the pooled vectors whole."""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

SENTENCES = (
    "",
    " ",
    "a",
    "a small red circle",
    "a small red circle to the left of a large blue square",
    "three small orange crosses",
    "in this drawing we can see a coal-black round spot",
    "A BROWN Dog, lying on (someone's) bed!?",
    "don't  stop   now",
    "e = mc^2; 3.14159 & 42%",
    "ein kleiner roter Kreis über einem großen blauen Quadrat",
    "un petit cercle rouge à gauche d'un grand carré bleu",
    "маленький красный круг",
    "一个小的红色圆形",
    "小さな赤い円",
    "دائرة حمراء صغيرة",
    "🚀🍎 emoji of rocket and apple",
    "antidisestablishmentarianism and floccinaucinihilipilification",
    "http://example.org/a?b=c#d",
    "two men in hats play chess while a child in a yellow raincoat watches them from under a table near the window",
    "tab\tand\nnewline",
    "the quick brown fox jumps over the lazy dog " * 40,  # longer than the model takes: truncated
)


def main() -> None:
    directory = sys.argv[1]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModel.from_pretrained(directory, attn_implementation="eager").eval()
    out: dict[str, np.ndarray] = {"sentences": np.array(SENTENCES)}
    for i, sentence in enumerate(SENTENCES):
        tokens = tokenizer(sentence, return_tensors="pt", truncation=True, max_length=256)
        with torch.no_grad():
            states = torch.stack(model(**tokens, output_hidden_states=True).hidden_states)[:, 0]  # [layers + 1, T, D]
        mean = states[-1].mean(0)
        out[f"ids_{i}"] = tokens["input_ids"][0].numpy().astype(np.int32)
        out[f"hidden_{i}"] = states[:, :, ::24].numpy()
        out[f"largest_{i}"] = states.abs().amax((1, 2)).numpy()
        out[f"pooled_{i}"] = (mean / mean.norm()).numpy()
    np.savez_compressed(Path("tests/text/references/minilm.npz"), **out)


if __name__ == "__main__":
    main()
