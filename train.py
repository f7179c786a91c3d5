"""Train a picture generator, or a language model of captions, from a configuration file.

    python train.py [--config=configs/quickstart.py] [--config.SECTION.FIELD=VALUE ...] [--workdir=runs/NAME]

The same command again goes on where the run stopped."""

import argparse
import os
import sys
from pathlib import Path

from jaxgen import config as configs
from jaxgen.errors import UserError, cli


@cli
def main() -> None:
    # Flags and configuration
    path, overrides, rest = configs.split_arguments(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", help="everything of the run goes here, gs:// included (default: runs/CONFIG)")
    parser.add_argument("--allow_cpu", action="store_true", help="train on the CPU though the host has an accelerator")
    parser.add_argument("--dry_run", action="store_true", help="look at the pictures and captions of folder:PATH, and stop")
    parser.add_argument("--profile", action="store_true", help="trace ten steps into WORKDIR/profile")
    args = parser.parse_args(rest)
    path = path or "configs/quickstart.py"
    from jaxgen.parallel import runtime
    from jaxgen.parallel.kept import SWITCH

    runtime.require(("optax", "orbax", "grain", "tensorflow_datasets", "cv2", "tensorboardX"), "train")
    config = configs.load(path, overrides)
    if args.dry_run:
        return dry_run(config)

    # Devices
    os.environ.setdefault(SWITCH, "1")
    runtime.start(allow_cpu=args.allow_cpu)
    print(runtime.describe(runtime.compute_dtype(config.train.compute_dtype)), flush=True)

    # Training
    from jaxgen.storage import as_path
    from jaxgen.train import language, loop

    run = language.run if isinstance(config, language.LanguageRunConfig) else loop.run
    with runtime.together():
        run(config, as_path(args.workdir or Path("runs") / Path(path).stem), profile=args.profile)


def dry_run(config) -> None:
    """Counts, problems, and a sheet of 16 pictures with their captions."""
    from jaxgen.data import folder, registry
    from jaxgen.evaluate.pictures import save_png, sheet
    from jaxgen.storage import as_path

    _, recipe = registry.recipe(config.data)
    if not isinstance(recipe, folder.Folder):
        raise UserError("--dry_run is for your own pictures: --config.data.name=folder:PATH")
    report = folder.dry_run(recipe, config.data.image_size)
    print("\n".join(report.lines()))
    if report.sheet:
        images, captions = zip(*report.sheet, strict=True)
        save_png(as_path("dry_run.png"), sheet(images, captions), {})
        print("the first 16 with their captions: dry_run.png")


if __name__ == "__main__":
    main()
