"""The inputs and attributes a node may have: those its lowering reads, or whose value is the one kernels implement.

An operator's definition may have more of both, and defaults of its own: onnx.ai, and for ``com.microsoft``
onnxruntime's docs/ContribOperators.md.
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engram_compilers.kernels.quantise import MOST_PLANES
from engram_compilers.onnx_model import Node
from engram_runtime.errors import CompileError

Values = Container[Any] | None  # that an attribute may have
ANY: Values = None
COUNT = range(1, 2**31)
FLAG = (0, 1)
PLANES_KEY = "engram.planes"  # of a linear layer's metadata: 8-bit planes of its activations


@dataclass(frozen=True, slots=True)
class Signature:
    """What a node must and may have.

    Attributes:
        needs: places of the inputs it must have.
        takes: places of those it may have besides.
        required: its attributes and the values they may have; the default is none of them, or there is none.
        optional: attributes it may lack, the default being one of the values.
    """

    needs: Sequence[int]
    takes: Sequence[int] = ()
    required: Mapping[str, Values] = field(default_factory=dict)
    optional: Mapping[str, Values] = field(default_factory=dict)

    def check(self, node: Node) -> None:
        """Refuse what is missing and what has no lowering.

        Raises:
            CompileError: an input or an attribute.
        """
        self._check_inputs(node)
        known = {**self.required, **self.optional}
        if unknown := sorted(node.attributes.keys() - known.keys()):
            raise CompileError(f"{node.operator} has attributes {unknown} without lowering; there are {sorted(known)}")
        if missing := sorted(self.required.keys() - node.attributes.keys()):
            raise CompileError(f"{node.operator} lacks attributes {missing}; export the bundle again")
        for name, value in node.attributes.items():
            allowed = known[name]
            if allowed is not None and value not in allowed:
                raise CompileError(f"{node.operator} has {name} {value!r}, kernels need one of {allowed}")

    def _check_inputs(self, node: Node) -> None:
        if missing := [place for place in self.needs if not node.has(place)]:
            raise CompileError(f"{node.operator} lacks inputs {missing}; export the bundle again")
        known = (self.needs, self.takes)
        if more := [name for place, name in enumerate(node.inputs) if name and not any(place in k for k in known)]:
            raise CompileError(f"{node.operator} takes {more}, which has no lowering")


def planes_of(node: Node) -> int:
    """Return how many planes a quantised linear layer takes its activations in; two where the node doesn't say.

    Raises:
        CompileError: another number than one or two.
    """
    planes = node.metadata.get(PLANES_KEY, str(MOST_PLANES))
    if planes not in ("1", "2"):
        raise CompileError(
            f"{node.operator} has {PLANES_KEY} {planes!r} in its metadata, kernels need '1' or '2'; "
            "export the bundle again"
        )
    return int(planes)


_ONE, _TWO = Signature(range(1)), Signature(range(2))
_REDUCTION = Signature(range(2), optional={"keepdims": FLAG, "noop_with_empty_axes": (0,)})

_STANDARD = {
    **dict.fromkeys(("Abs", "Relu", "Sigmoid", "Sign", "Sqrt", "Tanh"), _ONE),
    **dict.fromkeys(("Add", "Div", "Expand", "Less", "MatMul", "Mul", "Sub", "Unsqueeze"), _TWO),
    "Cast": Signature(range(1), required={"to": ANY}),
    "Clip": Signature(range(1), takes=(1, 2)),
    "Concat": Signature(range(1), takes=COUNT, required={"axis": ANY}),
    "Gather": Signature(range(2), optional={"axis": ANY}),
    "Gelu": Signature(range(1), required={"approximate": (b"tanh",)}),
    "Gemm": Signature(range(2), required={"transB": (1,)}, optional={"transA": (0,), "alpha": (1.0,), "beta": (1.0,)}),
    "RMSNormalization": Signature(range(2), optional={"axis": ANY, "epsilon": ANY, "stash_type": (1,)}),
    "ReduceL2": _REDUCTION,
    "ReduceMean": _REDUCTION,
    "ReduceSum": _REDUCTION,
    "Reshape": Signature(range(2), optional={"allowzero": FLAG}),
    "Shape": Signature(range(1), optional={"start": ANY, "end": ANY}),
    "Slice": Signature(range(3), takes=(3, 4)),
    "Softmax": Signature(range(1), optional={"axis": ANY}),
    "Split": Signature(range(1), takes=(1,), optional={"axis": ANY, "num_outputs": ANY}),
    "Squeeze": Signature(range(1), takes=(1,)),
    "Transpose": Signature(range(1), required={"perm": ANY}),
    "Where": Signature(range(3)),
}

_BLOCKS = {"block_size": (32,)}
_LINEAR = {
    "com.microsoft.GatherBlockQuantized": Signature(
        range(3), required={**_BLOCKS, "bits": (8,), "quantize_axis": (2,)}, optional={"gather_axis": (0,)}
    ),
    "com.microsoft.MatMulNBits": Signature(
        range(3),
        takes=(3,),
        required={**_BLOCKS, "K": COUNT, "N": COUNT, "bits": (4, 8)},
        optional={"accuracy_level": ANY, "weight_prepacked": (0,)},
    ),
}

_HEADS = {"num_heads": COUNT, "kv_num_heads": COUNT, "scale": ANY}
_INDEXER = dict.fromkeys(("index_heads", "rotary_dim", "budget", "block"), COUNT)
_ATTENTION = {
    "com.microsoft.GroupQueryAttention": Signature(
        (0, *range(3, 9)), required={**_HEADS, "do_rotary": (1,)}, optional={"local_window_size": ANY}
    ),
    "engram.IndexedAttention": Signature(range(10), required={**_HEADS, **_INDEXER, "epsilon": ANY}),
    "engram.SharedAttention": Signature(range(6), required=_HEADS, optional={"local_window_size": ANY}),
}

_ROUTING = {"k": COUNT, "normalize_routing_weights": FLAG}
_SILU_GATE = {
    "activation_type": (b"swiglu",),
    "swiglu_fusion": (1,),
    "activation_alpha": (1.0,),
    "activation_beta": (0.0,),
}
_EXPERTS = {
    "com.microsoft.MoE": Signature(
        (0, 1, 2, 4), required={**_ROUTING, **_SILU_GATE}, optional={"use_sparse_mixer": (0,)}
    ),
    "com.microsoft.QMoE": Signature(
        (0, 1, 2, 3, 5, 6, 14),
        takes=(11, 12),
        required={**_ROUTING, **_SILU_GATE, **_BLOCKS, "expert_weight_bits": (4, 8)},
        optional={
            "accuracy_level": ANY,
            "quant_type": (b"int",),
            "use_sparse_mixer": (0,),
            "weights_prepacked": (-1, 0),
        },
    ),
    "engram.UnnormalisedMoE": Signature(range(4), required={"k": COUNT}),
}

_RECURRENT = {
    "com.microsoft.CausalConvWithState": Signature(
        (0, 1, 3),
        required={"activation": (b"silu", b"none"), "channels_last": (1,), "dilation": COUNT},
        optional={"ndim": (1,), "state_window": (0,)},
    ),
    "com.microsoft.LinearAttention": Signature(
        range(6),
        required={"q_num_heads": COUNT, "kv_num_heads": COUNT, "scale": ANY},
        optional={"update_rule": (b"gated_delta",), "chunk_size": ANY, "state_window": (0,)},
    ),
}

_BRANCHES = {"num_branches": COUNT}
_STREAMS = {
    "com.microsoft.BranchwiseRMSNorm": Signature(range(1), takes=(1,), required={**_BRANCHES, "epsilon": ANY}),
    "com.microsoft.EngramGate": Signature(range(6), required={"epsilon": ANY}),
    "com.microsoft.GatedRMSNorm": Signature(range(3), required={"activation": (b"silu", b"sigmoid"), "epsilon": ANY}),
    "com.microsoft.HyperConnectionPostMix": Signature(range(3), required=_BRANCHES),
    "com.microsoft.HyperConnectionPreMix": Signature(range(2), required={**_BRANCHES, "reduction_scale": ANY}),
    "com.microsoft.LinearAttentionGate": Signature(range(4)),
}

SIGNATURES: Mapping[str, Signature] = {
    **_STANDARD,
    **_LINEAR,
    **_ATTENTION,
    **_EXPERTS,
    **_RECURRENT,
    **_STREAMS,
}
