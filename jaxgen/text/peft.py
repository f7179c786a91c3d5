"""Trained adapters alone, as PEFT keeps them: adapter_config.json and adapter_model.safetensors.

LoRA and AdaLoRA are written and read in PEFT's own layout; other methods in the same two files, under a peft_type of ours."""

import json
import math
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jaxgen import config as configs
from jaxgen.errors import UserError
from jaxgen.nn.module import Params, flatten, unflatten
from jaxgen.text.adapt import AdaLoRA, Adaptation, LoRA, Method, adaptable, factors_of
from jaxgen.text.encoder import Pretrained
from jaxgen.text.sources import check_new, read_json
from jaxgen.text.weights import Table, Tensor

CONFIG, WEIGHTS, OURS, ROOT = "adapter_config.json", "adapter_model.safetensors", "JAXGEN_", "base_model.model."
# Fields of PEFT's configuration that change what is computed -> the values with which they do not.
HARMLESS: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (),
    "arrow_config": (),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva"),  # others change the model's own weights
    "kasa_config": (),
    "layer_replication": (),
    "lora_bias": (False,),
    "modules_to_save": ([],),
    "monteclora_config": (),
    "target_parameters": ([],),
    "trainable_token_indices": ([], {}),
    "use_bdlora": (False,),
    "use_dora": (False,),
    "use_qalora": (False,),
}


def save_adapter(trained: Params, method: Method, pretrained: Pretrained, directory: str | Path) -> None:
    """Write what was trained, and how, into a new directory. PEFT loads LoRA and AdaLoRA on transformers' model."""
    target = Path(directory)
    check_new(target)
    flat = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), dict(flatten(jax.device_get(trained))))
    values: dict[str, Any] = {"base_model_name_or_path": str(pretrained.directory), "inference_mode": True, "task_type": None}
    if isinstance(method, LoRA | AdaLoRA):
        tensors, more = _theirs(unflatten(flat), method, pretrained.architecture.tensors())
        values |= more
    else:
        chosen = configs.to_dict(method)
        tensors, values = flat, values | {"peft_type": OURS + chosen["type"].upper(), "method": chosen}
    target.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
    (target / CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True))  # last: without it the directory is no adapter


def load_adapter(directory: str | Path, pretrained: Pretrained) -> tuple[Method, Params]:
    """(method, trained) of an adapter for a model; `adapt.adapted` puts it in. Raises UserError naming what is not done here,
    or the tensor that is missing, surplus, misshapen or not finite."""
    where, file = Path(directory) / CONFIG, Path(directory) / WEIGHTS
    values = read_json(where)
    kind = str(values.get("peft_type"))
    if kind not in ("LORA", "ADALORA") and not kind.startswith(OURS):
        raise UserError(f"{where}: peft_type={kind!r} is not supported; LORA, ADALORA and what jaxgen writes are")
    for name, harmless in HARMLESS.items():
        if values.get(name) is not None and values[name] not in harmless:
            raise UserError(f"{where}: {name}={values[name]!r} is not supported")
    try:
        tensors = load_file(file)
    except FileNotFoundError:
        raise UserError(f"{file} is missing (a pickle, adapter_model.bin, is not read)") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is no whole safetensors file ({error}); download it again") from None
    for name, value in tensors.items():
        if value.dtype.kind not in "fV" or not np.isfinite(value.astype(np.float32)).all():
            raise UserError(f"{file}: tensor {name} holds NaN, infinity or no floating-point numbers")
    if not kind.startswith(OURS):
        method, trained = _ours(values, tensors, pretrained, file)
    else:
        method = configs.finalize(configs.from_dict(None, values.get("method") or {"type": "?"}, str(where)))
        if not isinstance(method, Adaptation):
            raise UserError(f"{where}: {values['method']['type']!r} is no way to adapt a text encoder")
        trained, key, architecture = unflatten(tensors), jax.random.key(0), pretrained.architecture
        wanted = dict(flatten(jax.eval_shape(lambda: method.init(key, pretrained.params, architecture))))
        for name in sorted(wanted.keys() ^ tensors.keys()):
            raise UserError(f"{file}: tensor {name} is {'missing' if name in wanted else 'surplus'}: not of this text encoder")
        for name, value in tensors.items():
            if value.shape != wanted[name].shape:
                raise UserError(
                    f"{file}: tensor {name} has shape {value.shape}, this text encoder asks for {wanted[name].shape}"
                )
    return method, jax.tree.map(lambda leaf: jax.numpy.asarray(leaf, np.float32), trained)


