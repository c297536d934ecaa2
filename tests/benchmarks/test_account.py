"""Bytes of a request in other layouts."""

from benchmarks.bench_bytes import sglang_bytes
from trimserve.config import EngineConfig, ModelConfig
from trimserve.model.loading import describe_model


def test_a_slot_of_sglang_spans_all_layers_and_an_image_takes_a_full_canvas() -> None:
    info = describe_model(ModelConfig(), EngineConfig())
    slot = info.self_kv_bytes_per_token + info.cross_kv_bytes_per_feature
    canvas = info.max_tiles * info.features_per_tile
    found = sglang_bytes(info, num_images=2, num_positions=10)
    assert found == {"self": 10 * slot, "cross": 2 * canvas * slot, "total": (10 + 2 * canvas) * slot}
