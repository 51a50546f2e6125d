"""Every kernel against numpy, and the promises made for all of them: same bits whatever the rows, family, threads."""

from collections.abc import Callable
from functools import cache, partial
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi
from numpy.typing import NDArray
from tvm.script import tirx as T

from engram_compilers.kernels import (
    activation,
    attention,
    avx2,
    avx512_vnni,
    avx_vnni,
    intrinsics,
    loops,
    normalise,
    portable,
    quantise,
)
from engram_compilers.linking import link
from engram_runtime.cpu import cpu_flags, machine
from engram_runtime.errors import CompileError

Array = NDArray[Any]

CPU_FLAGS = cpu_flags()
HAS_VNNI = {"avx512_vnni", "avx512vl"} <= CPU_FLAGS
needs_vnni = pytest.mark.skipif(not HAS_VNNI, reason="this machine's processor has no avx512_vnni")
needs_avx_vnni = pytest.mark.skipif(
    not (HAS_VNNI or "avx_vnni" in CPU_FLAGS), reason="this machine's processor has neither avx_vnni nor avx512_vnni"
)
needs_avx2 = pytest.mark.skipif(not {"avx2", "fma"} <= CPU_FLAGS, reason="this machine's processor has no avx2")
X86_FAMILIES = [
    pytest.param(avx512_vnni, id="avx512_vnni", marks=needs_vnni),
    pytest.param(avx_vnni, id="avx_vnni", marks=needs_avx_vnni),
    pytest.param(avx2, id="avx2", marks=needs_avx2),
]
FAMILIES = [pytest.param(portable, id="portable"), *X86_FAMILIES]
OTHER_ROWS = [pytest.param(rows, marks=pytest.mark.exhaustive) for rows in (7, 8, *range(10, 17), 64)]
ROWS = [*range(1, 7), 9, 17, *OTHER_ROWS]  # blocks of rows of every size, and what can be left over
PLANES = [1, 2]
FEW_ROWS = [1, 3, 17]  # for the kernels that share their blocking with others
BLOCK_ROWS = [1, 2, 3, 5, 6, 9, 17]
OUTPUTS, INPUTS = 201, 160  # 12 whole tiles and one of 9 outputs; inputs are padded to 192
LEGAL_GROUPS = np.array([(m, z) for m in range(1, 17) for z in range(16) if (15 - z) * m <= 127 and z * m <= 128])


def processor(family: ModuleType) -> str:
    """Return what to compile a family for: AVX2 on its own, the others for this machine."""
    return "haswell" if family.__name__.rsplit(".", 1)[1].startswith("avx2") else host_processor()


def host_processor() -> str:
    return str(tvm.target.codegen.llvm_get_system_cpu())


def compile_kernels(kernels: dict[Any, Any], mcpu: str | None = None) -> dict[Any, Callable[..., None]]:
    """Compile PrimFuncs for this machine in one module; the keys come back with callables."""
    names = {key: f"kernel_{i}" for i, key in enumerate(kernels)}
    module = tvm.IRModule({names[key]: f.with_attr("global_symbol", names[key]) for key, f in kernels.items()})
    executable = tvm.compile(module, tvm.target.Target({"kind": "llvm", "mcpu": mcpu or host_processor()}))
    return {key: executable[name] for key, name in names.items()}


def call(kernel: Callable[..., None], *arrays: Array) -> list[Array]:
    """Call a kernel with copies of ``arrays`` and return them as it left them."""
    tensors = [tvm.runtime.tensor(np.ascontiguousarray(a)) for a in arrays]
    kernel(*tensors)
    return [t.numpy() for t in tensors]


