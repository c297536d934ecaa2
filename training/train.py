"""Trains trimserve-tiny: `python -m training.train --steps 4000 --out training/runs/one [--resume]`.

Every step's data comes from the seed and the step's number, so a resumed run goes on as if it had not
stopped.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TextIO

import torch
from rich.progress import Progress
from safetensors.torch import load_file
from torch import nn
from transformers import MllamaForConditionalGeneration

from training.attention import WRITTEN_OUT, register
from training.batches import Batcher
from training.examples import SCENES_ONLY, TRAINING_PICTURES
from training.guide import Teacher
from training.mended import mend
from training.model import PatchHead, make_model, read_batch
from training.scenes import Split
from training.tokenizer import make_processor

__all__ = ["HEAD_FILE", "Settings", "Trainer", "main", "open_log"]

HEAD_FILE = "head.safetensors"
"""The auxiliary head beside an exported model that training is to go on from."""

_HEAD_ALONE = 40
"""Steps that the auxiliary head learns by itself."""


@dataclass(frozen=True)
class Settings:
    """What a run is made of; kept in its checkpoint."""

    steps: int = 4000
    minutes: float | None = None
    """Processor time of all threads that the cosine ends at, instead of `steps`: a run that is stopped loses none."""
    seed: int = 1
    rows: int = 20
    """Images in a batch."""
    two_image_every: int = 12
    """Steps from one batch of two-image prompts to the next."""
    learning_rate: float = 2e-3
    muon_learning_rate: float = 2e-3
    """Of the weight matrices; scaled to AdamW's step size."""
    warm_up: float = 0.02
    """Share of the run."""
    weight_decay: float = 0.01
    has_harder_pictures: bool = False
    """Whether busy scenes, objects, pages and charts are shown as well: `TRAINING_PICTURES`."""
    guide_of: str | None = None
    """Folder of the exported model that a model of half its width learns to guide."""

    @property
    def narrower(self) -> int:
        """What the model's widths are divided by."""
        return 1 if self.guide_of is None else 2


