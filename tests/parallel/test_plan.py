import importlib.util
import math
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxgen.errors import UserError
from jaxgen.families.base import Shapes
from jaxgen.families.flow import Flow
from jaxgen.families.transformer import Transformer
from jaxgen.parallel import hlo, memory, plan, probe
from jaxgen.parallel.devices import Device
from jaxgen.parallel.mesh import MeshConfig, lay_out, make_mesh
from jaxgen.text.config import TextConfig
from jaxgen.text.features import TextFeatures
from jaxgen.train.config import DataConfig, RunConfig, TrainConfig

CHIP = Device(flops=1e12, memory=1e9, bandwidth=1e11, link=1e9, links=2, ring=8, network=1e8, tile=128)
ENCODER = SimpleNamespace(hidden_size=12, pooled_size=8, params={}, pretrained=None, apply=None)


def config(**train):
    network = Transformer(width=32, depth=2, head_dim=16, refiner=1)
    return RunConfig(
        family=Flow(network=network),
        data=DataConfig(image_size=16),
        text=TextConfig(in_step=False),
        mesh=MeshConfig(data=2, fsdp=2, tensor=2),
        train=TrainConfig(**{"batch_size": 16, "compute_dtype": "float32"} | train),
    )


def read(function, *args):
    return hlo.read(jax.jit(function).lower(*args).compile().as_text())


def placed(mesh, shape, *spec):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec)))


def test_a_product_summed_over_a_mesh_axis_sends_what_a_ring_sends():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    x, w = placed(mesh, (16, 64), "data", "fsdp"), placed(mesh, (64, 32), "fsdp", None)
    out = NamedSharding(mesh, PartitionSpec("data", None))
    work, found = hlo.read(jax.jit(jnp.matmul, out_shardings=out).lower(x, w).compile().as_text())
    assert probe.flops_of(work) == 2 * 8 * 16 * 32
    (collective,) = found
    assert (collective.kind, collective.devices, collective.times) == ("all-reduce", (0, 1, 2, 3), 1)
    assert collective.bytes == 2 * 3 / 4 * 8 * 32 * 4
    assert plan.grouped(found, mesh)[0]["axes"] == "fsdp"


def test_gathered_weights_are_counted_by_what_the_others_hold():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    gather = jax.jit(lambda w: w * 2.0, out_shardings=NamedSharding(mesh, PartitionSpec()))
    _, found = hlo.read(gather.lower(placed(mesh, (64, 32), "fsdp")).compile().as_text())
    assert [(c.kind, c.bytes) for c in found] == [("all-gather", 3 * 16 * 32 * 4)]