def same_bits(a: Array, b: Array) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def floats(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def hard_rows(rows: int, columns: int) -> Array:
    """Return ordinary rows, but the first four (as many as there are) are an outlier, zeros, denormals, constant."""
    x = floats(rows, columns, seed=1)
    x[0, columns // 3] = 1e4
    x[1:2] = 0
    x[2:3] *= 1e-39
    x[3:4] = -0.37
    return x


def quantised_rows(x: Array, planes: int) -> list[Array]:
    """State the planes, scales and offsets of rows in one or two planes."""
    return list(quantise.quantise_rows_numpy(x, planes))


def joined(planes: Array, weight: Array, rows: int) -> Array:
    """f32(S), or 256 * f32(H) + f32(L) of two planes, for integer weights ``[N, K]``."""
    sums = (planes[:, : weight.shape[1]].astype(np.int64) @ weight.astype(np.int64).T).astype(np.int32)
    parts = sums.astype(np.float32).reshape(-1, rows, len(weight))
    return np.asarray(parts[0] if len(parts) == 1 else parts[0] * np.float32(256) + parts[1])


# Quantising activations


@cache
def quantisers() -> dict[Any, Callable[..., None]]:
    shapes = [(1, 64), (4, 100), (17, 49), (64, 160), (2, 3)]
    return compile_kernels({shape: quantise.quantise_rows(*shape, quantise.MOST_PLANES) for shape in shapes})


def quantised(kernel: Callable[..., None], x: Array) -> list[Array]:
    rows, columns = x.shape
    planes = np.full((2 * rows, loops.round_up(columns, 64)), 99, np.int8)
    return call(kernel, x, planes, np.zeros(rows, np.float32), np.zeros(2 * rows, np.int32))[1:]


@pytest.mark.parametrize("shape", [(1, 64), (4, 100), (17, 49), (64, 160), (2, 3)])
def test_quantise_rows_is_its_numpy_statement_bit_for_bit(shape: tuple[int, int]) -> None:
    x = hard_rows(*shape)
    expected = quantised_rows(x, 2)
    found = quantised(quantisers()[shape], x)
    assert [same_bits(f, e) for f, e in zip(found, expected, strict=True)] == [True] * 3


def test_two_planes_hold_16_bits_of_every_row() -> None:
    x = hard_rows(17, 49)
    planes, row_scale, _ = quantised_rows(x, 2)
    restored = (256.0 * planes[:17, :49] + planes[17:, :49]) * row_scale[:, None]
    # Half a step, and 32639 * 2^-23 of a step for the rounding of x * (32639 / peak).
    assert np.all(np.abs(restored - x).max(axis=1) <= 0.504 * row_scale)


def test_the_low_plane_reaches_both_ends_of_int8() -> None:
    planes, _, _ = quantised_rows(floats(64, 160), 2)
    assert (planes[64:].min(), planes[64:].max()) == (-128, 127)


def test_a_row_with_a_nan_or_inf_gets_a_scale_that_shows_it() -> None:
    x = floats(4, 100)
    x[0, 99], x[2, 3] = np.nan, -np.inf
    row_scale = quantised(quantisers()[4, 100], x)[1]
    assert list(np.isfinite(row_scale)) == [False, True, False, True]


# Linear layers


def linear_sizes(rows: int) -> tuple[int, int, int]:
    return rows, OUTPUTS, INPUTS


def cut_int8(rows: int) -> tuple[int, int, int]:
    """A second shape for int8 layers: fewer outputs than a vector has lanes, inputs not of whole groups."""
    return rows, 15, 70


@cache
def linears(family: ModuleType, rows: int) -> dict[Any, Callable[..., None]]:
    kernels: dict[Any, Any] = {}
    for planes in PLANES:
        kernels["int8", planes] = family.linear_int8(*linear_sizes(rows), planes)
        kernels["int4", planes] = family.linear_int4(*linear_sizes(rows), planes)
        if rows in FEW_ROWS:
            kernels["int8 cut", planes] = family.linear_int8(*cut_int8(rows), planes)
    if rows in BLOCK_ROWS:
        kernels["q4_0", 2] = family.linear_block(*linear_sizes(rows), bits=4)
        kernels["q8_0", 2] = family.linear_block(*linear_sizes(rows), bits=8)
    return compile_kernels(kernels, processor(family))


def int8_weight(outputs: int, inputs: int) -> Array:
    weight = np.random.default_rng(2).integers(0, 256, (outputs, inputs)).astype(np.uint8)
    weight[:2] = [[0], [255]]  # saturated: -128 and 127
    return weight


def int4_weight() -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(3)
    codes = rng.integers(0, 16, (OUTPUTS, INPUTS)).astype(np.uint8)
    codes[:2] = [[0], [15]]
    chosen = LEGAL_GROUPS[rng.integers(0, len(LEGAL_GROUPS), (OUTPUTS, INPUTS // 32))].astype(np.uint8)
    return codes, chosen[..., 0], chosen[..., 1]


def block_weight(bits: int) -> tuple[Array, Array]:
    rng = np.random.default_rng(4)
    codes = rng.integers(0, 2**bits, (OUTPUTS, INPUTS)).astype(np.uint8)
    return codes, (rng.normal(size=(OUTPUTS, INPUTS // 32)) * 0.01).astype(np.float32)


def channel_scale(outputs: int) -> Array:
    return np.random.default_rng(5).uniform(0.001, 0.1, outputs).astype(np.float32)


def run_linear(family: ModuleType, kind: str, x: Array, planes: int = 2) -> Array:
    """Quantise ``x`` with numpy and run one linear layer of a family on it."""
    return run_quantised(family, kind, quantised_rows(x, planes), x.shape[1])


def run_quantised(family: ModuleType, kind: str, quantised_x: list[Array], inputs: int) -> Array:
    """Run one linear layer of a family on the planes, scales and offsets of its rows."""
    planes, row_scale, _ = quantised_x
    rows = len(row_scale)
    kernel = linears(family, rows)[kind, len(planes) // rows]
    return call(kernel, *linear_arguments(family, kind, quantised_x, inputs))[-1]


def linear_arguments(family: ModuleType, kind: str, quantised_x: list[Array], inputs: int) -> list[Array]:
    planes, row_scale, plane_offset = quantised_x
    outputs = cut_int8(1)[1] if kind == "int8 cut" else OUTPUTS
    weights, y = packed_weights(family, kind, outputs, inputs), np.full((len(row_scale), outputs), np.nan, np.float32)
    if kind.startswith("q"):
        return [planes, row_scale, *weights, y]
    return [planes, row_scale, plane_offset, *weights, channel_scale(outputs), y]


@cache
def packed_weights(family: ModuleType, kind: str, outputs: int, inputs: int) -> list[Array]:
    if kind.startswith("int8"):
        return list(family.pack_int8(int8_weight(outputs, inputs)).values())
    if kind == "int4":
        return list(family.pack_int4(*int4_weight()).values())
    return list(family.pack_block(*block_weight(int(kind[1])), int(kind[1])).values())


def stated_linear(kind: str, quantised_x: list[Array], inputs: int) -> Array:
    """State what the int8 and int4 layers compute."""
    planes, row_scale, _ = quantised_x
    if kind == "int4":
        codes, multiplier, zero = (a.astype(np.int64) for a in int4_weight())
        weight = (codes - zero.repeat(32, axis=1)) * multiplier.repeat(32, axis=1)
    else:
        outputs = cut_int8(1)[1] if kind == "int8 cut" else OUTPUTS
        weight = int8_weight(outputs, inputs).astype(np.int64) - 128
    return np.asarray(joined(planes, weight, len(row_scale)) * channel_scale(len(weight)) * row_scale[:, None])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("planes", PLANES)
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_linear_layers_are_integer_sums_scaled_in_the_stated_order(
    family: ModuleType, kind: str, rows: int, planes: int
) -> None:
    quantised_x = quantised_rows(hard_rows(rows, INPUTS), planes)
    assert same_bits(run_quantised(family, kind, quantised_x, INPUTS), stated_linear(kind, quantised_x, INPUTS))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("planes", PLANES)
@pytest.mark.parametrize("rows", FEW_ROWS)
def test_linear_int8_takes_sizes_that_fill_no_vector(family: ModuleType, rows: int, planes: int) -> None:
    _, _, inputs = cut_int8(rows)
    quantised_x = quantised_rows(hard_rows(rows, inputs), planes)
    found = run_quantised(family, "int8 cut", quantised_x, inputs)
    assert same_bits(found, stated_linear("int8 cut", quantised_x, inputs))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("planes", PLANES)
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_the_largest_products_of_both_signs_are_exact(family: ModuleType, kind: str, planes: int) -> None:
    """The first outputs have the lowest and highest weights throughout; rows are -128, 127 and both in turn."""
    plane = np.zeros((3 * planes, 192), np.int8)
    plane[:, :INPUTS] = np.resize([[-128, -128], [127, 127], [-128, 127]], (3 * planes, 2)).repeat(80, axis=1)
    quantised_x = [plane, np.ones(3, np.float32), -128 * plane.sum(axis=1, dtype=np.int32)]
    assert same_bits(run_quantised(family, kind, quantised_x, INPUTS), stated_linear(kind, quantised_x, INPUTS))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", BLOCK_ROWS)
@pytest.mark.parametrize("bits", [4, 8])
def test_linear_block_adds_scaled_groups(family: ModuleType, rows: int, bits: int) -> None:
    x = hard_rows(rows, INPUTS)
    planes, row_scale, _ = quantised_rows(x, 2)
    codes, scale = block_weight(bits)
    weight = (codes.astype(np.float64) - 2 ** (bits - 1)) * scale.astype(np.float64).repeat(32, axis=1)
    value = 256.0 * planes[:rows, :INPUTS] + planes[rows:, :INPUTS]
    expected = value @ weight.T * row_scale[:, None]
    bound = np.abs(value) @ np.abs(weight).T * row_scale[:, None]
    error = np.abs(run_linear(family, f"q{bits}_0", x) - expected)
    assert np.all(error <= 7 * 2.0**-24 * bound)  # one rounding each: 5 groups, the row scale, and one to spare


@pytest.mark.parametrize("family", X86_FAMILIES)
@pytest.mark.parametrize(("kind", "rows"), list(product(["q4_0", "q8_0"], BLOCK_ROWS)))
def test_all_families_give_the_same_bits_on_block_formats(family: ModuleType, kind: str, rows: int) -> None:
    x = hard_rows(rows, INPUTS)
    assert same_bits(run_linear(portable, kind, x), run_linear(family, kind, x))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", BLOCK_ROWS)
@pytest.mark.parametrize(("kind", "planes"), [*product(["int8", "int4"], PLANES), ("q4_0", 2), ("q8_0", 2)])
def test_a_row_of_a_linear_layer_does_not_depend_on_its_neighbours(
    family: ModuleType, kind: str, rows: int, planes: int
) -> None:
    x = hard_rows(rows, INPUTS)
    alone = [run_linear(family, kind, x[row : row + 1], planes) for row in range(rows)]
    assert same_bits(run_linear(family, kind, x, planes), np.concatenate(alone))


def linked(kernels: dict[str, Any], mcpu: str, folder: Path) -> Any:
    """Return a library of PrimFuncs with the threads and the memory of the product."""
    module = tvm.IRModule({name: f.with_attr("global_symbol", name) for name, f in kernels.items()})
    compiled = tvm.compile(module, tvm.target.Target({"kind": "llvm", "mcpu": mcpu}))
    path = folder / "model.so"
    compiled.export_library(str(path), fcompile=partial(link, mtriple=f"{machine()}-linux-gnu"))
    return tvm_ffi.load_module(str(path))


@pytest.mark.parametrize("family", FAMILIES)
def test_threads_do_not_change_a_bit(family: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the thread pool of compiled libraries, whose threads have 8 rows of 201 outputs to share."""
    monkeypatch.setattr(loops, "PARALLEL_FROM_US", 0.0)
    layers = [("int8", 2), ("int4", 2), ("int4", 1)]
    kernels = {
        f"{kind}_{planes}": getattr(family, f"linear_{kind}")(*linear_sizes(8), planes) for kind, planes in layers
    }
    assert all("T.parallel" in kernel.script() for kernel in kernels.values())
    library = linked(kernels, processor(family), tmp_path)
    for (kind, planes), threads in product(layers, (1, 3)):
        quantised_x = quantised_rows(hard_rows(8, INPUTS), planes)
        library["use_threads"](threads)
        arguments = linear_arguments(family, kind, quantised_x, INPUTS)
        found = call(library[f"{kind}_{planes}"], *arguments)[-1]
        assert same_bits(found, stated_linear(kind, quantised_x, INPUTS))


@pytest.mark.parametrize("family", FAMILIES)
def test_embedding_reads_the_packed_weight_of_the_output_layer(family: ModuleType) -> None:
    weight, scale = int8_weight(OUTPUTS, 70), channel_scale(OUTPUTS)
    token_ids = np.array([0, OUTPUTS - 1, 15, 16, 15])
    kernel = compile_kernels({"embed": family.embed_int8(5, OUTPUTS, 70)}, processor(family))["embed"]
    embedded = np.zeros((5, 70), np.float32)
    found = call(kernel, token_ids, family.pack_int8(weight)["weight"], scale, embedded)[-1]
    assert same_bits(found, (weight[token_ids].astype(np.float32) - 128) * scale[token_ids, None])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("multiplier", "zero"), [(0, 0), (17, 8), (16, 7), (9, 0), (16, 9), (1, 16)])
def test_int4_groups_that_leave_int8_are_refused_by_name(family: ModuleType, multiplier: int, zero: int) -> None:
    codes, multipliers, zeros = int4_weight()
    multipliers[3, 1], zeros[3, 1] = multiplier, zero
    with pytest.raises(CompileError, match=f"group 1 of output 3 has multiplier {multiplier} and zero {zero},"):
        family.pack_int4(codes, multipliers, zeros)


@pytest.mark.parametrize("family", FAMILIES)
def test_grouped_weights_refuse_inputs_that_are_not_whole_groups(family: ModuleType) -> None:
    with pytest.raises(CompileError, match="in_features is 70, grouped weights need a multiple of 32"):
        family.linear_int4(1, 16, 70, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_beyond_32_bit_indices_are_refused(family: ModuleType) -> None:
    with pytest.raises(CompileError, match="the weight has 2147483648 elements"):
        family.linear_int8(1, 2**21, 1024, 2)


# Normalisation and activation


@cache
def exponential() -> Callable[..., None]:
    @T.prim_func(s_tir=True, private=True)  # type: ignore[untyped-decorator]
    def kernel(x: T.Buffer((1024, 16), "float32"), y: T.Buffer((1024, 16), "float32")) -> None:  # type: ignore[valid-type]
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        with T.sblock("root"):
            for row in T.serial(1024):
                y[row, intrinsics.lanes(0)] = intrinsics.exp16(x[row, intrinsics.lanes(0)])

    return compile_kernels({"exp16": kernel})["exp16"]


def exp16(x: Array) -> Array:
    return call(exponential(), x.astype(np.float32).reshape(1024, 16), np.zeros((1024, 16), np.float32))[-1].ravel()


def test_exp16_is_good_to_one_and_a_half_ulp() -> None:
    x = np.linspace(-87.33, 88.37, 1024 * 16).astype(np.float32)
    expected = np.exp(x.astype(np.float64))
    assert np.max(np.abs(exp16(x) - expected) / np.spacing(expected.astype(np.float32))) < 1.5


def test_exp16_is_0_far_below_and_finite_far_above_0() -> None:
    found = exp16(np.resize(np.array([-np.inf, -3e38, -87.4, 0.0, 1e9, np.inf]), 1024 * 16))
    assert found[:4].tolist() == [0, 0, 0, 1]
    assert np.isfinite(found).all()


@cache
def row_kernels() -> dict[Any, Callable[..., None]]:
    kernels: dict[Any, Any] = {}
    for rows in (1, 17):
        for columns in (9, 77, 576):
            kernels["rms_norm", rows, columns] = normalise.rms_norm(rows, columns, 1e-5)
            kernels["l2_norm", rows, columns] = normalise.l2_norm(rows, columns)
            kernels["silu_mul", rows, columns] = activation.gated(rows, columns, activation.silu)
            kernels["add", rows, columns] = activation.add(rows, columns)
    return compile_kernels(kernels)


def rms_norm(x: Array) -> Array:
    gain = floats(x.shape[1], seed=6)
    return call(row_kernels()["rms_norm", *x.shape], x, gain, np.zeros_like(x))[-1]


def l2_norm(x: Array) -> Array:
    return call(row_kernels()["l2_norm", *x.shape], x, np.zeros(len(x), np.float32))[-1]


def silu_mul(gate_up: Array) -> Array:
    rows, columns = gate_up.shape[0], gate_up.shape[1] // 2
    return call(row_kernels()["silu_mul", rows, columns], gate_up, np.zeros((rows, columns), np.float32))[-1]


@pytest.mark.parametrize("columns", [9, 77, 576])
def test_rms_norm_divides_by_the_root_of_the_mean_square(columns: int) -> None:
    x = hard_rows(17, columns)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 1e-5) * floats(columns, seed=6)
    # Sums of squares of 36 terms per lane and a few roundings after: well under 20 of 2^-24, or of a denormal.
    np.testing.assert_allclose(rms_norm(x), expected, rtol=20 * 2.0**-24, atol=2.0**-149)


@pytest.mark.parametrize("columns", [9, 77, 576])
def test_l2_norm_is_the_root_of_the_sum_of_squares(columns: int) -> None:
    x = hard_rows(17, columns)
    x[2] = 0  # the squares of denormals are 0
    expected = np.linalg.norm(x.astype(np.float64), axis=1)
    np.testing.assert_allclose(l2_norm(x), expected, rtol=20 * 2.0**-24, atol=0)


@pytest.mark.parametrize("columns", [9, 77, 576])
def test_silu_mul_is_gate_times_sigmoid_times_up_for_any_gate(columns: int) -> None:
    gate_up = floats(17, 2 * columns) * 30
    gate_up[0, :9] = [0.0, -0.0, 88, -86, -104, -1e30, 1e30, np.float32(3e38), 1e-40]
    gate, up = np.split(gate_up.astype(np.float64), 2, axis=1)
    with np.errstate(over="ignore"):
        expected = gate / (1 + np.exp(-gate)) * up
    found = silu_mul(gate_up)
    clipped = np.abs(expected) > np.finfo(np.float32).max
    # exp is good to about 1 ulp; below exp(-87.33) it is 0, which drops results under 1e-35.
    np.testing.assert_allclose(found[~clipped], expected[~clipped], rtol=8 * 2.0**-24, atol=1e-34)


def test_silu_mul_shows_a_nan() -> None:
    gate_up = floats(17, 2 * 77)
    gate_up[3, 5] = np.nan
    assert np.argwhere(np.isnan(silu_mul(gate_up))).tolist() == [[3, 5]]


@pytest.mark.parametrize("columns", [9, 77, 576])
def test_add_adds(columns: int) -> None:
    a, b = floats(17, columns, seed=7), floats(17, columns, seed=8)
    assert same_bits(call(row_kernels()["add", 17, columns], a, b, np.zeros_like(a))[-1], a + b)


@pytest.mark.parametrize("columns", [9, 77, 576])
@pytest.mark.parametrize("function", [rms_norm, l2_norm, silu_mul])
def test_a_row_does_not_depend_on_its_neighbours(function: Callable[[Array], Array], columns: int) -> None:
    x = floats(17, 2 * columns if function is silu_mul else columns)
    alone = [function(x[row : row + 1]) for row in range(17)]
    assert same_bits(function(x), np.concatenate(alone))


# Attention

LENGTH, CAPACITY, WINDOW = 150, 157, 70
LAYERS = {"grouped": (6, 2, 64), "one kv head, wide": (2, 1, 96), "no groups, narrow": (2, 2, 16)}  # heads, kv, dim
CASES = [
    ("grouped", WINDOW),
    ("one kv head, wide", None),
    pytest.param("grouped", None, marks=pytest.mark.exhaustive),
    pytest.param("no groups, narrow", WINDOW, marks=pytest.mark.exhaustive),
]


@cache
def attention_kernels(name: str, window: int | None) -> dict[Any, Callable[..., None]]:
    kernels: dict[Any, Any] = {}
    for tokens in (1, 4, 17):
        sizes = (tokens, *LAYERS[name], CAPACITY)
        kernels["rope_append", tokens] = attention.rope_append(*sizes)
        kernels["attend", tokens] = attention.attend(*sizes, LAYERS[name][2] ** -0.5, window)
    return compile_kernels(kernels)


def rope_tables(head_dim: int) -> tuple[Array, Array]:
    frequency = 10000.0 ** (-np.arange(head_dim // 2) / (head_dim // 2))
    angle = np.arange(CAPACITY)[:, None] * frequency
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def attend_in_steps(name: str, tokens: int, window: int | None) -> tuple[Array, Array, Array, Array]:
    """Run LENGTH tokens through rope_append and attend, ``tokens`` at a time; return out, q and the caches.

    What is left of LENGTH goes one by one. The caches start as NaN: no row may count before it is written.
    """
    heads, kv_heads, head_dim = LAYERS[name]
    qkv = floats(LENGTH, (heads + 2 * kv_heads) * head_dim, seed=9)
    caches = [tvm.runtime.tensor(np.full((1, kv_heads, CAPACITY, head_dim), np.nan, np.float32)) for _ in "kv"]
    tables = [tvm.runtime.tensor(table) for table in rope_tables(head_dim)]
    outs, queries = [], []
    kernels, position = attention_kernels(name, window), 0
    while position < LENGTH:
        step = tokens if position + tokens <= LENGTH else 1
        at = tvm.runtime.tensor(np.array([position]))
        q, out = (tvm.runtime.tensor(np.zeros((step, heads * head_dim), np.float32)) for _ in range(2))
        new = tvm.runtime.tensor(qkv[position : position + step])
        kernels["rope_append", step](new, *tables, at, *caches, q)
        kernels["attend", step](q, *caches, at, out)
        outs.append(out.numpy())
        queries.append(q.numpy())
        position += step
    return np.concatenate(outs), np.concatenate(queries), caches[0].numpy(), caches[1].numpy()


def rotated(x: Array, head_dim: int) -> Array:
    """Rotate ``x [T, heads * hd]`` to positions 0.. in float64, the halves of each head as real and imaginary part."""
    cos, sin = (table[: len(x), None].astype(np.float64) for table in rope_tables(head_dim))
    x1, x2 = np.split(x.reshape(len(x), -1, head_dim).astype(np.float64), 2, axis=2)
    return np.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=2)


@pytest.mark.parametrize(("name", "window"), CASES)
def test_attention_is_softmax_over_the_live_rows(name: str, window: int | None) -> None:
    heads, kv_heads, head_dim = LAYERS[name]
    qkv = floats(LENGTH, (heads + 2 * kv_heads) * head_dim, seed=9)
    q, k, v = np.split(qkv, [heads * head_dim, (heads + kv_heads) * head_dim], axis=1)
    q, k = rotated(q, head_dim), rotated(k, head_dim).repeat(heads // kv_heads, axis=1)
    v = v.reshape(LENGTH, kv_heads, head_dim).astype(np.float64).repeat(heads // kv_heads, axis=1)
    scores = np.einsum("thd,shd->hts", q, k) * head_dim**-0.5
    distance = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
    scores[:, (distance < 0) | (distance >= (window or LENGTH))] = -np.inf
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    expected = np.einsum("hts,shd->thd", weights / weights.sum(axis=2, keepdims=True), v)
    found = attend_in_steps(name, 17, window)[0]
    # Scores reach about 5 and carry some 2^-21 of error, which exp passes on; values are of order 1.
    np.testing.assert_allclose(found, expected.reshape(found.shape), rtol=0, atol=4e-6)


@pytest.mark.parametrize(("name", "window"), CASES)
def test_rope_append_rotates_queries_and_keys_and_copies_values(name: str, window: int | None) -> None:
    heads, kv_heads, head_dim = LAYERS[name]
    qkv = floats(LENGTH, (heads + 2 * kv_heads) * head_dim, seed=9)
    q, k, v = np.split(qkv, [heads * head_dim, (heads + kv_heads) * head_dim], axis=1)
    _, found_q, k_cache, v_cache = attend_in_steps(name, 17, window)
    # Two products of numbers below 5, each rounded once.
    np.testing.assert_allclose(found_q.reshape(LENGTH, heads, -1), rotated(q, head_dim), rtol=0, atol=1e-6)
    found_k = k_cache[0, :, :LENGTH].transpose(1, 0, 2)
    np.testing.assert_allclose(found_k, rotated(k, head_dim), rtol=0, atol=1e-6)
    assert same_bits(np.ascontiguousarray(v_cache[0, :, :LENGTH].transpose(1, 0, 2)), v.reshape(found_k.shape))
    assert np.isnan(k_cache[:, :, LENGTH:]).all()


@pytest.mark.parametrize(("name", "window"), CASES)
@pytest.mark.parametrize("tokens", [4, 17])
def test_tokens_at_once_are_tokens_one_by_one(name: str, tokens: int, window: int | None) -> None:
    one_by_one = attend_in_steps(name, 1, window)
    at_once = attend_in_steps(name, tokens, window)
    assert [same_bits(a, b) for a, b in zip(one_by_one, at_once, strict=True)] == [True] * 4


@pytest.mark.parametrize("tokens", [1, 17])
def test_threads_do_not_change_a_bit_of_attention(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    heads, kv_heads, head_dim = LAYERS["grouped"]
    kernels = {}
    for limit_us in (0.0, 20.0, np.inf):
        monkeypatch.setattr(loops, "PARALLEL_FROM_US", limit_us)
        kernels[limit_us] = attention.attend(tokens, heads, kv_heads, head_dim, CAPACITY, head_dim**-0.5)
    q, caches = floats(tokens, heads * head_dim), [floats(1, kv_heads, CAPACITY, head_dim, seed=s) for s in (1, 2)]
    out = np.zeros_like(q)
    results = [call(kernel, q, *caches, np.array([130]), out)[-1] for kernel in compile_kernels(kernels).values()]
    assert [same_bits(results[0], result) for result in results] == [True] * 3


def test_rope_append_works_in_place_through_relax() -> None:
    from tvm import relax

    def tensor(*shape: int, dtype: str = "float32") -> Any:
        return relax.TensorType(shape, dtype)

    cache_type, q_type = tensor(1, 2, 8, 32), tensor(2, 4 * 32)
    types = [tensor(2, 8 * 32), tensor(8, 16), tensor(8, 16), tensor(1, dtype="int64"), cache_type, cache_type]
    arguments = [relax.Var(f"argument_{i}", ty) for i, ty in enumerate(types)]
    builder = relax.BlockBuilder()
    with builder.function("main", arguments):
        with builder.dataflow():
            kernel = builder.add_func(attention.rope_append(2, 4, 2, 32, 8), "rope_append")
            call_inplace = relax.op.call_tir_inplace(kernel, arguments, [4, 5, -1], [cache_type, cache_type, q_type])
            result = builder.emit_output(builder.emit(call_inplace))
        builder.emit_func_output(result)
    executable = relax.build(builder.get(), tvm.target.Target("llvm"))
    qkv, caches = floats(2, 8 * 32), [tvm.runtime.tensor(np.zeros((1, 2, 8, 32), np.float32)) for _ in "kv"]
    no_turn = [np.ones((8, 16), np.float32), np.zeros((8, 16), np.float32), np.array([3])]
    inputs = [tvm.runtime.tensor(a) for a in [qkv, *no_turn]]
    k, v, q = relax.VirtualMachine(executable, tvm.cpu())["main"](*inputs, *caches)
    assert same_bits(q.numpy(), qkv[:, :128])
    assert same_bits(caches[1].numpy()[0, :, 3:5].transpose(1, 0, 2).copy(), qkv[:, 192:].reshape(2, 2, 32))
    assert same_bits(k.numpy(), caches[0].numpy())
    assert same_bits(v.numpy(), caches[1].numpy())
