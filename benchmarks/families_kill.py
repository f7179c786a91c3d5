"""Whether each family's killed run goes on exactly and draws, through the two scripts.

    python benchmarks/families_kill.py [--only=gan,vae] [--steps=40] [--seed=0] [--dir=DIR] [--json=FILE]

Of each family one tiny run is left alone; on another workdir the same command is killed by SIGKILL at a random step and given
again until it has finished, sample.py draws from it, and the verifier looks at the pictures (a figure, not a test: so short a
run draws nothing right). The exit status is 1 where a weight, average, moment or loss differs in one bit, or a picture is
missing. About 40 seconds a family on two cores."""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from resume import ROOT, Child, compare, environment, whole

# Those that need another one's workdir come behind it.
FAMILIES = {
    "flow": "Flow(network=UNET)",
    "ddpm": "DDPM(network=UNET)",
    "onestep": "OneStep(network=UNET, teacher={flow!r})",
    "dmd": "DMD(network=UNET, teacher={flow!r})",
    "adversarial": "Adversarial(network=UNET, judge=Gan(network=DCGAN(width=8)))",
    "gan": "Gan(network=DCGAN(width=8))",
    "vae": "Vae(network=Ladder(strides=(2, 2, 4), widths=(16, 16, 16), down=(1,) * 3, up=(1,) * 3, groups=(0, 1, 1),"
    " channels=4, attention=('none', 'text', 'text'), head_dim=16))",
    "autoencoder": "Autoencoder(network=CODEC, adversarial=0.1, discriminator_widths=(8, 8))",
    "flow in latents": "Flow(network=UNET, codec=Pretrained({autoencoder!r}))",
    "tokenizer": "Autoencoder(network=replace(CODEC, bottleneck=FSQ((3, 3, 3))))",
    "raster": "Autoregressive(Pretrained({tokenizer!r}), TOKENS)",
    "masked": "Autoregressive(Palette(3), TOKENS, order='masked')",
}
NEEDS = {"onestep": "flow", "dmd": "flow", "flow in latents": "autoencoder", "raster": "tokenizer"}
CONFIG = """
from dataclasses import replace

from jaxgen.data.config import DataConfig
from jaxgen.families import *
from jaxgen.families.autoencoder import Convolutional
from jaxgen.families.codec import Pretrained
from jaxgen.families.fsq import FSQ
from jaxgen.families.gan_networks import DCGAN
from jaxgen.families.palette import Palette
from jaxgen.families.transformer import TokenTransformer
from jaxgen.families.unet import UNet
from jaxgen.families.vae_networks import Ladder
from jaxgen.train.config import OptimizerConfig, RunConfig, TrainConfig

UNET = UNet(widths=(16,), down=(1,), up=(1,), attention=("joint",), head_dim=16, refiner=1, dropout=0.1)
TOKENS = TokenTransformer(width=16, depth=1, head_dim=8, refiner=1)
CODEC = Convolutional(widths=(16,), encoder_blocks=1, decoder_blocks=1)

def get_config():
    return RunConfig(
        family={family},
        data=DataConfig(image_size=16, train_examples=128, dir={data!r}),
        train=TrainConfig(steps={steps}, batch_size=8, log_every=1, checkpoint_every=5),
        optimizer=OptimizerConfig(warmup_steps=5),
    )
"""
PROMPTS = ("a small red circle", "two large blue squares", "a small green ring above a large black cross")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(FAMILIES), help=f"some of: {', '.join(FAMILIES)}")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--dir", help="keep everything here (default: a temporary directory, removed at the end)")
    parser.add_argument("--json", help="write the figures here")
    arguments = parser.parse_args()
    asked = arguments.only.split(",")
    if unknown := [name for name in asked if name not in FAMILIES]:
        sys.exit(f"--only: no {unknown[0]!r}; known: {', '.join(FAMILIES)}")
    if arguments.steps < 12:
        sys.exit(f"--steps={arguments.steps}: at least 12, so that a kill comes behind a checkpoint")
    names = [name for name in FAMILIES if name in asked or name in [NEEDS.get(other) for other in asked]]
    rng, problems, rows = random.Random(arguments.seed), [], {}
    heads = ("killed at", "went on from", "arrays", "losses", "differ", "drawn")
    print(f"{'family':16s}" + "".join(f"{head:>14s}" for head in heads) + "  verifier")
    with tempfile.TemporaryDirectory(prefix="jaxgen-families-") as scratch:
        place = Path(arguments.dir or scratch).resolve()
        for name in names:
            row = rows[name] = one(name, place / name.replace(" ", "_"), place, arguments.steps, rng, problems)
            told = (row[key] for key in ("killed_at", "from_step", "arrays", "losses", "differences", "drawn"))
            print(f"{name:16s}" + "".join(f"{value:14d}" for value in told) + f"  {row['verifier']}", flush=True)
    print("\n".join(f"PROBLEM: {problem}" for problem in problems) or "exact")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"families": rows, "problems": problems}, indent=2) + "\n")
    sys.exit(bool(problems))


