"""Reads a compiled program's text (XLA's optimized HLO): what each operation computes, moves and sends, a loop's body as often
as it runs. XLA's own cost analysis counts a loop once and tells nothing of collectives."""

import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128, "token": 0, "opaque": 0}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id", "iota")
HANDED = (*COLLECTIVES, "tuple", "get-tuple-element", "custom-call")  # whose operands a fusion need not read
PART = ("dynamic-slice", "slice", "gather")  # read only as much of their operand as they give

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]+[0-9a-z]*)\[([0-9,<=]*)\](\{[^}]*\})?")


class Array(NamedTuple):
    dtype: str
    dims: tuple[int, ...]
    near: bool  # kept in the chip's own fast memory (S(n) of its layout), not in its main one

    @property
    def bytes(self) -> float:
        found = re.search(r"\d+", self.dtype)
        bits = BITS[self.dtype] if self.dtype in BITS else int(found.group()) if found else 0
        return math.prod(self.dims) * bits / 8

    @property
    def far(self) -> float:
        """Bytes of main memory."""
        return 0.0 if self.near else self.bytes


class Op(NamedTuple):
    name: str
    kind: str
    out: tuple[Array, ...]
    operands: tuple[str, ...]
    rest: str  # attributes; a constant's value, a parameter's number
    root: bool

    def called(self, attribute: str) -> str | None:
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.rest)
        return found and found.group(1)

    @property
    def origin(self) -> str:
        """What it comes from: the path of names in the traced function."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found.group(1) if found else self.name


class Product(NamedTuple):
    """A matrix product or a convolution as one: 2 m n k FLOPs, k summed over, n the kernel's outputs. `shape` (kind, operands'
    dims, attributes) is what tells it from others."""

    m: float
    n: float
    k: float
    shape: tuple

    @property
    def flops(self) -> float:
        return 2.0 * self.m * self.n * self.k


class Work(NamedTuple):
    """One operation at the program's top level, a fusion as a whole, `times` a step, on one device."""

    kind: str
    products: tuple[Product, ...]
    bytes: float  # of main memory, read and written
    elements: float  # computed one by one, products apart
    ahead: bool  # a copy that runs beside what is computed
    times: float


class Collective(NamedTuple):
    """bytes: that one device sends, a time. devices: a group's, by their place in the mesh. ahead: beside computation."""

    kind: str
    bytes: float
    devices: tuple[int, ...]
    ahead: bool
    times: float
    origin: str


def read(text: str) -> tuple[list[Work], list[Collective]]:
    """The work and the collectives of a compiled program's text (`compiled.as_text()`)."""
    program = _Program(text)
    work, found = [], {}
    for scope, op, times in program.run():
        if op.kind in FREE or op.kind in COLLECTIVES or op.kind.endswith(("-done", "-update")):
            continue
        if op.kind.removesuffix("-start") not in COLLECTIVES:
            work.append(program.cost(scope, op, times))
    for index, (inside, op, times) in enumerate(program.collectives()):
        kind = op.kind.removesuffix("-start")
        if kind == "all-reduce" and inside.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # a TPU's: fused with the slice that each device keeps of it
        channel = re.search(r"channel_id=(\d+)", op.rest)
        # Spread over several fusions, beside whose work it runs, a collective keeps its channel.
        key = (kind, channel.group(1) if channel else index)
        ahead = op.kind.endswith("-start") or inside.startswith("async") or key in found
        if key in found:
            found[key] = found[key]._replace(ahead=True)
        else:
            sent, devices = program.sent(kind, inside, op)
            found[key] = Collective(kind, sent, devices, ahead, times, op.origin)
    return work, [each for each in found.values() if len(each.devices) > 1]


