"""Adapters of a real server: at the start, by RPC, under load, and on the command line."""

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.model.adapters import CONFIGS, save_adapter, save_merged
from tests.model.peer import Peer
from trimserve.cli import app
from trimserve.client import Client
from trimserve.model.adapter_files import WEIGHTS_FILE
from trimserve.process import server_process
from trimserve.v1 import generation_pb2 as pb

NUM_NEW = 12
NO_TRIM = pb.TrimOptions(mode=pb.TRIM_MODE_OFF)
PROMPT = [320, 328, 30, 17, 5, 40]
"""Begin of text, an image, and a question of sorts."""


@pytest.fixture(scope="module")
def folders(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters."""
    return {name: save_adapter(tmp_path_factory.mktemp(name), checkpoint, CONFIGS[name]) for name in ("text", "vision")}


@pytest.fixture(scope="module")
def client(checkpoint: Path, folders: dict[str, Path]) -> Iterator[Client]:
    """Of a server that starts with one of the adapters."""
    arguments = ("--model", str(checkpoint), "--adapter", f"text={folders['text']}")
    with server_process(*arguments) as server, Client(server.address) as client:
        yield client


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8))


def asking(picture: Image.Image, adapter: str = "", max_new_tokens: int = NUM_NEW) -> pb.GenerateRequest:
    """A question on the picture."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    sampling = pb.SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=True, temperature=0)
    return pb.GenerateRequest(
        prompt_token_ids=pb.TokenIds(token_ids=PROMPT),
        images=[pb.Image(data=buffer.getvalue())],
        sampling=sampling,
        trim=NO_TRIM,
        adapter=adapter,
    )


def tokens(client: Client, request: pb.GenerateRequest) -> list[int]:
    return [*client.generate(request).token_ids]


@pytest.mark.parametrize("name", ["text", "vision"])
def test_answers_are_those_of_the_merged_model_of_transformers(
    client: Client, checkpoint: Path, folders: dict[str, Path], picture: Image.Image, tmp_path: Path, name: str
) -> None:
    peer = Peer(save_merged(tmp_path, checkpoint, folders[name]))
    if name == "vision":
        loaded = client.load_adapter(name, folders[name])
        assert loaded.changes_image_features
        assert loaded.rank == 4
        assert client.status().adapter_bytes == sum(adapter.num_bytes for adapter in client.adapters())
    expected = peer.generate(PROMPT, [picture], NUM_NEW)[:NUM_NEW]
    answer = tokens(client, asking(picture, name))
    assert answer[: len(expected)] == expected
    assert answer != tokens(client, asking(picture))
    if name == "vision":
        client.unload_adapter(name)
    assert [adapter.name for adapter in client.adapters()] == ["text"]


def test_unloading_under_load_fails_no_call(client: Client, folders: dict[str, Path], picture: Image.Image) -> None:
    client.load_adapter("vision", folders["vision"])
    requests = {name: asking(picture, name, 100) for name in ("", "text", "vision")}
    expected = {name: tokens(client, request) for name, request in requests.items()}
    with ThreadPoolExecutor() as pool:
        others = [(name, pool.submit(tokens, client, requests[name])) for name in ("", "text") * 4]
        streams = [client.stream(requests["vision"]) for _ in range(4)]
        for stream in streams:
            assert next(stream).HasField("started")
        client.unload_adapter("vision")
        with pytest.raises(grpc.RpcError) as caught:
            client.generate(requests["vision"])
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        for stream in streams:
            assert [token for event in stream for token in event.delta.token_ids] == expected["vision"]
        assert all(call.result() == expected[name] for name, call in others)
    assert client.status().adapter_bytes == client.adapters()[0].num_bytes


def test_an_adapter_that_is_cut_is_refused_at_the_start_and_by_rpc(
    client: Client, checkpoint: Path, picture: Image.Image, tmp_path: Path
) -> None:
    folder = save_adapter(tmp_path, checkpoint, CONFIGS["text"])
    file = folder / WEIGHTS_FILE
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(grpc.RpcError, match=f"{file}: not a complete safetensors file") as caught:
        client.load_adapter("cut", folder)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert tokens(client, asking(picture))
    result = CliRunner().invoke(app, ["serve", "--model", str(checkpoint), "--adapter", f"cut={folder}"])
    assert result.exit_code
    assert f"{file}: not a complete safetensors file" in str(result.exception)


def test_generate_loads_an_adapter_or_asks_a_server_for_one(
    client: Client, checkpoint: Path, folders: dict[str, Path]
) -> None:
    question = ["generate", "--prompt", "Hello", "--max-new-tokens", "8", "--temperature", "0"]
    own = [*question, "--model", str(checkpoint)]
    loaded = CliRunner().invoke(app, [*own, "--adapter", f"mine={folders['text']}"])
    assert loaded.exit_code == 0, loaded.output
    base = CliRunner().invoke(app, own)
    assert loaded.stdout != base.stdout
    sampling = pb.SamplingParams(max_new_tokens=8, temperature=0)
    assert loaded.stdout == client.generate("Hello", sampling=sampling, adapter="text").text + "\n"
    for wrong in ([*own, "--adapter", "mine"], [*question, "--address", "127.0.0.1:1", "--adapter", "a=b"]):
        refused = CliRunner(env={"COLUMNS": "200"}).invoke(app, wrong)
        assert refused.exit_code == 2
        assert "must be NAME=FOLDER without --address, and NAME with it" in refused.output
    unnamed = CliRunner().invoke(app, [*own, "--adapter", "a/b=c"])
    assert unnamed.exit_code == 2
