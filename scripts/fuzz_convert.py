"""Feeds made-up bytes to the way from the wire to the engine's request: it may refuse them, and nothing else.

Needs atheris (`pip install -e '.[fuzz]'`), which finds inputs that reach new lines of `server/codec.py` and
`server/convert.py`.

Usage: python scripts/fuzz_convert.py -max_total_time=300 (any option of libFuzzer)
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

with atheris.instrument_imports(include=["trimserve.server.codec", "trimserve.server.convert"]):
    from trimserve.server.codec import bounded
    from trimserve.server.convert import adopt_request_id, to_generation_request

from tests.server.fakes import CONFIG, INFO  # the root must be on the path first
from trimserve.client import make_request
from trimserve.errors import InvalidRequest, MessageTooLarge
from trimserve.v1 import generation_pb2 as pb

MAX_MESSAGE_BYTES = 1 << 16

READ = bounded(pb.GenerateRequest.FromString, MAX_MESSAGE_BYTES)


def convert(data: bytes) -> None:
    """What a call's bytes go through before the engine gets them; any error but a refusal is a finding."""
    try:
        request = READ(data)
        assert isinstance(request, pb.GenerateRequest)
        request_id = adopt_request_id(request)
        assert to_generation_request(request, INFO, CONFIG.engine).request_id == request_id
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


def main() -> None:
    """Fuzz until libFuzzer's options say to stop."""
    corpus = Path(tempfile.mkdtemp(prefix="fuzz-convert-"))
    for number, seed in enumerate(seeds()):
        (corpus / f"seed-{number}").write_bytes(seed.SerializeToString())
    atheris.Setup([*sys.argv, str(corpus)], convert)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
