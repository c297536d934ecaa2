"""What is trained, as a loss of a batch: a compressor whose rows stand for the image, or a router of `exit`."""

from typing import Protocol

import torch
from torch import Tensor

from trimserve.distillation.batches import LessonBatch
from trimserve.model.differentiable import DifferentiableDecoder, PaddedBatch
from trimserve.model.mllama import Mllama
from trimserve.model.trained_file import shape_of, trainable
from trimserve.trimming.compressor import Compressor
from trimserve.trimming.trained import Trained

__all__ = ["CompressorStudent", "Student", "divergence", "student_of"]


class Student(Protocol):
    """Learns from batches."""

    module: Trained
    """Its weights."""

    def loss(self, batch: LessonBatch) -> Tensor:
        """Scalar, mean over the batch's lessons or answers; a gradient flows to the module."""


def student_of(method: str, rows: int, model: Mllama) -> Student:
    """A fresh student, drawn from torch's own source of chance.

    Args:
        method: name of the policy that learns.
        rows: see `Shape.rows`.
        model: frozen.
    Raises:
        ValueError: the method learns nothing, or cannot make so many rows.
    """
    known = trainable()
    if method not in known:
        raise ValueError(f"must be among {', '.join(known)}, got {method!r}")
    module = known[method](shape_of(model.info, rows)).to(model.info.device)
    assert isinstance(module, Compressor)
    return CompressorStudent(module, model.differentiable())


class CompressorStudent:
    """The decoder reads a compressor's rows in place of the features; its answers shall be the untrimmed ones."""

    def __init__(self, module: Compressor, decoder: DifferentiableDecoder) -> None:
        """Join the two.

        Args:
            module: what is trained, on the decoder's device.
            decoder: frozen.
        """
        self.module: Trained = module
        self._compressor = module
        self._decoder = decoder
        counts = torch.bincount(module.group).float()
        self._bias = torch.cat([counts.new_zeros(1), counts.log()])
        """float32 [1 + W], of the class token and the new rows."""

    def loss(self, batch: LessonBatch) -> Tensor:
        """KL(untrimmed || this) in nats, summed over each answer's tokens, mean over answers."""
        return self.divergences(batch).sum() / len(batch.token_ids)

    def divergences(self, batch: LessonBatch) -> Tensor:
        """float32 [answer tokens], nats."""
        return divergence(batch.said, self._decoder(self._padded(batch), batch.wanted))

    def _padded(self, batch: LessonBatch) -> PaddedBatch:
        new = self._compressor(batch.tiles, self._text(batch) if self._compressor.reads_text else None)
        rows = torch.cat([batch.tiles[:, :1], new.to(batch.tiles.dtype)], dim=1)
        shape = (len(batch.token_ids), int(batch.place.max()) + 1)
        places = (batch.lesson_of, batch.place)
        placed = rows.new_zeros(*shape, *rows.shape[1:]).index_put(places, rows)
        bias = rows.new_full((*shape, rows.shape[1]), -torch.inf, dtype=torch.float32)
        bias = bias.index_put(places, self._bias.expand(len(rows), -1))
        return PaddedBatch(batch.token_ids, batch.sees, placed.flatten(1, 2), bias.flatten(1))

    def _text(self, batch: LessonBatch) -> Tensor:
        asks = batch.asks[..., None]
        embedded = self._decoder.embed(batch.token_ids).float()
        return ((embedded * asks).sum(dim=1) / asks.sum(dim=1))[batch.lesson_of]


def divergence(said: Tensor, logits: Tensor) -> Tensor:
    """KL of two distributions of each row, in nats.

    Args:
        said: float32 [R, V], logarithms of probabilities.
        logits: float32 [R, V].
    Returns:
        [R]
    """
    return (said.exp() * (said - logits.log_softmax(dim=-1))).sum(dim=-1)
