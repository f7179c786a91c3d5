"""PyTorch's side of text_encoders.py, which starts it with an interpreter that has torch and transformers."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from text_encoders import CHECKED, NEW
from workers import Work, serve

STATIC = {"cache_implementation": "static"}  # a cache of one size: nothing compiled again as it fills


class Torch:
    def __init__(self):
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        torch._dynamo.config.recompile_limit = 64

    def write(self, name: str, directory: str) -> None:
        """Random weights; the configurations' defaults are GPT-2-small and T5-small."""
        torch.manual_seed(0)
        model: Any = {"gpt2": transformers.GPT2LMHeadModel, "t5": transformers.T5EncoderModel}[name]
        model(model.config_class()).save_pretrained(directory)

    def load(self, directory: str, words: str) -> None:
        self.directory = Path(directory)
        kind = transformers.AutoConfig.from_pretrained(directory).model_type
        loader = transformers.T5EncoderModel if kind == "t5" else transformers.AutoModel
        self.model = loader.from_pretrained(directory, attn_implementation="sdpa", dtype=torch.float32).eval()
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(words)

    def first(self, caption: str) -> None:
        self.model(**self.tokens([caption])).last_hidden_state  # noqa: B018

    def equal(self, variant: str, ids: list[list[int]]) -> Work:
        array = torch.tensor(ids)
        given = {"input_ids": array, "attention_mask": torch.ones_like(array)}
        model = self.compiled(variant, dynamic=False)
        return lambda: model(**given).last_hidden_state, lambda hidden: np.concatenate(hidden.numpy())

    def mixed(self, variant: str, captions: list[str]) -> Work:
        model = self.compiled(variant, dynamic=True)

        def run() -> list[tuple[torch.Tensor, torch.Tensor]]:
            found = []
            for start in range(0, len(captions), 32):
                tokens = self.tokens(captions[start : start + 32])
                found.append((model(**tokens).last_hidden_state, tokens["attention_mask"]))
            return found

        def show(found: list[tuple[torch.Tensor, torch.Tensor]]) -> np.ndarray:
            return np.concatenate([hidden[mask > 0].numpy() for hidden, mask in found[: CHECKED // 32]])

        return run, show

    def generate(self, variant: str, ids: list[list[int]]) -> Work:
        model = transformers.GPT2LMHeadModel.from_pretrained(self.directory, attn_implementation="sdpa").eval()
        if variant == "compiled":
            model.forward = torch.compile(model.forward, dynamic=False)
        array = torch.tensor(ids)
        settings = {"attention_mask": torch.ones_like(array), "max_new_tokens": NEW, "do_sample": False}
        settings |= {"eos_token_id": None, "pad_token_id": 0} | (STATIC if variant == "compiled" else {})
        return lambda: model.generate(array, **settings), lambda done: done[:, -NEW:].numpy()

    def bare(self, variant: str, tokens: int, width: int) -> Work:
        x, kernel = torch.randn(tokens, width), torch.randn(width, 4 * width)
        return lambda: x @ kernel, lambda y: y.numpy()

    def tokens(self, captions: list[str]) -> dict[str, torch.Tensor]:
        given = self.tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
        return {name: given[name] for name in ("input_ids", "attention_mask")}

    def compiled(self, variant: str, dynamic: bool) -> torch.nn.Module:
        return torch.compile(self.model, dynamic=dynamic) if variant == "compiled" else self.model


if __name__ == "__main__":
    with torch.inference_mode():
        serve(Torch())
