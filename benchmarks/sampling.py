"""Drawing by steps against PyTorch of the same network: weights, texts, noise, steps and guidance alike.

    python benchmarks/sampling.py --torch_python=PYTHON [--problems=transformer,unet] [--batches=1,16] [--steps=25]
        [--guidance=1.5] [--bfloat16] [--rounds=7] [--json=FILE]

PYTHON is an interpreter with torch in it; generators_torch.py is what it runs, eager and compiled. Both draw the same pictures
first, in two steps, as rounding grows with each; they must agree (1e-5 of the largest value in float32, 1e-3 in bfloat16),
else no figure and exit status 1. Text encoders are left out; a step with guidance is one pass for the batch with its captions
and without. The columns are train_step.py's."""

from typing import Any

from generators import Driver


def main() -> None:
    def add(parser) -> None:
        parser.add_argument("--batches", default="1,16", help="pictures drawn together")
        parser.add_argument("--steps", type=int, default=25)
        parser.add_argument("--guidance", type=float, default=1.5)

    driver = Driver(__doc__, add)
    steps, guidance = driver.arguments.steps, driver.arguments.guidance
    for name in driver.arguments.problems.split(","):
        problem = driver.load(name)
        if not driver.rows:
            driver.head("sampling", problem)
        for count in map(int, driver.arguments.batches.split(",")):
            label = f"{name[:9]} {count}"
            settings: dict[str, Any] = {"count": count, "guidance": guidance, "shift": 3.0}
            driver.prepare("sample", driver.variants, steps=2, **settings)
            if driver.agree(label, {variant: driver.shown(variant) for variant in driver.variants}):
                driver.prepare("sample", driver.variants, steps=steps, **settings)
                passes = 1 if guidance == 1 else 2
                driver.tell(label, problem, problem["flops"] * steps * passes * count, count, driver.race(driver.variants))
    driver.end()


if __name__ == "__main__":
    main()
