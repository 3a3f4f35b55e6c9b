"""GPTQ (Frantar et al., https://arxiv.org/abs/2210.17323): codes for a weight W such that X·Wᵀ changes least.

Columns are rounded one after another; the remaining columns are adjusted to compensate for the error. With
H = Σ x·xᵀ over the inputs of the layer and U the upper Cholesky factor of H⁻¹ (H⁻¹ = Uᵀ·U),

    e = (w_i − round(w_i)) / U[i, i]          W[:, i+1:] −= e · U[i, i+1:]

is equations 2 and 3 of the paper, for all rows at once. Columns are processed in blocks: within a block updates are immediate,
the columns after it are updated with one product (its section 3.3). The columns with the strongest inputs come first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakeet.core.tiled_product import RowSource, tiles
from lorakeet.errors import DataError
from lorakeet.quant.gptq import GptqBase, GptqGrid, ZeroFormat, codes_for, fit_group, groups_in_order, quantise_to_nearest
from lorakeet.quant.packed import TILE, PackedBase

BLOCK = 128  # columns whose errors are propagated together
DAMPINGS = 6  # tries, each with ten times the damping, until H has a Cholesky factor
FP32 = 4  # bytes
ROWS = 512  # of H that are read at once: 22 MB of 11,008
PACKING = 18  # bytes a code while codes are packed into words (quant/gptq)


@dataclass(frozen=True)
class GptqLayout:
    """How a weight is quantised: `group_size` −1 is one group for the whole row.

    Without `desc_act`, groups are neighbouring columns, with scales fitted to the given weight. With it, groups are consecutive
    in the order of rounding, and fitted when the first of their columns is rounded.
    """

    bits: int = 4
    group_size: int = 128
    desc_act: bool = False
    sym: bool = True
    zero_format: ZeroFormat = "gptq"


class Hessian:
    """H = Σ x·xᵀ / n over the inputs of a linear layer, (in, in) in fp32, accumulated batch by batch."""

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        self.matrix = torch.zeros(columns, columns, device=device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Adds inputs (…, in) of any floating dtype."""
        rows = x.reshape(-1, x.shape[-1]).float()
        total = self.tokens + len(rows)
        self.matrix.addmm_(rows.t(), rows, beta=self.tokens / total, alpha=1 / total)
        self.tokens = total


@dataclass(frozen=True)
class Sensitivity:
    """What `gptq_quantise` needs of a layer's inputs; shared by all layers with the same inputs."""

    order: Tensor  # (in,) the columns, those with the strongest inputs first
    factor: Tensor  # (in, in) U, in that order


def sensitivity(hessian: RowSource, *, damping: float = 0.01) -> Sensitivity:
    """The order of the columns and U of (H + λ·I)⁻¹ = Uᵀ·U, from H (in, in), read some rows at a time.

    λ is `damping` times the mean diagonal of H, and ten times more after each failure. Inputs that are always 0 count with the
    mean of the diagonal, so that their weights are rounded to the nearest. DataError if H is not finite or stays singular. One
    matrix of H's size is allocated, and U replaces H in it.
    """
    count = hessian.shape[0]
    strength = torch.cat([hessian[part].diagonal(part.start) for part in tiles(count, ROWS)])
    if not bool(torch.isfinite(strength).all()):
        raise DataError("The inputs of a layer are not finite on the calibration rows. Check the model and the rows.")
    order = strength.argsort(descending=True, stable=True)
    mean = float(strength.mean()) or 1.0
    factor = strength.new_empty(count, count).t()  # columns end to end, as LAPACK has them
    for attempt in range(DAMPINGS):
        _put_in_order(hessian, order, factor)
        diagonal = factor.diagonal()
        diagonal[diagonal == 0] = mean
        diagonal += damping * 10**attempt * mean
        if _inverted_root(factor):
            return Sensitivity(order, factor)
    raise DataError(
        f"The inputs of a layer with {count} columns are linearly dependent, even with a damping of "
        f"{damping * 10 ** (DAMPINGS - 1):g}. Give more calibration rows."
    )


