"""How the numbers of some tensors change on their way into a GGUF file: halves of fused matrices, order of heads, decays.

Each takes a tensor as transformers stores it, and config.json, and returns that of the file. The facts are those of llama.cpp's
converters, build 11739.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Config = Mapping[str, Any]  # config.json, of the text part
Conversion = Callable[[Tensor, Config], Tensor]


def first_half(tensor: Tensor, _: Config) -> Tensor:
    """The gates of a fused matrix (…, 2 · out, in): the first half of the rows."""
    return tensor.chunk(2, -2)[0]


def second_half(tensor: Tensor, _: Config) -> Tensor:
    """The other half of the rows."""
    return tensor.chunk(2, -2)[1]


def across(tensor: Tensor, _: Config) -> Tensor:
    """(…, in, out) to (…, out, in)."""
    return tensor.transpose(-1, -2)


def even_columns(tensor: Tensor, _: Config) -> Tensor:
    """gpt-oss alternates gate and up, and stores matrices transposed."""
    return tensor[..., ::2].transpose(-1, -2)


def odd_columns(tensor: Tensor, _: Config) -> Tensor:
    """The ups of gpt-oss, as `even_columns`."""
    return tensor[..., 1::2].transpose(-1, -2)


def even_numbers(tensor: Tensor, _: Config) -> Tensor:
    """The biases of gpt-oss's gates, (…, 2 · out)."""
    return tensor[..., ::2]


def odd_numbers(tensor: Tensor, _: Config) -> Tensor:
    """The biases of its ups."""
    return tensor[..., 1::2]


def decay(tensor: Tensor, _: Config) -> Tensor:
    """A state's decay is stored as a logarithm."""
    return -tensor.exp()


def without_middle(tensor: Tensor, _: Config) -> Tensor:
    """(channels, 1, width) to (channels, width)."""
    return tensor.squeeze(1)


def a_column(tensor: Tensor, _: Config) -> Tensor:
    """(n,) to (n, 1)."""
    return tensor[:, None]


def decay_column(tensor: Tensor, config: Config) -> Tensor:
    """The decay of a Mamba-2 state, (heads, 1)."""
    return a_column(decay(tensor, config), config)


def by_groups(tensor: Tensor, config: Config) -> Tensor:
    """The norm of a Mamba-2 block, (groups, channels of one)."""
    return tensor.reshape(int(config["mamba_n_groups"]), -1)


# Gated DeltaNet: transformers keeps the heads of v grouped by the head of k that they share; llama.cpp wants the first of each
# group, then the second of each.
def _v_heads(tensor: Tensor, config: Config, size: int) -> Tensor:
    """Rows (v heads · size, …) in llama.cpp's order."""
    k_heads, v_heads = int(config["linear_num_key_heads"]), int(config["linear_num_value_heads"])
    grouped = tensor.reshape(k_heads, v_heads // k_heads, size, *tensor.shape[1:])
    return grouped.transpose(0, 1).reshape(tensor.shape)


def v_rows(tensor: Tensor, config: Config) -> Tensor:
    """Rows of all heads of v, (heads · width, in), in llama.cpp's order."""
    return _v_heads(tensor, config, int(config["linear_value_head_dim"]))


def one_v_row(tensor: Tensor, config: Config) -> Tensor:
    """The same with one row a head."""
    return _v_heads(tensor, config, 1)


def v_columns(tensor: Tensor, config: Config) -> Tensor:
    """Columns of all heads of v, (out, heads · width)."""
    return v_rows(tensor.T.contiguous(), config).T


def last_rows(tensor: Tensor, config: Config) -> Tensor:
    """q, k, v in one matrix: only the rows of v move."""
    keys = 2 * int(config["linear_num_key_heads"]) * int(config["linear_key_head_dim"])
    return torch.cat([tensor[:keys], v_rows(tensor[keys:], config)])


def convolution_rows(tensor: Tensor, config: Config) -> Tensor:
    """The kernels of q, k and v, (channels, 1, width) to (channels, width), those of v in llama.cpp's order."""
    return last_rows(tensor.squeeze(1), config)


def v_decay(tensor: Tensor, config: Config) -> Tensor:
    """The decay of each head of v."""
    return one_v_row(decay(tensor, config), config)


def _qkvz(tensor: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """Qwen3-Next keeps q, k, v and z of a head of k together: (q, k, v) of all heads, and z of all heads."""
    k_heads, v_heads = int(config["linear_num_key_heads"]), int(config["linear_num_value_heads"])
    k_size, v_size = int(config["linear_key_head_dim"]), v_heads // k_heads * int(config["linear_value_head_dim"])
    q, k, v, z = torch.split(tensor.reshape(k_heads, -1, tensor.shape[-1]), [k_size, k_size, v_size, v_size], 1)
    return torch.cat([part.flatten(0, 1) for part in (q, k, v)]), z.flatten(0, 1)


def qkv_of_qkvz(tensor: Tensor, config: Config) -> Tensor:
    """q of all heads, then k, then v, from the joined matrix of Qwen3-Next."""
    return _qkvz(tensor, config)[0]


def z_of_qkvz(tensor: Tensor, config: Config) -> Tensor:
    """z of all heads from the same matrix."""
    return _qkvz(tensor, config)[1]
