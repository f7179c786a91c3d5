"""Draw pictures from sentences.

    python sample.py --prompt="a large red circle above a small blue square" [--workdir=runs/NAME] [--out=grid.png]

Without --workdir the small model that ships with the package draws. Prompt and settings stand in each PNG's metadata."""

import argparse
import itertools
import sys
import time
from typing import Any

from jaxgen.errors import UserError, cli


@cli
def main() -> None:
    args = arguments()

    # Models
    from jaxgen.parallel import runtime

    runtime.start(allow_cpu=args.allow_cpu)
    from jaxgen.evaluate.pictures import save_gif, save_png, sheet
    from jaxgen.model import load, shipped
    from jaxgen.storage import as_path
    from jaxgen.text import check_prompts

    names = shipped() if args.model == "all" and not args.workdir else [args.workdir or args.model]
    several = len(names) > 1
    prompts = args.prompts
    if args.expand is not None:
        from jaxgen.text.expand import DEFAULT, expand_prompts

        prompts = expand_prompts(prompts, args.expand or DEFAULT, seed=args.seed)
        print("\n".join(prompts))
    captions = [prompt for prompt in prompts for _ in range(args.num_images)]
    wanted = {"num_images": args.num_images, "negative_prompt": args.negative_prompt}
    chosen = {"seed": args.seed, "guidance_scale": args.guidance, "num_steps": args.steps}
    chosen |= {name: getattr(args, name) for name in ("sampler", "temperature", "top_k", "top_p", "aspect_ratio")}
    pictures, under, notes, frames = [], [], {}, []
    for name in names:
        model = load(name)
        for warning in check_prompts(model.encoder, prompts, args.negative_prompt):
            print(f"warning: {warning}", file=sys.stderr)

        # Drawing
        if several:  # whose seconds are compared, so that compiling comes before
            model.sample(prompts, **wanted, **chosen)
        began = time.monotonic()
        images = model.sample(prompts, **wanted, **chosen)
        seconds = time.monotonic() - began
        print(f"{len(images)} pictures in {seconds:.2f} s" + (f" by {name}" if several else ""))
        pictures += list(images)
        under += judged(f"{name}, {seconds:.2f} s", images, captions) if several else captions
        notes = model.settings(**chosen) | {"negative_prompt": args.negative_prompt, "step": model.step, "model": name}
        notes |= {"asked": args.prompts} if args.expand is not None else {}
        if args.trace:
            frames.append(model.trace(prompts, **wanted, **chosen))
        if args.out_dir:
            save_each(as_path(args.out_dir) / (name if several else ""), images, captions, args.num_images, notes)

    # Sheets
    columns = in_a_row(len(captions), args.num_images, several)
    if args.trace:
        pages = [sheet([*itertools.chain(*moment)], under, columns) for moment in zip(*frames, strict=True)]
        save_gif(as_path(args.trace), pages)
        print(args.trace)
    if args.out or not args.out_dir:
        out = args.out or "grid.png"
        metadata = {"model": names, "seed": args.seed} if several else notes
        save_png(as_path(out), sheet(pictures, under, columns), {"prompts": prompts, **metadata})
        print(out)


def arguments() -> argparse.Namespace:
    """The flags, looked at; `prompts` are those of the command line and of the file. Raises UserError."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--workdir", help="a run of train.py, or an exported model; the newest EMA weights draw")
    which.add_argument("--model", default="flow", help="a model that ships with the package, or all (default: flow)")
    parser.add_argument("--prompt", action="append", default=[], help="may be given several times")
    parser.add_argument("--prompts_file", help="a text file, a prompt a line")
    parser.add_argument("--expand", nargs="?", const="", help="say prompts in more words first, with this language model")
    parser.add_argument("--negative_prompt", default="", help="what to steer away from")
    parser.add_argument("--num_images", type=int, default=4, help="a prompt (default: 4)")
    parser.add_argument("--steps", type=int, help="of the sampler (default: the model's own)")
    parser.add_argument("--guidance", type=float, help="how strongly the prompt steers; 1 is not at all beyond the model's own")
    parser.add_argument("--sampler", help="one of the model's own: an unknown one is answered with their names")
    parser.add_argument("--temperature", type=float, help="below 1 draws what is likelier, where latents or tokens are drawn")
    parser.add_argument("--top_k", type=int, help="choose among the k likeliest tokens; 0 is all")
    parser.add_argument("--top_p", type=float, help="choose among the likeliest tokens of this probability together")
    parser.add_argument("--aspect_ratio", type=ratio, help="of the pictures, as in 3:2, or width over height (default: 1:1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="the captioned grid (default: grid.png, unless --out_dir is given)")
    parser.add_argument("--trace", help="a GIF of how the pictures come about")
    parser.add_argument("--out_dir", help="one PNG an image: 0000.png, 0001.png, …, prompt by prompt")
    parser.add_argument("--allow_cpu", action="store_true", help="draw on the CPU though the host has an accelerator")
    args = parser.parse_args()
    args.prompts = args.prompt + read_prompts(args.prompts_file)
    if not args.prompts:
        raise UserError('say what to draw: --prompt="a large red circle" (or --prompts_file=FILE, a prompt a line)')
    for name, value in (("num_images", args.num_images), ("steps", args.steps)):
        if value is not None and value < 1:
            raise UserError(f"--{name}={value} must be at least 1")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed={args.seed} must lie between 0 and 2^32 - 1")
    return args


def in_a_row(pictures: int, num_images: int, several: bool) -> int:
    """Columns of a sheet: a row a model where there are several, else a row a prompt; prompts of one picture share rows."""
    if several:
        return pictures
    return min(num_images if num_images > 1 else pictures, 8)


def save_each(place: Any, images: Any, captions: list[str], num_images: int, notes: dict[str, Any]) -> None:
    """One PNG an image, with its prompt, its place and the settings."""
    from jaxgen.evaluate.pictures import save_png

    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        where = {"image_index": i % num_images, "prompt_index": i // num_images}
        save_png(place / f"{i:04d}.png", image, {"prompt": caption, **notes, **where})
    print(f"{place}/0000.png … {len(images) - 1:04d}.png")


def ratio(said: str) -> float:
    """Width over height, of 3:2 as of 1.5. Raises ValueError where that is no positive number."""
    width, _, height = said.partition(":")
    value = float(width) / (float(height or 1) or float("nan"))
    if not 0 < value < float("inf"):
        raise ValueError(said)
    return value


def judged(name: str, images: Any, captions: list[str]) -> list[str]:
    """Captions for a sheet of several models: whose picture it is and, where a caption is a scene's, whether it is right."""
    from jaxgen.data.scenes import parse
    from jaxgen.evaluate.verifier import verify

    def verdict(image, caption: str) -> str:
        scene = parse(caption)
        return "" if scene is None else " (right)" if verify(image[None], [scene]).exact[0] else " (wrong)"

    return [f"{name}{verdict(image, caption)}: {caption}" for image, caption in zip(images, captions, strict=True)]


def read_prompts(file: str | None) -> list[str]:
    """The lines of a file that say something."""
    if file is None:
        return []
    from jaxgen.storage import as_path

    try:
        lines = [line.strip() for line in as_path(file).read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts_file={file} cannot be read: {error}") from None
    return [line for line in lines if line]


if __name__ == "__main__":
    main()
