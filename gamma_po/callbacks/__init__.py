"""Callbacks that let people look at a run, and stop it when its numbers break.

    GammaStatistics    log mean, spread, percentiles of γ and its correlation with the reward margin
    MarginHistograms   histograms of γ and of the reward margin: TensorBoard, W&B and plots/gamma_histogram.png
    PairRecorder       every N steps, the micro-batch pair by pair: pairs/step-000050.parquet
    RunPlots           plots/loss.png and plots/reward_margin.png
    Throughput         pairs and tokens per second
    LearningRate       the learning rate of each logged step, beside its loss
    Samples            what the policy writes after each epoch: samples/epoch-001.jsonl (off unless asked for)
    NonFiniteGuard     stops before an optimizer step that a NaN or an infinity would spoil

Files go under the run's directory, `trainer.log_dir`. The callbacks read what the module's `training_step`
returns and what its validation logs; none changes the training.
"""

from gamma_po.callbacks.gamma_statistics import GammaStatistics
from gamma_po.callbacks.guards import NonFiniteGuard
from gamma_po.callbacks.histograms import MarginHistograms
from gamma_po.callbacks.monitors import LearningRate, Throughput
from gamma_po.callbacks.pair_recorder import PairRecorder
from gamma_po.callbacks.plots import RunPlots
from gamma_po.callbacks.samples import Samples

__all__ = [
    "GammaStatistics",
    "LearningRate",
    "MarginHistograms",
    "NonFiniteGuard",
    "PairRecorder",
    "RunPlots",
    "Samples",
    "Throughput",
]
