"""Meta's own model code, image transform, chat format and tokenizer (`llama-models`), run in float32 on the CPU.

Nothing is computed here but random weights: what is called is what Meta's `Llama3.generate` calls, in its order.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from unittest import mock

import llama_models.llama3
import llama_models.llama3.multimodal.model as meta_model
import torch
from fairscale.nn.model_parallel.initialize import initialize_model_parallel
from fairscale.nn.model_parallel.layers import ColumnParallelLinear
from llama_models.llama3.args import ModelArgs
from llama_models.llama3.chat_format import ChatFormat, LLMInput, create_vision_mask
from llama_models.llama3.tokenizer import Tokenizer
from PIL import Image
from torch import Tensor
from torch.distributed import HashStore, init_process_group  # type: ignore[attr-defined]  # the first is not exported

from scripts.verify.meta.checkpoint import INTERMEDIATE_LAYERS, MetaGeometry

__all__ = ["IMAGE_TOKEN_ID", "TOKENIZER_MODEL", "Judge", "begin", "chat_format", "seen_by_all"]

TOKENIZER_MODEL = Path(llama_models.llama3.__file__).parent / "tokenizer.model"
IMAGE_TOKEN_ID = 128256
MAX_POSITIONS = 256


def begin() -> None:
    """Set up the process group that Meta's layers ask for: one process, without a network."""
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    initialize_model_parallel(1)


def chat_format() -> ChatFormat:
    """Meta's chat format over its own tokenizer."""
    return ChatFormat(Tokenizer(TOKENIZER_MODEL))


def seen_by_all(prompt: LLMInput, num_decoded: int) -> list[list[int]]:
    """The mask that Meta's code makes where decoded tokens count as the prompt's: they see what its last row sees."""
    mask: list[list[int]] = create_vision_mask([*prompt.tokens, *[0] * num_decoded], IMAGE_TOKEN_ID)
    return mask


class Judge:
    """A model of Meta's with small random weights: gates open, logits that vary."""

    def __init__(self, geometry: MetaGeometry, seed: int) -> None:
        """Build it; `begin` comes first."""
        names = {name: getattr(geometry, name) for name in geometry.__slots__ if name in ModelArgs.__annotations__}
        encoder = partial(meta_model.VisionEncoder, width=geometry.vision_width, heads=geometry.vision_heads)
        with mock.patch.object(meta_model, "VisionEncoder", encoder):
            self.model = meta_model.CrossAttentionTransformer(
                ModelArgs(**names, max_batch_size=1, max_seq_len=MAX_POSITIONS)
            )
        self.model.vision_model.vision_projection = ColumnParallelLinear(
            geometry.vision_width * (1 + len(INTERMEDIATE_LAYERS)), geometry.dim, bias=True
        )
        self.model.eval().requires_grad_(False)
        self.model.setup_cache(1, torch.device("cpu"), torch.float32)
        torch.manual_seed(seed)
        for name, parameter in self.model.named_parameters():
            _draw(name, parameter)

    @torch.inference_mode()
    def logits(
        self,
        prompt: LLMInput,
        decoded: Sequence[int] = (),
        images: Sequence[Image.Image] | None = None,
        mask: list[list[int]] | None = None,
    ) -> Tensor:
        """Logits [T + decoded, vocab_size]: of the prompt in one pass, then of one token after the other.

        Args:
            prompt: what the chat format made.
            decoded: token ids that follow.
            images: others than the prompt's.
            mask: first row and end of what sees each image; None is the chat format's.
        """
        token_ids = [*prompt.tokens, *decoded]
        tokens = torch.tensor([token_ids])
        vision = prompt.vision
        if mask is None and vision is not None:
            mask = [list(rows) for rows in vision.mask]
        caches, masks, row_mask = self.model.compute_vision_tokens_masks(
            batch_images=[list(images or (vision.images if vision else []))],
            batch_masks=[mask or []],
            total_len=len(token_ids),
            device=tokens.device,
        )
        length = len(prompt.tokens)
        passes = [range(length), *([row] for row in range(length, len(token_ids)))]
        text_only = vision is None
        logits = [
            self.model.forward(torch.tensor([*rows]), tokens, masks, row_mask, caches, text_only) for rows in passes
        ]
        return torch.cat(logits, dim=1)[0]


def _draw(name: str, parameter: Tensor) -> None:
    kind = name.rpartition(".")[2]
    if "gate" in kind:
        parameter.uniform_(0.5, 1.0)
    elif kind == "bias":
        parameter.normal_(0, 0.1)
    elif "norm" in name or ".ln_" in name:
        parameter.uniform_(0.7, 1.3)
    elif name == "text_model.output.weight":
        parameter.normal_(0, 2 * parameter.shape[1] ** -0.5)  # the logits' standard deviation is about 2
    elif "embed" in name:
        parameter.normal_(0, 0.5)
    else:
        parameter.normal_(0, parameter.shape[-1] ** -0.5)
