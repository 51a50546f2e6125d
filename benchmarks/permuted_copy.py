"""Copy a checkpoint with its columns in another order: the same function, but no longer on the 4-bit grid of a GGUF.

    python benchmarks/permuted_copy.py SmolLM2-135M-Instruct.Q4_1.gguf build/permuted

Blocks of 32 weights that a GGUF file rounded together can be rounded again almost without loss, which flatters 4-bit
formats. In the copy the columns of every block come from different blocks: the hidden dimensions, those between ``up``
and ``down``, and those within each value head are permuted; queries and keys keep theirs, which are rotated in pairs.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

SEED = 0


def permute(model: Any) -> None:
    """Permute a Llama of transformers in place."""
    config, generator = model.config, torch.Generator().manual_seed(SEED)

    def order(size: int) -> Tensor:
        return torch.randperm(size, generator=generator)

    hidden = order(config.hidden_size)
    tables = {id(table.weight): table.weight for table in (model.get_input_embeddings(), model.get_output_embeddings())}
    for table in tables.values():  # one where they are tied
        _reorder(table, lambda values: values[:, hidden])
    _reorder(model.model.norm.weight, lambda values: values[hidden])
    for layer in model.model.layers:
        _permute_layer(layer, hidden, order(config.intermediate_size), order(config.head_dim))


def _permute_layer(layer: Any, hidden: Tensor, between: Tensor, head: Tensor) -> None:
    attention, mlp = layer.self_attn, layer.mlp
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        _reorder(norm.weight, lambda values: values[hidden])
    for linear in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
        _reorder(linear.weight, lambda values: values[:, hidden])
    for linear in (attention.o_proj, mlp.down_proj):
        _reorder(linear.weight, lambda values: values[hidden])
    for linear in (mlp.gate_proj, mlp.up_proj):
        _reorder(linear.weight, lambda values: values[between])
    _reorder(mlp.down_proj.weight, lambda values: values[:, between])
    size = len(head)
    _reorder(attention.v_proj.weight, lambda values: values.reshape(-1, size, values.shape[1])[:, head].flatten(0, 1))
    _reorder(attention.o_proj.weight, lambda values: values.reshape(len(values), -1, size)[:, :, head].flatten(1))


def _reorder(parameter: nn.Parameter, change: Callable[[Tensor], Tensor]) -> None:
    parameter.data = change(parameter.data).contiguous()


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
def main(checkpoint: Path, out: Path) -> None:
    """Copy CHECKPOINT, a Llama, to the folder OUT."""
    folder, file = (checkpoint.parent, checkpoint.name) if checkpoint.is_file() else (checkpoint, None)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    ids = torch.arange(1, 65)[None]
    with torch.no_grad():
        before = model(ids).logits
        permute(model)
        difference = float((model(ids).logits - before).abs().max())
    if file is not None:  # read from a GGUF, it refuses to be saved
        model.hf_quantizer = None
        del model.config.quantization_config
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(out)
    click.echo(f"{out}: logits differ by {difference:.1e} at most")


if __name__ == "__main__":
    main()
