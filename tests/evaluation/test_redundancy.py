"""Finding features that say nothing, and the command that writes them down."""

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from typer.testing import CliRunner, Result

from trimserve.cli import app
from trimserve.config import EngineConfig, ModelConfig
from trimserve.evaluation.dataset import DatasetError, Question
from trimserve.evaluation.redundancy import find_prototypes, js_divergence, k_means
from trimserve.evaluation.report import Report
from trimserve.model.codebook import load_codebook
from trimserve.model.loading import describe_model
from trimserve.model.mllama import Mllama


@pytest.mark.parametrize(
    ("p", "q", "expected"),
    [
        ([0.5, 0.5], [0.5, 0.5], 0.0),
        ([1.0, 0.0], [0.0, 1.0], math.log(2)),
        # The middle is (3/4, 1/4): (ln 4/3 + (ln 2/3 + ln 2) / 2) / 2
        ([1.0, 0.0], [0.5, 0.5], (math.log(4 / 3) + 0.5 * math.log(2 / 3) + 0.5 * math.log(2)) / 2),
    ],
)
def test_the_divergence_is_that_of_jensen_and_shannon(p: list[float], q: list[float], expected: float) -> None:
    # Probabilities of nothing are those of a logit that is very low.
    logs = [torch.tensor(each, dtype=torch.float64).clamp(min=1e-300).log() for each in (p, q)]
    assert float(js_divergence(*logs)) == pytest.approx(expected, abs=1e-12)


def test_clusters_are_found_whatever_the_seed() -> None:
    noise = 0.05 * torch.randn(90, 4, generator=torch.Generator().manual_seed(0))
    directions = F.normalize(torch.eye(4)[torch.arange(90) % 3] + noise, dim=1)
    for seed in range(5):
        centres = k_means(directions, 3, torch.Generator().manual_seed(seed))
        assert (centres @ torch.eye(4)[:3].T > 0.99).sum(dim=0).tolist() == [1, 1, 1]
        torch.testing.assert_close(centres.norm(dim=1), torch.ones(3))


def test_as_many_centres_as_directions_are_these() -> None:
    directions = F.normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    centres = k_means(directions, 6, torch.Generator().manual_seed(0))
    torch.testing.assert_close(centres.sort(dim=0).values, directions.sort(dim=0).values)


def test_more_prototypes_than_redundant_features_are_refused(model: Mllama, questions: list[Question]) -> None:
    with pytest.raises(DatasetError, match=r"must have 20 redundant features .* of 4 tested"):
        find_prototypes(model, questions[:2], num_prototypes=20, features_per_question=2, redundant_ratio=0.5, seed=0)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


def test_a_codebook_is_built_the_same_every_time_and_compared_with_other_policies(
    data: Path, checkpoint: Path, tmp_path: Path
) -> None:
    files = [tmp_path / "one.safetensors", tmp_path / "other.safetensors"]
    asked = ("--data", data, "--model", checkpoint, "--prototypes", 2, "--features-per-question", 5, "--limit", 4)
    for file in files:
        built = run("codebook", "build", *asked, "--redundant-ratio", 0.9, "--out", file)
        assert built.exit_code == 0, built.output
    assert files[0].read_bytes() == files[1].read_bytes()
    info = describe_model(ModelConfig(model=str(checkpoint), codebook=files[0]), EngineConfig())
    prototypes = load_codebook(files[0], info, "inputs")
    torch.testing.assert_close(prototypes.norm(dim=1), torch.ones(2))
    needed = ("--model", checkpoint, "--codebook", files[0], "--guide-model", checkpoint)
    compared = run(
        *("eval", "--data", data, "--out", tmp_path, *needed, "--limit", 2),
        *("--policies", "trimmed,guided,codebook", "--keep", "0.3"),
    )
    assert compared.exit_code == 0, compared.output
    rows = Report.from_json((tmp_path / "report.json").read_text()).rows
    figures = {row.policy: (row.kept_fraction, row.divergence) for row in rows if row.kind == "all"}
    assert figures["codebook"][0] == figures["trimmed"][0] == figures["guided"][0]
    assert figures["codebook"][1] != figures["trimmed"][1]