class Trainer:
    """A model in training: takes steps, measures, saves itself and comes back."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        """Start a fresh run.

        Args:
            settings: see `Settings`.
            device: where to train.
        """
        self.settings = settings
        self.device = device
        self.step = 0
        self.minutes = 0.0
        register()
        self.model = mend(make_model(settings.seed, settings.narrower))
        nn.Module.to(self.model, device)
        self.model.set_attn_implementation(WRITTEN_OUT)
        self._teacher = None
        if settings.guide_of is not None:
            self._teacher = Teacher(Path(settings.guide_of), self.model)
        torch.manual_seed(settings.seed)
        self.head = PatchHead(self.model.config.get_text_config().hidden_size).to(device)
        pictures = TRAINING_PICTURES if settings.has_harder_pictures else SCENES_ONLY
        self.batcher = Batcher(make_processor(), pictures=pictures)
        self._optimizers = self._make_optimizers()

    @property
    def progress(self) -> float:
        """Share of the run that is done, 0 to 1."""
        limit = self.settings.minutes
        return min(1.0, self.step / self.settings.steps if limit is None else self.minutes / limit)

    def take_step(self) -> dict[str, float]:
        """Train on one batch.

        Returns:
            loss per answer token, share of answer tokens right, auxiliary loss, learning rate factor; a guide's loss
            is the sum of its divergences from the teacher, which are told by themselves as well.
        """
        started = time.process_time()
        rng = random.Random(f"train/{self.settings.seed}/{self.step}")
        two = self.step % self.settings.two_image_every == self.settings.two_image_every - 1
        rows = self.settings.rows // 2 if two else self.settings.rows
        batch = self.batcher.make(rng, "train", rows, num_images=2 if two else 1).to(self.device)
        factor = self._learning_rate_factor()
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
        logits, features = read_batch(self.model, batch)
        labels = batch.labels[batch.labels >= 0]
        told = {}
        if self._teacher is None:
            loss = nn.functional.cross_entropy(logits.float(), labels)
        else:
            answers, attention = self._teacher.losses(batch, logits)
            told = {"answers": answers.item(), "attention": attention.item()}
            loss = answers + attention
        # A head that knows nothing yet would tear at features that are good: at first it learns and does not teach.
        read = features.detach() if self.step < _HEAD_ALONE else features
        auxiliary = self.head(read.float(), batch.marks, batch.colours)
        (loss + max(0.1, 1 - 2 * self.progress) * auxiliary).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        self.minutes += (time.process_time() - started) / 60
        right = (logits.argmax(-1) == labels).float().mean()
        return {
            "loss": loss.item(),
            "token_accuracy": right.item(),
            "auxiliary": auxiliary.item(),
            "factor": factor,
            **told,
        }

    @torch.no_grad()
    def measure(self, split: Split, num_batches: int, rows: int = 48) -> dict[str, float]:
        """Share of answers that greedy decoding gets right from end to end, by kind.

        Greedy decoding gives the answer exactly when every token is the likeliest after the true ones before
        it, so one forward pass measures all questions of a batch.

        Args:
            split: whose digits and words are shown.
            num_batches: how many batches to measure.
            rows: images in each.
        """
        right: dict[str, list[bool]] = {}
        for index in range(num_batches):
            batch = self.batcher.make(random.Random(f"{split}/measure/{index}"), split, rows).to(self.device)
            logits, _ = read_batch(self.model, batch)
            asked = batch.labels >= 0
            wrong = torch.zeros(len(batch.kinds), device=self.device)
            wrong.index_add_(0, batch.turns[asked], (logits.argmax(-1) != batch.labels[asked]).float())
            for kind, misses in zip(batch.kinds, wrong.tolist(), strict=True):
                right.setdefault(kind, []).append(misses == 0)
        return {kind: sum(hits) / len(hits) for kind, hits in sorted(right.items())}

    def save(self, path: Path) -> None:
        """Write everything that going on needs, atomically."""
        state = {
            "settings": asdict(self.settings),
            "step": self.step,
            "minutes": self.minutes,
            "model": self.model.state_dict(),
            "head": self.head.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
        }
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

    @classmethod
    def load(cls, path: Path, device: torch.device, minutes: float | None = None) -> "Trainer":
        """Come back from `save`.

        Args:
            path: what `save` wrote.
            device: where to train.
            minutes: a new end of the run, which a finished one needs to go on; the learning rate rises again.
        """
        state = torch.load(path, map_location=device, weights_only=True)
        settings = Settings(**state["settings"])
        trainer = cls(settings if minutes is None else replace(settings, minutes=minutes), device)
        trainer.step, trainer.minutes = state["step"], state["minutes"]
        trainer.model.load_state_dict(state["model"])
        trainer.head.load_state_dict(state["head"])
        for optimizer, saved in zip(trainer._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        return trainer

    def take_weights(self, checkpoint: Path) -> None:
        """Start from the weights of an exported model; optimizers start afresh, and so does a head that is not there.

        Args:
            checkpoint: folder with `model.safetensors`, in any float dtype, and perhaps with `HEAD_FILE`.
        """
        self.model.load_state_dict(MllamaForConditionalGeneration.from_pretrained(checkpoint).float().state_dict())
        if (checkpoint / HEAD_FILE).exists():
            self.head.load_state_dict(load_file(checkpoint / HEAD_FILE))

    def _learning_rate_factor(self) -> float:
        warm = self.progress / self.settings.warm_up
        return min(1.0, warm + 1e-3) * (0.02 + 0.98 * (1 + math.cos(math.pi * self.progress)) / 2)

    def _make_optimizers(self) -> list[torch.optim.Optimizer]:
        matrices: list[nn.Parameter] = []
        others = list(self.head.parameters())
        for name, parameter in self.model.named_parameters():
            is_matrix = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
            (matrices if is_matrix else others).append(parameter)
        adam = torch.optim.AdamW(others, lr=self.settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
        muon = torch.optim.Muon(
            matrices,
            lr=self.settings.muon_learning_rate,
            weight_decay=self.settings.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        for optimizer in (adam, muon):
            for group in optimizer.param_groups:
                group["initial_lr"] = group["lr"]
        return [adam, muon]


def main() -> None:
    """Command line: train, log and save until the run is over."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run: state.pt and log.jsonl")
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument(
        "--minutes", type=float, help="end by processor time of all threads, not steps; with --resume, a new end"
    )
    parser.add_argument("--rows", type=int, default=Settings.rows, help="images in a batch")
    parser.add_argument("--learning-rate", type=float, default=Settings.learning_rate)
    parser.add_argument("--muon-learning-rate", type=float, default=Settings.muon_learning_rate)
    parser.add_argument("--warm-up", type=float, default=Settings.warm_up, help="share of the run")
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument(
        "--harder-pictures",
        dest="has_harder_pictures",
        action="store_true",
        help="busy scenes, objects, pages and charts as well; fetches packages",
    )
    parser.add_argument(
        "--guide-of", help="folder of an exported model: train one of half its width that looks where it looks"
    )
    parser.add_argument("--from-checkpoint", type=Path, help="folder of an exported model to start from")
    parser.add_argument("--resume", action="store_true", help="go on from state.pt with its settings")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--measure-every", type=float, default=6.0, help="minutes from one measurement to the next")
    parser.add_argument("--threads", type=int, help="of the CPU; default: torch's")
    arguments = vars(parser.parse_args())
    out, device = arguments.pop("out"), torch.device(arguments.pop("device"))
    measure_every = arguments.pop("measure_every")
    threads, resume = arguments.pop("threads"), arguments.pop("resume")
    checkpoint = arguments.pop("from_checkpoint")
    if threads:
        torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    if resume:
        trainer = Trainer.load(out / "state.pt", device, arguments["minutes"])
    else:
        trainer = Trainer(Settings(**arguments), device)
        if checkpoint is not None:
            trainer.take_weights(checkpoint)
    with open_log(out / "log.jsonl", trainer.step) as log:
        _train(trainer, out, log, measure_every)


