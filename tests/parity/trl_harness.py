"""Call TRL's own loss code on given log-probabilities: stand-ins for its trainer, accelerator and model.

TRL computes its DPO losses inside the trainer's step, so the step runs unbound on an object that has just what it
reads. Rows are chosen then rejected; a completion of n tokens fills the first n of the shifted positions.
"""

from __future__ import annotations

import os
from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from gamma_po.types import Evidence

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # it warns that CPO and ORPO may move


def token_mask(lengths: Tensor) -> Tensor:
    """[S, T] 1 where a completion token is."""
    return (torch.arange(int(lengths.max())) < lengths[:, None]).long()


def spread(totals: Tensor, lengths: Tensor) -> Tensor:
    """Per-token log-probabilities [S, T], growing along the completion, that sum to `totals`."""
    mask = token_mask(lengths).to(totals.dtype)
    share = mask * torch.arange(1, mask.shape[1] + 1, dtype=totals.dtype)
    return totals[:, None] * share / share.sum(dim=1, keepdim=True)


def accelerator() -> SimpleNamespace:
    """One process on the CPU."""
    return SimpleNamespace(
        device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x, autocast=nullcontext
    )


def _outputs(log_probs: Tensor, log_sum_sq_probs: Tensor | None = None) -> SimpleNamespace:
    nothing = torch.zeros_like(log_probs).detach()
    collision = nothing if log_sum_sq_probs is None else log_sum_sq_probs
    return SimpleNamespace(
        log_probs=log_probs, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool(), log_sum_sq_probs=collision
    )


def dpo_step_loss(
    loss_types: list[str], evidence: Evidence, *, loss_weights: list[float] | None = None, **options: Any
) -> Tensor:
    """TRL's scalar DPO loss of a batch; gradient flows to the policy's log-probabilities.

    The reference goes through TRL's own precomputation, token by token.
    """
    from trl import DPOTrainer

    policy, reference = evidence.policy, evidence.reference
    lengths = torch.cat([policy.chosen_length, policy.rejected_length])
    completion = torch.cat([torch.zeros(len(lengths), 1, dtype=torch.long), token_mask(lengths)], dim=1)
    inputs = {
        "input_ids": torch.zeros_like(completion),
        "attention_mask": torch.ones_like(completion),
        "completion_mask": completion,
    }
    per_token = spread(torch.cat([policy.chosen, policy.rejected]), lengths)
    of_reference = spread(torch.cat([reference.chosen, reference.rejected]), lengths)
    collision = None
    if options.get("use_weighting"):
        aligned = torch.cat([policy.chosen_on_policy, policy.rejected_on_policy]) * lengths
        collision = per_token.detach() - spread(aligned, lengths)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False, is_gradient_checkpointing=False),
        ref_model="the one that is called below",
        accelerator=accelerator(),
        aux_loss_enabled=False,
        ld_alpha=options.get("ld_alpha"),
        precompute_ref_logps=True,
        f_divergence_type=options.get("f_divergence_type", "reverse_kl"),
        f_alpha_divergence_coef=options.get("f_alpha_divergence_coef", 0.5),
        loss_types=loss_types,
        loss_weights=loss_weights or [1.0] * len(loss_types),
        beta=options.get("beta", 0.1),
        label_smoothing=options.get("label_smoothing", 0.0),
        args=SimpleNamespace(discopop_tau=options.get("discopop_tau", 0.05), gradient_checkpointing_kwargs=None),
        use_weighting=options.get("use_weighting", False),
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
    )
    ref_chosen, ref_rejected = DPOTrainer.compute_ref_log_probs(trainer, lambda **_: _outputs(of_reference), inputs)
    inputs |= {"ref_chosen_logps": ref_chosen, "ref_rejected_logps": ref_rejected}
    return DPOTrainer._compute_loss(trainer, lambda **_: _outputs(per_token, collision), inputs, False)


