"""The policy `exit`: a trained router says after which cross-attention layer the text has seen enough."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from trimserve.trimming.budget import Allowance
from trimserve.trimming.policies.policy import Choice, CrossAttentionView, Place, Policy, Verdict, parameter
from trimserve.trimming.trained import Shape, Trained

__all__ = ["Exit", "Router"]


class Router(Trained):
    """An MLP for each cross-attention layer but the last, see `Exit`."""

    def __init__(self, shape: Shape) -> None:
        """See `Trained`."""
        super().__init__(shape)
        if shape.rows:
            raise ValueError(f"must be 0, since no rows are made, got {shape.rows}")
        if shape.num_cross_layers < 2:
            raise ValueError("a model with one cross-attention layer has none to leave out")
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(2 * shape.width),
                nn.Linear(2 * shape.width, self.inside),
                nn.GELU(),
                nn.Linear(self.inside, 1),
            )
            for _ in range(shape.num_cross_layers - 1)
        )

    def decides_after(self, layer: int) -> bool:
        """Whether it has learned to decide after a cross-attention layer."""
        return layer < len(self.heads)

    def forward(self, layer: int, mean: Tensor, last: Tensor) -> Tensor:
        """How sure it is that the text has seen enough, as a logit.

        Args:
            layer: that it `decides_after`.
            mean: [..., D], over the prompt's rows that see an image, behind the layer's attention.
            last: [..., D], of these rows the last.
        Returns:
            float32 [...]
        """
        logits: Tensor = self.heads[layer](torch.cat([mean.float(), last.float()], dim=-1))[..., 0]
        return logits


@dataclass(frozen=True, slots=True)
class Exit(Policy):
    """All features stay until a router finds that the text has seen enough; later cross-attention layers are left out.

        leave after layer l  if  sigmoid(MLP_l [mean_t h[t], h[last]]) >= certainty

    h are the prompt's rows that see an image, behind the layer's gated attention. No row of the request, decoded ones
    included, sees an image in later layers. The router learns from whether the answer stays the same token for token.

    Source: DyVTE, arXiv 2411.19628, visual-token exit. Adapted: it decides after cross-attention layers, the only ones
    that hold features; the label is the answer alone, where the paper also bounds how much the loss rises. Left out:
    dropping features from self-attention layers, which hold none here.
    """

    name: ClassVar[str] = "exit"
    place: ClassVar[Place] = Place.AFTER_LAYERS
    budgets: ClassVar[tuple[str, ...]] = ()
    knob: ClassVar[str] = "compressor"
    trained: ClassVar[type[Trained]] = Router

    certainty: float = parameter(0.9, 0, 1, "It leaves once the answer stays the same with this probability.")

    @property
    def trims_later_layers(self) -> bool:
        """See `Policy.trims_later_layers`."""
        return True

    def is_asked_after(self, layer: int) -> bool:  # noqa: ARG002 - after all of them
        """See `Policy.is_asked_after`."""
        return True

    def after_layer(self, view: CrossAttentionView, allowance: Allowance) -> list[Choice] | Verdict:  # noqa: ARG002 - it leaves or keeps all
        """See `Policy.after_layer`."""
        router = view.trained[self.name]
        assert isinstance(router, Router)
        assert view.hidden is not None
        assert view.added is not None
        if not router.decides_after(view.layer):
            return Verdict.KEEP_ALL
        rows = (view.hidden + view.added).float()
        certainty = torch.sigmoid(router(view.layer, rows.mean(dim=0), rows[-1]))
        return Verdict.LEAVE if bool(certainty >= self.certainty) else Verdict.KEEP_ALL
