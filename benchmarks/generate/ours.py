"""trimserve's model: vision, prefill and decode steps of one setting, each a call to be timed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.generate.setting import Setting, make_prompt, trim_params
from trimserve.config import Dtype, EngineConfig, KvDtype, ModelConfig, Quantize
from trimserve.evaluation.pages import OwnKeyValues, OwnPages
from trimserve.model.interruptible import run_through
from trimserve.model.loading import load_model
from trimserve.model.prefilled import Prefilled
from trimserve.model.prepared import PreparedPrompt
from trimserve.trimming.encoded_image import EncodedImage
from trimserve.trimming.plan import TrimPlan

__all__ = ["Asked", "Ours", "copied"]

_ANSWER_TOKENS = 16
_SLACK = 1.1  # of the pool: pages are whole


class Ours:
    """A loaded model."""

    def __init__(
        self,
        folder: Path,
        dtype: Dtype,
        quantize: Quantize,
        *,
        max_kept_fraction: float | None,
        most: int,
        kv_dtype: KvDtype = "auto",
    ) -> None:
        """Load it.

        Args:
            folder: of the checkpoint.
            dtype: of weights.
            quantize: as in `ModelConfig`.
            max_kept_fraction: cap of trimmed settings.
            most: sequences that decode together, at most.
            kv_dtype: as in `ModelConfig`.
        """
        config = ModelConfig(model=str(folder), dtype=dtype, quantize=quantize, kv_dtype=kv_dtype)
        self.model = load_model(config, EngineConfig())
        self.max_kept_fraction = max_kept_fraction
        info = self.model.info
        of_text = info.self_kv_bytes_per_token * 4 * _ANSWER_TOKENS
        of_image = info.cross_kv_bytes_per_feature * info.max_tiles * info.features_per_tile
        self.pool = OwnPages(info, int((most + 1) * (of_text + of_image) * _SLACK) + 2**24)

    def ask(self, setting: Setting) -> "Asked":
        """Encode and prefill a setting."""
        return Asked(self, setting)


class Asked:
    """One setting, prefilled."""

    def __init__(self, ours: Ours, setting: Setting) -> None:
        """Use `Ours.ask`."""
        self._model, self._pool = ours.model, ours.pool
        self._trim = TrimPlan.of(trim_params(setting, self._model.info, ours.max_kept_fraction))
        self.prompt: PreparedPrompt = self._model.prepare(make_prompt(setting, self._model.info.tile_size))
        self._images = [self.encode()]
        self._kvs: list[OwnKeyValues] = []
        self.logits = self._prefill().logits

    def encode(self) -> EncodedImage:
        """The image's features."""
        return run_through(self._model.encode_image(self.prompt.images[0]))

    def prefill(self) -> None:
        """The prompt, into pages that are then given back."""
        self._prefill()
        self._kvs.pop().release()

    def step(self, batch: int) -> Callable[[], Tensor]:
        """A decode step of so many sequences that each hold the prompt in pages of their own; always the same one."""
        while len(self._kvs) < batch:
            self._copy()
        kvs = self._kvs[:batch]
        token_ids = [int(self.logits.argmax())] * batch

        def run() -> Tensor:
            for kv in kvs:
                kv.length = len(self.prompt.token_ids)
            return self._model.decode(token_ids, kvs)

        return run

    def kv_bytes(self, batch: int) -> int:
        """Keys and values that a step of a batch attends to."""
        info, kv = self._model.info, self._kvs[0]
        of_text = (len(self.prompt.token_ids) + 1) * info.self_kv_bytes_per_token
        return batch * (of_text + kv.cross_lengths[0] * info.cross_kv_bytes_per_feature)

    def describe(self) -> dict[str, Any]:
        """Numbers of rows."""
        return {"prompt_tokens": len(self.prompt.token_ids), "cross_rows": self._kvs[0].cross_lengths[0]}

    def release(self) -> None:
        """Give all pages back."""
        for kv in self._kvs:
            kv.release()

    def _prefill(self) -> Prefilled:
        num_positions = len(self.prompt.token_ids) + _ANSWER_TOKENS
        kv = self._pool.key_values(num_positions, sum(image.num_features for image in self._images))
        self._kvs.append(kv)
        prefilled = run_through(self._model.prefill(self.prompt, self._images, self._trim, kv))
        kv.give_back_unused()
        return prefilled

    def _copy(self) -> None:
        self._kvs.append(copied(self._pool, self._kvs[0], len(self.prompt.token_ids) + _ANSWER_TOKENS))


def copied(pool: OwnPages, kv: OwnKeyValues, num_positions: int) -> OwnKeyValues:
    """What a sequence holds, in pages of another one.

    Args:
        pool: of both.
        kv: after its prefill.
        num_positions: text positions that `kv` has pages for.
    """
    other = pool.key_values(num_positions, kv.cross_lengths[0])
    other.length, other.cross_lengths, other.cross_biases = kv.length, [*kv.cross_lengths], [*kv.cross_biases]
    for to, source in ((other.self_tables, kv.self_tables), (other.cross_tables, kv.cross_tables)):
        tables = (to, source[:, : to.shape[1]])
        here, there = (torch.from_numpy(table.ravel()).long().to(pool.pages.device) for table in tables)
        pool.pages[here] = pool.pages[there]
    return other
