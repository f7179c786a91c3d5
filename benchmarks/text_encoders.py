"""Text encoders against PyTorch's on this machine's CPU: the same weights, processes taking turns, real tokens counted only.

    python benchmarks/text_encoders.py --torch_python=PYTHON [--models=minilm,gpt2,t5] [--cases=equal,mixed,first,generate]
        [--rounds=5] [--seconds=1] [--captions=2000] [--json=FILE]

PYTHON is an interpreter with torch and transformers (5) in it; SDPA, inference mode, a thread a core, eager and compiled.
MiniLM is the installed one; the others have random weights of GPT-2-small's and T5-small's shapes, and MiniLM's tokenizer.
Both sides' outputs are compared before anything is timed: exit status 1 where they differ.

equal: a batch without padding, 32 x 16, 32 x 64 and 8 x 256 tokens.
mixed: distinct captions of 4 to 60 tokens (each length as often), from strings to features; ours as training tables are made,
    theirs the usual way: batches of 32 in the order given, each padded to its longest.
first: a new process until it has the features of one caption; files cached, ours with its programs compiled before and not.
generate: GPT-2's head and cache, 4 prompts of 16 tokens, 64 more each, greedy.

A round is one call of each, in rotating order; told are medians, and the median over rounds of theirs / ours (above 1 is
faster here). share: of the bare matrix product [tokens, D] x [D, 4D] on the same side."""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from workers import Skip, Work, Worker, environment, median, race, rotated, serve, versions

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
MODELS = {"minilm": (6, 384), "gpt2": (12, 768), "t5": (6, 512)}  # layers, width; the MLP is four times as wide
EQUAL = ((32, 16), (32, 64), (8, 256))
BATCH, PROMPT, NEW = 4, 16, 64  # of the generation
TARGETS = {
    "equal": {"eager": 1.05, "compiled": 0.95},
    "mixed": {"eager": 1.3, "compiled": 1.3},
    "first": {"eager": 1.0},
    "generate": {"eager": 1.0, "compiled": 1.0},
}
TOLERANCE = 1e-4
CHECKED = 64  # captions of the mixed lengths that are compared


class Ours:
    def __init__(self):
        from jaxgen.parallel import runtime

        runtime.start(allow_cpu=True)

    def load(self, directory: str, words: str) -> None:
        from jaxgen.text import load_text_encoder

        self.directory, self.words = directory, words
        try:
            self.encoder = load_text_encoder(directory, tokenizer=words)
        except ModuleNotFoundError as error:
            raise Skip(f"this model is not done here yet ({error})") from None

    def first(self, caption: str) -> None:
        self.encoder([caption]).hidden.block_until_ready()

    def equal(self, variant: str, ids: list[list[int]]) -> Work:
        array, mask = np.array(ids, np.int32), np.ones(np.shape(ids), np.int32)
        return lambda: self.encoder(array, mask).hidden.block_until_ready(), lambda hidden: np.concatenate(np.asarray(hidden))

    def mixed(self, variant: str, captions: list[str]) -> Work:
        from jaxgen.text.cache import CaptionTable

        def work() -> Any:
            return CaptionTable(self.encoder, captions).lookup(captions)

        return work, lambda features: features.hidden[:CHECKED][features.mask[:CHECKED]]

    def generate(self, variant: str, ids: list[list[int]]) -> Work:
        try:
            from jaxgen.text.generate import load_language_model
        except ImportError as error:
            raise Skip(f"no generation here yet ({error})") from None
        model = load_language_model(self.directory, tokenizer=self.words)
        return lambda: model.generate(ids, max_new_tokens=NEW, ends=()), np.array

    def bare(self, variant: str, tokens: int, width: int) -> Work:
        import jax

        x, kernel = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(tokens, width), (width, 4 * width)]))
        product = jax.jit(lambda x, kernel: x @ kernel)
        return lambda: product(x, kernel).block_until_ready(), np.asarray


