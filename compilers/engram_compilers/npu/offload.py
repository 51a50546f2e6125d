"""Replace partitions by calls of the accelerator: integer sums by it, then the scales by a kernel of the host."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import tvm
from tvm import relax, tirx
from tvm.relax.analysis import free_vars
from tvm.relax.expr_functor import PyExprMutator, mutator

from engram_compilers.kernels.experts import Routing
from engram_compilers.kernels.quantise import MOST_PLANES
from engram_compilers.kernels.scale_sums import scale_expert_sums, scale_sums
from engram_compilers.npu.partition import Offloaded, Partition, offloaded_kernel
from engram_runtime.npu.commands_file import MULTIPLY, MULTIPLY_EXPERTS
from engram_runtime.npu.device import Product

SEGMENTS = 4  # arguments that `experts.Segments` is


@dataclass(frozen=True, slots=True)
class DeviceWeight:
    """A weight as the accelerator takes it.

    Attributes:
        parts: names of the packed tensors it is made of.
        product: which it is for. ``experts``: how many of them follow one another.
        bytes: of one.
    """

    parts: tuple[str, ...]
    product: Product
    experts: int
    bytes: int

    @property
    def stored_name(self) -> str:
        """The weight's name in the graph."""
        return self.parts[0].partition(":")[0]

    @property
    def layer(self) -> str:
        """The name of the layer it is the weight of."""
        return self.stored_name.removesuffix(".codes")


@dataclass(slots=True)
class Asked:
    """What all functions ask of the accelerator so far, each once, in order: products, and weights by their parts."""

    products: dict[Product, int] = field(default_factory=dict)
    weights: dict[tuple[str, ...], DeviceWeight] = field(default_factory=dict)

    def product(self, product: Product) -> int:
        """Return a product's place."""
        return self.products.setdefault(product, len(self.products))

    def layer(self, parts: tuple[str, ...]) -> int:
        """Return a weight's place."""
        return list(self.weights).index(parts)


