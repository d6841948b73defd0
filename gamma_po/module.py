"""The LightningModule: conducts policy, reference, loss and margin; computes nothing itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gamma_po.attention import SEGMENTS
from gamma_po.bases import base_fingerprint
from gamma_po.checkpoints import (
    keep_trained_weights,
    load_plain_files_only,
    load_step_state,
    plain_hparams,
    slim_state_dict,
    straighten_progress,
    trained_names,
)
from gamma_po.data.dataset import PairDataset
from gamma_po.data.loader import ShuffledBatches
from gamma_po.data.reference_cache import (
    BASE_FIELDS,
    SHARED_FIELDS,
    CachedLogps,
    ReferenceKey,
    cached_logps,
    default_cache_dir,
)
from gamma_po.errors import ConfigError, require
from gamma_po.evaluation.pairs import PairMetrics
from gamma_po.fingerprints import Fingerprint
from gamma_po.flat_sharding import check_flat_sharding, is_flat, shard_flat
from gamma_po.forwards import score
from gamma_po.losses import Loss, require_margin_fits
from gamma_po.margins import Margin
from gamma_po.objective import StepState, check_finite, evaluate, short_step_factor, train, training_log
from gamma_po.optimizers import check_optimizer
from gamma_po.policies import (
    Lora,
    ModelConfig,
    attach_lora,
    evaluating,
    load_model,
    load_parts,
    load_tokenizer,
)
from gamma_po.ranks import Distributed, Ranks, as_one, current_ranks
from gamma_po.reference import Reference, ReferenceSource, check_agreement, check_reference_is_used
from gamma_po.resuming import (
    Resume,
    check_accumulation,
    check_end_of_training,
    check_same_checkpoint,
    check_same_run,
    check_same_settings,
    check_same_weights,
    check_validations,
    check_whole_steps,
    go_on_as_given,
    run_settings,
)
from gamma_po.saved import FORMAT, FORMAT_KEY, check_format
from gamma_po.schedules import Schedule, warmup_then
from gamma_po.scorer import CompletionScorer, check_layout, steady_positions
from gamma_po.sharding import TENSOR, check_sharding, gathered_in, shard
from gamma_po.state import state_to_device, state_to_plain
from gamma_po.types import Evidence, LossOutput, PairLogps, PreferenceBatch


class PreferenceModule(LightningModule):
    """Preference optimization with any loss and any target margin.

    Args:
        policy: the model to train.
        loss: a preference loss, e.g. DPO.
        margin: a rule for the target margin γ, e.g. KL.
        lora: train low-rank adapters; null trains all weights.
        reference: where the reference's log-probabilities come from: computed once before training and cached on
            disk, the policy with its adapters off, or a frozen copy in memory.
        reference_model: a reference other than the untrained policy.
        gradient_checkpointing: recompute activations in the backward pass, of every layer (true) or of every n-th;
            less memory, more time.
        optimizer: called with the trainable parameters.
        schedule: of the learning rate, after the warm-up.
        warmup_ratio: share of the steps in the warm-up, in [0, 1).
        seed: of adapter initialisation and of each step's dropout.
    """

    strict_loading = False
    resume: Resume = "exact"  # or "anyway": a training goes on with other settings than its checkpoint's

    def __init__(
        self,
        policy: ModelConfig,
        loss: Loss,
        margin: Margin,
        lora: Lora | None = None,
        reference: ReferenceSource = "cached",
        reference_model: ModelConfig | None = None,
        gradient_checkpointing: bool | int = False,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-5, weight_decay=0.0),
        schedule: Schedule = "cosine",
        warmup_ratio: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        plain_hparams(self.hparams)
        require(0 <= warmup_ratio < 1, "model.warmup_ratio", warmup_ratio, "0 <= ratio < 1")
        require(
            gradient_checkpointing >= 0, "model.gradient_checkpointing", gradient_checkpointing, "true, false, n >= 1"
        )
        if policy.quantization is not None and lora is None:
            raise ConfigError(
                f"model.policy.quantization={policy.quantization} needs model.lora: adapters can be trained on "
                "quantised weights, the weights themselves cannot"
            )
        self.policy_config, self.lora, self.seed = policy, lora, seed
        require_margin_fits(loss, margin.name)
        self.loss, self.margin = loss, margin.bind(loss)
        self.loss_state, self.margin_state = self.loss.init(), self.margin.init()
        self.gradient_checkpointing = gradient_checkpointing
        self.optimizer_factory = _as_configured(optimizer)
        self.schedule, self.warmup_ratio = schedule, warmup_ratio
        check_reference_is_used(self.loss, self.margin, reference, reference_model)
        self.reference: Reference | None = None
        self.reference_cost: dict[str, CachedLogps] = {}
        if loss.needs_reference or margin.needs_reference:
            self.reference = Reference(
                reference,
                reference_model or policy,
                is_start_of_policy=reference_model is None,
                has_adapters=lora is not None,
            )
        self.policy: CompletionScorer | None = None
        self.base_weights: Fingerprint | None = None  # of what adapters are trained on
        self.pair_metrics = PairMetrics()
        self.last_output: LossOutput | None = None
        self.last_batch: PreferenceBatch | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._of_step: list[Tensor] = []  # what is logged of each micro-batch of the step so far
        self._given_options: list[dict[str, Any]] = []  # of the optimizer's groups, before a checkpoint's come
        self._steps_in_all: dict[str, Any] = {}
        self._steps_before: dict[str, Any] | None = None  # of the checkpoint

    # --- what there is -------------------------------------------------------------------------------------

    @property
    def ranks(self) -> Ranks:
        """The processes of this run."""
        return current_ranks()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer, loaded at first use."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.policy_config)
        return self._tokenizer

    def configure_model(self) -> None:
        """Load policy and, if it is a copy, the reference. Does nothing when they are there."""
        if self.policy is not None:
            return
        self._prepare_sharding()
        model = self._load(self.policy_config)
        datamodule = getattr(self._trainer, "datamodule", None)
        layout = getattr(datamodule, "layout", "padded")
        check_layout(layout, model, self.policy_config.attention)
        if hasattr(datamodule, "check_vocabulary"):
            datamodule.check_vocabulary(model.get_input_embeddings().num_embeddings)
        if self.reference is not None:
            self.reference.load(model, layout, self._placed, self._load)
        if self.lora is not None:
            self.base_weights = base_fingerprint(self.policy_config, model)
            model = attach_lora(model, self.lora, seed=self.seed)
        if self.gradient_checkpointing:
            model.activation_checkpointing_enable(
                {"use_reentrant": False}, every_n_layers=int(self.gradient_checkpointing)
            )
        self.policy = self._placed(CompletionScorer(model, with_on_policy=self.loss.needs_on_policy)).train()

    def _prepare_sharding(self) -> None:
        """Refuse what the strategy cannot shard; keep checkpoints from bringing together what they drop."""
        strategy, mesh = getattr(self._trainer, "strategy", None), self.device_mesh
        if isinstance(strategy, FSDPStrategy):
            for config in self.model_configs:
                check_flat_sharding(config, strategy, self.trainer.precision, processes=self.trainer.world_size)
            load_plain_files_only(strategy)
            self.to(strategy.root_device)  # else this module's device stays the CPU: Lightning moves weights only
        elif mesh is not None:
            self.check_sharding(processes=mesh.size(), tensor_parallel=mesh[TENSOR].size())
        if self._is_sharded:
            self.register_state_dict_post_hook(keep_trained_weights)

    @property
    def model_configs(self) -> tuple[ModelConfig, ModelConfig]:
        """Of the policy and the reference."""
        return self.policy_config, self.reference.config if self.reference else self.policy_config

    @property
    def _is_sharded(self) -> bool:
        """Whether the strategy shares the weights of models between the processes; `inspect` has none."""
        flat = isinstance(getattr(self._trainer, "strategy", None), FSDPStrategy)
        return self.device_mesh is not None or (flat and isinstance(self.ranks, Distributed))

    def check_sharding(self, *, processes: int, tensor_parallel: int) -> None:
        """Refuse a policy or a reference that cannot be sharded over so many processes; see `sharding`."""
        for config in self.model_configs:
            precision = self.trainer.precision
            check_sharding(config, precision, processes=processes, tensor_parallel=tensor_parallel)

    def _load(self, config: ModelConfig) -> PreTrainedModel:
        """Load a model; where it is going to be sharded, without weights, of which each process then reads its part."""
        model = load_parts(config) if self._is_sharded else load_model(config)
        datamodule, limit = getattr(self._trainer, "datamodule", None), steady_positions(model.config)
        if limit is not None and hasattr(datamodule, "check_positions"):
            datamodule.check_positions(limit)
        return model

    def _placed(self, scorer: CompletionScorer) -> CompletionScorer:
        """Shard a model that was just loaded, where the strategy shards."""
        if not self._is_sharded:
            return scorer
        if self.device_mesh is None:
            return shard_flat(scorer, self.trainer.strategy.root_device, self.trainer.precision)
        return shard(scorer, self.device_mesh, self.trainer.precision)

    def configure_optimizers(self) -> dict[str, Any]:
        """The given optimizer over what is trainable, with warm-up and schedule per step."""
        assert self.policy is not None
        check_accumulation(self.trainer)
        optimizer = self.optimizer_factory([p for p in self.policy.parameters() if p.requires_grad])
        shared_by = type(self.trainer.strategy).__name__ if self._is_sharded else None
        check_optimizer(optimizer, precision=self.trainer.precision, shared_by=shared_by)
        total_steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(total_steps):
            raise ConfigError("the schedule needs a known number of steps: set trainer.max_steps or trainer.max_epochs")
        self.trainer.fit_loop.setup_data()  # for the checks; where only max_steps is set, nobody has done it yet
        check_whole_steps(self.trainer)
        check_validations(self.trainer)
        factor = warmup_then(self.schedule, total_steps=int(total_steps), warmup_ratio=self.warmup_ratio)
        ends = self.schedule != "constant" or self.warmup_ratio > 0  # the learning rate depends on the number of steps
        self._steps_in_all = {"steps_in_all": int(total_steps) if ends else "any"}
        schedule = LambdaLR(optimizer, factor)
        self._given_options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "train/lr"}}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip; also for fused optimizers, which Lightning refuses under bf16-mixed though nothing is scaled there."""
        plugin = self.trainer.precision_plugin
        if gradient_clip_val and is_flat(self.policy) and gradient_clip_algorithm != GradClipAlgorithmType.VALUE:
            self.policy.clip_grad_norm_(gradient_clip_val)  # by the norm over all processes
        elif gradient_clip_val and type(plugin) is MixedPrecision and plugin.scaler is None:
            kind = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
            Precision.clip_gradients(plugin, optimizer, gradient_clip_val, kind)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    # --- steps ---------------------------------------------------------------------------------------------

    @property
    def step_state(self) -> StepState:
        """What loss and margin remember."""
        return StepState(self.loss_state, self.margin_state)

    def compute(self, batch: PreferenceBatch, state: StepState) -> tuple[LossOutput, StepState]:
        """Run the whole algebra on one batch: evidence, rewards, γ, loss.

        Args:
            batch: P pairs, all of weight > 0 in training.
            state: of loss and margin.

        Returns:
            The output over the pairs of weight > 0, and the next state; in evaluation it is the given one.
        """
        evidence = Evidence(score(self.policy, batch), self._reference_logps(batch), batch.column)
        rows = batch.index
        if not self.training:
            counts = batch.weight > 0
            evidence, rows = evidence.map(lambda value: value[counts]), rows[counts]
        with as_one(self.ranks):
            check_finite(self.loss.rewards(evidence).margin, rows, self.trainer.global_step if self._trainer else 0)
        here = state_to_device(state, self.device)
        if self.training:
            return train(self.loss, self.margin, evidence, here, self.ranks)
        return evaluate(self.loss, self.margin, evidence, here.margin, self.ranks)[0], state

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> dict[str, Any]:
        """One micro-batch; advances the state of loss and margin."""
        output, (self.loss_state, self.margin_state) = self.compute(batch, self.step_state)
        detached = output._replace(loss=output.loss.detach())
        self.last_output, self.last_batch = detached, batch
        self._log_step(detached, batch)
        scale = batch.weight.mean() * short_step_factor(
            batch_idx, self.trainer.num_training_batches, self.trainer.accumulate_grad_batches
        )
        return {"loss": output.loss * scale, "output": detached}

    def _log_step(self, output: LossOutput, batch: PreferenceBatch) -> None:
        """Log an optimizer step at its end: means over the pairs of its micro-batches and ranks, as its loss is one.

        All ranks meet in one reduction per step: Lightning would make one, and a barrier, of each value. What a cut
        into micro-batches changes by nature (a loss or a γ that looks at several pairs at once, what a loss remembers,
        such as β-DPO's β) is the mean of what the micro-batches had.
        """
        of_loss = {f"train/{name}": value for name, value in self.loss.report(self.loss_state).items()}
        values = training_log(output) | of_loss
        own = torch.stack([torch.as_tensor(value, device=self.device).float() for value in values.values()])
        self._of_step.append(own * batch.weight.mean())
        if self.trainer.fit_loop._should_accumulate():
            return
        means, self._of_step = self.ranks.mean(torch.stack(self._of_step).mean(0)), []
        for name, mean in zip(values, means, strict=True):
            self.log(name, mean, prog_bar=name == "train/loss", batch_size=batch.num_pairs)

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> dict[str, Any]:
        """Evaluate; the margin's state is read, never advanced."""
        return self._evaluation_step(batch)

    def test_step(self, batch: PreferenceBatch, batch_idx: int) -> dict[str, Any]:
        """Evaluate, as validation."""
        return self._evaluation_step(batch)

    def predict_step(self, batch: PreferenceBatch, batch_idx: int) -> dict[str, Tensor]:
        """Score pairs: row, log-probabilities, rewards, margins and loss, [P] each."""
        output, _ = self.compute(batch, self.step_state)
        return {"index": batch.index[batch.weight > 0], **PairMetrics.columns(output)}

    def _evaluation_step(self, batch: PreferenceBatch) -> dict[str, Any]:
        output, _ = self.compute(batch, self.step_state)
        self.pair_metrics.update(output, batch.index[batch.weight > 0])
        return {"output": output}

    def _reference_logps(self, batch: PreferenceBatch) -> PairLogps | None:
        return None if self.reference is None else self.reference.logps(batch, self.policy)

    # --- reference -----------------------------------------------------------------------------------------

    def attach_reference(self, dataset: PairDataset, split: str) -> None:
        """Give the dataset its cached reference log-probabilities, computing them at first use."""
        if self.reference is None or self.reference.source != "cached":
            return
        datamodule, config = self.trainer.datamodule, self.reference.config
        gathered = gathered_in(self.trainer.precision, sharded=self._is_sharded)
        key = ReferenceKey(
            weights=self.reference.fingerprint.digest,
            layout=datamodule.layout,
            precision=f"{config.dtype}/{gathered}",
            attention=config.attention if datamodule.layout == "padded" else SEGMENTS,
        )
        needed = BASE_FIELDS + (SHARED_FIELDS if self.loss.needs_shared else ())
        if dataset.reference is not None and dataset.scored_as == (key, needed):
            return  # else it has the numbers of another module's reference, which trained on this data before
        self.reference_cost[split] = found = cached_logps(
            dataset.pairs,
            self._open_scoring,
            key=key,
            folder=datamodule.cache_dir or default_cache_dir(),
            ranks=self.ranks,
            batch_size=datamodule.eval_batch_size,
            collate=datamodule.collate,
            description=f"reference log-probabilities, {split}",
            needed=needed,
        )
        dataset.scored_as = (key, needed)
        dataset.reference = found.logps

    def open_reference(self) -> AbstractContextManager[CompletionScorer]:
        """Give the frozen reference, in eval mode; also where the loss itself reads none."""
        reference = self.reference or self._start_of_policy()
        untouched = self._policy_is_untouched() and not is_flat(self.policy)  # its weights cannot be read one by one
        how = {"place": self._placed, "load": self._load, "precision": self.trainer.precision}
        return reference.opened(self.policy, policy_is_untouched=untouched, **how)

    @contextmanager
    def _open_scoring(self) -> Iterator[Callable[[PreferenceBatch], PairLogps]]:
        """Give a function from batch to reference log-probabilities, under the trainer's precision."""
        with self.open_reference() as scorer, torch.no_grad(), self.precision_context():
            yield lambda batch: score(scorer, batch.to(self.device))

    def precision_context(self) -> AbstractContextManager[Any]:
        """The trainer's autocast, for forwards outside of its loops."""
        return self.trainer.precision_plugin.forward_context()

    def _start_of_policy(self) -> Reference:
        return Reference("cached", self.policy_config, is_start_of_policy=True, has_adapters=self.lora is not None)

    def _policy_is_untouched(self) -> bool:
        trainer = self._trainer
        fresh = trainer is not None and trainer.training and trainer.global_step == 0
        return bool(fresh and trainer.ckpt_path is None)

    # --- hooks ---------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Check the data's margin column, whichever command it is; the data module has read it by now."""
        datamodule = getattr(self.trainer, "datamodule", None)
        if not hasattr(datamodule, "check_column"):
            return
        if datamodule.columns.margin is not None and not self.margin.reads_column:
            raise ConfigError(
                f"data.columns.margin={datamodule.columns.margin!r} is not used: the margin {self.margin.name} "
                "does not read a data column; allowed with: column, or reverse and shuffled around it"
            )
        with as_one(self.ranks):
            datamodule.check_margin(self.margin)
            datamodule.check_column(self.margin)

    def on_fit_start(self) -> None:
        """Score the data under the reference and let the margin see the training split."""
        datamodule = self.trainer.datamodule
        if datamodule is not None:
            for split, dataset in datamodule.datasets.items():
                self.attach_reference(dataset, split)
        if self.margin.needs_fit and self.trainer.ckpt_path is None:
            if datamodule is None:
                raise ConfigError(
                    f"the margin {self.margin.name} is fitted on the training split: use PreferenceDataModule"
                )
            self.margin_state = self.margin.fit(datamodule.datasets["train"].labelled_reference())

    def on_train_start(self) -> None:
        """Continue in the data where the checkpoint stood: Lightning forgets that for a loader that it built before
        it restored its loops, and `estimated_stepping_batches` builds it early."""
        if self._steps_before is not None:
            check_same_run(self._steps_before, self._steps_in_all, self.resume)
        self._of_step = []
        self.trainer.fit_loop._load_combined_loader_states()
        self._begin_epoch_of_data()
        if self.resume == "anyway" and self._steps_before is not None:
            go_on_as_given(self.trainer, self.optimizers().optimizer, self.lr_schedulers(), self._given_options)
        self._steps_before = None

    def on_train_epoch_start(self) -> None:
        """Let the data take this epoch's order. Lightning tells no batch sampler of one's own which epoch it is, and
        miscounts after a checkpoint from the end of an epoch; a run that goes on inside an epoch skips this hook."""
        self._begin_epoch_of_data()

    def _begin_epoch_of_data(self) -> None:
        batches = getattr(self.trainer.train_dataloader, "batch_sampler", None)
        if isinstance(batches, ShuffledBatches):
            batches.set_epoch(self.current_epoch)

    def on_train_batch_start(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Check the first step; make the step's randomness a function of (seed, epoch, batch, rank)."""
        if batch_idx == 0 and self._policy_is_untouched() and self.reference and self.reference.is_start_of_policy:
            with evaluating(self.policy), torch.no_grad(), self.precision_context():
                policy, reference = score(self.policy, batch), self._reference_logps(batch)
            full_precision = self.policy_config.dtype == "float32" and self.trainer.precision == "32-true"
            with as_one(self.ranks):
                check_agreement(policy, reference, batch.index, full_precision=full_precision)
        torch.manual_seed(hash((self.seed, self.current_epoch, batch_idx, self.ranks.rank)) % 2**63)

    def on_validation_epoch_end(self) -> None:
        """Log the pair metrics of the validation split."""
        self._log_pair_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log the pair metrics of the test split."""
        self._log_pair_metrics("test")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what training changes and the state of loss and margin; drop the reference and frozen weights."""
        checkpoint["state_dict"] = slim_state_dict(self, checkpoint["state_dict"])
        checkpoint["trained_weights"] = trained_names(self)
        checkpoint["loss_state"] = state_to_plain(self.loss_state)
        checkpoint["margin_state"] = state_to_plain(self.margin_state)
        checkpoint[FORMAT_KEY] = FORMAT
        checkpoint["run"] = run_settings(self.trainer)
        checkpoint["steps"] = self._steps_in_all
        known = {"reference": self.reference and self.reference.fingerprint, "base": self.base_weights}
        checkpoint |= {f"{what}_weights": found and found._asdict() for what, found in known.items()}
        batches = getattr(self.trainer.train_dataloader, "batch_sampler", None)
        if isinstance(batches, ShuffledBatches) and "loops" in checkpoint:
            straighten_progress(checkpoint["loops"], batches.epoch)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the state of loss and margin; refuse a checkpoint that does not fit, however it was found."""
        trainer = self._trainer
        if trainer is not None:  # a run that is still ending may have replaced the file for some of the processes
            check_same_checkpoint(self.ranks, f"step {checkpoint['global_step']}")
        check_format(checkpoint, str(getattr(trainer, "ckpt_path", None) or "the checkpoint"))
        if trainer is not None:
            saved, here = checkpoint.get("hyper_parameters", {}), dict(self.hparams)
            check_same_settings(saved, here, training=bool(trainer.training), resume=self.resume)
        if trainer is not None and trainer.training:
            check_end_of_training(checkpoint, max_steps=trainer.max_steps, max_epochs=trainer.max_epochs)
            check_same_run(checkpoint["run"], run_settings(trainer), self.resume)
            self._steps_before = checkpoint["steps"]
        self.loss_state, self.margin_state = load_step_state(self, checkpoint)
        if trainer is not None and trainer.training and self.reference is not None:
            saved = Fingerprint.of(checkpoint.get("reference_weights"))
            check_same_weights("reference", saved, self.reference.fingerprint, self.resume)
        if trainer is not None:
            resume = self.resume if trainer.training else "anyway"
            check_same_weights("base", Fingerprint.of(checkpoint.get("base_weights")), self.base_weights, resume)

    def _log_pair_metrics(self, prefix: str) -> None:
        values = self.pair_metrics.compute()
        self.pair_metrics.reset()
        # Equal on every rank already; sync_dist only tells Lightning so.
        self.log_dict({f"{prefix}/{key}": value for key, value in values.items()}, sync_dist=True)


def _as_configured(optimizer: OptimizerCallable) -> OptimizerCallable:
    """The optimizer, whose refusal of a value is a configuration error."""

    def make(parameters: Iterable[Tensor]) -> Optimizer:
        try:
            return optimizer(parameters)
        except ValueError as error:
            raise ConfigError(f"model.optimizer: {error}") from error

    return make
