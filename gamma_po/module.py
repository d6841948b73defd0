"""The LightningModule: conducts policy, reference, loss and margin; computes nothing itself."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gamma_po import scoring
from gamma_po.bases import base_fingerprint
from gamma_po.checkpoints import load_step_state, plain_hparams
from gamma_po.continuation import Continuation, begin_epoch_of_data, check_models
from gamma_po.data.dataset import PairDataset
from gamma_po.data.margin_column import check_is_read
from gamma_po.data.reference_cache import CachedLogps
from gamma_po.errors import ConfigError, require
from gamma_po.evaluation.pairs import PairMetrics
from gamma_po.fingerprints import Fingerprint
from gamma_po.forwards import score
from gamma_po.losses import Loss, require_margin_fits
from gamma_po.margins import Margin
from gamma_po.objective import StepLog, StepState, check_finite, evaluate, short_step_factor, train, training_log
from gamma_po.optimizers import as_configured, check_optimizer, clip_gradients, steps_in_all
from gamma_po.placement import Placement
from gamma_po.policies import Lora, ModelConfig, attach_lora, load_tokenizer
from gamma_po.ranks import Ranks, as_one, current_ranks
from gamma_po.reference import ReferenceSource, reference_for
from gamma_po.resuming import Resume
from gamma_po.saved import check_start
from gamma_po.schedules import Schedule, warmup_then
from gamma_po.scorer import CompletionScorer, check_layout, steady_positions
from gamma_po.state import state_to_device
from gamma_po.types import Evidence, LossOutput, PreferenceBatch
from gamma_po.whole_steps import check_accumulation, check_validations, check_whole_steps


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
        every, allowed = gradient_checkpointing, "true, false, n >= 1"
        require(every >= 0, "model.gradient_checkpointing", every, allowed)
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
        self.optimizer_factory = as_configured(optimizer)
        self.schedule, self.warmup_ratio = schedule, warmup_ratio
        adapters = {"has_adapters": lora is not None}
        self.reference = reference_for(self.loss, self.margin, reference, policy, reference_model, **adapters)
        self.reference_cost: dict[str, CachedLogps] = {}
        self.policy: CompletionScorer | None = None
        self.base_weights: Fingerprint | None = None  # of what adapters are trained on
        self.pair_metrics = PairMetrics()
        self.last_output: LossOutput | None = None
        self.last_batch: PreferenceBatch | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._step_log = StepLog()
        self._continuation = Continuation()

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

    @property
    def model_configs(self) -> tuple[ModelConfig, ModelConfig]:
        """Of the policy and the reference."""
        return self.policy_config, self.reference.config if self.reference else self.policy_config

    @property
    def placement(self) -> Placement:
        """What the run's strategy does with models."""
        return Placement(trainer=self._trainer, mesh=self.device_mesh)

    @property
    def _datamodule(self) -> Any:
        """Of this run, whoever wrote it; None where there is none."""
        return getattr(self._trainer, "datamodule", None)

    def configure_model(self) -> None:
        """Load policy and, if it is a copy, the reference. Does nothing when they are there."""
        if self.policy is not None:
            return
        self.placement.prepare(self, self.model_configs)
        model = self.load(self.policy_config)
        layout = getattr(self._datamodule, "layout", "padded")
        check_layout(layout, model, self.policy_config.attention)
        if hasattr(self._datamodule, "check_vocabulary"):
            self._datamodule.check_vocabulary(model.get_input_embeddings().num_embeddings)
        if self.reference is not None:
            self.reference.load(model, layout, self.placement.place, self.load)
        if self.lora is not None:
            self.base_weights = base_fingerprint(self.policy_config, model)
            model = attach_lora(model, self.lora, seed=self.seed)
        if self.gradient_checkpointing:
            every = int(self.gradient_checkpointing)
            model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=every)
        scorer = CompletionScorer(model, with_on_policy=self.loss.needs_on_policy)
        self.policy = self.placement.place(scorer).train()

    def load(self, config: ModelConfig) -> PreTrainedModel:
        """Load a model as the strategy wants it; refuse adapters of another base, and data beyond its positions."""
        check_start(config)
        model = self.placement.load(config)
        limit = steady_positions(model.config)
        if limit is not None and hasattr(self._datamodule, "check_positions"):
            self._datamodule.check_positions(limit)
        return model

    def configure_optimizers(self) -> dict[str, Any]:
        """The given optimizer over what is trainable, with warm-up and schedule per step."""
        assert self.policy is not None
        check_accumulation(self.trainer)
        optimizer = self.optimizer_factory([p for p in self.policy.parameters() if p.requires_grad])
        check_optimizer(optimizer, precision=self.trainer.precision, shared_by=self.placement.shared_by)
        total_steps = steps_in_all(self.trainer)
        self.trainer.fit_loop.setup_data()  # for the checks; where only max_steps is set, nobody has done it yet
        check_whole_steps(self.trainer)
        check_validations(self.trainer)
        factor = warmup_then(self.schedule, total_steps=total_steps, warmup_ratio=self.warmup_ratio)
        schedule = LambdaLR(optimizer, factor)
        ends = self.schedule != "constant" or self.warmup_ratio > 0  # the learning rate depends on the number of steps
        self._continuation.plan(optimizer, total_steps if ends else "any")
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "train/lr"}}

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip, in the way that strategy and precision need."""
        clip_gradients(self, optimizer, gradient_clip_val, gradient_clip_algorithm)

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
        policy = score(self.policy, batch)
        reference = None if self.reference is None else self.reference.logps(batch, self.policy)
        evidence = Evidence(policy, reference, batch.column)
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
        factor = short_step_factor(batch_idx, self.trainer.num_training_batches, self.trainer.accumulate_grad_batches)
        return {"loss": output.loss * (batch.weight.mean() * factor), "output": detached}

    def _log_step(self, output: LossOutput, batch: PreferenceBatch) -> None:
        """Log an optimizer step, at its end."""
        of_loss = {f"train/{name}": value for name, value in self.loss.report(self.loss_state).items()}
        self._step_log.add(training_log(output) | of_loss, batch.weight)
        if self.trainer.fit_loop._should_accumulate():
            return
        for name, mean in self._step_log.end(self.ranks).items():
            self.log(name, mean, prog_bar=name == "train/loss", batch_size=batch.num_pairs)

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> dict[str, Any]:
        """Evaluate; the margin's state is read, never advanced."""
        output, _ = self.compute(batch, self.step_state)
        self.pair_metrics.update(output, batch.index[batch.weight > 0])
        return {"output": output}

    test_step = validation_step

    def predict_step(self, batch: PreferenceBatch, batch_idx: int) -> dict[str, Tensor]:
        """Score pairs: row, log-probabilities, rewards, margins and loss, [P] each."""
        output, _ = self.compute(batch, self.step_state)
        return {"index": batch.index[batch.weight > 0], **PairMetrics.columns(output)}

    # --- reference -----------------------------------------------------------------------------------------

    def attach_reference(self, dataset: PairDataset, split: str) -> None:
        """Give the dataset its cached reference log-probabilities, computing them at first use."""
        found = scoring.attach(self, dataset, split)
        if found is not None:
            self.reference_cost[split] = found

    def open_reference(self) -> AbstractContextManager[CompletionScorer]:
        """Give the frozen reference, in eval mode; also where the loss itself reads none."""
        return scoring.opened(self)

    def precision_context(self) -> AbstractContextManager[Any]:
        """The trainer's autocast, for forwards outside of its loops."""
        return self.trainer.precision_plugin.forward_context()

    # --- hooks ---------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Check the data's margin column, whichever command it is; the data module has read it by now."""
        datamodule = self._datamodule
        if not hasattr(datamodule, "check_column"):
            return
        check_is_read(self.margin, datamodule.columns.margin)
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
        """Go on where the checkpoint stood, if there is one."""
        self._step_log = StepLog()
        self._continuation.begin(self)

    def on_train_epoch_start(self) -> None:
        """Let the data take this epoch's order; a run that goes on inside an epoch skips this hook."""
        begin_epoch_of_data(self.trainer)

    def on_train_batch_start(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Check the first step; make the step's randomness a function of (seed, epoch, batch, rank)."""
        if batch_idx == 0:
            scoring.check_same_start(self, batch)
        torch.manual_seed(hash((self.seed, self.current_epoch, batch_idx, self.ranks.rank)) % 2**63)

    def on_validation_epoch_end(self) -> None:
        """Log the pair metrics of the validation split."""
        self._log_pair_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log the pair metrics of the test split."""
        self._log_pair_metrics("test")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what training changes and the state of loss and margin; drop the reference and frozen weights."""
        self._continuation.write(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the state of loss and margin; refuse a checkpoint that does not fit, however it was found."""
        self._continuation.check(self, checkpoint)
        self.loss_state, self.margin_state = load_step_state(self, checkpoint)
        check_models(self, checkpoint)

    def _log_pair_metrics(self, prefix: str) -> None:
        values = self.pair_metrics.compute()
        self.pair_metrics.reset()
        # Equal on every rank already; sync_dist only tells Lightning so.
        self.log_dict({f"{prefix}/{key}": value for key, value in values.items()}, sync_dist=True)
