"""Generates the tables of docs/ and README.md, and the help on policies; `--check` only compares.

Text between `<!-- generated: NAME -->` and `<!-- end -->` comes from here, all else is written by hand.

Usage: python -m scripts.generate.docs [--check]
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)

from benchmarks import (
    bench_bytes,
    bench_default,
    bench_generate,
    bench_pictures,
    bench_precision,
    bench_quantized,
    bench_real_size,
    bench_serve,
)
from benchmarks.report import RESULTS
from scripts.generate.picture_tables import cost_by_picture
from scripts.generate.policy_tables import accuracy_by_kind, accuracy_by_policy, parameters_found
from scripts.generate.saving import headline, saving
from scripts.generate.verified_tables import (
    batch_table,
    departures_table,
    load_table,
    meta_table,
    tools_table,
    walkthrough_table,
)
from trimserve.config import Config
from trimserve.evaluation.report import Report
from trimserve.server.declarations import Declared
from trimserve.server.grpc.services import RPCS
from trimserve.server.metrics import Metrics
from trimserve.trimming.policies.table import POLICIES

ROOT = Path(__file__).resolve().parents[2]

SCALARS = {value: name.removeprefix("TYPE_").lower() for name, value in FieldDescriptorProto.Type.items()}


def configuration() -> str:
    """Every knob of `trimserve/config.py`, one table for each section."""
    schema = Config.model_json_schema()
    lines: list[str] = []
    for section, reference in schema["properties"].items():
        definition = schema["$defs"][reference["$ref"].rpartition("/")[2]]
        lines += [f"## {section}", "", definition["description"], ""]
        lines += ["| knob | type | default | range | meaning |", "| --- | --- | --- | --- | --- |"]
        for knob, field in definition["properties"].items():
            kind, bounds = _type_and_range(field)
            default = f"`{field['default']}`" if field["default"] not in (None, []) else "unset"
            lines.append(f"| `{knob}` | {kind} | {default} | {bounds} | {field['description']} |")
        lines.append("")
    return "\n".join(lines[:-1])


def _type_and_range(field: dict[str, Any]) -> tuple[str, str]:
    """How the docs call a JSON schema's type, and its bounds."""
    options = field.get("anyOf", [field])
    schema = next(option for option in options if option.get("type") != "null")
    if "anyOf" in schema or {option.get("type") for option in options} >= {"string", "integer"}:  # pydantic's ByteSize
        return "size, such as `2GiB`", ""
    if "enum" in schema:
        return "choice", ", ".join(f"`{value}`" for value in schema["enum"])
    if schema.get("format") == "path":
        return "file", ""
    if schema["type"] == "array":
        return f"{_type_and_range(schema['items'])[0]}, any number of times", ""
    kind = {"integer": "integer", "number": "number", "string": "text", "boolean": "switch"}[schema["type"]]
    symbols = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    bounds = [f"{symbol} {schema[key]:g}" for key, symbol in symbols.items() if key in schema]
    return kind, ", ".join(bounds)


def metrics() -> str:
    """Every metric that `trimserve/server/metrics.py` has or inherits."""
    lines = ["| name | type | labels | meaning |", "| --- | --- | --- | --- |"]
    declared = Metrics(POLICIES, RPCS).declared
    for metric in declared:
        labels = "<br>".join(_label(name, values) for name, values in metric.labels.items())
        lines.append(f"| `{metric.name}` | {metric.kind} | {labels} | {metric.help} |")
    lines += ["", "Buckets:", "", "| histogram | upper ends |", "| --- | --- |"]
    return "\n".join([*lines, *(_bucket_row(metric) for metric in declared if metric.buckets)])


def _label(name: str, values: tuple[str, ...]) -> str:
    return f"`{name}`: {', '.join(values)}" if values else f"`{name}`"


def _bucket_row(metric: Declared) -> str:
    return f"| `{metric.name}` | {', '.join(f'{end:.12g}' for end in metric.buckets)} |"


def descriptors() -> list[FileDescriptorProto]:
    """The protos of `protos/`, parsed, with comments."""
    protos = ROOT / "protos"
    paths = sorted(str(path) for path in protos.rglob("*.proto"))
    with tempfile.NamedTemporaryFile() as file:
        command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{protos}", "--include_source_info"]
        subprocess.run([*command, f"--descriptor_set_out={file.name}", *paths], check=True)
        return list(FileDescriptorSet.FromString(Path(file.name).read_bytes()).file)


