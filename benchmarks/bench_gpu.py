"""Times vision encoder, prefill and decode steps at the 11B model's geometry on a GPU, beside transformers.

    python -m benchmarks.bench_gpu [--seconds 1] [--out FILE]

Both run on the same bfloat16 weights, drawn on the device: transformers with sdpa and Meta's semantics, whose cache
grows; trimserve with its decode steps as CUDA graphs. A prompt of random tokens about an image of four tiles is read
untrimmed (`off`) and trimmed (`default`), and about an image of one tile (`one_tile`), for which transformers takes as
long as for four. Heads of random weights agree on nothing, so `default` is capped at half of the features
(`max_kept_fraction`). Each sequence of a batch has pages of its own. The floor of a decode step is the bytes of
weights, keys and values that it reads over the bandwidth of reading, measured here.

Logits are compared first. Each row is told at once, so that a failure loses none.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch.nn import functional as F
from transformers import MllamaConfig

from benchmarks.bench_generate import phases
from benchmarks.floor import StepShape
from benchmarks.measure import bandwidth, time_calls
from benchmarks.models import draw_weights
from benchmarks.ours import SETTINGS, Asked, Ours, Setting
from benchmarks.report import command_line, finish, noted
from benchmarks.rival import Rival
from training.mended import mend
from trimserve.api.trim import TrimRequest
from trimserve.config import Device, EngineConfig, ModelConfig
from trimserve.evaluation.answers import UNTRIMMED
from trimserve.model.checkpoint import (
    Checkpoint,
    GenerationJson,
    TrimserveJson,
    embedded_model_folder,
    text_config,
    vision_config,
)
from trimserve.model.loading import describe_checkpoint, describe_model
from trimserve.model.mllama import Mllama
from trimserve.model.prepared import PreparedImage, PreparedPrompt
from trimserve.model.processor import Processor
from trimserve.model.weights import allocated_model

__all__ = ["main", "measure"]

_PROMPT_TOKENS: Final = 64
_MAX_MODEL_LEN: Final = 4096
_LEAST_COSINE: Final = 0.99
"""Between both models' logits, of bfloat16 weights."""
_TRIMMED: Final = TrimRequest(k_ratio=0.2, max_kept_fraction=0.5)


class _Both:
    """One set of weights, run by trimserve and by transformers."""

    def __init__(self, config: MllamaConfig, device: Device, most: int) -> None:
        """Draw the weights; up to `most` sequences decode together."""
        max_model_len = min(_MAX_MODEL_LEN, text_config(config).max_position_embeddings)
        knobs = ModelConfig(device=device, dtype="bfloat16", max_model_len=max_model_len)
        generation, trimming = GenerationJson.model_validate({}), TrimserveJson.model_validate({})
        checkpoint = Checkpoint("random", "0", Path(), config, generation, trimming)
        info = describe_checkpoint(checkpoint, knobs, EngineConfig(max_images=1))
        self.theirs: Any = allocated_model(config, torch.bfloat16, torch.device(info.device))
        draw_weights(self.theirs)
        # Prompts are drawn, too: no processor is asked, so the embedded model's stands in.
        embedded = describe_model(ModelConfig(), EngineConfig())
        processor = Processor.from_pretrained(embedded_model_folder(), embedded, max_image_pixels=info.tile_size**2)
        self.ours = Ours(Mllama(self.theirs, processor, info), most)
        mend(self.theirs)
        self.ours.model.warm_up_decode(self.ours.pool.pages, most)
        self.weight_bytes = StepShape.of_model(self.theirs, torch.bfloat16).weight_bytes

    def prompt(self, setting: Setting) -> PreparedPrompt:
        """An image that fills its tiles, then text, all at random."""
        info, generator, side = self.ours.model.info, torch.Generator().manual_seed(0), setting.side
        pixels = torch.zeros(info.max_tiles, 3, info.tile_size, info.tile_size)
        pixels[: side**2].normal_(generator=generator)
        ratios = vision_config(self.theirs.config).supported_aspect_ratios or []
        size = side * info.tile_size
        image = PreparedImage(pixels, ratios.index([side, side]) + 1, side, side, size, size, b"")
        text = torch.randint(info.vocab_size, (_PROMPT_TOKENS - 1,), generator=generator).tolist()
        return PreparedPrompt((info.image_token_id, *text), (image,))

    def asked(self, setting: Setting) -> Asked:
        """The prompt, prefilled by trimserve."""
        return Asked(self.ours, self.prompt(setting), _TRIMMED if setting.is_trimmed else UNTRIMMED)

    def rival(self) -> Rival:
        """The prompt about four tiles, as transformers takes it."""
        prompt, max_tiles = self.prompt(SETTINGS["off"]), self.ours.model.info.max_tiles
        [image] = prompt.images
        inputs = {
            "input_ids": torch.tensor([prompt.token_ids]),
            "attention_mask": torch.ones(1, _PROMPT_TOKENS, dtype=torch.int64),
            "cross_attention_mask": torch.ones(1, _PROMPT_TOKENS, 1, max_tiles, dtype=torch.int64),
            "pixel_values": image.pixel_values[None, None],
            "aspect_ratio_ids": torch.tensor([[image.aspect_ratio_id]]),
            "aspect_ratio_mask": torch.ones(1, 1, max_tiles, dtype=torch.int64),
        }
        return Rival(self.theirs, {name: tensor.to(self.theirs.device) for name, tensor in inputs.items()})


