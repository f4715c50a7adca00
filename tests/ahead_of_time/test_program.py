"""What compiled programs are said to come to, on small programs and snippets of compiled text."""

import jax
import jax.numpy as jnp
import meshes
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from t5x_sparsity.ahead_of_time.program import Collective, collectives, describe


def abstract(mesh, shape, *spec):
    return jax.ShapeDtypeStruct(
        shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec))
    )


def compile_(fn, *arguments, donate=()):
    return describe(jax.jit(fn, donate_argnums=donate).lower(*arguments).compile())


def test_memory_and_flops_of_each_device():
    mesh = meshes.mesh(2, 4)
    x = abstract(mesh, (64, 128), "x", "y")
    w = abstract(mesh, (128, 32))
    step = compile_(lambda x, w: (x @ w).sum(0), x, w)
    # a 32 x 32 part of x, all of w; one reduction over each axis of the mesh
    assert step.argument_bytes == 4 * (32 * 32 + 128 * 32)
    assert 4 * 32 <= step.output_bytes < 4 * 32 + 64  # and the table of a tuple
    assert step.peak_bytes == step.argument_bytes + step.output_bytes + step.temp_bytes
    assert 2 * 32 * 32 * 32 <= step.flops < 1.2 * 2 * 32 * 32 * 32
    assert set(step.collectives) == {"all-reduce"} and step.open_loops == 0


def test_what_is_donated_counts_once():
    mesh = meshes.mesh(2, 4)
    x = abstract(mesh, (64, 128), "x", "y")
    kept, donated = compile_(lambda x: x + 1, x), compile_(lambda x: x + 1, x, donate=0)
    assert donated.alias_bytes == 4 * 32 * 32 and kept.alias_bytes == 0
    assert kept.peak_bytes - donated.peak_bytes == 4 * 32 * 32


def test_a_gather_counts_as_often_as_its_loop_turns():
    mesh = meshes.mesh(2, 4)
    x, w = abstract(mesh, (16, 64)), abstract(mesh, (64, 64), None, "y")

    def fn(x, w):
        def body(_, c):
            return jax.lax.with_sharding_constraint(jnp.tanh(c @ w), everywhere)

        return jax.lax.fori_loop(0, 7, body, x)

    everywhere = NamedSharding(mesh, PartitionSpec())
    step = compile_(fn, x, w)
    # c as it comes out of the product, a quarter of its columns on each device
    assert step.collectives["all-gather"] == Collective(7, 7 * 4 * 16 * 64)
    assert step.open_loops == 0


def test_one_device_moves_nothing():
    step = compile_(lambda x: x @ x, jnp.ones((8, 8)))
    assert step.collectives == {} and step.temp_bytes >= 0


