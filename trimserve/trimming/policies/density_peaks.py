"""Groups around density peaks: features in a dense place that is far from any denser one. It knows no scores."""

from itertools import pairwise

import torch
from torch import Tensor

from trimserve.trimming.merging import Groups
from trimserve.trimming.policies.tiles import directions

__all__ = ["around_density_peaks", "group_members"]

_NUM_NEIGHBOURS = 5


def group_members(keys: Tensor, is_member: Tensor, features_per_tile: int, num_groups: int) -> Groups:
    """Group some features of one image, tile by tile; tiles share the groups as they share the members.

    Args:
        keys: [N, Hkv, Dh], keys of the first cross-attention layer.
        is_member: bool [N]; those of a tile that is left without a group are in none.
        features_per_tile: F.
        num_groups: at most the number of members.
    """
    tiles = is_member.view(-1, features_per_tile)
    counts = tiles.sum(dim=1)
    num_members = counts.sum().clamp(min=1)
    ends = (counts.cumsum(dim=0) * num_groups + num_members // 2) // num_members  # rounded
    members, sizes = [ends[:0]], [ends[:0]]
    for tile, (start, end) in enumerate(pairwise([0, *ends.tolist()])):
        if start < end:
            places = tile * features_per_tile + tiles[tile].nonzero()[:, 0]
            group = around_density_peaks(keys[places].flatten(1), end - start)
            members.append(places[group.argsort(stable=True)])
            sizes.append(torch.bincount(group))
    return Groups(torch.cat(members), torch.cat(sizes), (num_groups,))


def around_density_peaks(rows: Tensor, num_groups: int) -> Tensor:
    """Group rows around as many centres.

        distance[n, m] = |u[n] - u[m]|, with u the rows at length 1
        density[n]     = exp(-mean distance[n, m]^2 over the 5 nearest m)
        apart[n]       = min distance[n, m] over denser m; of the densest row max_m distance[n, m]

    The rows with the largest density * apart are centres, and every other row joins the nearest one. Tie: the lower
    index is denser, comes first as centre and is joined.

    Args:
        rows: [R, D]; one that is not finite is equally far from all others.
        num_groups: G, in [1, R].
    Returns:
        int64 [R], the group of each row, in [0, G); groups are in the order of their centres, and none is empty.
    Source: DPC-KNN, as in SparseVLM, arXiv 2410.04417, token recycling.
    """
    unit = directions(rows)
    squares = (unit @ unit.T).mul_(-2).add_(2).clamp_(min=0).fill_diagonal_(0)
    nearest = squares.topk(min(_NUM_NEIGHBOURS + 1, len(rows)), largest=False).values  # one of them is the row itself
    density = (-nearest.sum(dim=1) / max(1, nearest.shape[1] - 1)).exp()
    order = density.argsort(descending=True, stable=True)
    rank = order.argsort()
    apart = squares.masked_fill(rank >= rank[:, None], torch.inf).amin(dim=1)
    apart[order[0]] = squares[order[0]].max()
    peaks = (density * apart.sqrt()).argsort(descending=True, stable=True)
    centres = peaks[:num_groups].sort().values
    group = squares[:, centres].argmin(dim=1)
    group[centres] = torch.arange(num_groups, device=rows.device)
    return group
