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


@pytest.mark.parametrize(
    ("section", "knob"),
    [
        (ModelConfig, "codebook"),
        (ServerConfig, "tls_cert"),
        (ServerConfig, "tls_key"),
        (ServerConfig, "tls_client_ca"),
        (ServerConfig, "auth_file"),
    ],
)
def test_a_file_may_be_in_the_home(
    section: Callable[..., BaseModel], knob: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    beside = {"tls_cert": "c", "tls_key": "k"} if knob.startswith("tls") else {}
    assert getattr(section(**{**beside, knob: "~/file"}), knob) == Path("/home/somebody/file")
    with pytest.raises(ValidationError, match="must be in a home that there is"):
        section(**{**beside, knob: "~nobody-at-all/file"})


def test_files_and_adapters_that_are_given_again_may_be_in_the_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    config = ModelConfig(adapter=("one=~/lora", "two=/lora"), compressor=(Path("~/file"),))
    assert config.adapters == {"one": Path("/home/somebody/lora"), "two": Path("/lora")}
    assert config.compressor == (Path("/home/somebody/file"),)
    with pytest.raises(ValidationError, match="must be in a home that there is"):
        ModelConfig(adapter=("one=~nobody-at-all/lora",))


@pytest.mark.parametrize(("written", "host"), [("[::1]", "::1"), ("::1", "::1"), ("127.0.0.1", "127.0.0.1")])
def test_an_ipv6_host_may_have_brackets(written: str, host: str) -> None:
    assert ServerConfig(host=written).host == host


def test_every_knob_in_bytes_takes_units() -> None:
    for section in (ModelConfig, EngineConfig, ServerConfig):
        for knob in section.model_fields:
            if knob.endswith("_bytes"):
                assert getattr(section(**{knob: "2MiB"}), knob) == 2 * 2**20, knob  # type: ignore[arg-type]  # any field


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