def kto_step_loss(evidence: Evidence, mismatched: Tensor, reference_mismatched: Tensor, *, beta: float) -> Tensor:
    """TRL's scalar KTO loss of the pairs' completions; its KL is that of the mismatched completions, [2P]."""
    from trl import KTOTrainer

    policy, reference = evidence.policy, evidence.reference
    lengths = torch.cat([policy.chosen_length, policy.rejected_length])
    completion = torch.cat([torch.zeros(len(lengths), 1, dtype=torch.long), token_mask(lengths)], dim=1)
    inputs = {
        "input_ids": torch.zeros_like(completion),
        "attention_mask": torch.ones_like(completion),
        "completion_mask": completion,
        "label": torch.arange(len(lengths)) < len(lengths) // 2,
        "ref_logps": torch.cat([reference.chosen, reference.rejected]),
        "ref_KL_logps": reference_mismatched,
    }
    per_token = spread(torch.cat([policy.chosen, policy.rejected]), lengths)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=accelerator(),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=True,
        _compute_kl_logps=lambda model, batch: mismatched,
        loss_type="kto",
        beta=beta,
        desirable_weight=1.0,
        undesirable_weight=1.0,
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
    )
    return KTOTrainer._compute_loss(trainer, lambda **_: _outputs(per_token), inputs, False)


def cpo_losses(chosen: Tensor, rejected: Tensor, *, loss_type: str, beta: float, simpo_gamma: float = 0.0) -> Tensor:
    """TRL's CPO losses per pair, without the likelihood term, [P]."""
    from trl.experimental.cpo import CPOTrainer

    trainer = SimpleNamespace(
        accelerator=accelerator(),
        alpha=0.0,
        label_smoothing=0.0,
        loss_type=loss_type,
        beta=beta,
        simpo_gamma=simpo_gamma,
    )
    return CPOTrainer.cpo_loss(trainer, chosen, rejected)[0]


def odds_ratio_losses(mean_chosen: Tensor, mean_rejected: Tensor, *, weight: float) -> Tensor:
    """TRL's ORPO loss per pair, without the likelihood term, [P]."""
    from trl.experimental.orpo import ORPOTrainer

    trainer = SimpleNamespace(accelerator=accelerator(), beta=weight)
    return -ORPOTrainer.odds_ratio_loss(trainer, mean_chosen, mean_rejected)[0]


def forward_nll(
    trainer_name: str, logits: Tensor, chosen_ids: Tensor, rejected_ids: Tensor, prompt_length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Chosen log-probabilities, rejected log-probabilities and likelihood term of TRL's CPO or ORPO forward.

    Args:
        trainer_name: "cpo" (summed log-probabilities) or "orpo" (mean ones).
        logits: [2P, T, V] of the model.
        chosen_ids: [P, T], prompt first, padding -1.
        rejected_ids: [P, T], as `chosen_ids`.
        prompt_length: the same for all rows.
    """
    if trainer_name == "cpo":
        from trl.experimental.cpo import CPOTrainer as trainer_class
    else:
        from trl.experimental.orpo import ORPOTrainer as trainer_class
    batch = {}
    for side, ids in (("chosen", chosen_ids), ("rejected", rejected_ids)):
        labels = ids.masked_fill(ids < 0, -100)
        labels[:, :prompt_length] = -100
        batch |= {
            f"{side}_input_ids": ids.clamp(min=0),
            f"{side}_attention_mask": (ids >= 0).long(),
            f"{side}_labels": labels,
        }
    trainer = SimpleNamespace(
        accelerator=accelerator(),
        concatenated_inputs=trainer_class.concatenated_inputs,
        get_batch_logps=trainer_class.get_batch_logps,
        is_encoder_decoder=False,
        aux_loss_enabled=False,
        pad_token_id=0,
        padding_value=0,
        cpo_alpha=1.0,
        loss_type="sigmoid",
    )
    outputs = trainer_class.concatenated_forward(trainer, lambda *_, **__: SimpleNamespace(logits=logits), batch)
    return outputs[0], outputs[1], outputs[4]