def _put_in_order(hessian: RowSource, order: Tensor, out: Tensor) -> None:
    """Writes H to `out` with its rows and columns in `order`."""
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    for part in tiles(len(order), ROWS):
        out.index_copy_(0, place[part], hessian[part].index_select(1, order))


def _inverted_root(matrix: Tensor) -> bool:
    """Replaces M (column-major) by U with M⁻¹ = Uᵀ·U; False if M is not positive definite."""
    found = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(matrix, out=(matrix, found))
    if not bool(found == 0):
        return False
    torch.cholesky_inverse(matrix, out=matrix)
    torch.linalg.cholesky_ex(matrix, upper=True, out=(matrix, found))
    return bool(found == 0)


def output_error(weight: Tensor, other: PackedBase, hessian: RowSource) -> float:
    """‖X·(W − W′)ᵀ‖ / ‖X·Wᵀ‖ on the inputs X of H = Σ x·xᵀ / n: √(tr(D·H·Dᵀ) / tr(W·H·Wᵀ)), D = W − W′.

    Computed by parts of W and rows of H, which is symmetric and may be on disk.
    """
    lost = whole = 0.0
    for part, numbers in other.in_parts():
        wide = weight[part].float()
        change = wide - numbers
        for some in tiles(hessian.shape[0], ROWS):
            rows = hessian[some].t()
            lost += float((change @ rows).mul_(change[:, some]).sum())
            whole += float((wide @ rows).mul_(wide[:, some]).sum())
    return (max(lost, 0.0) / whole) ** 0.5 if whole > 0 else 0.0


def gptq_quantise(weight: Tensor, inputs: Sensitivity, layout: GptqLayout, *, grid: GptqGrid | None = None) -> GptqBase:
    """weight (out, in) as a GptqBase, rounded so that the outputs on `inputs` change least.

    With `grid`, only codes are chosen, under its scales, zero points and groups: so a changed weight keeps the layout of its
    file. Without it they are fitted by `layout`, whose group_size and desc_act apply only then.
    """
    given = weight.detach().float()
    g_idx = groups_in_order(weight.shape[1], layout.group_size, weight.device)
    if grid is not None:
        g_idx = grid.g_idx
    elif layout.desc_act:
        g_idx = torch.empty_like(g_idx).index_copy_(0, inputs.order, g_idx)
    else:
        grid = quantise_to_nearest(given, layout.bits, layout.sym, g_idx, int(g_idx.max()) + 1)[1]
    rounding = ColumnRounding(given, inputs)
    del given
    groups = _Groups(rounding, g_idx[inputs.order].long(), layout, grid)
    rounding.run(groups.nearest)
    kept, codes = GptqGrid(groups.scales, groups.zeros, g_idx), rounding.taken_codes()
    del rounding, groups
    return GptqBase.of(codes, kept, bits=layout.bits, sym=layout.sym, zero_format=layout.zero_format)


