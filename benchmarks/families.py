"""The families side by side on scenes of 32 x 32: one text encoder, one data set, like networks, like training arithmetic.

    python benchmarks/families.py [--budget=1.0] [--only=flow,gan] [--workdirs=runs/families] [--data_dir=DIR]
        [--prompts=1000] [--seeds=3] [--splits=test] [--json=PATH] [--sheet=families.png]
        [--families_from=flow=runs/a,gan=runs/b]

train.py trains each in a directory of its own: the same command again goes on where it was cut, and trains nothing twice. The
full budget is the arithmetic of configs/scenes.py; `--budget` is a share of it. A teacher's or a codec's training comes on top
and is reported beside. What draws has as many parameters as the first family's, within a tenth. What `--families_from` names is
not trained: a workdir, an exported directory or a shipped model is measured as it is.

Prints and writes, of each: parameters, training arithmetic, images/s in training (the median) and in drawing, the memory of a
training step, shares drawn exactly by split and kind, and how far apart those pictures of one caption lie that are right, as a
share of the data's own."""

import argparse
import dataclasses
import json
import math
import multiprocessing
import os
import time
from collections.abc import Collection, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from training import ROOT, train

from jaxgen.errors import UserError, cli

SPLITS = ("test", "test_unseen_pairs", "test_paraphrases")
COLUMNS = ("exact", "exact_single", "exact_relation", "exact_count")
SIZE, WIDTH, TOKENS = 32, 384, 32  # pixels; of the default text encoder's features; a batch's captions are padded to
ROUNDS = {1: 15, 64: 3}  # pictures a call: calls that are timed
SHOWN = 8  # pictures of each on the sheet
TOLERANCE = 0.1


class Entry(NamedTuple):
    config: str
    overrides: tuple[str, ...] = ()  # the network's size
    needs: tuple[str, ...] = ()  # what is trained before it
    named: tuple[str, ...] = ()  # fields that say where they lie


# Of a flow: its own network, what is trained before it, and where that one lies.
PUPIL = ("family.network.up=2,2", "family.network.refiner=2"), ("flow",), ("family.teacher", "train.init_from")
FAMILIES = {
    "flow": Entry("scenes"),
    "onestep": Entry("scenes_onestep", *PUPIL),
    "dmd": Entry("scenes_dmd", *PUPIL),
    "autoregressive": Entry(
        "scenes_ar", ("family.network.width=128", "family.network.depth=8"), ("tokenizer",), ("family.codec.source",)
    ),
    "gan": Entry("scenes_gan", ("family.network.blocks=4,3",)),
    "adversarial": Entry("scenes_adversarial", PUPIL[0], ("dmd", "gan"), ("train.init_from",)),
    "vae": Entry("scenes_vae", ("family.network.widths=64,96,64,128",)),
}
CODECS = {"tokenizer": Entry("scenes_tokenizer")}
FIRST = "flow"  # whose parameters and arithmetic are the measure
# The same pictures, enough of them for a likelihood; nothing is drawn or judged between the steps that are timed.
ALIKE = ("data.name=scenes", "data.image_size=32", "data.train_examples=120000", "data.paraphrases=1")
ALIKE += ("eval.every=0", "sample.prompts=")


class Plan(NamedTuple):
    command: list[str]  # of train.py
    steps: int
    params: int  # of what draws
    others: int  # trained, and not drawn with
    flops: float  # of all its steps


def plan(names: Sequence[str], places: dict[str, str], budget: float, data_dir: str | None) -> dict[str, Plan]:
    """How each is trained in its place. Of what it needs only the configuration is read, so that it may come later."""
    import jax

    from jaxgen import config as configs
    from jaxgen.families.base import Shapes

    shapes = Shapes((SIZE, SIZE, 3), WIDTH, WIDTH)
    found = {}
    for name in dict.fromkeys([FIRST, *names]):
        entry = (FAMILIES | CODECS)[name]
        file = str(ROOT / "configs" / f"{entry.config}.py")
        fields = [
            *ALIKE,
            *entry.overrides,
            *(f"{field}={','.join(places[need] for need in entry.needs)}" for field in entry.named),
        ]
        fields += [f"data.dir={data_dir}"] if data_dir else []
        config = configs.load(file, fields)
        family = filled(config.family, name)
        a_step = family.train_flops(shapes, TOKENS) * config.train.batch_size
        share = found[FIRST].flops / a_step if name in FAMILIES and name != FIRST else budget * config.train.steps
        steps = max(round(share), 1)
        trees = jax.eval_shape(lambda family=family: family.init(jax.random.key(0), shapes))
        drawn = sum(size(trees[group]) for group in family.drawn)
        arguments = [f"--config.{field}" for field in (*fields, f"train.steps={steps}")]
        command = [f"--config={file}", *arguments, f"--workdir={places[name]}"]
        found[name] = Plan(command, steps, drawn, size(trees) - drawn, steps * a_step)
    return {name: found[name] for name in names}


