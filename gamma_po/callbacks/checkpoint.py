"""Checkpoints belong to the run that writes them, and are whole."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import proxy

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.types import STEP_OUTPUT

from gamma_po.checkpoints import save_whole, tidy
from gamma_po.errors import require
from gamma_po.files import ABANDONED
from gamma_po.ranks import as_one, current_ranks
from gamma_po.runs import LAST, run_of, runs_in


class RunCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint; a resumed run ranks and deletes the checkpoints of its own folder only.

    It saves between optimizer steps only: the gradients of the first micro-batches of a step are in no checkpoint, and
    a run that went on from there would go without them. What is due inside a step (`train_time_interval`) is saved at
    its end, and a training that is told to end (`trainer.max_time`) ends there, too; an exception inside a step saves
    nothing (`save_on_exception`).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._told_to_stop = False  # inside a step
        require(self.save_last != "link", "checkpoint.save_last", self.save_last, "true, false: a file of its own")

    @property
    def state_key(self) -> str:
        """One for all settings: a resumed run may write checkpoints more or less often than the one before."""
        return type(self).__name__

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tidy the folders of this run's checkpoints, of the run it goes on from, and of others of its name."""
        super().on_train_start(trainer, pl_module)
        self._told_to_stop = False
        self._last_global_step_saved = trainer.global_step  # 0, or that of the checkpoint the run goes on from
        if trainer.is_global_zero:
            with suppress(OSError):  # what cannot be read is not tidied
                self._tidy(Path(trainer.ckpt_path) if trainer.ckpt_path else None)

    def _tidy(self, start: Path | None) -> None:
        own = Path(self.dirpath)
        tidy(own)
        run, before = run_of(own / LAST), run_of(start) if start else None
        others = {*([start.parent] if start else []), *([before] if before else [])}
        for other in runs_in(run.parent) if run else []:
            others |= {other, other / own.name}
        for folder in others - {own}:  # of runs that may be in training, also on other machines
            tidy(folder, for_seconds=ABANDONED)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Save what is due at the end of a step; inside one, put off also the end of the training."""
        told, trainer.should_stop = self._told_to_stop or trainer.should_stop, False
        if not between_steps(trainer):
            self._told_to_stop = told
            return
        self._told_to_stop, trainer.should_stop = False, told
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def _should_skip_saving_checkpoint(self, trainer: Trainer) -> bool:
        return super()._should_skip_saving_checkpoint(trainer) or not between_steps(trainer)

    def _should_save_on_exception(self, trainer: Trainer) -> bool:
        return super()._should_save_on_exception(trainer) and between_steps(trainer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the record of earlier checkpoints where they lie in the same folder."""
        if state_dict.get("dirpath") == self.dirpath:
            super().load_state_dict(state_dict)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Write under another name first; Lightning copies onto the place itself from another file system."""
        save_whole(trainer, Path(filepath), weights_only=self.save_weights_only)
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath
        for logger in trainer.loggers if trainer.is_global_zero else ():
            logger.after_save_checkpoint(proxy(self))

    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Remove it; where the disk refuses, all ranks say so."""
        with as_one(current_ranks()):
            super()._remove_checkpoint(trainer, filepath)


def between_steps(trainer: Trainer) -> bool:
    """Return whether a trainer in training has no gradients of an unfinished step, nor a micro-batch under way."""
    progress = trainer.fit_loop.epoch_loop.batch_progress.current
    return progress.processed == progress.ready and not trainer.fit_loop._should_accumulate()
