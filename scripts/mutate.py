"""Whether the tests notice when the code is wrong: small changes to it, one at a time, each met by that module's tests.

    python scripts/mutate.py [MODULE ...] [--per_module=15] [--seed=0] [--threshold=0.8] [--json=FILE] [--list]

A mutant is a module with one comparison, operator, constant, condition, statement, result or argument order changed. A
seeded sample of them runs in a copy of the package (the tree itself is never touched). A mutant that the tests pass
survives: a test is missing there, or the change changes nothing. The exit status is 1 where a module's share of killed
ones is below the threshold. Half a minute of processor time a mutant at most; a module takes minutes."""

import argparse
import ast
import itertools
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# The quick tests of each module; those of the step that compile whole networks say little more of it than the toy's do.
TESTS = {
    "jaxgen/train/step.py": [
        "tests/train/test_step.py",
        "-k",
        "not mesh and not moments and not learns and not bfloat16 and not schedules and not clipping",
    ],
    "jaxgen/train/checkpoints.py": ["tests/train/test_checkpoints.py"],
    "jaxgen/text/weights.py": [
        "tests/text/test_weights.py",
        *(f"tests/text/test_bert.py::test_every_layer_is_that_of_transformers[{i}]" for i in (3, 7, 11)),
    ],
    "jaxgen/evaluate/verifier.py": ["tests/evaluate/test_verifier.py", "tests/data/test_scenes.py"],
}
COPIED = ("jaxgen", "tests", "configs", "train.py", "sample.py", "pyproject.toml")

