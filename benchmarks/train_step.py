"""One training step against PyTorch's of the same network: weights, batches, optimizer, average and clipping alike.

    python benchmarks/train_step.py --torch_python=PYTHON [--problems=transformer,unet] [--bfloat16] [--rounds=7] [--json=FILE]

PYTHON is an interpreter with torch in it; generators_torch.py is what it runs, eager and compiled. First both take twenty steps
from the same weights with the same times and noise, and their losses must agree (1e-5 in float32, 1e-3 in bfloat16, relative
to the largest), else no figure and exit status 1. What is timed draws its own times and noise on both sides.

A round is one call of each side, in rotating order; told are medians, FLOPs counted from the network's products (attention
included, norms and activations not), the share of the bare product [tokens, D] x [D, 4D] on the same side, MFU where the
device's peak is known, and the median over rounds of theirs / ours (above 1 is faster here).

On a GPU: --problems=dit_130m,dit_xl --bfloat16."""

from generators import CHECKED, Driver


def main() -> None:
    driver = Driver(__doc__)
    for name in driver.arguments.problems.split(","):
        problem = driver.load(name)
        if not driver.rows:
            driver.head("train step", problem)
        driver.prepare("train", driver.variants, drawn=False)
        losses = {variant: [driver.shown(variant) for _ in range(CHECKED)] for variant in driver.variants}
        if not driver.agree(name, losses):
            continue
        driver.prepare("train", driver.variants[1:], drawn=True)
        driver.tell(name, problem, problem["train_flops"], problem["batch"], driver.race(driver.variants))
    driver.end()


if __name__ == "__main__":
    main()
