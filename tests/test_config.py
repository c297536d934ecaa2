"""Knobs: bounds hold, names are checked, and every knob is documented."""

from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from trimserve.config import Config, EngineConfig, ModelConfig, ServerConfig

BAD = [
    (ModelConfig, "model", ""),
    (ModelConfig, "dtype", "int8"),
    (ModelConfig, "quantize", "int2"),
    (ModelConfig, "max_model_len", 0),
    (ModelConfig, "intermediate_features", "both"),
    (ModelConfig, "k_ratio", 0.0),
    (ModelConfig, "k_ratio", 1.01),
    (ModelConfig, "k_ratio", float("nan")),
    (ModelConfig, "merge_ratio", -0.1),
    (ModelConfig, "merge_ratio", 1.01),
    (EngineConfig, "max_batch", 0),
    (EngineConfig, "max_queue", 0),
    (EngineConfig, "max_images", 0),
    (EngineConfig, "max_image_bytes", 0),
    (EngineConfig, "max_image_pixels", 0),
    (EngineConfig, "num_preprocess_workers", 0),
    (EngineConfig, "num_threads", 0),
    (EngineConfig, "num_threads", 2**32),
    (EngineConfig, "max_batch", 2**32),
    (EngineConfig, "max_queue", 2**32),
    (EngineConfig, "max_images", 2**32),
    (EngineConfig, "max_image_pixels", 10**20),
    (EngineConfig, "num_preprocess_workers", 10**6),
    (ServerConfig, "port", -1),
    (ServerConfig, "metrics_port", 65536),
    (ServerConfig, "max_message_bytes", 100),
    (ServerConfig, "max_concurrent_rpcs", 0),
    (ServerConfig, "max_concurrent_rpcs_per_client", 0),
    (ServerConfig, "receive_timeout_seconds", 0),
    (ServerConfig, "max_deadline_seconds", 0),
    (ServerConfig, "drain_grace_seconds", float("inf")),
    (ServerConfig, "max_connection_age_seconds", 0),
    (ServerConfig, "log_level", "loud"),
    (ServerConfig, "prot", 50051),
]


@pytest.mark.parametrize(("section", "knob", "value"), BAD, ids=str)
def test_a_bad_value_is_refused_by_the_name_of_its_knob(
    section: Callable[..., BaseModel], knob: str, value: object
) -> None:
    with pytest.raises(ValidationError, match=knob):
        section(**{knob: value})


def test_a_config_does_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Config().engine.max_batch = 1


def test_every_knob_says_what_it_sets_and_names_are_used_once() -> None:
    sections: list[type[BaseModel]] = [ModelConfig, EngineConfig, ServerConfig]
    names = [name for section in sections for name in section.model_fields]
    assert len(names) == len(set(names))
    for section in sections:
        for name, field in section.model_fields.items():
            assert field.description, name
            assert field.description.endswith("."), name


def test_adapters_are_folders_by_name() -> None:
    config = ModelConfig(adapter=("a=x/y", "b=z=z"))
    assert config.adapters == {"a": Path("x/y"), "b": Path("z=z")}
    for wrong in ("a", "=x", "a=", "a b=x", f"{'a' * 65}=x"):
        with pytest.raises(ValidationError):
            ModelConfig(adapter=(wrong,))
    with pytest.raises(ValidationError, match="must name each adapter once, a is there 2 times"):
        ModelConfig(adapter=("a=x", "a=y"))
