"""Writes a run as a Hugging Face checkpoint: `python -m training.export --run training/runs/one`.

The checkpoint is what the package ships: weights in float32, tokenizer, chat template, processor and
generation settings, and `trimserve.json` with what serving wants to know beyond them. With `--unfinished` it is what
`training.train --from-checkpoint` goes on from: weights in float16, and the auxiliary head.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig

from training.examples import DATA_VERSION
from training.model import make_model
from training.tokenizer import make_processor
from training.train import HEAD_FILE, Trainer

__all__ = ["CHECKPOINT", "DEFAULT_K_RATIO", "DEFAULT_MERGE_RATIO", "export", "main"]

CHECKPOINT = Path(__file__).parents[1] / "trimserve" / "assets" / "trimserve-tiny"
"""Where the package keeps the embedded model."""

DEFAULT_K_RATIO = 0.1
DEFAULT_MERGE_RATIO = 0.1


def export(
    trainer: Trainer,
    folder: Path,
    k_ratio: float,
    merge_ratio: float,
    accuracy: dict[str, float],
    *,
    is_unfinished: bool = False,
) -> None:
    """Write the checkpoint; a checkpoint already there is replaced file by file, never half.

    Args:
        trainer: the run.
        folder: of the checkpoint.
        k_ratio: recommended budget per head, in (0, 1].
        merge_ratio: recommended rows for what is not kept, as a share of a tile's features, in [0, 1].
        accuracy: share of held-out questions answered exactly right, by kind.
        is_unfinished: whether training is to go on: half the bytes, and the head that only training uses.
    """
    model = make_model(trainer.settings.seed, trainer.settings.narrower)
    model.load_state_dict(trainer.model.state_dict())
    if is_unfinished:
        model.half()
    text = model.config.get_text_config()
    model.generation_config = GenerationConfig(
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
        do_sample=False,
        max_new_tokens=64,
    )
    about = {
        "k_ratio": k_ratio,
        "merge_ratio": merge_ratio,
        "data_version": DATA_VERSION,
        "training_steps": trainer.step,
        "training_minutes": round(trainer.minutes, 1),
        "accuracy": accuracy,
    }
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        fresh = Path(name)
        model.save_pretrained(fresh)
        if is_unfinished:
            save_file({name: weight.half() for name, weight in trainer.head.state_dict().items()}, fresh / HEAD_FILE)
        processor = make_processor()
        processor.save_pretrained(fresh)
        processor.image_processor.save_pretrained(fresh)  # some loaders read preprocessor_config.json only
        (fresh / "trimserve.json").write_text(json.dumps(about, indent=2) + "\n")
        for file in sorted(fresh.iterdir()):
            file.chmod(0o644)  # safetensors writes for the owner alone
            shutil.move(file, folder / file.name)


def main() -> None:
    """Command line: export a run with the accuracy of `training/report.json`, where there is one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder that training.train wrote")
    parser.add_argument("--out", type=Path, default=CHECKPOINT)
    parser.add_argument("--k-ratio", type=float, default=DEFAULT_K_RATIO, help="recommended budget per head")
    parser.add_argument("--merge-ratio", type=float, default=DEFAULT_MERGE_RATIO, help="rows for what is not kept")
    parser.add_argument("--unfinished", action="store_true", help="what training can go on from, in float16")
    parser.add_argument("--report", type=Path, help="report.json of training.evaluate")
    arguments = parser.parse_args()
    accuracy = json.loads(arguments.report.read_text())["accuracy"] if arguments.report else {}
    trainer = Trainer.load(arguments.run / "state.pt", torch.device("cpu"))
    budgets = arguments.k_ratio, arguments.merge_ratio
    export(trainer, arguments.out, *budgets, accuracy, is_unfinished=arguments.unfinished)


if __name__ == "__main__":
    main()
