"""Feeds made-up bytes to the way from the wire to the engine's request: it may refuse them, and nothing else.

Needs atheris (`pip install -e '.[fuzz]'`), which finds inputs that reach new lines of `server/grpc/codec.py` and
`server/grpc/convert.py`; fails, too, when it found none.

Usage: python -m scripts.verify.fuzz_convert -max_total_time=300 (any option of libFuzzer)
"""

import inspect
import multiprocessing
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import atheris

from tests.server.fakes import CONFIG, INFO
from trimserve.client import make_request
from trimserve.errors import InvalidRequest, MessageTooLarge
from trimserve.server.grpc import census, codec, convert
from trimserve.v1 import generation_pb2 as pb

MAX_MESSAGE_BYTES = 1 << 16

# Not atheris.instrument_imports: it leaves out what the loader of an editable install loads.
for module in (census, codec, convert):
    for _, function in inspect.getmembers(module, inspect.isfunction):
        if function.__module__ == module.__name__:
            atheris.instrument_func(function)

READ = codec.Codec(pb.GenerateRequest, MAX_MESSAGE_BYTES).read


def take(data: bytes) -> None:
    """What a call's bytes go through before the engine gets them; any error but a refusal is a finding."""
    try:
        request = READ(data)
        assert isinstance(request, pb.GenerateRequest)
        request_id = convert.adopt_request_id(request)
        assert convert.to_generation_request(request, INFO, CONFIG.engine).request_id == request_id
    except (InvalidRequest, MessageTooLarge):
        pass


def seeds() -> Iterator[pb.GenerateRequest]:
    """Sound requests of each kind, which set nearly every field: fuzzing goes on from there."""
    sampling = pb.SamplingParams(
        max_new_tokens=5,
        temperature=0.5,
        top_p=0.5,
        logit_bias={7: 1.5},
        seed=1,
        stop_strings=["x"],
        stop_token_ids=[3],
    )
    trim = pb.TrimOptions(mode=pb.TRIM_MODE_ON, policy="trimmed", k_ratio=0.5, max_kept_fraction=0.5, merge_ratio=0.1)
    yield make_request(
        "Hi", [b"image"], system="Be brief.", request_id="mine", priority=3, sampling=sampling, trim=trim
    )
    yield pb.GenerateRequest(raw_prompt="<|image|>Hi", images=[pb.Image(data=b"image", mime_type="image/png")])
    yield pb.GenerateRequest(prompt_token_ids=pb.TokenIds(token_ids=[1, 2, 999]))


def fuzz(corpus: Path) -> None:
    """Fuzz until libFuzzer's options say to stop; what reached new lines is in the folder then. Ends the process."""
    atheris.Setup([*sys.argv, str(corpus)], take)
    atheris.Fuzz()


def main() -> None:
    """Fuzz in a process of its own, and see how far it got."""
    with tempfile.TemporaryDirectory(prefix="fuzz-convert-") as folder:
        corpus = Path(folder)
        for number, seed in enumerate(seeds()):
            (corpus / f"seed-{number}").write_bytes(seed.SerializeToString())
        num_seeds = len(list(corpus.iterdir()))
        process = multiprocessing.get_context("fork").Process(target=fuzz, args=(corpus,))
        process.start()
        process.join()
        num_found = len(list(corpus.iterdir())) - num_seeds
    if process.exitcode:
        sys.exit(f"fuzzing ended with status {process.exitcode}")
    if not num_found:
        sys.exit("no input reached a new line: is the code instrumented?")
    print(f"fuzz: {num_found} inputs reached new lines, and each was converted or refused")


if __name__ == "__main__":
    main()