FLIPPED = {
    ast.Lt: ast.GtE,
    ast.GtE: ast.Lt,
    ast.Gt: ast.LtE,
    ast.LtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
SHIFTED = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
SWAPPED = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
TOLD = {"print", "tell", "_tell", "warn", "warning", "getLogger", "setLevel"}  # calls whose arguments are for a reader
# Calls whose arguments in another order are the same, or an error of types that says nothing of the tests.
ALIKE = {"min", "max", "minimum", "maximum", "swapaxes", "isinstance", "array", "asarray", "zeros", "full", "map"}


@dataclass
class Mutant:
    line: int
    kind: str
    before: str
    after: str
    source: str


def mutants(source: str) -> list[Mutant]:
    """Every mutant of a module, in the order of its lines."""
    tree = ast.parse(source)
    found = []
    for node, changed in sites(tree):
        line = node.iter.lineno if isinstance(node, ast.comprehension) else node.lineno
        after = "deleted" if isinstance(changed, ast.Pass) else first_line(changed)
        new = with_changed(tree, node, changed)
        found.append(Mutant(line, kind(node, changed), first_line(node), after, new))
    distinct = {ast.unparse(tree): None} | {mutant.source: mutant for mutant in reversed(found)}
    return sorted(filter(None, distinct.values()), key=lambda mutant: mutant.line)


def kind(node: ast.AST, changed: ast.AST) -> str:
    if isinstance(changed, ast.Pass):
        return "statement"
    if isinstance(node, ast.Constant):
        return "text" if isinstance(node.value, str) else "number"
    names = {ast.Compare: "comparison", ast.Return: "result", ast.Call: "arguments"}
    conditions = ast.BoolOp | ast.If | ast.While | ast.IfExp | ast.comprehension
    return names.get(type(node), "condition" if isinstance(node, conditions) else "arithmetic")


def sample(possible: list[Mutant], count: int, rng: random.Random) -> list[Mutant]:
    """As many as possible of every kind, in the order of their lines."""
    kinds: dict[str, list[Mutant]] = {}
    for mutant in rng.sample(possible, len(possible)):
        kinds.setdefault(mutant.kind, []).append(mutant)
    turns = [mutant for turn in itertools.zip_longest(*(kinds[name] for name in sorted(kinds))) for mutant in turn if mutant]
    return sorted(turns[:count], key=lambda mutant: mutant.line)


def sites(tree: ast.Module) -> Iterator[tuple[ast.AST, ast.AST]]:
    """(node, what stands in its place) of every change worth trying."""
    silent = unheard(tree)
    for node in ast.walk(tree):
        if node not in silent:
            for changed in changes(node):
                yield node, changed


def changes(node: Any) -> Iterator[ast.AST]:
    """What may stand in a node's place."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        kind = type(node.ops[0])
        yield ast.Compare(node.left, [FLIPPED[kind]()], node.comparators)
        # Between real numbers equality does not come up; between whole ones it decides.
        if kind in SHIFTED and any(whole(side) for side in (node.left, *node.comparators)):
            yield ast.Compare(node.left, [SHIFTED[kind]()], node.comparators)
    elif isinstance(node, ast.BinOp) and adds_up(node):
        yield ast.BinOp(node.left, SWAPPED[type(node.op)](), node.right)
    elif isinstance(node, ast.AugAssign):
        yield ast.Pass()
        if isinstance(node.op, ast.Add | ast.Sub | ast.Mult | ast.Div):
            yield ast.AugAssign(node.target, SWAPPED[type(node.op)](), node.value)
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
    elif isinstance(node, ast.Constant):
        if isinstance(node.value, str | int | float):
            yield constant(node.value)
    elif isinstance(node, ast.If | ast.While) and not isinstance(node.test, ast.Compare | ast.UnaryOp):
        yield type(node)(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)
    elif isinstance(node, ast.IfExp):
        yield ast.IfExp(node.test, node.orelse, node.body)
    elif isinstance(node, ast.comprehension) and node.ifs:
        yield ast.comprehension(node.target, node.iter, [], node.is_async)
    elif isinstance(node, ast.Return) and node.value is not None and not is_none(node.value):
        yield ast.Return(ast.Constant(None))
    elif can_go(node):
        yield ast.Pass()
    elif isinstance(node, ast.Call) and len(node.args) >= 2 and called(node) not in ALIKE:
        first = len(node.args) - 2 if called(node) == "where" else 0  # a condition does not look like a value
        pair = node.args[first : first + 2]
        if len({type(argument) for argument in pair}) == 1 and not isinstance(pair[0], ast.Starred | ast.Tuple):
            yield ast.Call(node.func, [*node.args[:first], *pair[::-1], *node.args[first + 2 :]], node.keywords)


def constant(value: Any) -> ast.AST:
    if isinstance(value, str):
        return ast.Constant(f"_{value[1:]}")
    if isinstance(value, bool):
        return ast.Constant(not value)
    # One more where it counts something; a level or a tolerance is to be told from its double.
    return ast.Constant(value + 1 if isinstance(value, int) and value < 10 else value * 2 or 1.0)


def can_go(node: ast.AST) -> bool:
    """Statements without which the rest still runs."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Call)
    if isinstance(node, ast.Assign):
        return isinstance(node.targets[0], ast.Attribute | ast.Subscript)
    return isinstance(node, ast.Raise | ast.Continue | ast.Break | ast.Delete)


def adds_up(node: ast.BinOp) -> bool:
    """Whether a sum or product is one of numbers, as far as it shows: no text, path or set."""
    sides = (node.left, node.right)
    odd = any(is_text(side) or (isinstance(side, ast.Call) and called(side) == "keys") for side in sides)
    return type(node.op) in SWAPPED and not odd and called_name(node.left) not in ("directory", "workdir")


def unheard(tree: ast.Module) -> set[ast.AST]:
    """Nodes whose change no test should notice: docstrings, annotations, imports, decorators, and what is only told."""
    told: set[ast.AST] = set()
    rest: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            rest |= set(ast.walk(node))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            rest |= {node, node.value}
        for name in ("annotation", "returns"):
            if getattr(node, name, None) is not None:
                rest |= set(ast.walk(getattr(node, name)))
        for decorator in getattr(node, "decorator_list", []):
            rest |= set(ast.walk(decorator))
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Subscript)
            and called_name(node.value.value) == "Callable"
        ):
            rest |= set(ast.walk(node))  # a type's name
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            told |= {inner for part in (*node.exc.args, *node.exc.keywords) for inner in ast.walk(part)}
        elif isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Call) and called(node) in TOLD):
            told |= set(ast.walk(node))
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str):
            rest.add(node.slice)  # another key is a KeyError at once
        if isinstance(node, ast.Call) and called(node) == "einsum":
            rest.add(node.args[0])
    told |= {node for node in ast.walk(tree) if isinstance(node, ast.Expr) and node.value in told}
    # A variable that only messages read is a message.
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            names = [node for node in ast.walk(function) if isinstance(node, ast.Name)]
            read = {node.id for node in names if isinstance(node.ctx, ast.Load) and node not in told}
            for node in ast.walk(function):
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id not in read:
                    told |= set(ast.walk(node))
    return told | rest


def with_changed(tree: ast.Module, node: ast.AST, changed: ast.AST) -> str:
    """The module's source with one node replaced; the tree is as before afterwards."""
    for parent in ast.walk(tree):
        for name, value in ast.iter_fields(parent):
            if value is node:
                setattr(parent, name, changed)
                source = ast.unparse(ast.fix_missing_locations(tree))
                setattr(parent, name, node)
                return source
            if isinstance(value, list) and any(one is node for one in value):
                setattr(parent, name, [changed if one is node else one for one in value])
                source = ast.unparse(ast.fix_missing_locations(tree))
                setattr(parent, name, value)
                return source
    raise ValueError("no such node in the tree")


def called(node: ast.Call) -> str:
    return called_name(node.func)


def called_name(node: ast.AST) -> str:
    return getattr(node, "attr", getattr(node, "id", ""))


def whole(node: ast.AST) -> bool:
    return (isinstance(node, ast.Constant) and type(node.value) is int) or (
        isinstance(node, ast.Call) and called(node) == "len"
    )


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def first_line(node: ast.AST) -> str:
    line = ast.unparse(node).splitlines()[0]
    return line if len(line) <= 90 else line[:87] + "..."


