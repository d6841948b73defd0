"""Where a run's strategy has models: whole in every process, or shared between the processes (FSDP2, FSDP1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from transformers import PreTrainedModel

from gamma_po.checkpoints import keep_trained_weights, load_plain_files_only
from gamma_po.flat_sharding import check_flat_sharding, shard_flat
from gamma_po.policies import ModelConfig, load_model, load_parts
from gamma_po.ranks import Distributed, current_ranks
from gamma_po.scorer import CompletionScorer
from gamma_po.sharding import TENSOR, check_sharding, gathered_in, shard


@dataclass(frozen=True, kw_only=True)
class Placement:
    """What becomes of a model in a run.

    Args:
        trainer: of the run; None for a module without one, whose models stay whole.
        mesh: the processes between which FSDP2 shards; None under other strategies, and in `inspect`.
    """

    trainer: Trainer | None
    mesh: Any

    @property
    def is_sharded(self) -> bool:
        """Whether the processes share the weights of models."""
        return self.mesh is not None or (self._is_flat and isinstance(current_ranks(), Distributed))

    @property
    def shared_by(self) -> str | None:
        """The name of the strategy that shares weights, or None."""
        return type(self.trainer.strategy).__name__ if self.is_sharded else None

    @property
    def arithmetic(self) -> str:
        """The precision of a forward, for the reference cache."""
        return gathered_in(self.trainer.precision, sharded=self.is_sharded)

    def prepare(self, module: LightningModule, configs: Sequence[ModelConfig]) -> None:
        """Get a module ready for its models.

        Args:
            module: without its policy; its checkpoints are kept from bringing together what they drop.
            configs: of the models.

        Raises:
            ConfigError: the strategy cannot shard one of them.
        """
        if self._is_flat:
            strategy = self.trainer.strategy
            for config in configs:
                check_flat_sharding(config, strategy, self.trainer.precision, processes=self.trainer.world_size)
            load_plain_files_only(strategy)
            module.to(strategy.root_device)  # else its device stays the CPU: Lightning moves weights only
        elif self.mesh is not None:
            sizes = {"processes": self.mesh.size(), "tensor_parallel": self.mesh[TENSOR].size()}
            for config in configs:
                check_sharding(config, self.trainer.precision, **sizes)
        if self.is_sharded:
            module.register_state_dict_post_hook(keep_trained_weights)

    def load(self, config: ModelConfig) -> PreTrainedModel:
        """Load a model; where it is going to be sharded, without weights, of which each process then reads its part."""
        return load_parts(config) if self.is_sharded else load_model(config)

    def place(self, scorer: CompletionScorer) -> CompletionScorer:
        """Shard a model that was just loaded, where the strategy shards, and return what to use in its place."""
        if not self.is_sharded:
            return scorer
        if self.mesh is None:
            return shard_flat(scorer, self.trainer.strategy.root_device, self.trainer.precision)
        return shard(scorer, self.mesh, self.trainer.precision)

    @property
    def _is_flat(self) -> bool:
        return isinstance(getattr(self.trainer, "strategy", None), FSDPStrategy)