def comments(file: FileDescriptorProto) -> dict[tuple[int, ...], str]:
    """The comment before each element of a file, by its path of descriptor field numbers and indices."""
    return {
        tuple(location.path): " ".join(location.leading_comments.split())
        for location in file.source_code_info.location
        if location.leading_comments
    }


def api() -> str:
    """Services, messages and enums of the protos, in their order."""
    return "\n".join(line for file in descriptors() for line in _file(file)).rstrip()


def _file(file: FileDescriptorProto) -> Iterator[str]:
    said = comments(file)
    for index, service in enumerate(file.service):
        yield from _service(service, said, (6, index))
    for index, message in enumerate(file.message_type):
        yield from _message(message, said, (4, index))
    for index, enum in enumerate(file.enum_type):
        yield from _enum(enum, said, (5, index))


def _heading(name: str, path: tuple[int, ...], said: dict[tuple[int, ...], str]) -> list[str]:
    return [f"### {name}", "", said[path], ""]


def _service(service: ServiceDescriptorProto, said: dict[tuple[int, ...], str], path: tuple[int, ...]) -> Iterator[str]:
    yield from _heading(service.name, path, said)
    yield from ("| rpc | request | response | meaning |", "| --- | --- | --- | --- |")
    for index, method in enumerate(service.method):
        stream = "stream of " if method.server_streaming else ""
        request, response = _link(method.input_type), _link(method.output_type)
        yield _row(f"`{method.name}`", request, stream + response, said[*path, 2, index])
    yield ""


def _message(message: DescriptorProto, said: dict[tuple[int, ...], str], path: tuple[int, ...]) -> Iterator[str]:
    yield from _heading(message.name, path, said)
    if not message.field:
        return
    nested = {entry.name: entry for entry in message.nested_type}
    yield from ("| field | number | type | meaning |", "| --- | --- | --- | --- |")
    for index, field in enumerate(message.field):
        is_choice = field.HasField("oneof_index") and not field.proto3_optional
        group = f"one of `{message.oneof_decl[field.oneof_index].name}`: " if is_choice else ""
        yield _row(f"`{field.name}`", str(field.number), _type(field, nested), group + said[*path, 2, index])
    yield ""


def _enum(enum: EnumDescriptorProto, said: dict[tuple[int, ...], str], path: tuple[int, ...]) -> Iterator[str]:
    yield from _heading(enum.name, path, said)
    yield from ("| value | number | meaning |", "| --- | --- | --- |")
    for index, value in enumerate(enum.value):
        yield _row(f"`{value.name}`", str(value.number), said[*path, 2, index])
    yield ""


def _type(field: FieldDescriptorProto, nested: dict[str, DescriptorProto]) -> str:
    name = field.type_name.rpartition(".")[2]
    if name in nested:  # a map is a repeated message of key and value
        key, value = nested[name].field
        return f"map of {_type(key, {})} to {_type(value, {})}"
    kind = _link(field.type_name) if name else SCALARS[field.type]
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {kind}"
    return f"optional {kind}" if field.proto3_optional else kind


def _link(type_name: str) -> str:
    name = type_name.rpartition(".")[2]
    return f"[{name}](#{name.lower()})"


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def decisions() -> str:
    """Every ADR, by number and title."""
    lines = ["| number | decision |", "| --- | --- |"]
    for path in sorted((ROOT / "docs/adr").glob("[0-9]*.md")):
        title = path.read_text().partition("\n")[0].partition(": ")[2]
        lines.append(f"| [{path.name[:4]}]({path.name}) | {title[0].upper()}{title[1:]} |")
    return "\n".join(lines)


def measured(table: Callable[..., str], command: str, *names: str) -> str:
    """A table of what was measured.

    Args:
        table: takes the documents.
        command: that measures, which is told where a document is not there yet.
        *names: of the documents, within `benchmarks/results`.
    """
    paths = [RESULTS / name for name in names]
    if not all(path.exists() for path in paths):
        return f"Not measured yet: `{command}`."
    return table(*(json.loads(path.read_text(encoding="utf-8")) for path in paths))


def benchmark(module: ModuleType, name: str) -> str:
    """The table of a benchmark; takes the place of its document, too."""
    return measured(module.table, f"python -m {module.__name__}", name)


def compared(table: Callable[[Report], str], name: str = "policies/report.json") -> str:
    """A table of what `trimserve eval` found: every policy on the embedded model, unless another report is named."""
    path = RESULTS / name
    return table(Report.from_json(path.read_text())) if path.exists() else "Not measured yet: `trimserve eval`."


def of_pictures(table: Callable[..., str], subject: str) -> str:
    """A table of what was measured about harder pictures."""
    return measured(table, "python -m benchmarks.bench_pictures", f"pictures/{subject}.json")