@torch.inference_mode()
def measure(
    config: MllamaConfig, device: Device, seconds: float, batches: Sequence[int] = (1, 4, 8, 16, 32)
) -> dict[str, Any]:
    """Everything but the machine.

    Args:
        config: of the model.
        device: where both run.
        seconds: of every figure.
        batches: of decode steps.
    Raises:
        AssertionError: the logits of both models are not alike.
    """
    both = _Both(config, device, max(batches))
    asked, rival = both.asked(SETTINGS["off"]), both.rival()
    asked.release()
    alike = float(F.cosine_similarity(asked.logits.float(), rival.logits.float(), dim=0))
    assert alike >= _LEAST_COSINE, f"the cosine of both models' logits is {alike}"
    with torch.device(both.ours.model.info.device):
        per_second = bandwidth("read", 15)

    def timed(call: Callable[[], Any]) -> dict[str, float]:
        """Milliseconds of a call, the device's work included."""

        def run() -> None:
            call()
            if device == "cuda":
                torch.cuda.synchronize()

        return time_calls(run, seconds)

    rows: list[dict[str, Any]] = []
    for name, setting in SETTINGS.items():
        asked = both.asked(setting)
        row = {"engine": "trimserve", "setting": name, "cross_rows": asked.cross_rows}
        for phase in phases(asked, batches, timed):
            if phase["phase"] == "decode":
                floor = (both.weight_bytes + asked.kv_bytes(phase["batch"])) / per_second * 1e3
                phase |= {"floor_ms": round(floor, 3), "times_floor": round(phase["ms"]["median"] / floor, 3)}
            noted(rows, row | phase)
        asked.release()
    for phase in phases(rival, batches, timed):
        noted(rows, {"engine": "transformers", "setting": "off"} | phase)
    return {
        "max_kept_fraction": _TRIMMED.max_kept_fraction,
        "read_bytes_per_second": round(per_second),
        "cosine_of_logits": round(alike, 5),
        "rows": rows,
    }


def main() -> None:
    """Measure and write."""
    arguments = command_line(__doc__, "gpu.json", seconds=1.0, threads=torch.get_num_threads())
    # What transformers takes where nothing is said, with the tiles of the instruction-tuned checkpoint.
    config = MllamaConfig(vision_config={"image_size": 560}, image_token_index=128256)
    measured = measure(config, "cuda", arguments.seconds)
    finish(arguments, {"gpu": torch.cuda.get_device_name(), "model": "11b", "dtype": "bfloat16", **measured})


if __name__ == "__main__":
    main()