def run_tests(place: Path, arguments: list[str], seconds: float | None, timeout: float) -> tuple[str, str, float]:
    """("passed" | "failed" | "timeout" | "broken", the last lines, processor seconds) of a module's tests in the copy.

    The limit is processor time, so that a busy machine is no reason to fail."""
    keep = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "NPROC", "PYTHONPATH")}
    keep |= {
        "PYTHONDONTWRITEBYTECODE": "1",  # a mutant of the same second and size would run its predecessor's bytecode
        "PYTHONPATH": str(place),
        "JAX_COMPILATION_CACHE_DIR": str(place / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n0", "-p", "no:cacheprovider", "--tb=line", *arguments]
    limit = lambda: resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 5))  # noqa: E731
    before = used()
    process = subprocess.Popen(
        command,
        cwd=place,
        env=keep,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=limit if seconds else None,
    )
    try:
        out, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return "timeout", "", used() - before
    spent = used() - before
    if process.returncode < 0:
        return ("timeout" if seconds and spent >= seconds - 1 else "failed"), out, spent
    return {0: "passed", 1: "failed", 2: "failed"}.get(process.returncode, "broken"), out, spent


def used() -> float:
    """Processor seconds of all children so far."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", default=list(TESTS), help="; ".join(TESTS), metavar="MODULE")
    parser.add_argument("--per_module", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threshold", type=float, default=0.8, help="least share of killed mutants in each module")
    parser.add_argument("--timeout", type=float, default=900, help="seconds a mutant, where it waits and computes nothing")
    parser.add_argument("--list", action="store_true", help="only show the sample")
    parser.add_argument("--json", help="write the figures here")
    arguments = parser.parse_args()
    unknown = [module for module in arguments.modules if module not in TESTS]
    if unknown:
        sys.exit(f"error: no tests are named for {', '.join(unknown)}; known: {', '.join(TESTS)}")
    report: dict[str, Any] = {"seed": arguments.seed, "per_module": arguments.per_module, "modules": {}}
    with tempfile.TemporaryDirectory(prefix="jaxgen-mutants-") as scratch:
        place = Path(scratch)
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, place / name)
        for module in arguments.modules:
            report["modules"][module] = judge(place, module, arguments)
    if arguments.list:
        return
    print(f"\n{'module':30s}{'possible':>9s}{'tried':>7s}{'killed':>8s}{'survived':>10s}{'share':>8s}")
    for module, row in report["modules"].items():
        numbers = (
            f"{row['possible']:9d}{row['tried']:7d}{row['killed']:8d}{row['tried'] - row['killed']:10d}{row['share']:8.0%}"
        )
        print(f"{module:30s}{numbers}")
    print("\nsurvivors:")
    for module, row in report["modules"].items():
        for mutant in row["mutants"]:
            if mutant["status"] == "survived":
                print(f"  {module}:{mutant['line']}: {mutant['before']}  ->  {mutant['after']}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=2) + "\n")
    sys.exit(any(row["share"] < arguments.threshold for row in report["modules"].values()))


def judge(place: Path, module: str, arguments: Any) -> dict[str, Any]:
    """A module's sample of mutants through its tests."""
    original = (ROOT / module).read_text()
    possible = mutants(original)
    rng = random.Random(f"{arguments.seed} {module}")
    chosen = sample(possible, arguments.per_module, rng)
    if arguments.list:
        for mutant in chosen:
            print(f"{module}:{mutant.line}: {mutant.before}  ->  {mutant.after}")
        return {}
    status, out, seconds = run_tests(place, TESTS[module], None, 3600)
    if status != "passed":
        sys.exit(f"{module}: its tests fail on the code as it is\n{out[-3000:]}")
    print(f"{module}: {len(possible)} mutants possible; its tests take {seconds:.0f} s of processor time", flush=True)
    rows = []
    for mutant in chosen:
        (place / module).write_text(mutant.source)
        began = time.monotonic()
        status, out, _ = run_tests(place, TESTS[module], 5 * seconds + 30, arguments.timeout)
        if status == "broken":
            sys.exit(f"pytest itself failed on {module}:{mutant.line}\n{out[-3000:]}")
        by = next(
            (line.split()[1].split("::")[-1] for line in out.splitlines() if line.startswith(("FAILED", "ERROR "))), status
        )
        told = {key: value for key, value in asdict(mutant).items() if key != "source"}
        rows.append(told | {"status": "survived" if status == "passed" else "killed", "by": None if status == "passed" else by})
        print(
            f"  {rows[-1]['status']:9s}{module}:{mutant.line}: {mutant.before}  ->  {mutant.after}"
            f"  ({time.monotonic() - began:.0f} s{'' if status == 'passed' else ', ' + by})",
            flush=True,
        )
    (place / module).write_text(original)
    killed = sum(row["status"] == "killed" for row in rows)
    return {
        "possible": len(possible),
        "tried": len(rows),
        "killed": killed,
        "share": killed / max(len(rows), 1),
        "mutants": rows,
    }


if __name__ == "__main__":
    main()
