"""The public API, as notebooks and other programs use it, and frozen.

A failure of a `frozen` test means that a name, an option, a default or a signature has changed under its users.
If that is intended, change the table here in the same commit and say so in the release notes.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re

import mpmath
import pytest
import torch
from rich.table import Table

import gamma_po.losses
import gamma_po.margins
import gamma_po.presets
import gamma_po.types
from gamma_po.losses import LOSSES, Loss, build_loss
from gamma_po.margins import MARGINS, GammaBetaRatio, KLPool, KLSolver, Margin, build_margin, solve_kl_margins
from gamma_po.margins.maps import MapShape
from gamma_po.ranks import Local
from gamma_po.tables import option_meanings, option_table, part_tables, preset_table, registry_table, write_table
from gamma_po.types import Evidence, PairLogps

TOLERANCE = 1e-9  # float64 against 30 digits

DPO_DEFAULT = "DPO(beta=0.1, label_smoothing=0.0)"
LOSS_OPTIONS = {
    "dpo": "beta=0.1, label_smoothing=0.0",
    "robust_dpo": "beta=0.1, label_smoothing=0.1",
    "simpo": "beta=2.0",
    "dpo_norm": "beta=5.0",
    "ipo": "beta=0.1, length_norm=True",
    "hinge": "beta=0.1",
    "kto_pair": "beta=0.1",
    "cpo": "beta=0.1, sft_weight=1.0",
    "orpo": "odds_ratio_weight=0.1",
    "rdpo": "beta=0.1, alpha=0.01",
    "exo_pair": "beta=0.1, label_smoothing=0.001",
    "nca_pair": "beta=0.1",
    "bco_pair": "beta=0.1, shift='none'",
    "sppo_hard": "beta=0.1",
    "apo_zero": "beta=0.1",
    "apo_down": "beta=0.1",
    "aot": "beta=0.1, label_smoothing=0.0",
    "aot_unpaired": "beta=0.1, label_smoothing=0.0",
    "discopop": "beta=0.1, tau=0.05",
    "dpop": "beta=0.3, penalty=50.0",
    "f_dpo": f"loss={DPO_DEFAULT}, divergence='js_divergence', alpha=None",
    "ld_dpo": f"loss={DPO_DEFAULT}, alpha=0.5",
    "beta_dpo": f"loss={DPO_DEFAULT}, alpha=0.6, keep=0.8, decay=0.9, min_beta=0.001, seed=0",
    "wpo": f"loss={DPO_DEFAULT}",
    "sft": "",
    "with_sft": "loss, sft_weight=1.0",
    "weighted_sum": f"losses=({DPO_DEFAULT}, BCOPair(beta=0.1, shift='none'), SFT()), weights=(0.8, 0.2, 1.0)",
}
KL_OPTIONS = "gamma0=1.0, tau=1.0, center=None, history=None, solver=Exact(), pool=None"
KL_DEFAULT = f"KL({KL_OPTIONS})"
MARGIN_OPTIONS = {
    "none": "",
    "fixed": "gamma=1.0",
    "kl": KL_OPTIONS,
    "kl_dual": "gamma0=1.0, tau=1.0, center=None, window=512",
    "kl_authors": "gamma0=1.0, tau=1.0, center=None, sample=256, memory=2048, seed=0",
    "map": "beta=None, shape=Piecewise(k1=0.1, k2=0.5, t0=0.0, t1=1.0), standardize='robust_z', length_norm=False, "
    "budget=None, units='reward', strength=1.0",
    "column": "scale=1.0, transform='identity'",
    "alpha_dpo": "beta=None, gamma0=1.0, alpha=0.1, decay=0.9",
    "amapo": "beta=None",
    "reverse": f"inner={KL_DEFAULT}, history=None",
    "shuffled": f"inner={KL_DEFAULT}, seed=0, history=None",
}
SHAPE_OPTIONS = {
    "Linear": "g0=0.5, k=0.25",
    "ClippedLinear": "gmax=1.0, low=0.0, high=2.0",
    "Piecewise": "k1=0.1, k2=0.5, t0=0.0, t1=1.0",
    "Softplus": "k=0.5, sharpness=4.0, threshold=1.0",
    "Sigmoid": "gmax=1.0, threshold=1.0, temperature=0.25",
    "Power": "k=0.2, threshold=0.0, p=2.0",
    "Exp": "k=0.15, threshold=0.0, cap=2.5",
    "Quantile": "gmax=1.0, p=2.0",
}
SOLVER_OPTIONS = {"Exact": "", "MirrorDescent": "steps=20", "Dual": "window=512"}
POOL_OPTIONS = {"RecentPool": "history=256", "SampledPool": "sample=256, memory=2048, seed=0"}
TYPE_FIELDS = {
    "PairLogps": "chosen rejected chosen_length rejected_length chosen_shared rejected_shared chosen_on_policy "
    "rejected_on_policy",
    "Evidence": "policy reference column",
    "PairRewards": "chosen rejected",
    "LossOutput": "loss per_pair rewards target_margin gradient_weight evidence",
}
MODEL_SIDE = {"ModelInput", "PreferenceBatch"}  # named, but their fields belong to the language model's side
EXPORTS = {
    gamma_po.losses: "AOT CPO DPO DPOP FDPO IPO LDDPO LOSSES ORPO RDPO SFT WPO AOTUnpaired APODown APOZero BCOPair "
    "BetaDPO DPONorm DiscoPOP "
    "EXOPair Hinge KTOPair Loss NCAPair PairwiseLoss RobustDPO SPPOHard SimPO TwoSidedLoss WeightedSum WithSFT "
    "build_loss gradient_weight require_margin_fits",
    gamma_po.margins: "KL MARGINS AMaPO AlphaDPO Column Dual Exact Fixed GammaBetaRatio KLAuthors KLDual KLPool "
    "KLSolver Map Margin MirrorDescent NoMargin PoolMargin RecentPool Reverse SampledPool "
    "Shuffled build_margin mirror_descent_margins solve_kl_margins",
}
SIGNATURES = {
    build_loss: "(name: 'str', **options: 'Any') -> 'Loss'",
    build_margin: "(name: 'str', **options: 'Any') -> 'Margin'",
    solve_kl_margins: "(reward_margin: 'Tensor', *, gamma0: 'float', tau: 'float') -> 'Tensor'",
    gamma_po.margins.mirror_descent_margins: "(reward_margin: 'Tensor', *, gamma0: 'float', tau: 'float', "
    "steps: 'int' = 20) -> 'Tensor'",
    gamma_po.losses.gradient_weight: "(loss: 'Loss', evidence: 'Evidence', target_margin: 'Tensor', "
    "ranks: 'Ranks | None' = None) -> 'Tensor'",
    gamma_po.presets.preset: "(name: 'str') -> 'Preset'",
    Loss.__call__: "(self, evidence: 'Evidence', target_margin: 'Tensor', ranks: 'Ranks | None' = None) -> 'Tensor'",
    Loss.init: "(self) -> 'Any'",
    Loss.step: "(self, evidence: 'Evidence', state: 'Any', ranks: 'Ranks | None' = None) -> 'tuple[Loss, Any]'",
    Margin.__call__: "(self, reward_margin: 'Tensor', evidence: 'Evidence', state: 'Any', "
    "ranks: 'Ranks | None' = None) -> 'tuple[Tensor, Any]'",
    Margin.init: "(self) -> 'Any'",
    Margin.fit: "(self, reference: 'PairLogps') -> 'Any'",
}


def options_of(entry: type) -> str:
    """`name=default` of every field, the name alone where it is required."""
    parts = []
    for field in dataclasses.fields(entry):
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        parts.append(field.name if default is dataclasses.MISSING else f"{field.name}={default!r}")
    return ", ".join(parts)


def named(base: type) -> dict[str, type]:
    """The parts of margins that derive from a base, as they are called in YAML."""
    return {part.__name__: part for part in base.__subclasses__()}


EVERYTHING = (
    *LOSSES.values(),
    *MARGINS.values(),
    *(part for base in (MapShape, KLSolver, KLPool) for part in base.__subclasses__()),
    GammaBetaRatio,
)


def public_names(module: object) -> set[str]:
    """What a module itself defines without an underscore."""
    return {name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__} - {
        name for name in vars(module) if name.startswith("_")
    }


def double(*values: float) -> torch.Tensor:
    """A float64 vector."""
    return torch.tensor(values, dtype=torch.float64)


def solve_two_pairs(h: tuple[float, float], gamma0: float, tau: float) -> list[float]:
    """γ of a pool of two by root finding with 30 digits: γ_2 = 2γ0 - γ_1, and equal marginal costs."""

    def imbalance(gamma: mpmath.mpf) -> mpmath.mpf:
        other = 2 * gamma0 - gamma
        sigmoids = 1 / (1 + mpmath.exp(h[0] - gamma)) - 1 / (1 + mpmath.exp(h[1] - other))
        return gamma0 * sigmoids + tau * mpmath.log(gamma / other)

    with mpmath.workdps(30):
        first = mpmath.findroot(imbalance, (gamma0 * 1e-6, gamma0 * (2 - 1e-6)), solver="anderson")
        return [float(first), float(2 * gamma0 - first)]


def test_the_snippet_of_the_documentation_runs_and_gives_independently_derived_numbers() -> None:
    chosen, rejected = double(-10.0, -40.0).requires_grad_(), double(-14.0, -20.0).requires_grad_()
    reference = PairLogps(double(-11.0, -30.0).requires_grad_(), double(-13.0, -25.0), double(4, 9), double(5, 3))
    chosen_length, rejected_length = double(4, 9), double(5, 3)

    evidence = Evidence(policy=PairLogps(chosen, rejected, chosen_length, rejected_length), reference=reference)
    reward_margin = double(0.2, -1.5)  # 0.1 ((-10 + 11) - (-14 + 13)), 0.1 ((-40 + 30) - (-20 + 25))
    margin = build_margin("kl", gamma0=1.0, tau=0.3, center=True)
    target_margin, state = margin(reward_margin, evidence, margin.init())
    loss = build_loss("dpo", beta=0.1)
    per_pair = loss(evidence, target_margin)

    absolute = solve_two_pairs((0.2, -1.5), 1.0, 0.3)
    assert solve_kl_margins(reward_margin, gamma0=1.0, tau=0.3).tolist() == pytest.approx(absolute, abs=TOLERANCE)
    assert target_margin.tolist() == pytest.approx([gamma - 1 for gamma in absolute], abs=TOLERANCE)
    assert state.reward_margin.tolist() == [0.2, -1.5]
    assert loss.rewards(evidence).margin.tolist() == pytest.approx([0.2, -1.5], abs=TOLERANCE)
    excess = [0.2 - (absolute[0] - 1), -1.5 - (absolute[1] - 1)]
    expected = [math.log(1 + math.exp(-x)) for x in excess]
    assert per_pair.tolist() == pytest.approx(expected, abs=TOLERANCE)

    per_pair.sum().backward()
    pull = [0.1 / (1 + math.exp(x)) for x in excess]
    assert chosen.grad.tolist() == pytest.approx([-weight for weight in pull], abs=TOLERANCE)
    assert rejected.grad.tolist() == pytest.approx(pull, abs=TOLERANCE)
    assert reference.chosen.grad is None and not target_margin.requires_grad


def test_evidence_and_log_probabilities_accept_positional_fields() -> None:
    logps = PairLogps(double(-2.0), double(-3.0), double(2), double(4))
    assert Evidence(logps) == Evidence(policy=logps, reference=None, column=None)
    assert Evidence(logps, None, double(7.0)).column.item() == 7.0
    assert (logps.margin.item(), logps.mean_chosen.item(), logps.mean_rejected.item()) == (1.0, -1.0, -0.75)


def test_without_ranks_both_calls_are_those_of_one_process() -> None:
    evidence = Evidence(*[PairLogps(double(-2.0, -1.0), double(-3.0, -5.0), double(2, 1), double(4, 3))] * 2)
    margin = build_margin("kl", center=False)
    plain, given = (margin(double(0.5, -0.5), evidence, margin.init(), *ranks)[0] for ranks in ((), (Local(),)))
    assert torch.equal(plain, given)
    loss = build_loss("kto_pair")
    assert torch.equal(loss(evidence, plain), loss(evidence, plain, Local()))


@pytest.mark.parametrize(
    ("registry", "frozen"),
    [
        (LOSSES, LOSS_OPTIONS),
        (MARGINS, MARGIN_OPTIONS),
        (named(MapShape), SHAPE_OPTIONS),
        (named(KLSolver), SOLVER_OPTIONS),
        (named(KLPool), POOL_OPTIONS),
        ({"GammaBetaRatio": GammaBetaRatio}, {"GammaBetaRatio": "gamma_beta_ratio"}),
    ],
    ids=["losses", "margins", "shapes", "solvers", "pools", "ratio"],
)
def test_frozen_names_options_and_defaults(registry: dict[str, type], frozen: dict[str, str]) -> None:
    assert {name: options_of(entry) for name, entry in registry.items()} == frozen


def test_frozen_every_option_is_given_by_keyword_and_nothing_built_can_be_changed() -> None:
    for entry in EVERYTHING:
        parameters = inspect.signature(entry).parameters.values()
        assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in parameters)
        assert entry.__dataclass_params__.frozen


def test_frozen_exports() -> None:
    for module, names in EXPORTS.items():
        assert set(module.__all__) == set(names.split())
        assert all(hasattr(module, name) for name in module.__all__)
    assert public_names(gamma_po.types) == set(TYPE_FIELDS) | MODEL_SIDE
    assert public_names(gamma_po.presets) == {"Preset", "preset"} and "PRESETS" in vars(gamma_po.presets)


def test_frozen_fields_of_the_types_in_their_order() -> None:
    for name, frozen in TYPE_FIELDS.items():
        assert getattr(gamma_po.types, name)._fields == tuple(frozen.split())


def test_frozen_signatures() -> None:
    for function, frozen in SIGNATURES.items():
        assert str(inspect.signature(function)) == frozen


@pytest.mark.parametrize(("command", "registry"), [("losses", LOSS_OPTIONS), ("margins", MARGIN_OPTIONS)])
def test_the_printed_tables_have_every_name_and_the_frozen_defaults(command: str, registry: dict[str, str]) -> None:
    assert plain_rows(registry_table(command), 0) == [(name,) for name in registry]
    printed: dict[str, list[str]] = {name: [] for name in registry}
    for name, option, default in plain_rows(option_table(command), 0, 1, 2):
        printed[name].append(option if default == "required" else f"{option}={default}")
    assert {name: ", ".join(options) for name, options in printed.items()} == registry


def test_the_margins_tables_end_with_every_map_shape_its_formula_and_the_parts_of_the_kl_margin() -> None:
    tables = part_tables()
    shapes = dict(plain_rows(tables[0], 0, 1))
    assert list(shapes) == list(SHAPE_OPTIONS) and shapes["Power"] == "γ = k · relu(z - t)^p, t = threshold"
    assert all(formula.startswith("γ = ") for formula in shapes.values())
    assert [row[0] for row in plain_rows(tables[2], 0)] == list(SOLVER_OPTIONS)
    assert [row[0] for row in plain_rows(tables[4], 0)] == list(POOL_OPTIONS)
    options = {
        (name, option): default for table in tables[1::2] for name, option, default in plain_rows(table, 0, 1, 2)
    }
    assert options["Quantile", "p"] == "2.0" and options["SampledPool", "memory"] == "2048"
    assert options["GammaBetaRatio", "gamma_beta_ratio"] == "required"


GREEK = re.compile(r"[α-ω]")


def test_every_symbol_of_a_formula_is_explained_in_the_legend_in_the_formula_or_among_the_options() -> None:
    tables = [(registry_table("losses"), LOSSES), (registry_table("margins"), MARGINS)]
    tables.append((part_tables()[0], named(MapShape)))
    for table, entries in tables:
        caption = str(table.caption)
        for entry in entries.values():
            here = entry.formula + " ".join(option_meanings(entry).values())
            if "loss" in option_meanings(entry):
                here += " ".join(option_meanings(LOSSES["dpo"]).values())
            for letter in set(GREEK.findall(entry.formula)) - set("γπ"):
                explained = letter in " ".join(option_meanings(entry).values()) or re.search(
                    rf"{letter} (= |a running)|Σ_{letter}", entry.formula
                )
                assert explained or letter in "β", f"{letter} of {entry.formula}"
            for symbol in re.findall(r"ℓ|\b(?:s|relu|expm1)(?=\()", entry.formula):
                assert f"{symbol}(x) = " in caption
            for symbol, meaning in LEGEND.items():
                if re.search(rf"(?<![\w']){symbol}(?![\w'])", re.sub(r"\b(a|as) [a-z]+", "", entry.formula)):
                    assert meaning in caption, f"{symbol} of {entry.formula}"
    assert "R:" not in str(registry_table("margins").caption)  # only what occurs


LEGEND = {"h": "h: ", "a": "a, b: ", "b": "a, b: ", "a0": "a0, b0: ", "n_w": "n_w, n_l: ", "n_l": "n_w, n_l: "} | {
    "r_w": "r_w = a - a0", "r_l": "r_l = b - b0", "R": "R: ", "R_w": "R: ", "R_l": "R: ", "z": "z: ", "q": "q: ",
}  # fmt: skip


def test_one_symbol_stands_for_the_logistic_function() -> None:
    for entry in EVERYTHING:
        text = f"{getattr(entry, 'formula', '')} {entry.__doc__}"
        assert "σ" not in text and "logistic function" not in text


UNITS = ("reward units", "nats", "per nat", "of z", "share", "weight", "number", "integer", "how many", "in `units`")


def test_every_option_says_what_it_means_and_every_number_its_unit() -> None:
    for entry in EVERYTHING:
        meanings = option_meanings(entry)
        for field in dataclasses.fields(entry):
            meaning = meanings[field.name]
            assert len(meaning) > 10 and not meaning.startswith("see")
            if "float" in field.type or "int" in field.type.split(" |"):
                assert any(unit in meaning for unit in UNITS), f"{entry.__name__}.{field.name}: {meaning}"


@pytest.mark.parametrize(("command", "tables"), [("losses", 2), ("margins", 10), ("presets", 1)])
def test_the_lookup_commands_write_their_tables(command: str, tables: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert write_table(command) == 0
    printed = capsys.readouterr().out
    assert sum(set(line.strip()) == {"─"} for line in printed.splitlines()) == tables  # a rule under each head
    assert "of " + command in printed or command == "presets"


def plain_rows(table: Table, *columns: int) -> list[tuple[str, ...]]:
    """The rows of a table, as text."""
    return list(zip(*([cell.plain for cell in table.columns[column].cells] for column in columns), strict=True))


def test_the_presets_table_prints_loss_and_margin_of_every_preset() -> None:
    rows = zip(*([cell.plain for cell in column.cells] for column in preset_table().columns), strict=True)
    assert [row[0] for row in rows] == list(gamma_po.presets.PRESETS)
    assert ("KL(gamma0=4.0, tau=10.0, center=False, history=None, solver=Exact(), pool=None)",) in plain_rows(
        preset_table(), 2
    )
