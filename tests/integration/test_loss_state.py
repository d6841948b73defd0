"""A loss that remembers: β-DPO in a run, resumed, validated, and on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gamma_po.checkpoints import load_step_state, slim_state_dict
from gamma_po.errors import ConfigError
from gamma_po.losses import DPO, BetaDPO, WeightedSum
from gamma_po.margins import KL
from gamma_po.module import PreferenceModule
from gamma_po.policies import ModelConfig
from gamma_po.state import state_to_plain
from tests.contracts import batch_of, perturb, tiny_dataset
from tests.integration.test_resume import EVERY_STEP, TWO_EPOCHS, assert_same_ending, checkpoint_at, last_state
from tests.runs import fit, steps_of

BETA_DPO = ["--model.loss", "BetaDPO", "--model.loss.loss", "DPO", "--model.loss.loss.beta", "0.3"]
OFTEN = ["--trainer.val_check_interval", "1", "--trainer.check_val_every_n_epoch", "null"]


def test_a_resumed_run_has_the_betas_and_the_pairs_of_the_whole_one(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    options = [*BETA_DPO, "--model.loss.keep", "0.5", *TWO_EPOCHS, *EVERY_STEP]
    whole = fit(tiny_model_path, tiny_data, tmp_path, options)
    betas = steps_of(whole, "train/beta")
    assert betas[0] == pytest.approx(0.3) and len(set(betas)) > 8
    for step in (3, 8):
        resumed = fit(tiny_model_path, tiny_data, tmp_path, [*options, "--ckpt_path", str(checkpoint_at(whole, step))])
        assert_same_ending(whole, resumed, step)
        assert steps_of(resumed, "train/beta") == betas[step:]
        ours, theirs = (last_state(folder)["loss_state"] for folder in (whole, resumed))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        assert int(ours["steps"]) == 16


def test_validation_changes_nothing_that_is_remembered(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    states = [
        last_state(fit(tiny_model_path, tiny_data, tmp_path, [*BETA_DPO, *more]))
        for more in (OFTEN, ["--trainer.limit_val_batches", "0"])
    ]
    torch.testing.assert_close(states[0]["loss_state"], states[1]["loss_state"], rtol=0, atol=0)
    torch.testing.assert_close(states[0]["state_dict"], states[1]["state_dict"], rtol=0, atol=0)


def test_evaluation_takes_all_pairs_with_the_base_beta_and_returns_the_state_it_was_given(
    tiny_model_path: str, tiny_data: dict[str, str]
) -> None:
    module = PreferenceModule(
        ModelConfig(path=tiny_model_path), BetaDPO(loss=DPO(beta=0.3), keep=0.5), KL(), reference="copy"
    )
    module.configure_model()
    perturb(module)
    batch = batch_of(tiny_dataset(tiny_data["train"]), range(8))
    output, state = module.compute(batch, module.step_state)
    assert int((output.per_pair == 0).sum()) == 4 and int(state.loss.steps) == 1
    module.eval()
    output, same = module.compute(batch, state)
    assert same is state and (output.per_pair > 0).all()
    policy, reference = output.evidence.policy, output.evidence.reference
    torch.testing.assert_close(output.rewards.margin, 0.3 * (policy.margin - reference.margin))


def test_a_checkpoint_of_another_loss_is_refused_by_name(tiny_model_path: str) -> None:
    def module(loss: BetaDPO | DPO | WeightedSum) -> PreferenceModule:
        built = PreferenceModule(ModelConfig(path=tiny_model_path), loss, KL(), reference="copy")
        built.configure_model()
        return built

    def checkpoint(of: PreferenceModule) -> dict[str, Any]:
        state = {"loss_state": state_to_plain(of.loss_state), "margin_state": state_to_plain(of.margin_state)}
        return {"state_dict": slim_state_dict(of, of.state_dict()), **state}

    stateful = module(BetaDPO())
    for loss in (DPO(), WeightedSum()):
        with pytest.raises(ConfigError, match=r"the checkpoint's loss state does not belong to the loss 'beta_dpo'"):
            load_step_state(stateful, checkpoint(module(loss)))
    loaded = load_step_state(stateful, checkpoint(stateful))
    torch.testing.assert_close(state_to_plain(loaded), state_to_plain(stateful.step_state), rtol=0, atol=0)


@pytest.mark.parametrize(
    "loss",
    [
        ["FDPO", "--model.loss.loss", "IPO", "--model.loss.loss.beta", "0.5", "--model.loss.divergence", "forward_kl"],
        ["FDPO", "--model.loss.divergence", "alpha_divergence", "--model.loss.alpha", "0.3"],
        ["LDDPO", "--model.loss.alpha", "0.3"],
        ["WPO", "--model.loss.loss", "LDDPO", "--model.loss.loss.loss", "KTOPair"],
        ["BetaDPO", "--model.loss.loss", "SimPO", "--model.loss.loss.beta", "2.5"],
    ],
    ids=lambda options: " ".join(option for option in options if not option.startswith("--")),
)
def test_a_loss_around_a_loss_trains_from_the_command_line(
    loss: list[str], tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    folder = fit(tiny_model_path, tiny_data, tmp_path, ["--model.loss", *loss, "--trainer.max_steps", "3"])
    losses = steps_of(folder, "train/loss")
    assert len(losses) == 3 and len(set(losses)) == 3
