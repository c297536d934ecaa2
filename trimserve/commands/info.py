"""`trimserve info`: what is installed here, and which model it would serve; or which model a server serves."""

import json
import platform
from dataclasses import asdict
from importlib import metadata
from typing import Annotated, Any

import typer
from google.protobuf.json_format import MessageToDict

from trimserve import __version__
from trimserve.commands.tables import as_bytes, print_facts
from trimserve.config import Config
from trimserve.connection import Connection, connected, with_connection
from trimserve.knobs import with_knobs

__all__ = ["info"]

_PACKAGES = ("torch", "transformers", "tokenizers", "grpcio", "protobuf")


@with_knobs("model")
@with_connection("tell about what is installed here")
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document, with everything.")] = False,
    *,
    connection: Connection,
    config: Config,
) -> None:
    """Tell versions, the extension's build, devices and the model's geometry."""
    document = _installed(config) if connection.address is None else _served(connection)
    if as_json:
        print(json.dumps(document, indent=2))
    else:
        print_facts({**_facts_of_installation(document), **_facts_of_model(document["model"])})


def _served(connection: Connection) -> dict[str, Any]:
    with connected(connection) as client:
        model = MessageToDict(
            client.model(), preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        version = client.status().version
    model["revision"] = model.pop("model_revision")
    # 64-bit numbers are text in protobuf's JSON.
    return {
        "address": connection.address,
        "trimserve": version,
        "model": {name: int(value) if name.endswith(_WIDE) else value for name, value in model.items()},
    }


_WIDE = ("_bytes", "_pixels", "num_parameters", "_per_feature", "_per_token")


def _installed(config: Config) -> dict[str, Any]:
    import torch

    from trimserve import ops
    from trimserve.model.loading import describe_model

    model = describe_model(config.model, config.engine)
    return {
        "trimserve": __version__,
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in _PACKAGES},
        "extension": ops.build_info(),
        "ops": [name for name in ops.__all__ if hasattr(torch.ops.trimserve, name)],
        "devices": ["cpu", *(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))],
        "model": {
            **asdict(model),
            "cross_kv_bytes_per_feature": model.cross_kv_bytes_per_feature,
            "self_kv_bytes_per_token": model.self_kv_bytes_per_token,
        },
    }


def _facts_of_installation(document: dict[str, Any]) -> dict[str, str]:
    if "address" in document:
        return {"server": document["address"], "trimserve": document["trimserve"]}
    extension = document["extension"]
    return {
        "trimserve": f"{document['trimserve']}, Python {document['python']}",
        "packages": ", ".join(f"{name} {version}" for name, version in document["packages"].items()),
        "extension": ", ".join(f"{name} {value}" for name, value in extension.items() if value),
        "ops": ", ".join(document["ops"]),
        "devices": ", ".join(document["devices"]),
    }


def _facts_of_model(model: dict[str, Any]) -> dict[str, str]:
    layers = f"{model['num_self_attention_layers']} + {model['num_cross_attention_layers']} cross-attention"
    usable = [policy["name"] for policy in model["policy_details"] if policy["is_available"]]
    needs = [f"{policy['name']} (--{policy['knob']})" for policy in model["policy_details"] if policy["knob"]]
    quantized = "" if model["quantization"] == "none" else f", linear layers in {model['quantization']}"
    kv = "" if model["kv_dtype"] == model["dtype"] else f", KV in {model['kv_dtype']}"
    size = model["tensor_parallel"]
    shared = f", shared by {size} processes" if size > 1 else ""
    defaults = model["generation_defaults"]
    return {
        "model": f"{model['model_id']}, revision {model['revision']}",
        "weights": f"{model['num_parameters']:,} parameters, {as_bytes(model['weight_bytes'])}, "
        f"{model['dtype']}{quantized}{kv}, on {model['device']}{shared}",
        "decoder": f"{layers} layers, {model['num_heads']} heads ({model['num_kv_heads']} of KV) of "
        f"{model['head_dim']}, {model['max_model_len']:,} tokens",
        "images": f"up to {model['max_images']}, each up to {model['max_tiles']} tiles of {model['tile_size']} pixels, "
        f"{model['features_per_tile']:,} features a tile",
        "KV": f"{as_bytes(model['self_kv_bytes_per_token'])} a token, "
        f"{as_bytes(model['cross_kv_bytes_per_feature'])} a feature",
        "sampling": ", ".join(
            f"{name} {value:g}" for name, value in defaults.items() if isinstance(value, int | float)
        ),
        "trimming": f"k_ratio {model['default_k_ratio']:g}, merge_ratio {model['default_merge_ratio']:g}",
        "policies": ", ".join(usable) + (f"; with a knob {', '.join(needs)}".replace("_", "-") if needs else ""),
    }
