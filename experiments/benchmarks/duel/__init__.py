"""Train one model on the same pairs with TRL and with this project, step by step, and compare.

plan.py        what is compared: arms, targets, and the settings that both sides share
rows.py        which pairs are trained on, in which order
meter.py       time, peak memory and counted FLOPs of a step; the machine's matrix-product peak
turns.py       a process per arm, which takes one step when it is told to
ours.py        the project's side: its command line's `fit`, whole
theirs.py      TRL's side: `DPOTrainer.train`, whole
agreement.py   both must compute the same loss and gradient before anything is timed
ratios.py      from steps to ratios
report.py      tables, CSV files and the plot
"""