def course(name: str, given: Collection[str]) -> list[str]:
    """What is to be trained for a family, itself last, without what is given."""
    return [step for need in (FAMILIES | CODECS)[name].needs if need not in given for step in course(need, given)] + [name]


def filled(family: Any, name: str) -> Any:
    """The family with what its resolve() would read from the run that it needs."""
    from jaxgen import config as configs

    own = (FAMILIES | CODECS)[name]
    of = lambda need: configs.load(str(ROOT / "configs" / f"{need.config}.py"), need.overrides).family  # noqa: E731
    if "family.codec.source" in own.named:
        return dataclasses.replace(family, codec=dataclasses.replace(family.codec, codec=of(CODECS[own.needs[0]]).network))
    if "family.teacher" in own.named:
        return dataclasses.replace(family, teacher_flow=of(FAMILIES[own.needs[0]]))
    return family


def check(plans: dict[str, Plan]) -> None:
    """Raises UserError where a network is too large or too small to be compared."""
    wanted = plans[FIRST].params
    for name, found in plans.items():
        if name in FAMILIES and abs(found.params / wanted - 1) > TOLERANCE:
            raise UserError(
                f"{name} draws with {found.params:,} parameters, {FIRST} with {wanted:,}: choose its network in FAMILIES anew"
            )


def size(tree: Any) -> int:
    """Numbers in a tree of arrays, or of their shapes."""
    import jax

    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def of_training(place: str) -> dict[str, Any]:
    """What a model's files say of its training; None where they say nothing."""
    from jaxgen import config as configs
    from jaxgen.families.base import Shapes
    from jaxgen.model import read_config
    from jaxgen.storage import read_json
    from jaxgen.train.config import RunConfig

    directory = read_config(place)[0]
    values = read_json(directory / "config.json")
    exported = values.pop("exported", None)
    config = configs.from_dict(RunConfig, values, str(directory))
    steps = exported["step"] if exported else config.train.steps
    shapes = Shapes((config.data.image_size, config.data.image_size, 3), WIDTH, WIDTH)
    family: Any = config.family
    beside = None
    teacher, codec = getattr(family, "teacher", ""), getattr(getattr(family, "codec", None), "source", "")
    before = [teacher] if teacher else (config.train.init_from or "").split(",")
    try:
        if teacher and family.teacher_flow is None:  # an exported model leaves it out
            family = family.resolve()
        flops = steps * config.train.batch_size * family.train_flops(shapes, TOKENS)
        found = [of_training(source) for source in (*before, codec) if source]
        beside = sum((one["flops"] or math.nan) + (one["flops_beside"] or 0) for one in found)
    except UserError:  # what it was trained with is not here
        flops = None
    logged = directory / "metrics.jsonl"
    lines = [json.loads(line) for line in logged.read_text().splitlines()] if logged.exists() else []
    rates = [line["images_per_sec"] for line in lines if "images_per_sec" in line]
    memory = [line["peak_memory_bytes"] for line in lines if "peak_memory_bytes" in line]
    return {
        "steps": steps,
        "batch_size": config.train.batch_size,
        "flops": flops,
        "flops_beside": beside if beside is not None and math.isfinite(beside) else None,
        "train_images_per_sec": float(np.median(rates)) if rates else None,
        "peak_memory_bytes": max(memory) if memory else None,
    }


def rates(models: dict[str, Any], captions: Sequence[str]) -> dict[str, dict[str, float]]:
    """{name: {"1": images/s drawn one a call, …}}: medians of calls that the models take turns at."""
    found: dict[str, dict[str, float]] = {name: {} for name in models}
    for count, rounds in ROUNDS.items():
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for turn in range(rounds + 1):  # the first one compiles
            for name, model in models.items():
                began = time.perf_counter()
                model.sample(captions[:count], seed=turn)
                seconds[name].append(time.perf_counter() - began)
        for name, took in seconds.items():
            found[name][str(count)] = count / float(np.median(took[1:]))
    return found


