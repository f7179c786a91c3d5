"""Writes tests/text/references/minilm.npz: what all-MiniLM-L6-v2 makes of sentences in transformers and PyTorch.

    python scripts/make_minilm_references.py MODEL_DIRECTORY

Needs torch and transformers (extra `torch`). Of SENTENCES every 24th feature of each real token's hidden states is kept, and
the pooled vectors whole; of PAIRS those; of SPLIT the ids, types and mask that a classifier with room for 32 tokens reads."""

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
PAIRS = (  # from the same to nothing in common, and what only order or a small word tells apart
    ("a small red circle", "a little red disc"),
    ("a small red circle", "a small red circle."),
    ("a small red circle", "a large red circle"),
    ("a small red circle", "a small green circle"),
    ("a small red circle", "a small red square"),
    ("a small red circle", "three white rings"),
    ("a red circle above a blue square", "a blue square below a red circle"),
    ("a red circle above a blue square", "a blue circle above a red square"),
    ("a red circle above a blue square", "a red circle below a blue square"),
    ("two dogs run across a lawn", "a pair of dogs is running over the grass"),
    ("two dogs run across a lawn", "dogs"),
    ("two dogs run across a lawn", "a cat sleeps on a sofa"),
    ("two dogs run across a lawn", "quarterly earnings fell short of forecasts"),
    ("a man bites a dog", "a dog bites a man"),
    ("nobody is in the room", "the room is empty"),
    ("nobody is in the room", "everybody is in the room"),
    ("it is raining", "it is not raining"),
    ("it is raining", "the weather is wet today"),
    ("it is raining", "take an umbrella with you"),
    ("how do I bake bread?", "a recipe for a loaf of sourdough"),
    ("how do I bake bread?", "how do I break bad habits?"),
    ("the bank of the river", "the bank raised its rates"),
    ("the bank of the river", "the shore of a stream"),
    ("an apple a day", "Apple shipped a new phone"),
    ("Paris is the capital of France", "the French capital is Paris"),
    ("Paris is the capital of France", "Rome is the capital of Italy"),
    ("Paris is the capital of France", "Paris Hilton gave an interview"),
    ("42", "forty-two"),
    ("42", "43"),
    ("3 + 4 = 7", "four plus three makes seven"),
    ("ein roter Kreis", "a red circle"),
    ("un cercle rouge", "ein roter Kreis"),
    ("红色圆形", "a red circle"),
    ("THE END", "the end"),
    ("colour", "color"),
    ("a", "an old lighthouse on a cliff in heavy fog, painted in oil"),
    ("an old lighthouse on a cliff in heavy fog, painted in oil", "oil painting of a foggy cliff with an ancient lighthouse"),
    ("an old lighthouse on a cliff in heavy fog, painted in oil", "a modern glass tower downtown at noon, photographed"),
    ("def f(x): return x + 1", "a function that adds one to its argument"),
    ("🙂", "a smiling face"),
)
SPLIT = (
    ("a dog", None),
    ("a dog", "two cats on a roof"),
    ("is it raining?", "no"),
    ("", None),
    ("a very long one " * 30, "and a short one"),
    ("one that is not so long", "against one that goes on and on " * 9),
    ("both are much too long " * 9, "and so is this, word by word " * 9),
    ("alone, and cut " * 20, None),
)


def main() -> None:
    directory = sys.argv[1]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModel.from_pretrained(directory, attn_implementation="eager").eval()
    out: dict[str, np.ndarray] = {"sentences": np.array(SENTENCES), "pairs": np.array(PAIRS)}

    def read(sentence: str) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
        """Token ids [T], hidden states [layers + 1, T, D], pooled [D]."""
        tokens = tokenizer(sentence, return_tensors="pt", truncation=True, max_length=256)
        with torch.no_grad():
            states = torch.stack(model(**tokens, output_hidden_states=True).hidden_states)[:, 0]
        mean = states[-1].mean(0)
        return tokens["input_ids"][0], states, (mean / mean.norm()).numpy()

    out["vectors"] = np.array([[read(sentence)[2] for sentence in pair] for pair in PAIRS])
    out["split"] = np.array([[first, second or ""] for first, second in SPLIT])
    cut = {"truncation": True, "max_length": 32, "padding": "max_length"}
    read_together = [tokenizer(first, second, **cut) for first, second in SPLIT]
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        out[f"split_{name}"] = np.array([tokens[name] for tokens in read_together], np.int32)
    for i, sentence in enumerate(SENTENCES):
        ids, states, pooled = read(sentence)
        out[f"ids_{i}"] = ids.numpy().astype(np.int32)
        out[f"hidden_{i}"] = states[:, :, ::24].numpy()
        out[f"largest_{i}"] = states.abs().amax((1, 2)).numpy()
        out[f"pooled_{i}"] = pooled
    np.savez_compressed(Path("tests/text/references/minilm.npz"), **out)


if __name__ == "__main__":
    main()
