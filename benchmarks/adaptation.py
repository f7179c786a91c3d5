"""What training the text encoder together with the generator is worth: ways to adapt it, at equal steps, several seeds each.

    python benchmarks/adaptation.py [--only=frozen,lora] [--base=flow] [--steps=300] [--prompts=1000] [--seeds=0,1,2]
        [--workdirs=runs/adaptation] [--data_dir=DIR] [--json=FILE]

Every way sets out from the same generator, trained with the encoder frozen: the shipped flow, or `--base`, a run or an export
of its network. From there both learn together for `--steps` of 16 scenes, one paraphrase a picture. `scratch`, the control, is
a small encoder without pretrained weights in the other one's place, and the generator's way into it is new. Each way and seed
trains in a directory of its own: the same command again goes on where it was cut. A seed is the run's; its model draws each
caption once.

Told of each: numbers of the encoder that are trained, and the shares drawn exactly of `test` (sentences like those of training)
and of `test_paraphrases` (another sentence, with a word that no training caption has), mean and spread over the seeds."""

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from training import ROOT, train

from jaxgen.errors import UserError, cli

# The generator's rate is a quarter of the one it began with. The encoder's are shares of it, and AdamW's usual ones for weights
# that are trained (1e-4) and for weights that are added (1e-3).
RATE = "optimizer.learning_rate=5e-4"
TRAINED, ADDED = "text.adapt_learning_rate_scale=0.2", "text.adapt_learning_rate_scale=2.0"
WAYS = {
    "frozen": (),
    "lora": ("text.adapt=lora", "text.adapt.targets=all", ADDED),
    "adapters": ("text.adapt=bottleneck", ADDED),
    "prefix": ("text.adapt=prefix", ADDED),
    "last-2": ("text.adapt=last_layers", "text.adapt.count=2", TRAINED),
    "full": ("text.adapt=full", TRAINED),
    "scratch": ("text.adapt=full", "text.adapt_learning_rate_scale=0.4", "train.init_skip=generator.conditioning"),
}
SPLITS = ("test", "test_paraphrases")


def command(way: str, seed: int, workdir: Path, args: argparse.Namespace) -> list[str]:
    """train.py's arguments."""
    fields = [*WAYS[way], RATE, f"train.init_from={args.base}", f"train.steps={args.steps}", "train.ema_decay=0.98"]
    fields += [f"seed={seed}", "data.paraphrases=1", "sample.prompts=", "eval.every=0"]
    fields += [f"text.source={scratch(args)}"] if way == "scratch" else []
    fields += [f"data.dir={args.data_dir}"] if args.data_dir else []
    config = ROOT / "configs" / "quickstart.py"
    return [f"--config={config}", *(f"--config.{field}" for field in fields), f"--workdir={workdir}"]


def scratch(args: argparse.Namespace) -> Path:
    return Path(args.workdirs).resolve() / "encoder"


def write_scratch(directory: Path) -> None:
    from jaxgen.text.scratch import scene_captions, write

    if not (directory / "config.json").exists():
        write(directory, scene_captions(("en",)))


def judged(workdir: Path, prompts: int) -> dict[str, Any]:
    """{split: shares, "trained": numbers of the encoder that are}."""
    import jax

    import jaxgen
    from jaxgen.evaluate.accuracy import accuracy
    from jaxgen.parallel import runtime
    from jaxgen.text.adapt import text_of

    runtime.start(allow_cpu=True)
    model = jaxgen.load(str(workdir))
    trained = sum(leaf.size for leaf in jax.tree.leaves(text_of(model.params)))
    return {split: accuracy(model, split, prompts) for split in SPLITS} | {"trained": trained}


def elsewhere(function: Any, *arguments: Any) -> Any:
    """In a process of its own: an accelerator belongs to one, and the next training is to have it."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


@cli
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(WAYS), help="some of the ways")
    parser.add_argument("--base", default="flow", help="the trained generator: a shipped model, a run or an export")
    parser.add_argument("--steps", type=int, default=300, help="of both together")
    parser.add_argument("--prompts", type=int, default=1000, help="captions of each split")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--workdirs", default="runs/adaptation", help="a directory each goes below this one")
    parser.add_argument("--data_dir", help="where prepared sets are kept (default: the configuration's own)")
    parser.add_argument("--json", help="write the figures here")
    args = parser.parse_args()
    if unknown := set(args.only.split(",")) - set(WAYS):
        raise UserError(f"--only: {', '.join(sorted(unknown))} is no way here: choose from {', '.join(WAYS)}")
    from jaxgen.storage import as_path, read_json, write_json

    elsewhere(write_scratch, scratch(args))
    rows: dict[str, list[dict[str, Any]]] = {way: [] for way in args.only.split(",")}

    for seed in map(int, args.seeds.split(",")):  # all ways once, then again: a cut leaves a comparison
        for way, row in rows.items():
            workdir = Path(args.workdirs) / f"{way}-{seed}"
            train(f"{way}, seed {seed}", command(way, seed, workdir, args), args.steps, workdir)
            kept = as_path(workdir / f"judged_{args.prompts}.json")
            if not kept.exists():
                write_json(kept, elsewhere(judged, workdir, args.prompts))
            row.append(read_json(kept))
            exact = ", ".join(f"{split} {row[-1][split]['eval/exact']:.1%}" for split in SPLITS)
            print(f"{way}, seed {seed}: {exact}", flush=True)
    print(f"\n{'way':10s}{'trained':>12s}" + "".join(f"{split:>26s}" for split in SPLITS))
    for way, row in rows.items():
        text = f"{way:10s}{row[0]['trained']:12,d}"
        for split in SPLITS:
            exact = [100 * found[split]["eval/exact"] for found in row]
            text += f"{np.mean(exact):16.1f} ({min(exact):.1f}-{max(exact):.1f})".rjust(26)
        print(text)
    if args.json:
        write_json(as_path(args.json), {"settings": vars(args), "ways": rows})


if __name__ == "__main__":
    main()
