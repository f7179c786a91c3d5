"""Compares jaxgen's language model with transformers and PyTorch on a local Hugging Face directory, float32, eager attention.

    python scripts/check_text_parity.py DIRECTORY [--head=lm|classification] [--tokens=32]

Needs an environment with jaxgen, torch and transformers (extra `torch`). Prints max |difference| / max |reference| of every
hidden state, the last one, the pooled vector where transformers has the same, and a head's logits, each over the real
tokens of three random rows padded at the end; exits with status 1 where one is above 1e-5."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from jaxgen.errors import UserError, cli

LIMIT = 1e-5


def tokens(values: dict[str, Any], length: int) -> tuple[np.ndarray, np.ndarray]:
    """ids and mask, int32 [3, length]: rows of length, two thirds and a third of it, each with the end token at its end."""
    ids_of = {name: values.get(f"{name}_token_id") for name in ("pad", "bos", "eos", "decoder_start", "image", "video")}
    special = {i for i in ids_of.values() if isinstance(i, int)} | {0, 1, 2}
    draw = np.random.default_rng(0)
    ids = np.full((3, length), ids_of["pad"] if isinstance(ids_of["pad"], int) else 0, np.int32)
    mask = np.zeros_like(ids)
    for row, count in enumerate((length, length * 2 // 3, length // 3)):
        words = draw.integers(3, values["vocab_size"], 4 * length)
        ids[row, :count] = [i for i in words if i not in special][:count]
        if isinstance(ids_of["eos"], int):
            ids[row, count - 1] = ids_of["eos"]
        mask[row, :count] = 1
    return ids, mask


def theirs(directory: Path, head: str, ids: np.ndarray, mask: np.ndarray) -> dict[str, Any]:
    """{"states": [array ...], "last", "pooled", "logits"}; the last two where there are."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(directory)
    cls = {"lm": transformers.AutoModelForCausalLM, "classification": transformers.AutoModelForSequenceClassification}.get(head)
    named = (config.architectures or [""])[0]
    if cls is None:  # the whole model behind a head, but the half of one where only that is stored
        cls = getattr(transformers, named) if named.endswith(("Model", "WithProjection")) else transformers.AutoModel
    model: Any = cls.from_pretrained(directory, attn_implementation="eager", dtype=torch.float32).eval()
    base = getattr(model, model.base_model_prefix, model) if head else model
    if getattr(model.config, "is_encoder_decoder", False):
        model = base = model.get_encoder()
    elif not head and hasattr(model, "language_model"):
        model = base = model.language_model  # of one that also sees
    run = getattr(model, "get_text_features", model)  # of CLIP's two halves
    padded = {"input_ids": torch.tensor(ids, dtype=torch.long), "attention_mask": torch.tensor(mask, dtype=torch.long)}
    with torch.no_grad():
        result = run(**padded, output_hidden_states=True)
        last = base(**padded).last_hidden_state if head or run is model else result.last_hidden_state
    out = {"states": [state.numpy() for state in result.hidden_states], "last": last.numpy()}
    pooled = getattr(result, "text_embeds", None)
    if pooled is None and config.model_type.startswith("clip"):
        pooled = getattr(result, "pooler_output", None)  # others' goes through a layer that only their pretraining used
    for name, value in (("pooled", pooled), ("logits", getattr(result, "logits", None))):
        if value is not None:
            out[name] = value.numpy()
    return out


def ours(model: Any, head: str, ids: np.ndarray, mask: np.ndarray) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    from jaxgen.nn.module import bind

    def run(params: Any) -> dict[str, Any]:
        module = bind(model.architecture.build, params)
        states, last = module(jnp.asarray(ids), jnp.asarray(mask), jnp.float32)
        out = {"states": states, "last": last, "pooled": module.pool(last, ids, mask)}
        if head:
            out["logits"] = module.logits(last) if head == "lm" else module.classify(last, ids, mask)
        return out

    return jax.device_get(jax.jit(run)(model.params))


@cli
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--head", choices=("lm", "classification"), default="")
    parser.add_argument("--tokens", type=int, default=32)
    arguments = parser.parse_args()
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise UserError(f'{error}: pip install "jaxgen[torch]"') from None
    if not arguments.directory.is_dir():
        raise UserError(f"{arguments.directory} is no directory")
    from jaxgen.text.encoder import load_pretrained

    model = load_pretrained(str(arguments.directory), head=arguments.head)
    if not 4 <= arguments.tokens <= model.architecture.max_length:
        raise UserError(f"--tokens={arguments.tokens}: {arguments.directory} takes from 4 to {model.architecture.max_length}")
    ids, mask = tokens(model.values, arguments.tokens)
    found, expected = ours(model, arguments.head, ids, mask), theirs(arguments.directory, arguments.head, ids, mask)
    if len(found["states"]) != len(expected["states"]):
        sys.exit(f"{len(found['states'])} hidden states, and transformers has {len(expected['states'])}")
    rows = [(f"hidden state {i}", *pair) for i, pair in enumerate(zip(found["states"], expected["states"], strict=True))]
    rows += [(name, found[name], expected[name]) for name in ("last", "pooled", "logits") if name in expected]
    worst, real = 0.0, mask > 0
    for name, a, b in rows:
        if a.ndim == 3:  # [B, T, D]: what stands on padding counts for nothing
            a, b = a[real], b[real]
        error = float(np.abs(a - b).max() / np.abs(b).max())
        worst = max(worst, error) if error == error else float("inf")
        print(f"{name:16s} {error:.2e}")
    print(f"{'worst':16s} {worst:.2e}, limit {LIMIT:g}: {'FAILED' if worst > LIMIT else 'the same'}")
    sys.exit(worst > LIMIT)


if __name__ == "__main__":
    main()
