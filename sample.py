"""Draw pictures from sentences.

    python sample.py --prompt="a large red circle above a small blue square" [--workdir=runs/NAME] [--out=grid.png]

Without --workdir the small model that ships with the package draws. Prompt and settings stand in each PNG's metadata."""

import argparse
import sys
import time

from jaxgen.errors import UserError, cli


@cli
def main() -> None:
    # Flags
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--workdir", help="a run of train.py, or an exported model; the newest EMA weights draw")
    which.add_argument("--model", default="flow", help="a model that ships with the package (default: flow)")
    parser.add_argument("--prompt", action="append", default=[], help="may be given several times")
    parser.add_argument("--prompts_file", help="a text file, a prompt a line")
    parser.add_argument("--expand", nargs="?", const="", help="say prompts in more words first, with this language model")
    parser.add_argument("--negative_prompt", default="", help="what to steer away from")
    parser.add_argument("--num_images", type=int, default=4, help="a prompt (default: 4)")
    parser.add_argument("--steps", type=int, help="of the sampler (default: the model's own)")
    parser.add_argument("--guidance", type=float, help="how strongly the prompt steers; 1 is not at all beyond the model's own")
    parser.add_argument("--sampler", help="one of the model's own; flow: heun (two network passes a step), euler")
    parser.add_argument("--temperature", type=float, help="below 1 draws what is likelier (gan, vae, autoregressive)")
    parser.add_argument("--top_k", type=int, help="choose among the k likeliest tokens (autoregressive)")
    parser.add_argument("--top_p", type=float, help="choose among the likeliest tokens of this probability together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="the captioned grid (default: grid.png, unless --out_dir is given)")
    parser.add_argument("--trace", help="a GIF of how the pictures come about")
    parser.add_argument("--out_dir", help="one PNG an image: 0000.png, 0001.png, …, prompt by prompt")
    parser.add_argument("--allow_cpu", action="store_true", help="draw on the CPU though the host has an accelerator")
    args = parser.parse_args()
    prompts = args.prompt + read_prompts(args.prompts_file)
    if not prompts:
        raise UserError('say what to draw: --prompt="a large red circle" (or --prompts_file=FILE, a prompt a line)')
    for name, value in (("num_images", args.num_images), ("steps", args.steps)):
        if value is not None and value < 1:
            raise UserError(f"--{name}={value} must be at least 1")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed={args.seed} must lie between 0 and 2^32 - 1")

    # Model
    from jaxgen.parallel import runtime

    runtime.start(allow_cpu=args.allow_cpu)
    import jaxgen
    from jaxgen.evaluate.pictures import save_gif, save_png, sheet
    from jaxgen.storage import as_path
    from jaxgen.text import check_prompts

    model = jaxgen.load(args.workdir or args.model)
    asked = prompts
    if args.expand is not None:
        from jaxgen.text.expand import DEFAULT, expand_prompts

        prompts = expand_prompts(prompts, args.expand or DEFAULT, seed=args.seed)
        print("\n".join(prompts))
    for warning in check_prompts(model.encoder, prompts, args.negative_prompt):
        print(f"warning: {warning}", file=sys.stderr)

    # Drawing
    began = time.monotonic()
    settings = {"seed": args.seed, "guidance_scale": args.guidance, "num_steps": args.steps}
    settings |= {name: getattr(args, name) for name in ("sampler", "temperature", "top_k", "top_p")}
    wanted = {"num_images": args.num_images, "negative_prompt": args.negative_prompt}
    images = model.sample(prompts, **wanted, **settings)
    print(f"{len(images)} pictures in {time.monotonic() - began:.1f} s")

    # Files
    notes = model.settings(**settings) | {"negative_prompt": args.negative_prompt, "step": model.step}
    notes["model"] = args.workdir or args.model
    if args.expand is not None:
        notes["asked"] = asked
    captions = [prompt for prompt in prompts for _ in range(args.num_images)]
    if args.out_dir:
        for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
            metadata = {
                "prompt": caption,
                **notes,
                "image_index": i % args.num_images,
                "prompt_index": i // args.num_images,
            }
            save_png(as_path(args.out_dir) / f"{i:04d}.png", image, metadata)
        print(f"{args.out_dir}/0000.png … {len(images) - 1:04d}.png")
    if args.trace:
        frames = model.trace(prompts, **wanted, **settings)
        save_gif(as_path(args.trace), [sheet(list(frame), captions, columns=min(args.num_images, 8)) for frame in frames])
        print(args.trace)
    if args.out or not args.out_dir:
        out = args.out or "grid.png"
        save_png(as_path(out), sheet(list(images), captions, columns=min(args.num_images, 8)), {"prompts": prompts, **notes})
        print(out)


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
