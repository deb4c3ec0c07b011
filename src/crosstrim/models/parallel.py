"""One Mllama over several processes: each holds a share of the heads of every text layer (tensor parallelism).

transformers carries a plan out but has none for Mllama, whose attention modules moreover count their heads as if they
held all of them. The vision tower stays whole in every process.
"""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import nn

from crosstrim.errors import ConfigError, UnsupportedModelError
from crosstrim.method.choose import Processes
from crosstrim.models import mllama

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_ATTENTION = {"q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise", "o_proj": "rowwise"}
_MLP = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}


def plan() -> dict[str, str]:
    """How transformers is to divide the weights: parts of the model to transformers' names of styles.

    The projections of attention and MLP, the embeddings and the head are divided. Norms, which act on one head or on
    the whole width, tanh gates, the projection of the image features and the vision tower are copied.
    """
    parts = {"self_attn": _ATTENTION, "cross_attn": _ATTENTION, "mlp": _MLP}
    layers = {
        f"model.language_model.layers.*.{part}.{name}": style
        for part, styles in parts.items()
        for name, style in styles.items()
    }
    return layers | {"model.language_model.embed_tokens": "embedding_rowwise", "lm_head": "colwise_gather_output"}


def division(config: Any, tp: int) -> Any:
    """What to pass to `from_pretrained` as `distributed_config`, followed by `count_own_heads`.

    Args:
        config: an `MllamaConfig`.
        tp: processes to divide the model over.

    Returns:
        A `transformers` `DistributedConfig`.

    Raises:
        ConfigError: `tp` does not divide the heads or the MLP's width, or this run has another number of processes.
    """
    from transformers.distributed.configuration_utils import DistributedConfig

    text = config.text_config
    sizes = {
        "query heads": text.num_attention_heads,
        "key/value heads": text.num_key_value_heads,
        "dimensions inside the MLP": text.intermediate_size,
    }
    possible = [n for n in range(1, text.num_key_value_heads + 1) if not any(size % n for size in sizes.values())]
    if tp not in possible:
        counts = ", ".join(f"{size} {name}" for name, size in sizes.items())
        raise ConfigError(
            f"tp={tp} does not divide this model's {counts}; take one of {', '.join(map(str, possible))}."
        )
    running = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    if running != tp:
        raise ConfigError(
            f"tp={tp} needs {tp} processes and this run has {running}; start it with "
            f"`torchrun --nproc-per-node {tp} script.py`."
        )
    return DistributedConfig(tp_size=tp, tp_plan=plan())


def count_own_heads(model: nn.Module) -> None:
    """Let every attention of the text model count the heads whose weights it holds.

    Args:
        model: an `MllamaForConditionalGeneration` that was loaded with `division`.
    """
    for layer in cast(Any, mllama.locate(model).model).language_model.layers:
        attention = layer.cross_attn if hasattr(layer, "cross_attn") else layer.self_attn
        attention.num_heads = _held(attention.q_proj) // attention.head_dim
        attention.num_key_value_heads = _held(attention.k_proj) // attention.head_dim


def _held(projection: nn.Linear) -> int:
    """Rows of the weight that this process holds."""
    weight: Any = projection.weight
    return int((weight.to_local() if hasattr(weight, "to_local") else weight).shape[0])


def _gathered(group: ProcessGroup, tensor: torch.Tensor) -> torch.Tensor:
    """Of all processes of the group, in the order of the heads."""
    tensor = tensor.contiguous()
    shares = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(shares, tensor, group=group)
    return torch.cat(shares, dim=1)


def _of_the_first(group: ProcessGroup, tensor: torch.Tensor) -> torch.Tensor:
    agreed = tensor.contiguous().clone()
    # Not every backend knows bool.
    dist.broadcast(agreed.view(torch.uint8) if agreed.dtype == torch.bool else agreed, group=group, group_src=0)
    return agreed


def ranks(model: mllama.Mllama) -> Processes | None:
    """The processes that share the leader's heads; None when this one has all of them.

    Raises:
        UnsupportedModelError: it has a share of them, and its weights do not tell who holds the rest.
    """
    attention = cast(Any, model.leader).cross_attn
    own = attention.num_heads, attention.num_key_value_heads
    whole = attention.config.num_attention_heads, attention.config.num_key_value_heads
    if own == whole:
        return None
    group = _group(attention.q_proj.weight)
    if group is None or tuple(heads * group.size() for heads in own) != whole:
        raise UnsupportedModelError(
            f"the first cross-attention layer holds {own[0]} of {whole[0]} query heads and {own[1]} of {whole[1]} "
            "key/value heads, and its weights do not tell which processes hold the rest; every head has a say in "
            "what is kept, so divide the model with crosstrim.load(..., tp=...)."
        )
    return Processes(partial(_gathered, group), partial(_of_the_first, group))


def _group(weight: Any) -> ProcessGroup | None:
    """The processes that a DTensor's rows are divided over; None for any other tensor."""
    mesh = getattr(weight, "device_mesh", None)
    names = getattr(mesh, "mesh_dim_names", None) or ()
    if mesh is None or (mesh.ndim > 1 and "tp" not in names):
        return None
    group: ProcessGroup = mesh.get_group("tp" if "tp" in names else 0)
    return group
