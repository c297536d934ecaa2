"""Transformers' Mllama with the two mends that Meta's weights were trained with.

The peer of every equality test and the model that `training/` trains. It knows nothing about trimming.

transformers 5.23 differs from Meta's model code in two places that `docs/architecture.md` ("What correct means")
explains: (a) it collects intermediate vision features from the *outputs* of the layers in
`intermediate_layers_indices`, Meta from their *inputs*; (b) text rows that see no image keep their cross-attention
output, Meta zeroes it. Both are mended by hooks, so that the weights and every other line stay transformers' own.
"""

from typing import Any

from torch import Tensor, nn
from transformers import MllamaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.mllama.modeling_mllama import MllamaCrossAttentionDecoderLayer


def mend(
    model: MllamaForConditionalGeneration,
    *,
    intermediate_inputs: bool = True,
    mask_attention_output: bool = True,
) -> MllamaForConditionalGeneration:
    """Give a transformers Mllama the semantics of Meta's model code, in place.

    Args:
        model: any instance; its weights are not touched.
        intermediate_inputs: mend (a), intermediate vision features from layer inputs.
        mask_attention_output: mend (b), zero cross-attention output of text rows that see no image.
    Returns:
        The same model.
    """
    if intermediate_inputs:
        encoder = model.model.vision_model.transformer
        encoder.register_forward_hook(_collect_layer_inputs, with_kwargs=True)
    if mask_attention_output:
        for layer in model.model.language_model.layers:
            if isinstance(layer, MllamaCrossAttentionDecoderLayer):
                _mask_unseeing_rows(layer)
    return model


def _collect_layer_inputs(
    _: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: BaseModelOutput
) -> BaseModelOutput:
    first_input = args[0] if args else kwargs["hidden_states"]
    assert output.hidden_states is not None
    output.hidden_states = (first_input, *output.hidden_states[:-1])
    return output


def _mask_unseeing_rows(layer: MllamaCrossAttentionDecoderLayer) -> None:
    row_mask: list[Tensor | None] = [None]  # the decoder layer gets the mask, its cross_attn module does not

    def remember(_: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        row_mask[0] = kwargs["full_text_row_masked_out_mask"]

    def zero(_: nn.Module, __: tuple[Any, ...], output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        mask = row_mask[0]
        return output if mask is None else (output[0] * mask[:, 0], output[1])

    layer.register_forward_pre_hook(remember, with_kwargs=True)
    layer.cross_attn.register_forward_hook(zero)