TPU = """\
HloModule jit_f, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b), metadata={op_name="all-reduce(f)"}
}

%body (p: (s32[], bf16[64,512])) -> (s32[], bf16[64,512]) {
  %p = (s32[]{:T(128)}, bf16[64,512]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %one = s32[]{:T(128)} constant(1)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %next = s32[]{:T(128)} add(%i, %one)
  %x = bf16[64,512]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p), index=1
  %y = bf16[16,512]{1,0:T(8,128)(2,1)S(1)} reduce-scatter(%x), channel_id=1, to_apply=%add
  ROOT %t = (s32[]{:T(128)}, bf16[64,512]{1,0:T(8,128)(2,1)}) tuple(%next, %x)
}

%condition (q: (s32[], bf16[64,512])) -> pred[] {
  %twelve = s32[]{:T(128)} constant(12)
  %q = (s32[]{:T(128)}, bf16[64,512]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  ROOT %less = pred[]{:T(512)} compare(%j, %twelve), direction=LT
}

%wrapped (u: f32[8,4]) -> f32[8,4] {
  %u = f32[8,4]{1,0} parameter(0)
  ROOT %all = f32[8,4]{1,0} all-to-all(%u), channel_id=2, dimensions={0}
}

ENTRY %main (w: f32[8,4], v: bf16[64,512]) -> f32[8,4] {
  %w = f32[8,4]{1,0:T(8,128)} parameter(0)
  %v = bf16[64,512]{1,0:T(8,128)} parameter(1)
  %zero = s32[]{:T(128)} constant(START)
  %start = s32[]{:T(128)} copy(%zero)
  %state = (s32[]{:T(128)}, bf16[64,512]{1,0:T(8,128)(2,1)S(1)}) tuple(%start, %v)
  %loop = (s32[]{:T(128)}, bf16[64,512]{1,0:T(8,128)(2,1)S(1)}) while(%state), \
condition=%condition, body=%body, metadata={op_name="while"}NOTE
  %go = ((f32[8,4]{1,0}), f32[8,4]{1,0}, u32[]{:S(2)}) async-start(%w), calls=%wrapped
  %done = f32[8,4]{1,0} async-done(%go), calls=%wrapped
  %both = (f32[3]{0}, /*index=1*/pred[10]{0}) all-reduce(%r, %s), to_apply=%add
  %g = (f32[8,4]{1,0:T(8,128)}, f32[32,4]{1,0:T(8,128)S(1)}) all-gather-start(%w), dimensions={0}
  %h = f32[32,4]{1,0:T(8,128)S(1)} all-gather-done(%g)
  %c = (f32[8,4]{1,0}, f32[8,4]{1,0}, u32[], u32[]) collective-permute-start(%w)
  %e = f32[8,4]{1,0} collective-permute-done(%c)
  ROOT %k = f32[8,4]{1,0} custom-call(%e), custom_call_target="all-gather(x)"
}
"""


def tpu(start="0", note=""):
    return TPU.replace("START", start).replace("NOTE", note)


def test_the_text_of_a_tpu_program():
    found, open_loops = collectives(tpu())
    assert found == {
        "all-gather": Collective(1, 4 * 32 * 4),
        "all-reduce": Collective(1, 4 * 3 + 10),
        "reduce-scatter": Collective(12, 12 * 2 * 64 * 512),
        "all-to-all": Collective(1, 4 * 8 * 4),
        "collective-permute": Collective(1, 4 * 8 * 4),
    }
    assert open_loops == 0


@pytest.mark.parametrize(
    "text, turns, open_loops",
    [
        (tpu(start="2"), 10, 0),
        (tpu(note=', backend_config={"known_trip_count":{"n":"5"}}'), 5, 0),
        (tpu().replace("direction=LT", "direction=NE"), 1, 1),
        (tpu().replace("add(%i, %one)", "add(%i, %i)"), 1, 1),
        (tpu().replace("copy(%zero)", "negate(%zero)"), 1, 1),
    ],
)
def test_how_often_a_loop_turns(text, turns, open_loops):
    found, unknown = collectives(text)
    assert found["reduce-scatter"].count == turns and unknown == open_loops


def test_every_branch_of_a_conditional_counts():
    branches = "branch_computations={%wrapped, %none}"
    more = f"  %b = f32[8,4] conditional(%p, %w, %w), {branches}\n  ROOT %k"
    found, _ = collectives(tpu().replace("  ROOT %k", more))
    assert found["all-to-all"] == Collective(2, 2 * 4 * 8 * 4)


def test_an_asynchronous_reduce_scatter_counts_its_input():
    text = """
ENTRY %main (w: f32[1024]) -> f32[128] {
  %w = f32[1024]{0} parameter(0)
  %s = ((f32[1024]{0}), f32[128]{0}) reduce-scatter-start(%w), dimensions={0}, to_apply=%add
  ROOT %d = f32[128]{0} reduce-scatter-done(%s)
}
"""
    assert collectives(text)[0] == {"reduce-scatter": Collective(1, 4 * 1024)}
