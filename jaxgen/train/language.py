"""A causal language model fine-tuned on the captions of a data set or on a plain text, with the step, the loop, the mesh and
the checkpoints of the generators.

It learns by next-token cross-entropy over every token of a text, the one that ends it included (Radford et al., "Language
Models are Unsupervised Multitask Learners", 2019). What comes of it is a Hugging Face directory, WORKDIR/model, for
`jaxgen.text.load_language_model`, `sample.py --expand` and `data.rewrite`."""

import dataclasses
import hashlib
import json
import math
import re
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen import config as configs
from jaxgen.data import registry
from jaxgen.data.config import DataConfig
from jaxgen.data.pipeline import Source, batches, to_device
from jaxgen.errors import UserError
from jaxgen.families.base import Losses
from jaxgen.nn.module import Params, bind, dtype_of, flatten, init_params, logical_axes
from jaxgen.parallel.kept import KeptProgram
from jaxgen.parallel.mesh import MeshConfig, batch_sharding, check_batch, make_mesh, on_mesh, param_shardings
from jaxgen.parallel.runtime import compute_dtype
from jaxgen.storage import Path, as_path, copy_whole, read_text, write_json, write_text
from jaxgen.text import scratch, sources
from jaxgen.text.adapt import Adaptation, Full, LastLayers, LoRA, select, text_of, with_text
from jaxgen.text.encoder import Pretrained, load_pretrained, pad, token_limit
from jaxgen.text.expand import continued
from jaxgen.text.generate import LanguageModel, save_language_model
from jaxgen.train.checkpoints import Checkpoints
from jaxgen.train.config import EvalConfig, OptimizerConfig, TrainConfig
from jaxgen.train.fit import fit
from jaxgen.train.logging import tell
from jaxgen.train.loop import step_of
from jaxgen.train.optimizers import make_optimizer
from jaxgen.train.state import TrainState, abstract_state, create, fresh
from jaxgen.train.workdir import claim, is_finished, traced_from

HELD_OUT = 20  # of a plain text one example in so many, chosen by what it says, is for validation
Rows = list[list[int]]


@dataclass(frozen=True)
class LanguageConfig:
    """Which model learns, and the form of what it reads.

    template: "… {} …", for data sets with several captions a picture: the model also sees each of them in the template with
    another one behind it, and so learns to say one in other words. Empty: it reads captions one by one."""

    source: str = ""  # a Hub id or a directory; empty: a small GPT-2 with fresh weights and the captions' vocabulary
    adapt: Full | LastLayers | LoRA = field(default_factory=Full)  # what of it is trained
    max_length: int = 64  # tokens of an example; a longer text goes on in the next one
    template: str = ""
    hidden_size: int = 128  # of the fresh model, and so are those below
    layers: int = 4
    heads: int = 4
    vocab: int = 2000  # tokens at most

    def validate(self) -> None:
        for name, least in (("max_length", 8), ("hidden_size", 1), ("layers", 1), ("heads", 1), ("vocab", 1)):
            if getattr(self, name) < least:
                raise UserError(f"text.{name}={getattr(self, name)} must be at least {least}")
        if self.hidden_size % self.heads:
            raise UserError(f"text.hidden_size={self.hidden_size} does not divide among text.heads={self.heads}")
        if not self.source and not isinstance(self.adapt, Full):
            raise UserError("text.adapt: fresh weights are trained in full; give text.source, or leave it out")
        if self.template and (self.template.count("{}") != 1 or self.template.endswith("{}")):
            raise UserError(f"text.template={self.template!r} needs {{}} once, where the caption goes, and something behind it")


@dataclass(frozen=True)
class WritingConfig:
    """What is written while training, into samples/*.txt."""

    prompts: tuple[str, ...] = ("",)  # what texts begin with; "" leaves that to the model
    every: int = 500
    count: int = 5  # texts a prompt
    max_new_tokens: int = 32
    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 0.95