@mutator
class Offload(PyExprMutator):  # type: ignore[misc]
    """Rewrites one function at a time; `finish` returns the module without partitions."""

    def __init__(
        self,
        module: tvm.IRModule,
        partitions: Mapping[str, Partition],
        asked: Asked,
        bytes_of: Callable[[Product], int],
    ) -> None:
        """Rewrite functions of ``module``; ``bytes_of(product)`` says how large a weight is once it is packed."""
        super().__init__(module)
        self.module = module
        self.partitions = partitions
        self.asked = asked
        self.bytes_of = bytes_of
        self.scaling: dict[str, Any] = {}  # kernels by name
        self.tensors: Mapping[Any, str] = {}  # of the function being rewritten: packed tensors by their parameters
        self.device: dict[tuple[str, ...], Any] = {}  # and parameters for weights of the accelerator

    def rewrite(self, variable: Any, tensors: Sequence[str]) -> tuple[list[str], list[tuple[str, ...]]]:
        """Rewrite the function whose last parameters are packed ``tensors``.

        Returns:
            The tensors it still takes, and parts of the weights in the accelerator's form that it takes after them.
        """
        function = self.module[variable]
        first = len(function.params) - len(tensors)
        weights = function.params[first:]
        self.tensors, self.device = dict(zip(weights, tensors, strict=True)), {}
        body = self.visit_expr(function.body)
        read = set(free_vars(body))
        kept = [weight for weight in weights if weight in read]
        parameters = [*function.params[:first], *kept, *self.device.values()]
        rewritten = relax.Function(parameters, body, function.ret_ty, function.is_pure, function.attrs)
        self.builder_.update_func(variable, rewritten)
        return [self.tensors[weight] for weight in kept], list(self.device)

    def finish(self) -> tvm.IRModule:
        """Return the module without partitions and the kernels they called."""
        module = self.builder_.get()
        for variable in list(module.functions):
            if variable.name_hint in self.partitions or offloaded_kernel(variable.name_hint) is not None:
                del module[variable]
        return module

    def visit_call_(self, call: Any) -> Any:
        """Replace the call of a partition."""
        before, call = call, self.visit_expr_post_order(call)
        if not isinstance(call.op, tvm.ir.GlobalVar) or call.op.name_hint not in self.partitions:
            return call
        rows, outputs = _shape(before)
        partition = self.partitions[call.op.name_hint]
        kernel = offloaded_kernel(partition.kernel)
        assert kernel is not None
        arguments = partition.arguments(call.args)
        if not kernel.routed:
            return self._linear(kernel, arguments, (rows, outputs))
        return self._experts(kernel, int(self.module[partition.kernel].attrs["tokens"]), arguments, (rows, outputs))

    def _linear(self, kernel: Offloaded, arguments: Sequence[Any], shape: tuple[int, int]) -> Any:
        planes, row_scale, _, *parts, scale = arguments
        (stacked, inputs), (rows, outputs) = _shape(planes), shape
        product = Product(rows=stacked, inputs=inputs, outputs=outputs, weights=kernel.weights)
        sums = self._sums(MULTIPLY, [planes], [], product, parts, (stacked, outputs))
        name, count = f"scale_sums_{rows}_{outputs}_{stacked // rows}", stacked // rows
        scaling = self._scaling(name, lambda: scale_sums(rows, outputs, count))
        return relax.call_tir(scaling, [sums, row_scale, scale], out_ty=relax.TensorType(shape, "float32"))

    def _experts(self, kernel: Offloaded, tokens: int, arguments: Sequence[Any], shape: tuple[int, int]) -> Any:
        planes, row_scale, _, *segments, scale = arguments
        segments, parts = segments[:SEGMENTS], segments[SEGMENTS:]
        (stacked, inputs), (pairs, outputs) = _shape(planes), shape
        # An expert has each token once at most.
        product = Product(
            rows=MOST_PLANES * tokens, inputs=inputs, outputs=outputs, weights=kernel.weights, routed=True
        )
        sums = self._sums(MULTIPLY_EXPERTS, [planes], segments, product, parts, (MOST_PLANES * pairs, outputs))
        rows = stacked // MOST_PLANES
        routing = Routing(tokens, _shape(scale)[0] // outputs, pairs // tokens)
        name = f"scale_expert_sums_{routing.name}_{rows}_{outputs}"
        scaling = self._scaling(name, lambda: scale_expert_sums(routing, rows, outputs))
        result = relax.TensorType(shape, "float32")
        return relax.call_tir(scaling, [sums, row_scale, *segments, scale], out_ty=result)

    def _sums(
        self,
        function: str,
        planes: Sequence[Any],
        segments: Sequence[Any],
        product: Product,
        parts: Sequence[Any],
        shape: tuple[int, int],
    ) -> Any:
        """Emit the call that computes sums i32 of ``shape``."""
        names = tuple(self.tensors[part] for part in parts)
        experts = _shape(parts[0])[0] // product.outputs
        weight = DeviceWeight(names, product, experts, self.bytes_of(product))
        self.asked.weights.setdefault(names, weight)
        if names not in self.device:
            packed = relax.TensorType((experts * weight.bytes,), "uint8")
            self.device[names] = relax.Var(f"{weight.stored_name.replace('.', '_')}_npu", packed)
        places = (self.asked.product(product), self.asked.layer(names))
        arguments = [*planes, self.device[names], *segments, *(relax.prim_value(place) for place in places)]
        made = relax.call_dps_packed(function, relax.Tuple(arguments), out_ty=relax.TensorType(shape, "int32"))
        return self.builder_.emit(made)

    def _scaling(self, name: str, make: Callable[[], tirx.PrimFunc]) -> Any:
        """Return a kernel that scales sums, made once."""
        if name not in self.scaling:
            self.scaling[name] = self.builder_.add_func(make(), name)
        return self.scaling[name]


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in value.ty.shape)
