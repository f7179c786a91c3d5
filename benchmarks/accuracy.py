"""How often a model draws exactly what the caption asks for: prompts of the scenes' splits, judged by the verifier.

    python benchmarks/accuracy.py [--model=flow | --workdir=runs/NAME] [--splits=test,...] [--count=1000] [--seeds=0,1,2]

One draw a prompt and seed. Prints a table, a row a split (mean over the seeds), and writes JSON where asked."""

import argparse
import json
import time

from jaxgen.errors import cli


@cli
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="flow")
    parser.add_argument("--workdir")
    parser.add_argument("--splits", default="test,test_unseen_pairs,test_paraphrases")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--sampler")
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top_p", type=float)
    parser.add_argument("--json", help="write the figures here")
    parser.add_argument("--sheet", help="write the first 64 pictures with captions here (PNG)")
    args = parser.parse_args()
    from jaxgen.parallel import runtime

    runtime.start(allow_cpu=True)
    import numpy as np

    import jaxgen
    from jaxgen.evaluate.accuracy import ATTRIBUTES, judge
    from jaxgen.evaluate.pictures import save_png, sheet
    from jaxgen.storage import as_path, write_json

    model = jaxgen.load(args.workdir or args.model)
    settings = {"num_steps": args.steps, "guidance_scale": args.guidance}
    settings |= {name: getattr(args, name) for name in ("sampler", "temperature", "top_p")}
    report = {"model": args.workdir or args.model, "step": model.step, "count": args.count, "splits": {}}
    report["settings"] = model.settings(**settings)
    columns = [*ATTRIBUTES, "exact_single", "exact_relation", "exact_count"]
    print(json.dumps(report["settings"]))
    print(f"{'split':18s}" + "".join(f"{name:>16s}" for name in columns))
    for split in args.splits.split(","):
        rows = []
        for seed in map(int, args.seeds.split(",")):
            began = time.monotonic()
            shares, images, captions, exact = judge(model, split, args.count, seed, **settings)
            rows.append(shares | {"seconds": time.monotonic() - began})
            if args.sheet and len(rows) == 1:
                marks = [f"{'' if good else 'x '}{caption}" for good, caption in zip(exact, captions, strict=True)]
                save_png(as_path(args.sheet), sheet(list(images[:64]), marks[:64], columns=8), {"split": split})
        mean = {name: float(np.mean([row[f"eval/{name}"] for row in rows])) for name in columns}
        report["splits"][split] = {"mean": mean, "seeds": rows}
        print(f"{split:18s}" + "".join(f"{mean[name]:16.4f}" for name in columns), flush=True)
    if args.json:
        write_json(as_path(args.json), report)


if __name__ == "__main__":
    main()