def _theirs(trained: Params, method: LoRA | AdaLoRA, table: Table) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """PEFT's tensors and its configuration's fields."""
    modules: dict[str, dict[int, tuple[Tensor, dict[str, np.ndarray]]]] = {}
    for ours, f in factors_of(trained).items():
        tensor = table[ours]
        modules.setdefault(tensor.name.removesuffix(".weight"), {})[tensor.part[0]] = (tensor, f)
    tensors, ranks, alphas = {}, {}, {}
    end = "" if isinstance(method, AdaLoRA) else ".weight"
    for module, parts in modules.items():
        fused = _fused(parts)
        if (rank := fused["a"].shape[1]) != method.rank:
            ranks[module] = rank
            alphas[module] = method.scale * (math.sqrt(rank) if isinstance(method, LoRA) and method.rslora else rank)
        tensors[f"{ROOT}{module}.lora_A{end}"] = np.ascontiguousarray(fused["a"].T)
        tensors[f"{ROOT}{module}.lora_B{end}"] = np.ascontiguousarray(fused["b"].T)
        if "e" in fused:
            tensors[f"{ROOT}{module}.lora_E"] = fused["e"][:, None]
    if ranks and isinstance(method, AdaLoRA):
        raise UserError(f"PEFT's AdaLoRA knows one rank for all and cannot hold {next(iter(ranks))}: use LoRA there")
    known = {table[ours].name.removesuffix(".weight") for ours in table if table[ours].name.endswith(".weight")}
    values = {
        "peft_type": "LORA",
        "r": method.rank,
        "lora_alpha": method.alpha,
        "target_modules": _endings(set(modules), known),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "fan_in_fan_out": not all(t.transposed for parts in modules.values() for t, _ in parts.values()),
        "bias": "none",
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": isinstance(method, LoRA) and method.rslora,
    }
    if isinstance(method, AdaLoRA):
        values |= {"peft_type": "ADALORA", "r": 8, "init_r": method.rank, "target_r": method.target_rank, "rank_pattern": None}
        values |= {"tinit": method.warmup_steps, "tfinal": method.final_steps, "deltaT": method.every}
        values |= {"total_step": method.warmup_steps + method.final_steps + 1, "orth_reg_weight": method.orthogonality}
        values |= {"beta1": method.beta1, "beta2": method.beta2}
    return tensors, values


def _fused(parts: dict[int, tuple[Tensor, dict[str, np.ndarray]]]) -> dict[str, np.ndarray]:
    """The factors of a stored tensor from those of its parts along the output (a fused q, k, v): as they are where all parts
    share a, else blocks beside each other, which is a higher rank and the same change."""
    count = next(iter(parts.values()))[0].part[1]
    each = [parts[i][1] for i in sorted(parts)]
    if count == 1:
        return each[0]
    if len(each) == count and "e" not in each[0] and all((f["a"] == each[0]["a"]).all() for f in each):
        return {"a": each[0]["a"], "b": np.concatenate([f["b"] for f in each], axis=1)}
    rank, width = each[0]["b"].shape
    b = np.zeros((len(each) * rank, count * width), np.float32)
    for k, i in enumerate(sorted(parts)):
        b[k * rank : (k + 1) * rank, i * width : (i + 1) * width] = each[k]["b"]
    fused = {"a": np.concatenate([f["a"] for f in each], axis=1), "b": b}
    return fused | ({"e": np.concatenate([f["e"] for f in each])} if "e" in each[0] else {})