@dataclass(frozen=True)
class LanguageRunConfig:
    """A whole run. data.name may also be text:FILE, a plain text in UTF-8: texts between blank lines, or, where there are
    none, a text a line."""

    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    text: LanguageConfig = field(default_factory=LanguageConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    sample: WritingConfig = field(default_factory=WritingConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def validate(self) -> None:
        if self.eval.metric != "eval/loss":
            raise UserError(f"eval.metric={self.eval.metric}: a language model is judged by eval/loss")
        if self.optimizer.name != "adamw":
            raise UserError(f"optimizer.name={self.optimizer.name}: a language model is trained with adamw")
        if self.data.rewrite.source:
            raise UserError("data.rewrite is for pictures: a language model learns from the captions as they are")
        if self.train.init_from is not None:
            raise UserError(f"train.init_from={self.train.init_from}: the model to begin with is text.source")


@dataclass(frozen=True)
class NextToken:
    """What the step and the state ask of a family, for a model that draws nothing: all that is trained is what `adapt` trains
    of the language model."""

    groups: ClassVar = ("model",)
    drawn: ClassVar = ("model",)

    architecture: Any
    adapt: Adaptation

    def init(self, key: jax.Array, shapes: Any) -> Params:
        return {"model": {}}

    def logical_axes(self, shapes: Any) -> Params:
        return {"model": {}}

    def losses(self, params: Params, frozen: Params, batch: dict[str, Any], key: jax.Array) -> Losses:
        """Of batch {"input_ids", "attention_mask"}: int32 [B, T], padded at the end."""
        total, count = self.total(text_of(params), frozen, batch)
        loss = total / jnp.maximum(count, 1)
        return {"model": (loss, {"perplexity": jnp.exp(loss)})}

    def total(self, trained: Params, frozen: Params, batch: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
        """(sum of -log p of all tokens but each row's first, number of them): float32 []; in the dtype of `trained`."""
        dtype = dtype_of(trained)
        base = jax.tree.map(lambda p: p.astype(dtype), frozen["text"])
        module = bind(self.architecture.build, self.adapt.merge(base, trained))
        ids, mask = batch["input_ids"], batch["attention_mask"]
        _, last = module(ids, mask, dtype)
        logits = module.logits(last[:, :-1]).astype(jnp.float32)
        right = jnp.take_along_axis(logits, ids[:, 1:, None], axis=-1)[..., 0]
        real = (mask[:, 1:] > 0).astype(jnp.float32)
        return jnp.sum((jax.nn.logsumexp(logits, axis=-1) - right) * real), jnp.sum(real)

    def train_flops(self, tokens: int) -> float:
        """Of one text in a step: a forward pass and a backward pass of twice its work."""
        c: Any = self.architecture
        arrays = flatten(jax.eval_shape(lambda: init_params(c.build, jax.random.key(0))))
        # The table of words multiplies once: as the head, where there is no other.
        kernels = sum(
            leaf.size for name, leaf in arrays if leaf.ndim > 1 and not name.endswith(("embedding", "lm_head.kernel"))
        )
        return 3.0 * tokens * (2.0 * (kernels + c.vocab_size * c.hidden_size) + 4.0 * tokens * c.hidden_size * c.depth)


class Texts(Source):
    """Rows of token ids in the captions' place, and no pictures: of those of one picture's texts each visit draws one."""

    def __init__(self, rows: Sequence[Rows]):
        self.records, self.made = rows, {}

    def captions_of(self, index: int) -> Any:
        return self.records[index]


def run(config: LanguageRunConfig, workdir: Path, *, profile: bool = False) -> None:
    """Train until config.train.steps, early stopping, or SIGTERM/SIGINT (saves, exits with status 0); then write the model.

    Raises UserError for whatever the user can mend, a loss that is not finite included."""
    began = time.monotonic()
    mesh = make_mesh(config.mesh)
    check_batch(config.train.batch_size, mesh, config.train.accumulate)
    claim(workdir, config)
    texts = read_texts(config.data, "train")

    with tempfile.TemporaryDirectory(prefix="jaxgen-lm-") as place:
        directory = config.text.source
        if not directory:  # made anew at each start, the same each time
            directory = f"{place}/fresh"
            said = [config.text.template, *(text for some in texts for text in some)]
            sizes = {name: getattr(config.text, name) for name in ("hidden_size", "layers", "heads", "vocab")}
            # Twice the positions that are trained: a prompt and what follows it are longer than either.
            scratch.write(directory, said, **sizes, max_length=2 * config.text.max_length, seed=config.seed, causal=True)
        _run(config, workdir, load_pretrained(directory, head="lm", mesh=mesh), mesh, texts, began, profile)


def _run(
    config: LanguageRunConfig,
    workdir: Path,
    pretrained: Pretrained,
    mesh: jax.sharding.Mesh,
    texts: list[list[str]],
    began: float,
    profile: bool,
) -> None:
    kept = KeptProgram(config, mesh, traced_from(config))

    # Input
    start = LanguageModel(pretrained)
    start.tokenizer.fit(pretrained.architecture.vocab_size)
    limit, begin = token_limit(pretrained, config.text.max_length), opening(start)
    if config.text.template:
        texts = [with_pairs(some, config.text.template) for some in texts]
    rows, held = tokenized(texts, start, limit), []
    if config.data.name.startswith("text:"):
        rows, held = split(rows)
    elif config.eval.every:
        held = tokenized(read_texts(config.data, "validation"), start, limit)
    if not rows or (config.eval.every and not held):
        raise UserError(f"data.name={config.data.name} is too short to hold out a part of it: eval.every=0 trains without")
    length = min(-(-max(len(row) for some in rows for row in some) // 8) * 8, limit)  # a multiple of 8: few programs
    padding = start.tokenizer.padding

    def ready(batch: dict[str, Any]) -> dict[str, np.ndarray]:
        return pad([row[:length] for row in batch["caption"]], length, padding)

    # State
    family: Any = NextToken(pretrained.architecture, config.text.adapt)
    optimizers = {"model": make_optimizer(config.optimizer, config.train.steps, mesh)}
    adapt, architecture, base = config.text.adapt, pretrained.architecture, pretrained.params

    def make(base: Params) -> TrainState:
        nothing: Any = None
        return create(family, nothing, optimizers, config.seed, lambda key: adapt.init(key, base, architecture))

    abstract = abstract_state(make, base, with_text({"model": {}}, adapt.axes(architecture), "model"), mesh)
    where = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    score = config.eval.score if config.eval.every else None
    checkpoints = Checkpoints(workdir, config.train.keep_checkpoints, score)
    restored = checkpoints.restore(abstract)
    control: dict[str, Any] = {"best": None, "waited": 0, "stopped": False, "spent": {}}
    # Fresh weights are told by the texts alone: another device may draw them otherwise in their last bits.
    mark = hashlib.sha256(json.dumps([pretrained.digest if config.text.source else "", rows]).encode()).hexdigest()
    if restored is not None:
        state, meta = restored
        if meta["text_fingerprint"] != mark:
            raise UserError(
                f"{workdir} was begun with other model files or other texts: restore those or choose another --workdir"
            )
        control |= meta["control"]
    else:
        state = fresh(make, base, where)
    own = dict(flatten(text_of(state.params)))
    frozen = {"text": select(base, lambda name: name not in own)}
    laid = param_shardings(mesh, logical_axes(architecture.build), base)
    pretrained = dataclasses.replace(pretrained, params={}, values=described(pretrained.values, begin, config.text.template))
    del start, base
    if jax.process_index() == 0:
        write_json(workdir / "config.json", configs.to_dict(config))
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    tell(f"{count / 1e6:.2f} million parameters, {len(rows)} texts, from step {int(state.step)} to {config.train.steps}")

    # Loop
    dtype = compute_dtype(config.train.compute_dtype)
    merge = jax.jit(lambda trained, base: adapt.merge(base, trained), out_shardings=laid)
    totals = jax.jit(on_mesh(mesh, family.total))

    def feed(source: Texts, seed: int, step: int = 0) -> Any:
        own = {"process_index": jax.process_index(), "process_count": jax.process_count()}
        return batches(source, seed=seed, batch_size=config.train.batch_size, start_step=step, **own)

    def model_of(state: TrainState) -> LanguageModel:
        """The model with the running average of what is trained."""
        return LanguageModel(dataclasses.replace(pretrained, params=merge(text_of(state.ema_params), frozen["text"])), dtype)

    def evaluate(state: TrainState) -> dict[str, float]:
        found, raw, place = [], feed(Texts(held), 0), batch_sharding(mesh)
        for _ in range(max(config.eval.count // config.train.batch_size, 1)):
            batch = jax.tree.map(lambda x: jax.make_array_from_process_local_data(place, x), ready(next(raw)))
            found.append(totals(text_of(state.ema_params), frozen, batch))
        total, tokens = np.sum(jax.device_get(found), axis=0)
        return {"eval/loss": float(total / tokens), "eval/perplexity": math.exp(total / tokens)}

    def write_samples(state: TrainState, step: int, log: Any) -> None:
        said = write(model_of(state), begin, config.sample, config.seed)
        if jax.process_index() == 0:
            write_text(workdir / "samples" / f"step_{step:07d}.txt", "".join(f"{text}\n" for text in said))

    if is_finished(config, workdir, int(state.step), control):
        checkpoints.close()
    else:
        state = fit(
            config,
            workdir,
            step_of(config, family, optimizers, dtype),
            state,
            frozen,
            to_device(feed(Texts(rows), config.seed, int(state.step)), batch_sharding(mesh), ready),
            where=where,
            kept=kept,
            checkpoints=checkpoints,
            control=control,
            marks={"text_fingerprint": mark},
            flops=lambda batch: family.train_flops(batch["input_ids"].shape[1]),
            evaluate=evaluate,
            draw=write_samples if config.sample.prompts else None,
            use=f"write with: python sample.py --expand={workdir}/model --prompt=...",
            began=began,
            unit="texts",
            profile=profile,
        )
    if int(state.step) >= config.train.steps or control["stopped"]:
        save(model_of(state), workdir / "model")


def read_texts(config: DataConfig, split: str) -> list[list[str]]:
    """The texts of a split, those of a picture together; of a plain text (text:FILE) all of them, whatever the split.

    Raises UserError where there are none."""
    kind, _, file = config.name.partition(":")
    if kind != "text":
        records = registry.records(config, split)
        return [records[i][1] for i in range(len(records))]
    try:
        said = read_text(as_path(file))
    except OSError as error:
        raise UserError(f"data.name={config.name} cannot be read ({error.strerror or error})") from None
    parts = [part.strip() for part in re.split(r"\n\s*\n", said) if part.strip()]
    if len(parts) == 1:
        parts = [line.strip() for line in parts[0].splitlines()]
    if not parts:
        raise UserError(f"data.name={config.name} is empty: it takes texts between blank lines, or one a line")
    return [[part] for part in parts]


def with_pairs(captions: list[str], template: str) -> list[str]:
    """The captions of a picture, and each in the template with another one behind it."""
    return captions + [f"{template.replace('{}', a)} {b}" for a in captions for b in captions if a != b]


def opening(model: LanguageModel) -> str:
    """What a text begins with where the tokenizer does not see to that: the token that begins one, or that ends one."""
    named = sources.special_tokens(model.pretrained.tokenizer_directory)
    return "" if model.tokenizer.count("") else named.get("bos_token") or named.get("eos_token") or ""


def tokenized(texts: list[list[str]], model: LanguageModel, limit: int) -> list[Rows]:
    """Token ids of each text from the token that begins it to the one that ends it, in pieces of at most `limit`."""
    if not model.ends:
        raise UserError(
            f"{model.pretrained.directory} says of no token that it ends a text: set eos_token_id in its config.json"
        )
    begin, end = opening(model), model.ends[0]
    each = iter(model.tokenizer.encode([begin + text for some in texts for text in some], 2**30))

    def pieces(row: list[int]) -> Rows:
        row = row if row[-1] in model.ends and len(row) > 1 else [*row, end]
        return [row[i : i + limit] for i in range(0, len(row) - 1, limit)]

    return [[piece for _ in some for piece in pieces(next(each))] for some in texts]


def split(rows: list[Rows]) -> tuple[list[Rows], list[Rows]]:
    """(training, validation) of a plain text, a piece an example; the same piece is never in both."""
    parts: tuple[list[Rows], list[Rows]] = ([], [])
    for piece in (piece for some in rows for piece in some):
        parts[zlib.crc32(np.asarray(piece, np.int32).tobytes()) % HELD_OUT == 0].append([piece])
    return parts


def described(values: dict[str, Any], begin: str, template: str) -> dict[str, Any]:
    """A config.json's fields with the templates that the model has been trained for."""
    tasks = {"expand": {"template": begin + "{}"}} | ({"rewrite": {"template": begin + template}} if template else {})
    return values | {"task_specific_params": (values.get("task_specific_params") or {}) | tasks}


def write(model: LanguageModel, begin: str, config: WritingConfig, seed: int) -> list[str]:
    """`count` texts of each prompt, the prompt included."""
    prompts = [prompt for prompt in config.prompts for _ in range(config.count)]
    settings = {name: getattr(config, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p")}
    answers = model.generate([begin + prompt for prompt in prompts], seed=seed, **settings)
    return [continued(prompt, answer).strip() for prompt, answer in zip(prompts, answers, strict=True)]


def save(model: LanguageModel, target: Path) -> None:
    """Write the model's directory, over an older one; `target` may be remote."""
    from jax.experimental import multihost_utils

    gather: Callable[[Any], Any] = lambda leaf: (  # noqa: E731
        leaf if leaf.is_fully_addressable else multihost_utils.process_allgather(leaf, tiled=True)
    )
    model.params = jax.tree.map(gather, model.params)
    if jax.process_index() == 0:
        with tempfile.TemporaryDirectory(prefix="jaxgen-lm-") as place:
            save_language_model(model, f"{place}/model")
            copy_whole(as_path(place) / "model", target, last="config.json")