def test_a_loop_counts_as_often_as_it_turns():
    def five(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    work, _ = read(five, jnp.ones((8, 16)), jnp.ones((5, 16, 16)))
    assert probe.flops_of(work) == 5 * 2 * 8 * 16 * 16
    # Each turn reads its own matrix, not the whole stack.
    assert sum(w.bytes * w.times for w in work) < 5 * 4 * 16 * 16 * 4 + 30 * 4 * 8 * 16


@pytest.mark.parametrize(("stride", "positions"), [(1, 3 * 8 - 2), (2, 3 * 4 - 1)])
def test_a_convolution_does_not_count_its_padding(stride, positions):
    def convolve(x, w):
        return jax.lax.conv_general_dilated(x, w, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    work, _ = read(convolve, jnp.ones((4, 8, 8, 5)), jnp.ones((3, 3, 5, 7)))
    assert probe.flops_of(work) == pytest.approx(2 * 4 * positions**2 * 5 * 7)


@pytest.mark.parametrize(
    ("text", "devices"),
    [
        ("replica_groups={{0,2},{1,3}}", (0, 2)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", (0, 4)),
    ],
)
def test_groups_are_read_in_every_way_they_are_written(text, devices):
    assert hlo.groups(f"channel_id=1, {text}, use_global_device_ids=true") == devices


# What XLA writes for a TPU, cut down: a loop with its turns in its condition and in its body's steps of two, a sum fused with
# the slice that is kept, a weight gathered beside two fusions, an array that is never in main memory.
TPU = """HloModule step
%all-reduce-scatter (input: bf16[8,16]) -> bf16[2,16] {
  %input = bf16[8,16]{1,0} parameter(0)
  %all-reduce.1 = bf16[8,16]{1,0} all-reduce(%input), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %part = bf16[2,16]{1,0} dynamic-slice(%all-reduce.1), dynamic_slice_sizes={2,16}
}
%async_collective_fusion (p0: bf16[2,16], p1: bf16[4,8,16]) -> (bf16[8,16], bf16[1,8,16]) {
  %p0 = bf16[2,16]{1,0} parameter(0)
  %p1 = bf16[4,8,16]{2,1,0} parameter(1)
  %gathered = bf16[8,16]{1,0} all-gather(%p0), channel_id=2, replica_groups=mesh['x'=4] {'x'}, dimensions={0}
  %turn = bf16[1,8,16]{2,1,0} dynamic-slice(%p1), dynamic_slice_sizes={1,8,16}
  ROOT %both = (bf16[8,16]{1,0}, bf16[1,8,16]{2,1,0}) tuple(%gathered, %turn)
}
%fused (p2: bf16[2,16]) -> bf16[8,16] {
  %p2 = bf16[2,16]{1,0} parameter(0)
  ROOT %gathered.1 = bf16[8,16]{1,0} all-gather(%p2), channel_id=2, replica_groups=mesh['x'=4] {'x'}, dimensions={0}
}
%condition (arg: (s32[], bf16[4,8,16])) -> pred[] {
  %limit = s32[]{:T(128)} constant(13)
  %arg = (s32[], bf16[4,8,16]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}
%body (arg.1: (s32[], bf16[4,8,16])) -> (s32[], bf16[4,8,16]) {
  %arg.1 = (s32[], bf16[4,8,16]{2,1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%arg.1), index=0
  %stack = bf16[4,8,16]{2,1,0} get-tuple-element(%arg.1), index=1
  %near = bf16[2,16]{1,0:T(8,128)(2,1)S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %run = (bf16[8,16]{1,0}, bf16[1,8,16]{2,1,0}) fusion(%near, %stack), kind=kOutput, calls=%async_collective_fusion
  %end = bf16[8,16]{1,0} fusion(%near), kind=kLoop, calls=%fused
  %two = s32[] constant(2)
  %i.2 = s32[] add(%i.1, %two)
  ROOT %next = (s32[], bf16[4,8,16]{2,1,0}) tuple(%i.2, %stack)
}
ENTRY %main (a: bf16[8,16], b: bf16[4,8,16]) -> bf16[2,16] {
  %a = bf16[8,16]{1,0} parameter(0)
  %b = bf16[4,8,16]{2,1,0} parameter(1)
  %zero = s32[] constant(0)
  %begin = (s32[], bf16[4,8,16]{2,1,0}) tuple(%zero, %b)
  %loop = (s32[], bf16[4,8,16]{2,1,0}) while(%begin), condition=%condition, body=%body
  ROOT %reduced = bf16[2,16]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter
}
"""


def test_a_tpu_program_is_read():
    work, found = hlo.read(TPU)
    told = {c.kind: (c.bytes, c.times, c.ahead) for c in found}
    assert told == {"reduce-scatter": (3 / 4 * 8 * 16 * 2, 1, False), "all-gather": (3 * 2 * 16 * 2, 7, True)}
    # Of the stack one slice is read and given on; what the collectives carry is theirs.
    assert next(w.bytes for w in work if w.kind == "fusion" and w.times == 7) == 2 * 8 * 16 * 2


@pytest.mark.parametrize(
    ("line", "moved"),
    [
        # Of a large array a slice is brought near, or written back from there; a copy's types are (to, from), either way round.
        ("((s8[4096]{0}), s8[512]{0:S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:512]}", 512),
        ("((s8[4096]{0}), s8[512]{0}, s32[]{:S(2)}) slice-start(%a), slice={[0:512]}", 1024),
        ("((s8[4096]{0:S(1)}), s8[512]{0}, s32[]{:S(2)}) slice-start(%a), slice={[0:512]}", 512),
        ("((s8[4096]{0}, s32[]), s8[512]{0:S(1)}, s32[]{:S(2)}) dynamic-slice-start(%a, %i), dynamic_slice_sizes={512}", 512),
        ("((s8[4096]{0}, s8[512]{0:S(1)}, s32[]), s8[4096]{0}, s32[]) dynamic-update-slice-start(%a, %b, %i)", 512),
        ("((s8[4096]{0}), s8[512]{0:S(1)}, s32[]{:S(2)}) async-start(%a), calls=%part", 512),
        ("(s8[4096]{0}, s8[4096]{0:S(1)}, u32[]{:S(2)}) copy-start(%a)", 4096),
        ("(s8[4096]{0:S(1)}, s8[4096]{0}, u32[]{:S(2)}) copy-start(%a)", 4096),
    ],
)
def test_what_a_move_begun_ahead_takes_of_main_memory(line, moved):
    program = f"""HloModule step
%part (p: s8[4096]) -> s8[512] {{
  %p = s8[4096]{{0}} parameter(0)
  ROOT %some = s8[512]{{0:S(1)}} slice(%p), slice={{[0:512]}}
}}
ENTRY %main (a: s8[4096], b: s8[512], i: s32[]) -> s8[4096] {{
  %a = s8[4096]{{0}} parameter(0)
  %b = s8[512]{{0}} parameter(1)
  %i = s32[] parameter(2)
  %begun = {line}
  ROOT %done = s8[4096]{{0}} copy-done(%begun)
}}
"""
    (work,), _ = hlo.read(program)
    assert (work.bytes, work.ahead) == (moved, True)


def test_time_hides_what_runs_beside_and_adds_what_does_not():
    product = hlo.Product(m=1e6, n=100, k=64, shape=())
    work = [hlo.Work("fusion", (product,), 1e6, 0.0, False, 3.0), hlo.Work("copy", (), 8e8, 0.0, False, 1.0)]
    devices = tuple(range(8))
    sends = [
        hlo.Collective("all-gather", 1e6, devices, True, 2.0, ""),
        hlo.Collective("all-reduce", 4e5, devices, False, 1.0, ""),
        hlo.Collective("all-reduce", 4e5, devices[:2], False, 1.0, "far"),
    ]
    found = plan.predict(work, sends, plan.Published(CHIP), lambda c: c.origin == "far")
    # 64 of the matrix unit's 128 rows are used; two rings; between slices the network's own speed.
    computing = 3 * (2 * 2e6 * 100 * 64 / 0.8e12) + 8e8 / 0.8e11
    assert found.compute == pytest.approx(computing)
    assert found.beside == pytest.approx(2 * 1e6 / (2 * 0.8e9))
    assert found.exposed == pytest.approx(4e5 / (2 * 0.8e9) + 4e5 / 1e8)
    assert found.step == pytest.approx(found.compute + found.exposed)


@pytest.fixture(scope="module")
def tiny():
    mesh = make_mesh(config().mesh)
    return plan.plan(config(), mesh, ENCODER, 8, "here", chip=CHIP)


def test_a_plan_says_what_the_step_is_made_of(tiny):
    made = config()
    shapes = Shapes((16, 16, 3), 12, 8)
    state = jax.eval_shape(lambda: made.family.init(jax.random.key(0), shapes))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state))
    assert tiny.parameters == count
    assert tiny.flops == made.family.train_flops(shapes, 8) * 16
    # Four arrays a parameter (itself, its average, AdamW's two), on as few devices as the rules leave them.
    assert 4 * 4 * count / 4 < tiny.state < 4 * 4 * count
    assert tiny.fits
    assert tiny.memory > tiny.state
    # Products of all devices are the model's, a few small ones computed by several of them.
    assert 0.9 < tiny.executed * 8 / tiny.flops < 1.6
    assert tiny.mfu == pytest.approx(tiny.flops / 8 / 1e12 / tiny.seconds.step)
    assert {"all-reduce"} <= {row["kind"] for row in tiny.collectives}
    assert not any("all-to-all" in row["kind"] for row in tiny.collectives)
    assert "all-to-all  none" in "\n".join(tiny.lines())


def test_an_all_to_all_is_named_with_what_it_comes_from():
    mesh = make_mesh(MeshConfig())
    inner = lambda x: jax.lax.all_to_all(x, "data", 1, 0, tiled=True)  # noqa: E731
    turn = jax.shard_map(inner, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data"))
    _, found = hlo.read(jax.jit(turn).lower(placed(mesh, (64, 16), "data")).compile().as_text())
    rows = plan.grouped(found, mesh)
    assert [(row["kind"], row["bytes"]) for row in rows] == [("all-to-all", 7 / 8 * 8 * 16 * 4)]
    assert "all_to_all" in rows[0]["origin"]


def test_a_step_too_large_names_the_knobs_with_values_to_try(tiny):
    mesh = make_mesh(config().mesh)
    smaller = plan.plan(config(batch_size=8), mesh, ENCODER, 8, "here", chip=CHIP)
    assert smaller.memory < tiny.memory
    with pytest.raises(UserError) as told:
        plan.plan(config(), mesh, ENCODER, 8, "here", chip=CHIP._replace(memory=(smaller.memory + tiny.memory) / 2))
    line = str(told.value)
    places = [line.index(knob) for knob in ("train.batch_size=", "train.accumulate=2", "remat=True", "mesh.fsdp=4")]
    assert places == sorted(places)
    assert "\n" not in line
    assert re.search(r"batch_size=(8|12),", line)


@pytest.mark.parametrize(
    ("said", "held", "line"),
    [
        (
            "Used 20.00G of 15.75G hbm. Exceeded hbm capacity by 4.25G.",
            0,
            "the step takes 20.00 GiB a device and 15.75 are there: try --config.train.batch_size=12, ",
        ),
        (
            "the total memory required for HLO temporaries (20.00G) exceeds available HBM (15.75G).",
            2,
            "the step takes 22.00 GiB a device and 15.75 are there: try --config.train.batch_size=8, ",
        ),
        (
            "Used 20.00G of 15.75G hbm.",
            16,
            "the state takes 16.00 GiB a device before the first picture, ",
        ),
        ("in other words", 2, "the step takes more memory than a device has: try --config.train.batch_size=8, "),
    ],
)
def test_running_out_while_compiling_is_told_in_the_same_line(said, held, line):
    class Lowered:
        def compile(self):
            raise RuntimeError(f"RESOURCE_EXHAUSTED: {said}")

    with pytest.raises(UserError) as told:
        memory.compile_checked(Lowered(), config(), make_mesh(config().mesh), held * 2**30)
    assert str(told.value).startswith(line)
    assert ("batch_size" in str(told.value)) == (held < 15)  # no batch is small enough for a state that does not fit


def test_bytes_are_counted_as_they_lie():
    mesh = make_mesh(config().mesh)
    split = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    tree = {
        "split": jax.ShapeDtypeStruct((16, 3), jnp.bfloat16, sharding=split),
        "whole": jax.device_put(1.0, jax.devices()[0]),
    }
    assert memory.bytes_a_device(tree) == 16 * 3 * 2 // (mesh.shape["data"] * mesh.shape["fsdp"]) + 4


def test_the_largest_batch_is_found_along_a_line():
    tried = []

    def again(made):
        batch = made.train.batch_size
        tried.append(batch)
        if batch > 40:
            raise UserError("too large")
        return SimpleNamespace(batch=batch, memory=100 + 10 * batch, limit=520)

    assert plan.largest(config(), again, again(config()), 4) == 40
    assert tried == [16, 8, 40]


def test_speeds_of_this_machine_are_those_of_the_products_themselves():
    work, _ = read(lambda a, b: jnp.tanh(a) @ b, jnp.ones((64, 32)), jnp.ones((32, 16)))
    (product,) = [p for w in work for p in w.products]
    function, args = probe.remake(product.shape)
    assert [a.shape for a in args] == [(64, 32), (32, 16)]
    assert function(*args).shape == (64, 16)
    speed = probe.Measured(work, [])
    speed.look()
    assert min(speed.product(product), speed.copy(100.0), speed.elements(100.0)) > 0


def test_speeds_are_the_medians_of_all_looks(monkeypatch):
    seconds = iter([1.0, 9.0, 2.0])
    now: list[float] = []
    counted = lambda factor: lambda: now[0] * factor  # noqa: E731
    monkeypatch.setattr(probe, "timer", lambda function, args, **_: counted(10.0))
    for name, factor in {"per_byte": 1.0, "per_element": 0.1}.items():
        monkeypatch.setattr(probe, name, lambda f=factor: counted(f))
    monkeypatch.setattr(probe, "per_sent", lambda size: counted(size / 100))
    work, _ = read(lambda a, b: jnp.tanh(a) @ b, jnp.ones((64, 32)), jnp.ones((32, 16)))
    sent = hlo.Collective("all-reduce", 7.0, (0, 1), False, 1.0, "")
    speed = probe.Measured(work, [sent])
    for each in seconds:
        now[:] = [each]
        speed.look()
    (product,) = [p for w in work for p in w.products]
    assert speed.product(product) == 20.0
    # A shape that is not timed goes at the mean speed of those that are.
    assert speed.product(product._replace(m=2 * product.m, shape=("other",))) == pytest.approx(40.0)
    assert (speed.copy(3.0), speed.elements(5.0), speed.send(sent, False)) == pytest.approx((6.0, 1.0, 0.28))


def test_steps_are_run_in_turn_with_the_looks(monkeypatch):
    log, clock = [], iter([0.0, 90.0, 100.0, 101.0, 110.0, 113.0, 120.0, 122.0])
    monkeypatch.setattr(plan.time, "perf_counter", lambda: next(clock))
    speed: Any = SimpleNamespace(look=lambda: log.append("look"))
    assert plan.look(speed, lambda: log.append("step"), 3) == 2.0  # of 1, 3, 2: the first step does not count
    assert log == ["look", "step"] * 4 + ["look"]
    assert plan.look(speed, None, 0) is None
    assert log[9:] == ["look"] * 5


def test_slices_are_joined_along_the_first_axis():
    devices = [SimpleNamespace(id=i, slice_index=i % 2, device_kind="x", platform="x", process_index=0) for i in range(8)]
    grid = lay_out([4, 2, 1], devices)
    assert [{device.slice_index for device in row.flat} for row in grid] == [{0}, {0}, {1}, {1}]
    for device in devices:
        device.platform = "tpu"
    with pytest.raises(UserError, match=r"mesh.data=1 is no multiple of the 2 slices"):
        lay_out([1, 8, 1], devices)


@pytest.mark.parametrize("network", [{"scan": True}, {"scan": True, "remat": True}, {"remat": "dots"}])
def test_blocks_in_a_loop_or_computed_again_give_the_same_numbers(network):
    def gradient(network):
        family = Flow(network=replace(config().family.network, dropout=0.1, **network))
        shapes = Shapes((16, 16, 3), 12, 8)
        params = family.init(jax.random.key(0), shapes)
        params = jax.tree.map(lambda p: p + 0.02 * jax.random.normal(jax.random.key(1), p.shape), params)
        text = TextFeatures(jnp.ones((2, 4, 12)), jnp.ones((2, 8)), jnp.ones((2, 4), bool))
        batch = {"image": jax.random.normal(jax.random.key(2), (2, 16, 16, 3)), "text": text}
        loss = lambda p: family.losses(p, {}, batch, jax.random.key(3))["generator"][0]  # noqa: E731
        return jax.jit(jax.grad(loss))(params)

    for a, b in zip(jax.tree.leaves(gradient({})), jax.tree.leaves(gradient(network)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_a_topology_needs_the_library_that_knows_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"libtpu is not installed: run .*tpu"):
        plan.topology("v5e:2x2", 1)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra tpu")
def test_an_unknown_topology_lists_those_there_are(monkeypatch):
    for name, value in {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}.items():
        monkeypatch.setenv(name, value)
    assert len(plan.topology("v5e:2x2", 2)) == 8
    with pytest.raises(UserError, match=r"--topology=v9:2x2: .*known are v4:2x2x1"):
        plan.topology("v9:2x2", 1)
