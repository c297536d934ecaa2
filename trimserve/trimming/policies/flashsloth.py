"""The policy `flashsloth`: regions pooled by a trained attention, with what embedded queries find for the question."""

from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimserve.trimming.compressor import Compressor, Regions, silent
from trimserve.trimming.policies.learned import Learned
from trimserve.trimming.trained import Shape

__all__ = ["FlashSloth", "FlashSlothRows"]

_QUERIES: Final = 4


class FlashSlothRows(Compressor):
    """Spatial attention pooling and embedded queries, see `FlashSloth`."""

    reads_text: ClassVar[bool] = True

    def __init__(self, shape: Shape) -> None:
        """See `Compressor`."""
        super().__init__(shape)
        width, inside = shape.width, self.inside
        self.norm = nn.LayerNorm(width)
        self.text_norm = nn.LayerNorm(width)
        self.saliency = nn.Sequential(nn.Linear(width, inside), nn.GELU(), silent(inside, 1))
        self.queries = nn.Parameter(torch.randn(_QUERIES, inside))
        self.text = nn.Linear(width, inside)
        self.query = nn.Linear(inside, inside)
        self.key = nn.Linear(width, inside)
        self.value = nn.Linear(width, inside)
        self.joined = nn.Linear((1 + _QUERIES) * inside, inside)
        self.output = silent(inside, width)

    def made(self, patches: Tensor, regions: Regions, text: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `Compressor.made`."""
        assert text is not None, "it reads the question"
        normal = self.norm(patches)
        keys, values, salient = self.key(normal), self.value(normal), regions.softmax(self.saliency(normal))
        del normal  # as large as the patches, which are weighed below
        asking = F.gelu(self.queries + self.text(self.text_norm(text.float()))[:, None])
        logits = self.query(asking) @ keys.transpose(1, 2) / self.inside**0.5
        found = (logits.softmax(dim=-1) @ values).flatten(1)[:, None]
        own = regions.sum(salient * values)
        joined = self.joined(torch.cat([own, found.expand(-1, own.shape[1], -1)], dim=-1))
        return regions.sum(salient * patches), self.output(F.gelu(joined))


@dataclass(frozen=True, slots=True)
class FlashSloth(Learned):
    """Regions are pooled by how salient their patches are, and embedded queries look at the whole image.

        a[w] = softmax_n(MLP(f[n])) over the patches of region w
        b[e] = softmax_n(W_q gelu(e + W_t text) . W_k f[n] / sqrt(d)) over all patches, for each embedded query e
        row[w] = sum_n a[w, n] f[n] + W_o gelu(W_j [sum_n a[w, n] v[n], sum_n b[e, n] v[n] of each e]),   v = W_v f

    There are 4 queries. The choice holds for one question.

    Source: FlashSloth, arXiv 2412.04317, spatial attention pooling and embedded queries. Adapted: regions are patches
    that are alike, not squares; queries learn of the question from the mean of its embeddings, where the paper lets
    them attend to the text within the language model; what they find goes into the rows, because a row of theirs
    would stand for no patches and have no weight. Left out: training the model itself.
    """

    name: ClassVar[str] = "flashsloth"
    reads_text: ClassVar[bool] = True
    trained: ClassVar[type[Compressor]] = FlashSlothRows