def one(name: str, own: Path, place: Path, steps: int, rng: random.Random, problems: list[str]) -> dict[str, Any]:
    own.mkdir(parents=True)
    (place / "xla").mkdir(exist_ok=True)
    (own / "xla").symlink_to(place / "xla")  # the text encoder is compiled once for all
    workdirs = {other: str(place / other / "whole") for other in FAMILIES}
    config = CONFIG.format(family=FAMILIES[name].format(**workdirs), data=str(place / "data"), steps=steps)
    for run in ("whole", "killed"):
        (own / f"{run}.py").write_text(config)
    began = time.monotonic()
    Child(own, "whole").finish(f"{name}, the run nobody touches")
    target = rng.randint(7, steps - 4)
    child = Child(own, "killed")
    child.wait_until(lambda: (child.step or 0) >= target and bool(whole(child.workdir)))
    child.send(signal.SIGKILL, rng)
    if child.end() == 0:
        problems.append(f"{name}: the run finished before it was killed: raise --steps")
    expected, killed_at = max(whole(child.workdir), default=0), child.step or 0
    again = Child(own, "killed")
    again.finish(f"{name}, after the kill")
    if again.resumed != expected:
        problems.append(f"{name}: it went on from step {again.resumed}, though {expected} was on disk")
    found: list[str] = []
    counts = compare(own / "killed", own / "whole", found)
    problems += [f"{name}: {what}" for what in found]
    drawn, verdict = draw(name, own, problems)
    row = {"killed_at": killed_at, "from_step": again.resumed, **counts, "drawn": drawn, "verifier": verdict}
    return row | {"seconds": round(time.monotonic() - began)}


def draw(name: str, own: Path, problems: list[str]) -> tuple[int, str]:
    """(pictures written by sample.py, what the verifier sees in them)."""
    from jaxgen.data.scenes import parse
    from jaxgen.evaluate.pictures import read_metadata
    from jaxgen.evaluate.verifier import verify
    from jaxgen.storage import as_path

    prompts = [f"--prompt={prompt}" for prompt in PROMPTS]
    command = [sys.executable, str(ROOT / "sample.py"), f"--workdir={own / 'killed'}", *prompts, "--num_images=2", "--steps=4"]
    done = subprocess.run([*command, f"--out_dir={own / 'drawn'}"], env=environment(own, 1), capture_output=True, text=True)
    if done.returncode == 2 and "draws nothing from text" in done.stderr:
        return 0, "draws nothing from text, and says so"
    files = sorted((own / "drawn").glob("*.png"))
    if done.returncode or len(files) != 2 * len(PROMPTS):
        problems.append(f"{name}: sample.py ended with status {done.returncode}: {done.stderr[-300:]}")
        return len(files), "-"
    from PIL import Image

    pictures = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    scenes: list[Any] = [parse(read_metadata(as_path(file))["prompt"]) for file in files]  # all are captions of scenes
    verdict = verify(pictures, scenes)
    return len(files), f"{verdict.exact.mean():.0%} exact, {verdict.colour.mean():.0%} colours"


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path.insert(0, str(ROOT))
    main()
