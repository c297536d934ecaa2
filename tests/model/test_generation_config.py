"""What a checkpoint says about generation: which file counts, what has an effect."""

from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig, MllamaForConditionalGeneration

from tests.model.test_loading import edit_json, load
from trimserve.errors import CheckpointError


def transformers_generation(folder: Path) -> GenerationConfig:
    """How transformers would generate."""
    config = MllamaForConditionalGeneration.from_pretrained(folder).generation_config
    assert isinstance(config, GenerationConfig)
    return config


def test_unset_sampling_follows_generation_config(checkpoint: Path) -> None:
    greedy = load(checkpoint).info.generation_defaults
    assert greedy.temperature == 0
    assert len(greedy.eos_token_ids) > 1
    edit_json(
        checkpoint / "generation_config.json",
        lambda c: c.update(do_sample=True, temperature=0.6, top_p=0.9, max_new_tokens=7),
    )
    sampled = load(checkpoint).info.generation_defaults
    assert (sampled.temperature, sampled.top_p, sampled.max_new_tokens) == (0.6, 0.9, 7)


def test_the_configs_end_of_an_answer_is_no_negative_token(checkpoint: Path) -> None:
    edit_json(checkpoint / "config.json", lambda c: c["text_config"].update(eos_token_id=[3, -1]))
    assert load(checkpoint).info.generation_defaults.eos_token_ids  # generation_config.json goes before it
    (checkpoint / "generation_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: eos_token_id must be in \[0, 2\^32\), got \[3, -1\]"):
        load(checkpoint)


@pytest.mark.parametrize(
    ("top", "of_text"),
    [
        ({"eos_token_id": 3}, {"eos_token_id": [4, 5]}),
        ({"eos_token_id": None}, {"eos_token_id": [4, 5]}),
        ({"do_sample": True, "temperature": 0.5, "max_new_tokens": 9}, {"temperature": 0.7, "top_p": 0.9}),
    ],
)
def test_without_a_generation_config_generation_follows_the_config_as_in_transformers(
    checkpoint: Path, top: dict[str, Any], of_text: dict[str, Any]
) -> None:
    (checkpoint / "generation_config.json").unlink()
    edit_json(checkpoint / "config.json", lambda c: (c.update(top), c["text_config"].update(of_text)))
    ours, theirs = load(checkpoint).info.generation_defaults, transformers_generation(checkpoint)
    ids = theirs.eos_token_id
    assert ours.eos_token_ids == (tuple(ids) if isinstance(ids, list) else (ids,))
    assert ours.temperature == (theirs.temperature if theirs.do_sample else 0)
    assert ours.top_p == (theirs.top_p or 1)
    assert ours.max_new_tokens == (theirs.max_new_tokens or 256)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"suppress_tokens": [3, 4], "min_new_tokens": 2}, {"suppress_tokens": "[3, 4]", "min_new_tokens": "2"}),
        ({"begin_suppress_tokens": [*range(9)]}, {"begin_suppress_tokens": "[0, 1, 2, 3, 4, 5, ...]"}),
        ({"num_beams": 4, "stop_strings": "END"}, {"num_beams": "4", "stop_strings": "'END'"}),
        ({"num_beams": 1, "suppress_tokens": [], "no_repeat_ngram_size": 0, "guidance_scale": None}, {}),
        ({"forced_bos_token_id": 1, "length_penalty": 2.0, "pad_token_id": 1, "cache_implementation": "static"}, {}),
        ({"max_length": 131072}, {"max_length": "131072"}),
        ({"max_length": 20, "encoder_repetition_penalty": 1.0}, {}),
        ({"max_length": 131072, "max_new_tokens": 7}, {}),
        ({"do_sample": False, "typical_p": 0.9}, {}),
        ({"do_sample": True, "typical_p": 0.9, "eta_cutoff": 0.0}, {"typical_p": "0.9"}),
    ],
)
def test_settings_of_generation_that_have_no_effect_are_logged_at_load(
    checkpoint: Path, caplog: pytest.LogCaptureFixture, change: dict[str, Any], expected: dict[str, str]
) -> None:
    edit_json(checkpoint / "generation_config.json", lambda c: c.update(change))
    load(checkpoint)
    told = {record.__dict__["field"]: record.__dict__["value"] for record in caplog.records}
    assert told == expected
    for record, (name, value) in zip(caplog.records, expected.items(), strict=True):
        end = f"generation_config.json: {name} has no effect here, got {value}"
        assert record.getMessage() == f"{checkpoint}/{end}"