class Bench:
    def __init__(self, arguments: argparse.Namespace, place: Path):
        self.arguments, self.place = arguments, place
        self.rows: list[dict[str, Any]] = []
        self.problems: list[str] = []
        self.environment = environment(place) | {"JAX_PLATFORMS": "cpu"}
        here = Path(__file__).resolve()
        self.commands = {
            "ours": [sys.executable, str(here), "--worker"],
            "torch": [arguments.torch_python, str(here.with_name("text_encoders_torch.py"))],
        }
        self.sides = {name: Worker(c, self.environment, place / f"{name}.txt") for name, c in self.commands.items()}

    def model(self, name: str) -> None:
        directory = self.place / name
        words = str(source(MINILM))
        if name == "minilm":
            directory = words
        else:
            self.sides["torch"].ask(do="write", name=name, directory=str(directory))
        for side in self.sides.values():
            if reason := side.ask(do="load", directory=str(directory), words=words).get("skip"):
                return print(f"{name}: skipped, {reason}", flush=True)
        layers, width = MODELS[name]
        rng = np.random.default_rng(0)

        def flops(lengths: list[int]) -> int:
            return layers * sum(24 * n * width**2 + 4 * n**2 * width for n in lengths)

        def bare(tokens: int) -> dict[str, float]:
            seconds = self.race("bare", ("ours", "eager"), tokens=tokens, width=width)
            rate = {k: 8e-9 * tokens * width**2 / median(v) for k, v in seconds.items()}
            return {"ours": rate["ours"], "eager": rate["eager"], "compiled": rate["eager"]}

        if "equal" in self.arguments.cases:
            for batch, length in EQUAL:
                ids = rng.integers(1000, 20_000, (batch, length)).tolist()
                seconds = self.race("equal", ids=ids)
                self.tell(name, "equal", f"{batch} x {length}", seconds, flops([length] * batch), bare(batch * length))
        if "mixed" in self.arguments.cases:
            texts, lengths = captions(self.arguments.captions, Path(words), rng)
            seconds = self.race("mixed", once=True, captions=texts)
            label = f"{len(texts)} captions"
            self.tell(name, "mixed", label, seconds, flops(lengths), bare(32 * int(np.mean(lengths))))
        if "first" in self.arguments.cases:
            self.tell(name, "first", "load to first output", self.first(str(directory), words))
        if "generate" in self.arguments.cases and name == "gpt2":
            seconds = self.race("generate", ids=rng.integers(1000, 20_000, (BATCH, PROMPT)).tolist())
            self.tell(name, "generate", f"{BATCH} x ({PROMPT} + {NEW})", seconds)

    def race(
        self, kind: str, variants=("ours", "eager", "compiled"), once: bool = False, **work: Any
    ) -> dict[str, list[float]]:
        """Seconds a call by variant, a number a round; empty where a side cannot. `once`: a call is long enough alone."""
        for variant in variants:
            if reason := self.side(variant).ask(do="prepare", kind=kind, variant=variant, **work).get("skip"):
                print(f"{kind}: skipped, {reason}", flush=True)
                return {}
        shown = {}
        for variant in variants:
            file = self.place / f"{variant}.npy"
            self.side(variant).ask(do="show", variant=variant, file=str(file))
            shown[variant] = np.load(file)
        if kind != "bare":
            self.check(kind, shown)
        return race(self.side, variants, self.arguments.rounds, None if once else self.arguments.seconds)

    def side(self, variant: str) -> Worker:
        return self.sides["ours" if variant == "ours" else "torch"]

    def check(self, kind: str, shown: dict[str, np.ndarray]) -> None:
        """A table keeps float16."""
        relative = 2**-11 if kind == "mixed" else 0.0
        for variant in ("eager", "compiled"):
            ours, theirs = shown["ours"], shown[variant]
            same = ours.shape == theirs.shape
            worst = np.max(np.abs(ours - theirs) - relative * np.abs(theirs)) if same else np.inf
            if worst > (0 if kind == "generate" else TOLERANCE):
                self.problems.append(f"{kind}: ours {ours.shape} and {variant}'s {theirs.shape} differ by {worst:.2g}")
                print(f"PROBLEM: {self.problems[-1]}", flush=True)

    def first(self, directory: str, words: str) -> dict[str, list[float]]:
        command = [json.dumps({"do": "load", "directory": directory, "words": words}), '{"do": "first", "caption": "a cat"}']

        def start(variant: str) -> float:
            environment = self.environment
            with tempfile.TemporaryDirectory() as empty:
                if variant == "ours_cold":
                    environment = environment | {"JAX_COMPILATION_CACHE_DIR": empty}
                began = time.perf_counter()
                worker = Worker(self.commands["torch" if variant == "eager" else "ours"], environment, self.place / "first.txt")
                for line in command:
                    worker.ask(**json.loads(line))
                seconds = time.perf_counter() - began
                worker.end()
            return seconds

        variants = ("ours", "eager", "ours_cold")
        for variant in variants[:2]:
            start(variant)
        found: dict[str, list[float]] = {variant: [] for variant in variants}
        for variant in rotated(variants, self.arguments.rounds):
            found[variant].append(start(variant))
        return found

    def tell(
        self,
        model: str,
        kind: str,
        case: str,
        seconds: dict[str, list[float]],
        flops: int | None = None,
        bare: dict[str, float] | None = None,
    ) -> None:
        if not seconds:
            return
        row: dict[str, Any] = {"model": model, "kind": kind, "case": case, "seconds": seconds, "ratio": {}, "share": {}}
        text = f"{model:7s} {case:21s}"
        for variant in ("ours", "eager", "compiled"):
            text += f"{median(seconds[variant]) * 1e3:10.1f}" if variant in seconds else " " * 10
        for variant in ("eager", "compiled"):
            if variant in seconds:
                row["ratio"][variant] = median([b / a for a, b in zip(seconds["ours"], seconds[variant], strict=True)])
            text += f"{row['ratio'][variant]:9.3f}" if variant in seconds else " " * 9
        if flops and bare:
            row |= {"gflop": flops / 1e9, "bare": bare}
            row["share"] = {v: flops * 1e-9 / median(seconds[v]) / bare[v] for v in seconds}
            text += "".join(f"{row['share'][v]:9.1%}" for v in seconds) + f"{bare['ours']:8.0f} /{bare['eager']:4.0f}"
            text += f"{flops * 1e-9 / median(seconds['ours']):8.0f}"
        if "ours_cold" in seconds:
            text += f"  nothing compiled before: {median(seconds['ours_cold']) * 1e3:.1f}"
        missed = [f"{v} < {limit}" for v, limit in TARGETS[kind].items() if row["ratio"][v] < limit]
        print(text + (f"  misses {', '.join(missed)}" if missed else ""), flush=True)
        self.rows.append(row | {"missed": missed})