def judged(model: Any, split: str, prompts: int, seeds: int) -> tuple[dict[str, Any], np.ndarray, np.ndarray, list[str]]:
    """(shares: mean and one a seed, pictures uint8 [prompts, seeds, S, S, 3], exact bool [prompts, seeds], captions)."""
    from jaxgen.evaluate.accuracy import judge

    shares, images, captions, exact = zip(*(judge(model, split, prompts, seed) for seed in range(seeds)), strict=True)
    rows = {name: [row[f"eval/{name}"] for row in shares] for name in COLUMNS if f"eval/{name}" in shares[0]}
    means = {name: {"mean": float(np.mean(row)), "seeds": row} for name, row in rows.items()}
    return means, np.stack(images, axis=1), np.stack(exact, axis=1), captions[0]


def spread(images: np.ndarray, exact: np.ndarray, scenes: Sequence[Any]) -> dict[str, float | None]:
    """How far apart right pictures of one caption lie, and pictures that the data's own program draws of those captions."""
    from jaxgen.data.scenes import render
    from jaxgen.evaluate.diversity import correct_diversity

    several = exact.sum(axis=1) > 1
    if not several.any():
        return {"drawn": None, "data": None, "share": None}
    rng = np.random.default_rng(0)
    own = np.stack(
        [
            [render(redraw(scene, rng), SIZE) for _ in range(exact.shape[1])]
            for scene, some in zip(scenes, several, strict=True)
            if some
        ]
    )
    drawn, data = correct_diversity(images, exact), correct_diversity(own, np.ones(own.shape[:2], bool))
    return {"drawn": drawn, "data": data, "share": drawn / data}