def bytes_of_solving(shape: tuple[int, int], layout: GptqLayout, dtype: torch.dtype) -> int:
    """About the peak bytes of `gptq_quantise` beside a weight (out, in) of `dtype` and its inputs, with its result.

    Rounding keeps columns and codes; at its end there are two more copies of the codes, in the weight's order and packed.
    """
    count, wide = math.prod(shape), FP32 * math.prod(shape)
    group = wide if layout.group_size == -1 else FP32 * layout.group_size * shape[0]  # the columns of one group
    copy = 0 if dtype == torch.float32 else wide
    fitting = copy + count + 9 * group // FP32  # codes of all, and a group as it is, divided, and in codes
    walking = wide + count + (3 * group if layout.desc_act else 0) + 2 * FP32 * BLOCK * shape[0]
    packing = count + count * layout.bits // 4 + count // 4 + PACKING * min(TILE, count)
    most = max(fitting, copy + wide + count, walking, packing)  # second: the columns beside their weight
    groups = 1 if layout.group_size == -1 else -(-shape[1] // layout.group_size)
    return most + 3 * groups * shape[0] + 4 * FP32 * sum(shape)  # scales and zero points, and single rows and columns


class ColumnRounding:
    """Rounds the columns of a weight in order of sensitivity, and adjusts the remaining ones by the errors.

    `columns` (in, out), so that each is contiguous: its values when it was rounded. `codes` (in, out) uint8. Both are in the
    order of rounding; `in_order` restores the weight's.
    """

    def __init__(self, weight: Tensor, inputs: Sensitivity) -> None:
        self.columns = weight.t().index_select(0, inputs.order)
        self.codes = torch.empty(self.columns.shape, dtype=torch.uint8, device=weight.device)
        self.order, self.factor = inputs.order, inputs.factor
        self.start = self.stop = 0  # the present block
        self.errors = self.columns.new_zeros(0)

    def run(self, nearest: Callable[[Tensor, int], tuple[Tensor, Tensor]]) -> None:
        """Rounds every column. `nearest` maps a column (out,) and its index in this order to codes and their values."""
        for start in range(0, len(self.columns), BLOCK):
            self.start, self.stop = start, min(start + BLOCK, len(self.columns))
            self._block(nearest)

    def _block(self, nearest: Callable[[Tensor, int], tuple[Tensor, Tensor]]) -> None:
        """Rounds the columns of a block, and adjusts all later ones."""
        start, stop, factor = self.start, self.stop, self.factor
        errors = self.errors = self.columns.new_zeros(stop - start, self.columns.shape[1])
        pivots, rows = factor.diagonal()[start:stop].tolist(), factor[start:stop, start:stop].unbind()
        later, codes = self.columns[start:stop], self.codes[start:stop].unbind()
        for i, (column, error) in enumerate(zip(later.unbind(), errors.unbind(), strict=True)):
            code, value = nearest(column, start + i)
            torch.sub(column, value, out=error).div_(pivots[i])
            codes[i].copy_(code)
            later[i + 1 :].addr_(rows[i][i + 1 :], error, alpha=-1)
        self.columns[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)

    def now(self, places: Tensor) -> Tensor:
        """The columns at `places`, (out, places), with the pending updates of this block applied."""
        behind = places[places >= self.stop]
        pending = self.factor[self.start : self.stop][:, behind].t() @ self.errors
        return torch.cat([self.columns[places[places < self.stop]], self.columns[behind] - pending]).t()

    def taken_codes(self) -> Tensor:
        """The codes in the weight's order; frees the columns, so that they take no memory while codes are packed."""
        self.columns = self.errors = self.columns.new_zeros(0)
        return self.in_order(self.codes)

    def in_order(self, columns: Tensor) -> Tensor:
        """A tensor (in, out) in the order of rounding as (out, in) in the weight's order."""
        return torch.empty_like(columns).index_copy_(0, self.order, columns).t().contiguous()


class _Groups:
    """Scales and zero points during rounding; without a grid, a group's are fitted before its first column is rounded."""

    def __init__(self, rounding: ColumnRounding, group_of: Tensor, layout: GptqLayout, grid: GptqGrid | None) -> None:
        rows, groups, device = rounding.columns.shape[1], int(group_of.max()) + 1, rounding.columns.device
        self.rounding, self.group_of, self.names = rounding, group_of, group_of.tolist()
        self.bits, self.sym = layout.bits, layout.sym
        if grid is None:
            self.scales = torch.ones(groups, rows, dtype=torch.float16, device=device)
            self.zeros = torch.zeros(groups, rows, dtype=torch.uint8, device=device)
            self.unfitted = set(range(groups))
        else:
            self.scales, self.zeros, self.unfitted = grid.scales, grid.zeros, set()

    def nearest(self, column: Tensor, place: int) -> tuple[Tensor, Tensor]:
        """The codes of a column and their values."""
        group = self.names[place]
        if group in self.unfitted:
            members = self.rounding.now((self.group_of == group).nonzero().squeeze(1))
            self.scales[group], self.zeros[group] = fit_group(members, self.bits, self.sym)
            self.unfitted.discard(group)
        scale, zero = self.scales[group].float(), self.zeros[group].float()
        code = codes_for(column, scale, zero, self.bits)
        return code, scale * (code - zero)
