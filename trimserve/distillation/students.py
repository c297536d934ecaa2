"""What is trained, as a loss of a batch: a compressor whose rows stand for the image, or a router of `exit`."""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from trimserve.distillation.batches import LessonBatch
from trimserve.model.differentiable import DifferentiableDecoder, PaddedBatch
from trimserve.model.mllama import Mllama
from trimserve.model.trained_file import shape_of, trainable
from trimserve.trimming.compressor import Compressor, Regions
from trimserve.trimming.policies.exit import Router
from trimserve.trimming.trained import Trained

__all__ = ["CompressorStudent", "RouterStudent", "Student", "divergence", "student_of"]


class Student(Protocol):
    """Learns from batches."""

    module: Trained
    """Its weights."""

    def loss(self, batch: LessonBatch) -> Tensor:
        """Scalar, a mean over the batch; a gradient flows to the module."""


def student_of(method: str, rows: int, model: Mllama) -> Student:
    """A fresh student, drawn from torch's own source of chance.

    Args:
        method: one of `trainable`.
        rows: see `Shape.rows`.
        model: frozen.
    Raises:
        ValueError: the method cannot make so many rows; says which it can.
    """
    module = trainable()[method](shape_of(model.info, rows)).to(model.info.device)
    if isinstance(module, Router):
        return RouterStudent(module, model.differentiable())
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

    def loss(self, batch: LessonBatch) -> Tensor:
        """KL(untrimmed || this) in nats, mean over the answers' tokens."""
        return divergence(batch.said, self._decoder(self._padded(batch), batch.wanted)).mean()

    def _padded(self, batch: LessonBatch) -> PaddedBatch:
        text = self._text(batch) if self._compressor.reads_text else None
        num_tiles = torch.bincount(batch.lesson_of)
        most = int(num_tiles.max()) * self._compressor.shape.rows
        lessons, rows, biases = [], [], []
        for count in num_tiles.unique().tolist():  # images of as many tiles are compressed together
            those = (num_tiles == count).nonzero()[:, 0]
            tiles = batch.tiles[(num_tiles == count)[batch.lesson_of]].unflatten(0, (-1, count))
            new, group = self._compressor(tiles, None if text is None else text[those])
            held = torch.cat([tiles[:, :, 0], new.to(tiles.dtype)], dim=1)
            bias = F.pad(Regions(group, new.shape[1]).sizes.log(), (count, 0))
            room = most - held.shape[1]
            lessons.append(those)
            rows.append(F.pad(held, (0, 0, 0, room)))
            biases.append(F.pad(bias, (0, room), value=-torch.inf))
        order = torch.cat(lessons).argsort()
        return PaddedBatch(batch.token_ids, batch.sees, torch.cat(rows)[order], torch.cat(biases)[order])

    def _text(self, batch: LessonBatch) -> Tensor:
        return _mean(self._decoder.embed(batch.token_ids), batch.asks)


class RouterStudent:
    """A router of `exit`: it shall know which answers stay the same when later cross-attention layers are left out."""

    def __init__(self, module: Router, decoder: DifferentiableDecoder) -> None:
        """Join the two; see `CompressorStudent`."""
        self.module: Trained = module
        self._router = module
        self._decoder = decoder

    def loss(self, batch: LessonBatch) -> Tensor:
        """Binary cross-entropy in nats, mean over answers and layers."""
        states: dict[int, Tensor] = {}
        layers = range(self._decoder.num_cross_layers - 1)
        with torch.no_grad():
            padded = _untrimmed(batch)
            stays = [self._stays(batch, self._decoder(padded, batch.wanted, left_after=layer)) for layer in layers]
            self._decoder(padded, batch.wanted, left_after=layers[-1], watch=states.__setitem__)
            mean = [_mean(states[layer], batch.asks) for layer in layers]
            last = [_last(states[layer], batch.asks) for layer in layers]
        logits = torch.stack([self._router(layer, mean[layer], last[layer]) for layer in layers])
        return F.binary_cross_entropy_with_logits(logits, torch.stack(stays))

    @staticmethod
    def _stays(batch: LessonBatch, logits: Tensor) -> Tensor:
        """float32 [B], 1 where every token of the answer is the untrimmed one."""
        differs = (logits.argmax(dim=-1) != batch.said.argmax(dim=-1)).float()
        lesson = batch.wanted.nonzero()[:, 0]
        return (differs.new_zeros(len(batch.token_ids)).index_add(0, lesson, differs) == 0).float()


def _untrimmed(batch: LessonBatch) -> PaddedBatch:
    places = (batch.lesson_of, batch.place)
    shape = (len(batch.token_ids), int(batch.place.max()) + 1)
    rows = batch.tiles.new_zeros(*shape, *batch.tiles.shape[1:]).index_put(places, batch.tiles)
    bias = batch.tiles.new_full((*shape, rows.shape[2]), -torch.inf, dtype=torch.float32)
    bias = bias.index_put(places, bias.new_zeros(()))
    return PaddedBatch(batch.token_ids, batch.sees, rows.flatten(1, 2), bias.flatten(1))


def _mean(rows: Tensor, chosen: Tensor) -> Tensor:
    """Of the chosen rows of each sequence: [B, T, D], bool [B, T] -> float32 [B, D]."""
    return (rows.float() * chosen[..., None]).sum(dim=1) / chosen.sum(dim=1, keepdim=True)


def _last(rows: Tensor, chosen: Tensor) -> Tensor:
    """The last of the chosen rows of each sequence, [B, D]."""
    places = torch.arange(chosen.shape[1], device=chosen.device)
    return rows[torch.arange(len(rows), device=rows.device), (places * chosen).argmax(dim=1)]


def divergence(said: Tensor, logits: Tensor) -> Tensor:
    """KL of two distributions of each row, in nats.

    Args:
        said: float32 [R, V], logarithms of probabilities.
        logits: float32 [R, V].
    Returns:
        [R]
    """
    return (said.exp() * (said - logits.log_softmax(dim=-1))).sum(dim=-1)