def redraw(scene: Any, rng: np.random.Generator) -> Any:
    """Another scene of the same caption."""
    from jaxgen.data import scenes

    while True:
        new = scenes._place(rng, scene.kind, [thing.description for thing in scene.objects], SIZE)
        if new is not None and new.relation == scene.relation:
            return new


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The figures as two tables of text; a dash where there is none."""

    def number(value: float | None, scale: float = 1.0, digits: int = 1) -> str:
        return "-" if value is None else f"{value * scale:.{digits}f}"

    heads = ("family", "steps", "M par.", "besides", "PFLOP", "besides", "train/s", "GiB", "1: im/s", "64: im/s", "apart")
    lines = [heads]
    for name, row in rows.items():
        training, drawing = row["training"], row["images_per_sec"]
        counts = number(row["params"], 1e-6, 3), number(row["params_beside"], 1e-6, 3)
        spent = number(training["flops"], 1e-15, 4), number(training["flops_beside"], 1e-15, 4)
        speed = number(training["train_images_per_sec"]), number(training["peak_memory_bytes"], 2**-30, 2)
        apart = number(row["diversity"]["share"], 1, 3)
        lines.append((name, str(training["steps"]), *counts, *spent, *speed, *map(number, drawing.values()), apart))
    shares = [("family", "split", *COLUMNS)]
    for name, row in rows.items():
        for split, means in row["accuracy"].items():
            shares.append((name, split, *(number(means[c]["mean"] if c in means else None, 100) for c in COLUMNS)))
    return f"{aligned(lines)}\n\n{aligned(shares)}"


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns of text: words to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    words = [column[-1][0].isalpha() for column in zip(*lines, strict=True)]

    def cell(text: str, k: int) -> str:
        return text.ljust(widths[k]) if words[k] else text.rjust(widths[k])

    return "\n".join("  ".join(cell(text, k) for k, text in enumerate(line)).rstrip() for line in lines)


def measure(
    places: dict[str, str], splits: Sequence[str], prompts: int, seeds: int, json_file: str | None, sheet_file: str
) -> None:
    from jaxgen.parallel import runtime

    runtime.start(allow_cpu=True)
    import jaxgen
    from jaxgen.data.scenes import prompts as captioned
    from jaxgen.evaluate.pictures import save_png, sheet
    from jaxgen.storage import as_path, write_json

    device = runtime.describe(runtime.compute_dtype("auto"))
    print(device, flush=True)
    models = {name: jaxgen.load(place) for name, place in places.items()}
    speeds = rates(models, [caption for caption, _ in captioned("test", max(ROUNDS))])
    rows: dict[str, dict[str, Any]] = {}
    pictures, under = [], []
    for name, model in models.items():
        row: dict[str, Any] = {"model": places[name], "settings": model.settings(), "training": of_training(places[name])}
        row |= {"params": size(model.params), "params_beside": size(model.frozen), "images_per_sec": speeds[name]}
        row |= {"accuracy": {}}
        for split in splits:
            row["accuracy"][split], images, exact, captions = judged(model, split, prompts, seeds)
            if split == splits[0]:
                row["diversity"] = spread(images, exact, [scene for _, scene in captioned(split, prompts)])
                pictures += list(images[:SHOWN, 0])
                marks = ["right" if good else "wrong" for good in exact[:SHOWN, 0]]
                under += [f"{name} ({mark}): {caption}" for mark, caption in zip(marks, captions, strict=False)]
            exact_share = row["accuracy"][split]["exact"]["mean"]
            print(f"{name} {split}: {exact_share:.1%} exact", flush=True)
        rows[name] = row
        if json_file:  # after each: a cut leaves what was measured
            report = {"device": device, "prompts": prompts, "seeds": seeds, "tokens": TOKENS, "families": rows}
            write_json(as_path(json_file), report)
    print(f"\n{table(rows)}")
    save_png(as_path(sheet_file), sheet(pictures, under, min(SHOWN, prompts)), {"families": list(rows)})
    print(sheet_file)
    for name, row in rows.items():
        off = row["params"] / next(iter(rows.values()))["params"] - 1
        if abs(off) > TOLERANCE:
            print(f"{name} draws with {off:+.0%} parameters: not a like network")


def chosen(only: str | None, given: dict[str, str]) -> list[str]:
    """The families to look at, in order. Raises UserError for one that there is not."""
    names = only.split(",") if only else list(given or FAMILIES)
    for name in (*names, *given):
        if name not in FAMILIES:
            raise UserError(f"{name!r} is no family here: choose from {', '.join(FAMILIES)}")
    return [name for name in FAMILIES if name in names]


def pairs(text: str) -> dict[str, str]:
    """ "flow=runs/a,gan=runs/b" as a dictionary."""
    found = {}
    for part in filter(None, text.split(",")):
        name, equals, place = part.partition("=")
        if not (name and equals and place):
            raise UserError(f"--families_from: {part!r} is no FAMILY=DIRECTORY")
        found[name] = place
    return found


def on_the_cpu() -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"


@cli
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=1.0, help="share of the full training arithmetic")
    parser.add_argument("--only", help=f"some of {','.join(FAMILIES)}")
    parser.add_argument("--workdirs", default="runs/families", help="a directory each goes below this one")
    parser.add_argument("--data_dir", help="where prepared sets are kept (default: the configurations' own)")
    parser.add_argument("--prompts", type=int, default=1000, help="captions of each split")
    parser.add_argument("--seeds", type=int, default=3, help="pictures of each caption")
    parser.add_argument("--splits", default=",".join(SPLITS), help="whose captions: pictures and diversity are the first's")
    parser.add_argument("--families_from", default="", help="FAMILY=DIRECTORY,… measured instead of trained")
    parser.add_argument("--json", help="write the figures here")
    parser.add_argument("--sheet", default="families.png", help="pictures with captions, a row a family")
    args = parser.parse_args()
    if not args.budget > 0 or min(args.prompts, args.seeds) < 1:
        raise UserError("--budget must be positive, --prompts and --seeds at least 1")
    splits = args.splits.split(",")
    if not set(splits) <= set(SPLITS):
        raise UserError(f"--splits={args.splits}: choose from {', '.join(SPLITS)}")
    given = pairs(args.families_from)
    names = chosen(args.only, given)
    places = {name: str(Path(args.workdirs) / name) for name in FAMILIES | CODECS} | given
    wanted = [name for name in names if name not in given]
    todo = list(dict.fromkeys(step for name in wanted for step in course(name, given)))
    if todo:
        # Elsewhere: an accelerator belongs to one process, and train.py is to have it.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, context, on_the_cpu) as pool:
            plans = pool.submit(plan, [FIRST, *todo], places, args.budget, args.data_dir).result()
        check(plans)
        for name in todo:
            found = plans[name]
            off = found.params / plans[FIRST].params - 1, found.flops / plans[FIRST].flops - 1
            print(
                f"{name}: {found.params:,} parameters ({off[0]:+.1%}) and {found.others:,} that do not draw, "
                f"{found.steps} steps, {found.flops / 1e15:.4g} PFLOP ({off[1]:+.1%})"
            )
        for name in todo:
            train(name, plans[name].command, plans[name].steps, Path(places[name]))
    measure({name: places[name] for name in names}, splits, args.prompts, args.seeds, args.json, args.sheet)


if __name__ == "__main__":
    main()
