"""A decode step of all layers as one op, on weights that are described once; CPU only.

Typed wrappers over the compiled ops of `csrc/decoder_layers.cpp` and `csrc/decode.cpp`. All checks are made in C++.
`reference.decode_layers` defines what a step computes.
"""

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trimserve.ops.library import load_library

__all__ = ["CrossTables", "DecoderLayers", "SelfTables", "decode_layers"]

load_library()


class DecoderLayers:
    """The layers of one decoder: weights that `decode_layers` reads in every step.

    The tensors are borrowed, not copied; they must not be resized while this exists. Any number of these may exist side
    by side, and be used from any thread.
    """

    weights: tuple[Tensor, ...]
    """Layer after layer. Self-attention: input norm, query-key-value, output, MLP norm, gate-up, down. Cross-attention:
    input norm, query, query norm, output, MLP norm, gate-up, down."""
    scales: tuple[Tensor, ...]
    """As `linear` takes them, of each linear layer in the order of `weights`, four of each layer; one that is not
    quantized has an empty tensor. No tensors if none is quantized."""
    cross_layers: tuple[int, ...]
    """Which layers are cross-attention, ascending."""
    gates: tuple[float, ...]
    """Two factors of each cross-attention layer: of its attention and of its MLP."""
    epsilon: float
    """Of all norms."""
    handle: int
    """What the compiled op knows these layers by; never used twice in a process."""

    def __init__(
        self,
        weights: Sequence[Tensor],
        scales: Sequence[Tensor],
        cross_layers: Sequence[int],
        gates: Sequence[float],
        epsilon: float,
    ) -> None:
        """Describe the layers to the compiled op.

        Args:
            weights: see the attribute. Norms are float32, bfloat16 or float16 [D], or [Dh] for query norms; linear
                layers are [outputs, inputs], contiguous, of the same dtype, or int8 or int4 with scales. With int4, the
                output projections of self-attention layers must have a multiple of 32 inputs.
            scales: see the attribute.
            cross_layers: see the attribute.
            gates: see the attribute.
            epsilon: finite and at least 0.
        Raises:
            ValueError: weights that do not fit together, a tensor that is not on the CPU, or an epsilon out of range.
        """
        self.weights, self.scales = tuple(weights), tuple(scales)
        self.cross_layers, self.gates, self.epsilon = tuple(cross_layers), tuple(gates), epsilon
        self.handle = torch.ops.trimserve.make_decoder_layers(weights, scales, cross_layers, gates, epsilon)
        weakref.finalize(self, torch.ops.trimserve.drop_decoder_layers, self.handle)


class SelfTables(NamedTuple):
    """Page tables of the self-attention layers for a batch of sequences, each with one new row."""

    tables: Tensor
    """int32 [groups, B, max_pages]"""
    lengths: Tensor
    """int32 [B], positions to attend to, the new row included."""
    slots: Tensor
    """int64 [groups, B], where the new rows' keys and values go."""


class CrossTables(NamedTuple):
    """Page tables of the cross-attention layers; each layer has its own number S of rows that see features."""

    tables: Sequence[Tensor]
    """int32 [S, max_pages] of each layer, for the first S rows of the batch."""
    lengths: Sequence[Tensor]
    """int32 [S] of each layer, positions to attend to."""
    biases: Sequence[Tensor] = ()
    """float32 [S, max_pages * PAGE_POSITIONS] of each layer, added to the logits; empty if there is no bias."""


def decode_layers(
    layers: DecoderLayers,
    hidden: Tensor,
    pages: Tensor,
    angles: tuple[Tensor, Tensor],
    text: SelfTables,
    features: CrossTables | None = None,
) -> None:
    """Run one new row of each sequence through all layers of a decoder, in place.

    Rows that see no features pass a cross-attention layer unchanged. Layers are counted among their own kind: layer l
    uses slot l % G of the pages of group l // G. A row's result does not depend on the other rows or on the number of
    threads, to the last bit (of quantized weights see `linear`). Other Python threads run meanwhile.

    Args:
        layers: the weights.
        hidden: dtype of the norms [B, D], contiguous; becomes the last layer's output.
        pages: same dtype [P, G, 2, Hkv, PAGE_POSITIONS, Dh], contiguous; the new rows' keys and values are written.
        angles: cosines and sines of the new rows' positions, each float32 [B, Dh / 2].
        text: page tables of the self-attention layers.
        features: page tables of the cross-attention layers; None if no row sees features.
    Raises:
        ValueError: a wrong dtype or shape, or whatever one of the ops in a layer refuses. `hidden` and `pages` may have
            been written to by then.
    Definition: reference.decode_layers.
    """
    seen = CrossTables((), ()) if features is None else features
    torch.ops.trimserve.decode_layers(hidden, pages, layers.handle, angles, text, *seen)


def _fake_decode_layers(*_: object) -> None:  # everything is written in place
    return None


torch.library.register_fake("trimserve::decode_layers", _fake_decode_layers)
