"""Writes tests/text/references/NAME.npz for each NAME.json there: what transformers and PyTorch compute for tiny models.

    python scripts/make_text_references.py [NAME ...]

Needs torch and transformers (extra `torch`). A case's JSON: {"model": transformers' class, "config": {fields that
differ from the class's defaults}, "head": "" | "lm" | "classification", "lengths": of the rows}. Kept are the tensors' names
and shapes as transformers saves them, its config.json, token ids (three rows, padded at the end), all hidden states, the last
one, the pooled vector where the model has one, the head's logits, with "lm" 64 tokens of greedy generation (padded in front),
and of a classifier that knows them the logits of rows whose second half is a second sentence."""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.text.cases import NAMES, REFERENCES, Case, write

LENGTHS = (11, 7, 4)


def main() -> None:
    for name in sys.argv[1:] or NAMES:
        out = reference(Case(name))
        np.savez_compressed(REFERENCES / f"{name}.npz", **out)
        print(name, {key: value.shape for key, value in out.items() if value.shape})


def reference(case: Case) -> dict[str, np.ndarray]:
    cls = getattr(transformers, case.model)
    config = cls.config_class(**case.config)
    config._attn_implementation = "eager"
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        cls(config).save_pretrained(directory)
        with safe_open(str(directory / "model.safetensors"), "numpy") as file:
            shapes = {tensor: tuple(file.get_slice(tensor).get_shape()) for tensor in file.keys()}  # noqa: SIM118
        saved = json.loads((directory / "config.json").read_text())
        write(directory, saved, shapes)
        model = cls.from_pretrained(directory, attn_implementation="eager", dtype=torch.float32).eval()
    text = saved.get("text_config", saved)
    ids, mask = tokens(text, text["vocab_size"], case.spec.get("lengths", LENGTHS))
    padded = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    with torch.no_grad():
        run = getattr(model, "get_text_features", model)  # of CLIP's two halves
        if getattr(model.config, "is_encoder_decoder", False):
            run = model.get_encoder()
        result = run(**padded, output_hidden_states=True)
        states = torch.stack(result.hidden_states)
        base = getattr(model, model.base_model_prefix, model) if case.head else run
        last = base(**padded).last_hidden_state
        out = {"ids": ids, "mask": mask, "states": states.numpy(), "last": last.numpy()}
        for key in ("text_embeds", "pooler_output", "logits"):
            if getattr(result, key, None) is not None:
                out[key] = getattr(result, key).numpy()
        if case.head == "classification" and text.get("type_vocab_size", 0) > 1:
            types = (np.arange(ids.shape[1]) >= mask.sum(1, keepdims=True) // 2) * mask
            out |= {"types": types, "typed_logits": model(**padded, token_type_ids=torch.tensor(types)).logits.numpy()}
        if case.head == "lm":
            left, front = np.flip(ids, 1).copy(), np.flip(mask, 1).copy()
            done = model.generate(
                input_ids=torch.tensor(left), attention_mask=torch.tensor(front), do_sample=False, max_new_tokens=64,
                eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
            out |= {"prompt": left, "prompt_mask": front, "generated": done[:, ids.shape[1] :].numpy()}
    out = {key: value.astype(np.float32 if value.dtype.kind == "f" else np.int32) for key, value in out.items()}
    return out | {"tensors": np.array(json.dumps(shapes)), "config": np.array(json.dumps(saved))}


def tokens(config: dict, vocabulary: int, lengths: tuple[int, ...] = LENGTHS) -> tuple[np.ndarray, np.ndarray]:
    """ids and mask [3, 11] of rows that end with the end token; no special token stands elsewhere."""
    special = {config.get(f"{kind}_token_id") for kind in ("pad", "bos", "eos", "decoder_start")} | {0, 1, 2}
    plain = [i for i in range(vocabulary) if i not in special]
    draw = np.random.RandomState(0)
    ids = np.full((len(lengths), max(lengths)), config.get("pad_token_id") or 0, np.int64)
    mask = np.zeros_like(ids)
    end = config.get("eos_token_id")
    for row, length in enumerate(lengths):
        ids[row, :length] = draw.choice(plain, length)
        if isinstance(end, int):
            ids[row, length - 1] = end
        mask[row, :length] = 1
    return ids, mask


if __name__ == "__main__":
    main()
