"""What the wire contract promises: every element has a comment, enums start unspecified, numbers stay."""

import json
import re
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto

from scripts.generate import docs, protos

FILES = docs.descriptors()
NUMBERS = Path(__file__).parent / "field_numbers.json"


def elements(file: FileDescriptorProto) -> dict[tuple[int, ...], str]:
    """Path and name of everything that needs a comment."""
    found: dict[tuple[int, ...], str] = {}
    for index, service in enumerate(file.service):
        found[6, index] = service.name
        found |= {(6, index, 2, place): method.name for place, method in enumerate(service.method)}
    for index, message in enumerate(file.message_type):
        found[4, index] = message.name
        found |= {(4, index, 2, place): field.name for place, field in enumerate(message.field)}
        declared = [oneof.name for oneof in message.oneof_decl]
        found |= {(4, index, 8, place): name for place, name in enumerate(declared) if not name.startswith("_")}
    for index, enum in enumerate(file.enum_type):
        found[5, index] = enum.name
        found |= {(5, index, 2, place): value.name for place, value in enumerate(enum.value)}
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_everything_has_a_comment(file: FileDescriptorProto) -> None:
    said = docs.comments(file)
    missing = [name for path, name in elements(file).items() if path not in said]
    assert not missing


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_optional_scalars_of_requests_tell_their_default(file: FileDescriptorProto) -> None:
    said = docs.comments(file)
    for index, message in enumerate(file.message_type):
        for place, field in enumerate(message.field):
            if field.proto3_optional:
                assert "Default: " in said[4, index, 2, place], field.name


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_enums_start_unspecified(file: FileDescriptorProto) -> None:
    for enum in file.enum_type:
        prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", enum.name).upper()
        assert (enum.value[0].name, enum.value[0].number) == (f"{prefix}_UNSPECIFIED", 0)
        assert all(value.name.startswith(f"{prefix}_") for value in enum.value)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_other_languages_have_their_packages(file: FileDescriptorProto) -> None:
    options = file.options
    assert (options.go_package, options.java_package) == ("trimserve/v1;trimservev1", "io.trimserve.v1")
    assert options.java_multiple_files
    assert options.csharp_namespace == "Trimserve.V1"


def described(field: FieldDescriptorProto) -> str:
    """Name and type, which are what a number means for ever."""
    kind = field.type_name.removeprefix(".") or docs.SCALARS[field.type]
    is_repeated = field.label == FieldDescriptorProto.LABEL_REPEATED
    return f"{'repeated ' if is_repeated else ''}{kind} {field.name}"


def numbers(message: DescriptorProto) -> dict[str, str]:
    return {str(field.number): described(field) for field in message.field}


def test_field_numbers_are_never_reused() -> None:
    now: dict[str, dict[str, str]] = {}
    reserved: dict[str, list[range]] = {}
    for file in FILES:
        for message in file.message_type:
            name = f"{file.package}.{message.name}"
            now[name] = numbers(message)
            reserved[name] = [range(each.start, each.end) for each in message.reserved_range]
        for enum in file.enum_type:
            now[f"{file.package}.{enum.name}"] = {str(value.number): value.name for value in enum.value}
    ever: dict[str, dict[str, str]] = json.loads(NUMBERS.read_text())
    for name, fields in ever.items():
        for number, field in fields.items():
            gone = number not in now.get(name, {})
            if gone:
                assert any(int(number) in each for each in reserved.get(name, [])), f"reserve {name} {number}"
            else:
                assert now[name][number] == field, f"{name} {number} means something else already"
    new = {name: fields for name, fields in now.items() if not fields.items() <= ever.get(name, {}).items()}
    assert not new, f"add to {NUMBERS.name}: {json.dumps(new, indent=2)}"


def test_the_generated_code_is_in_step(tmp_path: Path) -> None:
    protos.generate(tmp_path)
    fresh, committed = tmp_path / protos.PACKAGE, protos.ROOT / protos.PACKAGE
    assert protos.differences(fresh, committed) == []


@pytest.mark.parametrize("kind", ["changed", "missing", "too many"])
def test_code_out_of_step_is_found(tmp_path: Path, kind: str) -> None:
    fresh, committed = tmp_path / "fresh", tmp_path / "committed"
    for folder in (fresh, committed):
        folder.mkdir()
        (folder / "a.py").write_text("a")
    match kind:
        case "changed":
            (committed / "a.py").write_text("b")
        case "missing":
            (committed / "a.py").unlink()
        case _:
            (fresh / "a.py").unlink()
    assert protos.differences(fresh, committed) == ["a.py"]


@pytest.mark.parametrize("name", docs.TABLES)
def test_the_generated_docs_are_in_step(name: str) -> None:
    path, text, wanted = docs.filled(name)
    assert text == wanted, f"{path.name}: run `make docs`"
