"""What the limits of control groups leave, by version and by where the process is in their tree."""

import logging
from pathlib import Path

import pytest

from trimserve.engine import cgroup
from trimserve.engine.cgroup import memory_left

V1_UNLIMITED = "9223372036854771712\n"
NOBODY = "anon 1000\ninactive_file 0\nactive_file 0\n"

Files = dict[str, str]


@pytest.fixture(autouse=True)
def _forget_what_was_logged() -> None:
    cgroup._warn.cache_clear()


def v2(limit: str, used: str, stat: str = NOBODY, folder: str = "") -> Files:
    return {f"{folder}memory.max": limit, f"{folder}memory.current": used, f"{folder}memory.stat": stat}


def v1(limit: str, used: str, stat: str = NOBODY, folder: str = "memory/") -> Files:
    files = {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used, "memory.stat": stat}
    return {f"{folder}{name}": text for name, text in files.items()}


def left(tmp_path: Path, files: Files, own: str = "") -> int | None:
    for name, text in files.items():
        file = tmp_path / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (tmp_path / "own").write_text(own)
    return memory_left(tmp_path / "cgroup", tmp_path / "own")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (v2("8000\n", "1000\n"), 7000),
        (v2("max\n", "1000\n"), None),
        (v2("8000\n", "9000\n"), -1000),
        (v2("0\n", "0\n"), 0),
        (v1("8000\n", "1000\n"), 7000),
        (v1(V1_UNLIMITED, "1000\n"), None),
        (v1("8000\n", "1000\n") | {"unified/cgroup.procs": ""}, 7000),
        (v1(V1_UNLIMITED, "1000\n") | v2("8000\n", "1000\n", folder="unified/"), 7000),
        ({"cpu/cpu.shares": "1024\n", "memory/cgroup.procs": "1\n"}, None),
        ({}, None),
    ],
    ids=[
        "v2",
        "v2 unlimited",
        "v2 overdrawn",
        "v2 nothing",
        "v1",
        "v1 unlimited",
        "v1 of both",
        "v2 of both",
        "v1 without",
        "none",
    ],
)
def test_a_limit_leaves_what_is_not_used(tmp_path: Path, files: Files, expected: int | None) -> None:
    assert left(tmp_path, files) == expected


@pytest.mark.parametrize(
    ("maximum", "high", "expected"), [("8000", "6000", 5000), ("max", "6000", 5000), ("8000", "max", 7000)]
)
def test_where_the_kernel_slows_a_group_down_it_is_full(tmp_path: Path, maximum: str, high: str, expected: int) -> None:
    assert left(tmp_path, v2(maximum, "1000") | {"memory.high": high}) == expected


def test_the_page_cache_is_no_loss_in_either_version(tmp_path: Path) -> None:
    # After a checkpoint was read, the kernel has filled what the limit leaves with its files.
    stat = "anon 2000\nfile 3000\nshmem 500\ninactive_file 1500\nactive_file 1000\n"
    assert left(tmp_path / "2", v2("5000", "5000", stat)) == 2500
    of_the_group_alone = "cache 300\ninactive_file 10\nactive_file 20\n"
    assert left(tmp_path / "1", v1("5000", "5000", of_the_group_alone)) == 30
    assert (
        left(tmp_path / "1t", v1("5000", "5000", of_the_group_alone + "total_" + stat.replace("\n", "\ntotal_")))
        == 2500
    )


SERVICE = "system.slice/trimserve.service/"