def open_log(path: Path, step: int) -> TextIO:
    """Open a run's log to go on after a step: what an interrupted run wrote of later steps goes, they come again.

    Args:
        path: the log; need not be there.
        step: steps of the run so far; 0 begins a new log.
    """
    lines = path.read_text().splitlines(keepends=True) if step and path.exists() else []
    path.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))
    return path.open("a")


def _train(trainer: Trainer, out: Path, log: TextIO, measure_every: float) -> None:
    recent: list[dict[str, float]] = []
    saved = measured = trainer.minutes
    with Progress() as bar:
        task = bar.add_task("training", total=1.0) if bar.console.is_terminal else None
        while trainer.progress < 1:
            recent.append(trainer.take_step())
            if trainer.step % 20 == 0:
                line = {"step": trainer.step, "minutes": round(trainer.minutes, 2)}
                means = {name: round(fmean(step[name] for step in recent), 4) for name in recent[0]}
                _write(log, line | means, quiet=task is not None)
                recent.clear()
            if task is not None:
                bar.update(task, completed=trainer.progress)
            if trainer.minutes - saved > 3:
                trainer.save(out / "state.pt")
                saved = trainer.minutes
            if trainer.minutes - measured > measure_every:
                _measure(trainer, log, quiet=task is not None)
                measured = trainer.minutes
    trainer.save(out / "state.pt")
    _measure(trainer, log, quiet=False)


def _measure(trainer: Trainer, log: TextIO, quiet: bool) -> None:
    accuracy = {kind: round(share, 3) for kind, share in trainer.measure("held_out", num_batches=4).items()}
    _write(log, {"step": trainer.step, "minutes": round(trainer.minutes, 2), "held_out": accuracy}, quiet)


def _write(log: TextIO, line: Mapping[str, object], quiet: bool) -> None:
    text = json.dumps(line)
    log.write(text + "\n")
    log.flush()
    if not quiet:
        print(text, flush=True)


if __name__ == "__main__":
    main()