BYTES = ("python -m benchmarks.bench_bytes", "bytes.json", "trimming/report.json")
CALIBRATE = ("trimserve eval --calibrate", "policies/cosine/calibration.json", "policies/kl/calibration.json")
TABLES: dict[str, tuple[str, Callable[[], str]]] = {
    "configuration": ("docs/configuration.md", configuration),
    "metrics": ("docs/metrics.md", metrics),
    "api": ("docs/api.md", api),
    "decisions": ("docs/adr/README.md", decisions),
    "headline": ("README.md", lambda: measured(headline, *BYTES)),
    "saving": ("docs/index.md", lambda: measured(saving, *BYTES)),
    "walkthrough": (
        "docs/start.md",
        lambda: measured(walkthrough_table, "make verify-walkthrough-as-root", "walkthrough.json"),
    ),
    "tools": ("docs/http.md", lambda: measured(tools_table, "make verify-tools", "tools.json")),
    "meta": ("docs/correctness.md", lambda: measured(meta_table, "make verify-meta", "meta.json")),
    "departures": ("docs/correctness.md", lambda: measured(departures_table, "make verify-meta", "meta.json")),
    "load": ("docs/service.md", lambda: measured(load_table, "make verify-load", "load.json")),
    "policies": ("docs/policies.md", lambda: compared(accuracy_by_policy)),
    "policies-by-kind": ("docs/policies.md", lambda: compared(accuracy_by_kind)),
    "policies-parameters": ("docs/policies.md", lambda: measured(parameters_found, *CALIBRATE)),
    "pictures": ("docs/pictures.md", lambda: compared(cost_by_picture, "pictures/report.json")),
    "pictures-grey": ("docs/pictures.md", lambda: of_pictures(bench_pictures.grey_table, "grey")),
    "pictures-backgrounds": ("docs/pictures.md", lambda: of_pictures(bench_pictures.backgrounds_table, "backgrounds")),
    "pictures-default": ("docs/pictures.md", lambda: benchmark(bench_default, "pictures/default.json")),
    "batch": ("docs/command-line.md", lambda: measured(batch_table, "make verify-batch", "batch.json")),
    "bytes": ("docs/performance.md", lambda: benchmark(bench_bytes, "bytes.json")),
    "serve": ("docs/performance.md", lambda: benchmark(bench_serve, "serve/report.json")),
    "generate": ("docs/performance.md", lambda: benchmark(bench_generate, "generate/report.json")),
    "generate-two-threads": (
        "docs/performance.md",
        lambda: benchmark(bench_generate, "generate/two_threads/report.json"),
    ),
    "precision": ("docs/performance.md", lambda: benchmark(bench_precision, "precision.json")),
    "quantized": ("docs/performance.md", lambda: benchmark(bench_quantized, "quantized.json")),
    "real-size": ("docs/performance.md", lambda: benchmark(bench_real_size, "real_size.json")),
}
"""Marker name -> document, and what generates the text."""


def filled(name: str) -> tuple[Path, str, str]:
    """A document with fresh text between its markers.

    Args:
        name: key of `TABLES`.
    Returns:
        Its path, its text as it is, and its text as it should be.
    Raises:
        ValueError: the markers are missing.
    """
    document, generate = TABLES[name]
    path = ROOT / document
    text = path.read_text()
    begin, end = f"<!-- generated: {name} -->", "<!-- end -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"{document}: must have {begin} and {end}")
    body = f"{begin}\n\n{generate()}\n\n{end}"
    return path, text, pattern.sub(lambda _: body, text)


def policy_help() -> tuple[Path, str, str]:
    """The file that `--help` lists policies from, as `filled` returns it."""
    path = ROOT / "trimserve/commands/policies.json"
    summaries = {name: policy.describe().summary for name, policy in POLICIES.items()}
    return path, path.read_text() if path.exists() else "", json.dumps(summaries, indent=2, ensure_ascii=False) + "\n"


def main() -> int:
    """Generate or compare; the exit status is 1 when the comparison finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, fail on a difference")
    check = parser.parse_args().check
    is_stale = False
    for path, text, wanted in chain(map(filled, TABLES), [policy_help()]):  # one by one: tables share documents
        if text == wanted:
            continue
        is_stale = True
        if check:
            print(f"{path.relative_to(ROOT)} is out of step; run `make docs`")
        else:
            path.write_text(wanted)
    return 1 if check and is_stale else 0


if __name__ == "__main__":
    sys.exit(main())