def _ours(values: dict[str, Any], tensors: dict[str, np.ndarray], pretrained: Pretrained, file: Path) -> tuple[Any, Params]:
    """A method of ours and its arrays from PEFT's."""
    adaptive = values["peft_type"] == "ADALORA"
    field = {"rank": "init_r", "target_rank": "target_r", "warmup_steps": "tinit", "final_steps": "tfinal", "every": "deltaT"}
    field |= {"orthogonality": "orth_reg_weight", "beta1": "beta1", "beta2": "beta2"}
    if not adaptive:
        field = {"rank": "r", "rslora": "use_rslora"}
    where = file.parent / CONFIG
    missing = [name for name in ("lora_alpha", field["rank"]) if not isinstance(values.get(name), int | float)]
    if missing:
        raise UserError(f"{where} lacks {missing[0]}")
    if adaptive and values.get("rank_pattern"):
        raise UserError(f"{where}: rank_pattern is not supported with ADALORA")
    chosen = {ours: values[theirs] for ours, theirs in field.items() if values.get(theirs) is not None}
    chosen["alpha"] = float(values["lora_alpha"])
    table, shapes = pretrained.architecture.tensors(), {n: p.shape for n, p in flatten(pretrained.params)}
    kernels = adaptable(pretrained.params)
    places: dict[str, list[str]] = {}  # module's path -> our kernels
    for ours in kernels:
        for name in (table[ours].name, table[ours].alias):
            if name:
                places.setdefault(name.removesuffix(".weight"), []).append(ours)
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, value in tensors.items():
        match = re.fullmatch(rf"{re.escape(ROOT)}(.+)\.lora_([ABE])(\.weight)?", name)
        options = [match[1], *(match[1].removeprefix(p) for p in pretrained.architecture.prefixes)] if match else []
        module = next((option for option in options if option in places), None)
        if match is None or module is None:
            raise UserError(f"{file}: tensor {name} belongs to no linear layer of this text encoder")
        found.setdefault(module, {})[match[2].lower()] = value.astype(np.float32)
    if not found:
        raise UserError(f"{file} holds no adapter")
    method = AdaLoRA(**chosen) if adaptive else LoRA(**chosen)
    flat, targets = {}, set()
    for module, f in found.items():
        for letter in ("a", "b", "e") if adaptive else ("a", "b"):
            if letter not in f:
                raise UserError(f"{file}: tensor {ROOT}{module}.lora_{letter.upper()} is missing")
        a, b = f["a"].T, f["b"].T
        rank = _pattern(values.get("rank_pattern"), module, method.rank)
        alpha = _pattern(values.get("alpha_pattern"), module, method.alpha)
        scale = alpha / (math.sqrt(rank) if isinstance(method, LoRA) and method.rslora else rank)
        if scale != method.scale:
            b = b * np.float32(scale / method.scale)
        for ours in places[module]:
            (rows, columns), (part, count) = shapes[ours], table[ours].part
            if (a.shape, b.shape, f.get("e", a[:1]).size) != ((rows, rank), (rank, columns * count), rank):
                raise UserError(
                    f"{file}: the factors of {module} have shapes {a.T.shape} and {b.T.shape}, "
                    f"this text encoder asks for {(rank, rows)} and {(columns * count, rank)}"
                )
            flat |= {f"{ours}.a": a.copy(), f"{ours}.b": b[:, part * columns : (part + 1) * columns].copy()}
            if adaptive:
                flat[f"{ours}.e"] = f["e"].reshape(rank)
            targets.add(kernels[ours])
    return configs.finalize(type(method)(**chosen, targets=tuple(sorted(targets)))), unflatten(flat)


def _pattern(pattern: dict[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's exceptions: regular expressions for the end of a module's path."""
    return next((v for name, v in (pattern or {}).items() if re.match(rf"(.*\.)?({name})$", module)), default)


def _endings(chosen: set[str], known: set[str]) -> list[str]:
    """The shortest endings of module paths that mean the chosen ones of the known ones."""
    found = set()
    for module in chosen:
        parts = module.split(".")
        endings = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        found.add(next(e for e in endings if {m for m in known if f".{m}".endswith(f".{e}")} <= chosen))
    return sorted(found)
