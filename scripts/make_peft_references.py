"""Writes tests/text/references/peft_NAME/: LoRA as the `peft` package makes and applies it, on the tiny models of the tests.

    python scripts/make_peft_references.py [NAME ...]
    python scripts/make_peft_references.py --check NAME DIRECTORY

Needs torch, transformers and peft. A folder has PEFT's own two files, with random factors, and last.npy, the last hidden
state of the case's model with them. With --check peft loads an adapter that jaxgen.text.peft.save_adapter wrote for the
model of case NAME, and its last hidden state is compared with DIRECTORY/last.npy."""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import peft
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.text.cases import REFERENCES, Case, random_tensor

TARGETS = {"bert": ["query", "value"], "llama_bias": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"]}


def main() -> None:
    if sys.argv[1:2] == ["--check"]:
        name, directory = sys.argv[2:]
        model = peft.PeftModel.from_pretrained(base(name), directory).eval()
        theirs, ours = last(model, name), np.load(Path(directory) / "last.npy")
        print(f"largest difference of {np.abs(theirs - ours).max():.3g}, largest value {np.abs(theirs).max():.3g}")
        return
    for name in sys.argv[1:] or TARGETS:
        torch.manual_seed(0)
        patterns = {"rank_pattern": {"mlp.c_proj": 2}, "alpha_pattern": {"mlp.c_proj": 6}} if name == "gpt2" else {}
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS[name], fan_in_fan_out=name == "gpt2", **patterns)
        model = peft.get_peft_model(base(name), config).eval()
        with torch.no_grad():
            for path, value in model.named_parameters():
                if "lora_" in path:
                    value.copy_(torch.tensor(0.3 * random_tensor(path, tuple(value.shape))))
        target = REFERENCES / f"peft_{name}"
        model.save_pretrained(target)
        (target / "README.md").unlink(missing_ok=True)
        values = json.loads((target / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}
        values["target_modules"] = sorted(values["target_modules"])
        (target / "adapter_config.json").write_text(json.dumps(values, indent=1, sort_keys=True) + "\n")
        np.save(target / "last.npy", last(model, name))
        print(target, sum(file.stat().st_size for file in target.iterdir()), "bytes")


def base(name: str) -> torch.nn.Module:
    case = Case(name)
    with tempfile.TemporaryDirectory() as directory:
        case.write(Path(directory))
        cls = getattr(transformers, case.model)
        return cls.from_pretrained(directory, attn_implementation="eager", dtype=torch.float32)


def last(model: torch.nn.Module, name: str) -> np.ndarray:
    stored = Case(name).stored
    ids, mask = torch.tensor(stored["ids"]).long(), torch.tensor(stored["mask"]).long()
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1].numpy()


if __name__ == "__main__":
    main()