class _Program:
    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Op]] = {}
        self.entry, self._known = "", {}
        current: dict[str, Op] = {}
        for line in text.splitlines():
            if head := _HEAD.match(line):
                current = self.computations[head.group(2)] = {}
                self.entry = head.group(2) if head.group(1) else self.entry
            elif found := _LINE.match(line):
                op = _parse(found.group(2), found.group(3), bool(found.group(1)))
                if op is not None:
                    current[op.name] = op

    def run(self) -> Iterator[tuple[dict[str, Op], Op, float]]:
        """Every operation outside fusions with those around it and how often a step runs it."""
        for name, times in self._levels(self.entry, 1.0):
            scope = self.computations[name]
            yield from ((scope, op, times) for op in scope.values() if op.kind not in ("while", "call", "conditional"))

    def collectives(self) -> Iterator[tuple[str, Op, float]]:
        """Those inside fusions too, with their computation's name."""
        for name, times in self._levels(self.entry, 1.0):
            for inner in self._below(name):
                for op in self.computations[inner].values():
                    if op.kind.removesuffix("-start") in COLLECTIVES:
                        yield inner, op, times

    def _levels(self, name: str, times: float) -> Iterator[tuple[str, float]]:
        yield name, times
        for op in self.computations[name].values():
            if op.kind == "while":
                yield from self._levels(op.called("body") or "", times * self._turns(op))
            elif op.kind == "call":
                yield from self._levels(op.called("to_apply") or "", times)
            elif op.kind == "conditional":  # the longest of its branches
                listed = re.search(r"branch_computations=\{([^}]*)\}", op.rest)
                names = [part.strip(" %") for part in listed.group(1).split(",")] if listed else []
                names = names or [op.called("true_computation") or "", op.called("false_computation") or ""]
                yield from self._levels(max(names, key=lambda n: len(self.computations.get(n, ()))), times)

    def _turns(self, op: Op) -> int:
        """How often a loop's body runs: as XLA says or, where it counts up from zero, as its condition does; else once."""
        if count := re.search(r'known_trip_count":\{"n":"(\d+)"', op.rest):
            return int(count.group(1))
        ops = self.computations.get(op.called("condition") or "", {})
        test = next((each for each in ops.values() if each.root and "direction=LT" in each.rest), None)
        limit = _constant(ops, test)
        if test is None or limit is None:
            return 1
        counter = next((ops[name] for name in test.operands if name in ops and ops[name].kind == "get-tuple-element"), None)
        return -(-limit // self._step(op.called("body") or "", counter))

    def _step(self, body: str, counter: Op | None) -> int:
        """By how much a loop's body raises what its condition takes out of the tuple: XLA unrolls some by two."""
        ops = self.computations.get(body, {})
        root = next((each for each in ops.values() if each.root), None)
        place = re.search(r"index=(\d+)", counter.rest) if counter else None
        if root is None or place is None or int(place.group(1)) >= len(root.operands):
            return 1
        raised = ops.get(root.operands[int(place.group(1))])
        return (raised is not None and raised.kind == "add" and _constant(ops, raised)) or 1

    def _below(self, name: str) -> Iterator[str]:
        yield name
        for op in self.computations[name].values():
            if op.kind in ("fusion", "async-start") and (inner := op.called("calls")) in self.computations:
                yield from self._below(inner)

    def cost(self, scope: dict[str, Op], op: Op, times: float) -> Work:
        inner = self.computations.get(op.called("calls") or "") if op.kind in ("fusion", "async-start") else None
        ahead = op.kind.endswith("-start")
        if ahead and inner is None:
            return Work(op.kind, (), _begun(scope, op), 0.0, True, times)
        if inner is None:
            moved = sum(a.far for a in op.out) * (2 if op.kind in PART else 1)
            if op.kind == "dynamic-update-slice":
                moved = 2 * sum(a.far for a in scope[op.operands[1]].out) if op.operands[1] in scope else moved
            elif op.kind not in PART:
                moved += sum(a.far for name in op.operands if name in scope for a in scope[name].out)
            elements = sum(math.prod(a.dims) for a in op.out)
            product = _product(op, scope)
            return Work(op.kind, (product,) if product else (), moved, 0.0 if product else elements, False, times)
        products, elements = [], 0.0
        for name in self._below(op.called("calls") or ""):
            ops = self.computations[name]
            for each in ops.values():
                if product := _product(each, ops):
                    products.append(product)
                elif each.kind not in (*FREE, *COLLECTIVES, "fusion", "broadcast", "copy", "reshape", "transpose", *PART):
                    source = ops.get(each.operands[0]) if each.kind.startswith("reduce") and each.operands else None
                    elements += sum(math.prod(a.dims) for a in (source or each).out)
        return Work(op.kind, tuple(products), self._edges(inner, op), elements, ahead and not products, times)

    def sent(self, kind: str, inside: str, op: Op) -> tuple[float, tuple[int, ...]]:
        """(bytes that one device of a group sends in a ring, the first group)."""
        scope = self.computations[inside]
        devices = groups(op.rest, kind)
        n = max(len(devices), 1)
        given = sum(a.bytes for name in op.operands if name in scope for a in scope[name].out)
        if kind == "collective-permute":
            return given, devices
        if kind == "all-gather":
            return given * (n - 1), devices
        return given * (n - 1) / n * (2 if kind == "all-reduce" else 1), devices

    def _edges(self, inner: dict[str, Op], op: Op) -> float:
        """Bytes of main memory at a fusion's edges: of an operand that it only slices the slices, of an output that it only
        updates the update, and nothing of what it hands through to a collective."""
        moved = sum(
            self._taken(inner, each.name, each.out[0].bytes)
            for each in inner.values()
            if each.kind == "parameter" and each.out and not each.out[0].near
        )
        root = next((each for each in inner.values() if each.root), None)
        if root is None:
            return moved
        ends = [inner[name] for name in root.operands if name in inner] if root.kind == "tuple" else [root]
        out = op.out[len(op.operands) :] if op.kind.endswith("-start") else op.out  # behind what it is given
        for end, array in zip(ends, out, strict=False):
            if array.near or end.kind == "parameter" or end.kind.removesuffix("-start") in HANDED:
                continue
            if end.kind == "dynamic-update-slice" and end.operands[1] in inner:
                moved += sum(a.bytes for a in inner[end.operands[1]].out)
            else:
                moved += array.bytes
        return moved

    def _taken(self, ops: dict[str, Op], name: str, whole: float) -> float:
        """Bytes that a computation reads of an array of `whole` bytes."""
        taken = 0.0
        for op, at in self._users(ops).get(name, ()):
            if op.kind in PART and at == 0:
                taken += sum(a.bytes for a in op.out)
            elif op.kind == "bitcast":
                taken += self._taken(ops, op.name, whole)
            elif op.kind == "fusion" and (inner := self.computations.get(op.called("calls") or "")):
                given = next(each.name for each in inner.values() if each.kind == "parameter" and each.rest == str(at))
                taken += self._taken(inner, given, whole)
            elif not (op.kind.removesuffix("-start") in HANDED or (op.kind == "dynamic-update-slice" and at == 0)):
                return whole
        return min(taken, whole)

    def _users(self, ops: dict[str, Op]) -> dict[str, list[tuple[Op, int]]]:
        """Of each array the operations that take it, and as which of their operands."""
        if id(ops) not in self._known:
            found: dict[str, list[tuple[Op, int]]] = {}
            for op in ops.values():
                for at, name in enumerate(op.operands):
                    found.setdefault(name, []).append((op, at))
            self._known[id(ops)] = found
        return self._known[id(ops)]


def _begun(scope: dict[str, Op], op: Op) -> float:
    """Bytes of main memory that a move begun here reads and writes: a copy's types are (to, from, …), others' ((what they are
    given …), to, …), of which they read only as much as they write."""
    if op.kind == "copy-start":
        return sum(a.far for a in op.out[:2])
    given, to = op.out[: len(op.operands)], op.out[len(op.operands) :][:1]
    if op.kind == "dynamic-update-slice-start" and len(given) > 1:
        given, to = given[1:2], (given[1]._replace(near=given[0].near),)
    read = sum(a.bytes for a in to if not given[0].near) if given else 0.0
    return read + sum(a.far for a in to)


def groups(rest: str, kind: str = "all-reduce") -> tuple[int, ...]:
    """The first group of devices of a collective's attributes, as XLA writes them in one of four ways."""
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", rest)
        return (int(pairs.group(1)), int(pairs.group(2))) if pairs else ()
    if found := re.search(r"replica_groups=\{\{([0-9,]+)\}", rest):
        return tuple(map(int, found.group(1).split(",")))
    if found := re.search(r"replica_groups=\[([0-9,]+)\]<=\[([0-9,]+)\](?:T\(([0-9,]+)\))?", rest):
        shape, source, order = ([int(n) for n in part.split(",")] if part else None for part in found.groups())
        ids = np.arange(math.prod(source or ())).reshape(source or ())
        return tuple(np.transpose(ids, order).reshape(shape or ())[0].ravel().tolist())
    if found := re.search(r"replica_groups=(?:@\w+ *)?(?:mesh)?\[([^\]]*)\][^{]*\{([^}]*)\}", rest):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found.group(1))}
        names = re.findall(r"'([^']+)'", found.group(2))
        ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        if device_ids := re.search(r"device_ids=\(\[([0-9,]+)\](?:T\(([0-9,]+)\))?\)", rest):
            shape, order = ([int(n) for n in part.split(",")] if part else None for part in device_ids.groups())
            ids = np.transpose(np.arange(ids.size).reshape(shape or ()), order).reshape(ids.shape)
        kept = [axis for axis, name in enumerate(sizes) if name in names]
        rest_first = np.moveaxis(ids, kept, range(-len(kept), 0))
        return tuple(rest_first.reshape(-1, math.prod(ids.shape[axis] for axis in kept))[0].tolist())
    return ()