@pytest.mark.parametrize(
    ("files", "own", "expected"),
    [
        (v2("8000", "1000", folder=SERVICE), f"0::/{SERVICE}", 7000),
        (v2("8000", "1000", folder=SERVICE) | v2("9000", "6000", folder="system.slice/"), f"0::/{SERVICE}", 3000),
        (v2("max", "1000", folder=SERVICE) | v2("9000", "6000", folder="system.slice/"), f"0::/{SERVICE}", 3000),
        (
            v2("8000", "1000", folder=SERVICE) | v2("10", "10", folder="system.slice/other.service/"),
            f"0::/{SERVICE}",
            7000,
        ),
        (v1("8000", "1000", folder=f"memory/{SERVICE}"), f"9:cpu,cpuacct:/\n4:memory:/{SERVICE}", 7000),
        (v1("8000", "1000", folder=f"memory/{SERVICE}"), f"1:name=systemd:/{SERVICE}\n4:memory:/{SERVICE}\n0::/", 7000),
    ],
    ids=["own", "the slice's is tighter", "only the slice's", "not another's", "v1", "both versions"],
)
def test_limits_count_of_the_process_s_own_group_and_all_around_it(
    tmp_path: Path, files: Files, own: str, expected: int
) -> None:
    root = {"cgroup.procs": "1\n", "memory/cgroup.procs": "1\n"} if "memory" not in own else {"memory/cgroup.procs": ""}
    assert left(tmp_path, files | root, own) == expected


@pytest.mark.parametrize("own", ["0::/docker/1f2e", "0::/../1f2e", "0::/", "", "no list"])
def test_a_container_that_sees_its_own_group_as_the_root_heeds_the_root_s_limit(tmp_path: Path, own: str) -> None:
    assert left(tmp_path, v2("8000", "1000") | {"cgroup.procs": "1\n"}, own) == 7000


def test_a_group_within_a_container_is_found_where_the_host_s_names_are_not_there(tmp_path: Path) -> None:
    files = v2("8000", "1000") | v2("4000", "1000", folder="init.scope/")
    assert left(tmp_path, files, "0::/docker/1f2e/init.scope") == 3000


@pytest.mark.parametrize("version", [v1, v2])
def test_the_only_limited_group_counts_where_a_sandbox_shows_part_of_the_tree(tmp_path: Path, version: object) -> None:
    make, root = (v1, "memory/") if version is v1 else (v2, "")
    files = make("8000", "1000", folder=f"{root}{SERVICE}") | make("max", "1", folder=f"{root}user.slice/")
    assert left(tmp_path / "a", files, "0::/elsewhere\n4:memory:/elsewhere") == 7000
    around = make("5000", "1000", folder=f"{root}system.slice/")
    assert left(tmp_path / "b", files | around) == 4000
    real = {f"{root}cgroup.procs": "1\n"}  # a whole tree, in whose root the process is: the limits are of others
    assert left(tmp_path / "c", files | real) is None


def test_limits_of_several_groups_of_which_none_is_known_to_be_ours_are_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert left(tmp_path, v2("8000", "1000", folder="a/") | v2("10", "10", folder="b/")) is None
    assert "memory limits of several control groups" in caplog.text


@pytest.mark.parametrize(
    ("files", "expected", "told"),
    [
        (v2("", "1000"), None, "memory.max: must be a number of bytes or max, got ''"),
        (v2("8 GiB", "1000"), None, "got '8 GiB'"),
        (v1("-1", "1000"), None, "got '-1'"),
        (v2("9" * 5000, "1000"), None, "memory.max: must be a number"),
        (v2("8000", ""), 8000, "memory.current: does not tell what is used"),
        (v2("8000", "much"), 8000, "memory.current: does not tell what is used"),
        ({"memory.max": "8000"}, 8000, "memory.current: does not tell what is used"),
        (v2("8000", "1000", ""), 7000, ""),
        (v2("8000", "1000", "anon 5\nslab\nactive_file x\n\n"), 7000, ""),
        (v2("8000", "1000", "active_file 5000\n"), 8000, ""),
        ({"memory.max": "8000", "memory.current": "1000"}, 7000, ""),
    ],
)
def test_files_that_nobody_understands_are_told_once_and_end_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, files: Files, expected: int | None, told: str
) -> None:
    with caplog.at_level(logging.WARNING, "trimserve"):
        assert left(tmp_path, files) == left(tmp_path, files) == expected
    assert caplog.text.count(told) == 1 if told else not caplog.text


def test_without_control_groups_there_is_no_limit(tmp_path: Path) -> None:
    assert memory_left(tmp_path / "none", tmp_path / "none") is None