def source(name: str) -> Path:
    from jaxgen.text.sources import resolve

    return resolve(name)


def captions(count: int, words: Path, rng: np.random.Generator) -> tuple[list[str], list[int]]:
    """Distinct captions of whole words, with the number of tokens of each ([CLS] and [SEP] included)."""
    vocabulary = json.loads((words / "tokenizer.json").read_text())["model"]["vocab"]
    known = sorted(word for word in vocabulary if word.isascii() and word.isalpha() and len(word) > 2)
    lengths = rng.permutation(np.arange(count) % 57 + 4).tolist()
    return [" ".join(rng.choice(known, n - 2)) for n in lengths], lengths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    listed = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--torch_python", help="an interpreter with torch and transformers")
    parser.add_argument("--models", type=listed, default=list(MODELS))
    parser.add_argument("--cases", type=listed, default=list(TARGETS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1, help="about so long is a timed call (mixed, first: as they are)")
    parser.add_argument("--captions", type=int, default=2000)
    parser.add_argument("--json", help="write the figures here")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return serve(Ours())
    for name, known in (("models", MODELS), ("cases", TARGETS)):
        if unknown := set(getattr(arguments, name)) - set(known):
            parser.error(f"--{name}: {', '.join(unknown)} is unknown; known are {', '.join(known)}")
    against = versions(arguments.torch_python, ("torch", "transformers"), parser)
    with tempfile.TemporaryDirectory(prefix="jaxgen-text-") as scratch:
        bench = Bench(arguments, Path(scratch))
        print(f"{len(os.sched_getaffinity(0))} cores; {against}; median ms, theirs / ours, shares of the bare product")
        columns = ["ours", "eager", "compiled"]
        print(
            f"{'model':7s} {'case':21s}{''.join(f'{c:>10s}' for c in columns)}{'/ eager':>9s}{'/ comp.':>9s}"
            f"{''.join(f'{c:>9s}' for c in columns)}{'GFLOP/s bare':>14s}{'ours':>8s}",
            flush=True,
        )
        for name in arguments.models:
            bench.model(name)
        for side in bench.sides.values():
            side.end()
    if arguments.json:
        report = {
            "cores": len(os.sched_getaffinity(0)),
            "versions": against,
            "settings": vars(arguments),
            "rows": bench.rows,
            "problems": bench.problems,
        }
        Path(arguments.json).write_text(json.dumps(report, indent=2) + "\n")
    sys.exit(bool(bench.problems))


if __name__ == "__main__":
    main()