def _parse(name: str, text: str, root: bool) -> Op | None:
    end = _closing(text, 0) if text.startswith("(") else text.find(" ") - 1
    kind_end = text.find("(", end + 1)
    if end < 0 or kind_end < 0:
        return None
    last = _closing(text, kind_end)
    out = tuple(
        Array(
            dtype, tuple(int(re.sub(r"\D", "", n)) for n in dims.split(",") if n), bool(layout and re.search(r"S\(\d", layout))
        )
        for dtype, dims, layout in _ARRAY.findall(text[: end + 1])
    )
    kind, inside = text[end + 1 : kind_end].strip(), text[kind_end + 1 : last]
    if kind in ("constant", "parameter"):
        return Op(name, kind, out, (), inside, root)
    return Op(name, kind, out, tuple(re.findall(r"%([\w.\-]+)", inside)), text[last + 1 :], root)


def _constant(ops: dict[str, Op], op: Op | None) -> int | None:
    """The whole number among an operation's operands."""
    values = [ops[name].rest for name in op.operands if name in ops and ops[name].kind == "constant"] if op else []
    return int(values[0]) if values and values[0].isdigit() else None


def _closing(text: str, start: int) -> int:
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if depth == 0:
            return at
    return len(text) - 1


def _product(op: Op, scope: dict[str, Op]) -> Product | None:
    """What a dot or a convolution computes; None for anything else."""
    if op.kind not in ("dot", "convolution") and 'custom_call_target="__cublas' not in op.rest:
        return None
    inputs = [scope[name].out[0] for name in op.operands[:2] if name in scope and scope[name].out]
    if len(inputs) < 2:
        return None
    out, shape = op.out[0].dims, tuple(a.dims for a in inputs)
    kept = re.search(r"(\w+_contracting_dim\w*.*?)(?=, metadata|$)|(window=.*?dim_labels=\S+)", op.rest)
    shape = (op.kind, inputs[0].dtype, *shape, kept.group().strip(", ") if kept else "")
    if op.kind == "convolution":
        found = re.search(r"dim_labels=([^,_\s]+)_([^,\s]+?)->([^,\s]+)", op.rest)
        if found is None:
            return None
        lhs, rhs, res = found.groups()
        window = {key: value.split("x") for key, value in re.findall(r"(\w+)=([\dx_\-]+)", _braces(op.rest, "window"))}
        spatial = [label for label in rhs if label.isdigit()]
        valid = 1
        for label in spatial:
            get = lambda key, default, at=int(label): window[key][at] if key in window else default  # noqa: E731
            pads = tuple(int(p) for p in get("pad", "0_0").split("_"))
            numbers = (int(get("stride", 1)), int(get("lhs_dilate", 1)), int(get("rhs_dilate", 1)))
            sizes = (inputs[0].dims[lhs.index(label)], inputs[1].dims[rhs.index(label)], out[res.index(label)])
            valid *= _positions(*sizes, *numbers, pads[0])
        k, n = inputs[1].dims[rhs.index("i")], out[res.index("f")]
        # Pairs of an output and a kernel position: outputs count as rows, and what the kernel spans is summed over.
        span = max(math.prod(out[res.index(s)] for s in spatial), 1)
        return Product(out[res.index("b")] * span, n, k * valid / span, shape)
    contracted = [
        [int(n) for n in re.findall(r"\d+", found)]
        for found in re.findall(r"(?:lhs|rhs)_contracting_dim\w*\"?[=:][{\[]([^}\]]*)", op.rest)
    ]
    batched = [int(n) for n in re.findall(r"\d+", _braces(op.rest, "rhs_batch_dims"))]
    k = math.prod(inputs[0].dims[d] for d in contracted[0]) if contracted else 1
    n = math.prod(size for d, size in enumerate(inputs[1].dims) if d not in (*contracted[-1], *batched)) if contracted else 1
    return Product(math.prod(out) / max(n, 1), n, k, shape)


def _braces(rest: str, key: str) -> str:
    found = re.search(rf"{key}=\{{([^}}]*)\}}", rest)
    return found.group(1) if found else ""


@functools.cache
def _positions(size: int, kernel: int, out: int, stride: int, dilate: int, kernel_dilate: int, pad: int) -> int:
    """Pairs of an output and a kernel position that meet an input, not padding."""
    at = np.arange(out)[:, None] * stride + np.arange(kernel)[None] * kernel_dilate - pad
    return int(((at >= 0) & (at < (size - 1) * dilate + 1) & (at % dilate == 0)).sum())
