"""The batched bandit against plain loops over one run, and its measures against explicit sums."""

from __future__ import annotations

import math

import pytest
import torch

from gamma_po.errors import ConfigError
from gamma_po.losses import DPO, IPO, KTOPair, SimPO, build_loss
from gamma_po.margins import KL, Fixed, Map, NoMargin, Reverse, Shuffled, build_margin
from gamma_po.margins.ablations import reversed_ranks
from gamma_po.studies.bandit import Bandit
from gamma_po.studies.figures import frontier_figure
from gamma_po.studies.measures import Judge
from gamma_po.studies.network import scores, with_constant
from gamma_po.studies.settings import Setting
from gamma_po.studies.training import Training, known_margins, ordered, train
from gamma_po.studies.worlds import HeldOut, labels, reference_accuracy, reference_logps
from gamma_po.types import Evidence, PairLogps

SMALL = Bandit(prompts=96, held_out=8, responses=5, features=4)
HOW = Training(steps=12, batch=32, units=8, snapshot_every=4)
SAME_SCORES = 2e-5  # float32, 12 steps of Adam, another order of summation

MARGINS = {
    "none": NoMargin(),
    "fixed": Fixed(gamma=0.7),
    "kl": KL(gamma0=2.0, tau=1.5, history=40, center=True),
    "kl, hard": KL(gamma0=2.0, tau=0.25, history=40, center=False),
    "kl reversed": Reverse(inner=KL(gamma0=2.0, tau=1.5, history=40, center=True)),
    "kl shuffled": Shuffled(inner=KL(gamma0=2.0, tau=1.5, history=40, center=True)),
    "map": Map(budget=0.5),
}


@pytest.fixture(scope="module")
def worlds():
    return SMALL.draw((0, 1, 2), (0.0, 0.75))


def beginning(worlds, world, how):
    """The network of a seed as a torch module, and the rows of every step."""
    first = worlds.pairs.first[world]
    generator = torch.Generator().manual_seed(1_000_003 * (worlds.seed[world] + 1) + 1)
    start = torch.randn(first.shape[1] + 1, how.units, generator=generator) / math.sqrt(first.shape[1] + 1)
    layer, out = torch.nn.Linear(first.shape[1], how.units), torch.nn.Linear(how.units, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(start[:-1].T)
        layer.bias.copy_(start[-1])
        out.weight.zero_()
    generator = torch.Generator().manual_seed(1_000_003 * (worlds.seed[world] + 1) + 2)
    order = torch.cat([torch.randperm(len(first), generator=generator) for _ in range(how.steps)]).view(-1, how.batch)
    return torch.nn.Sequential(layer, torch.nn.ReLU(), out), order


def learning_rate(setting, how, step):
    """A warm-up and a cosine."""
    warm = math.ceil(how.warmup_ratio * how.steps)
    late = 0.5 * (1 + math.cos(math.pi * (step - warm) / (how.steps - warm)))
    return setting.learning_rate * ((step + 1) / warm if step < warm else late)


def one_run(worlds, world, setting, how):
    """A plain training loop of one run: torch's modules, autograd and Adam, and the margin on [B] tensors."""
    first, second = (field[world] for field in worlds.pairs[:2])
    found = labels(worlds.pairs, setting.flip_rate)
    policy, order = beginning(worlds, world, how)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1.0)
    margin = setting.margin.bind(setting.loss)
    everything = reference_logps(worlds.pairs, found.first_chosen)
    own = PairLogps(*(field[world] for field in everything[:4]))
    state = margin.fit(own) if margin.needs_fit else margin.init()
    for step in range(how.steps):
        rows = order[step]
        prefers_first = found.first_chosen[world, rows]
        r_first, r_second = policy(first[rows])[:, 0], policy(second[rows])[:, 0]
        one = torch.ones(how.batch)
        reference = [own.chosen[rows], own.rejected[rows]]
        chosen, rejected = torch.where(prefers_first, r_first, r_second), torch.where(prefers_first, r_second, r_first)
        evidence = Evidence(
            PairLogps(reference[0] + chosen, reference[1] + rejected, one, one), PairLogps(*reference, one, one)
        )
        h = setting.loss.rewards(evidence).margin.detach()
        gamma, state = margin(h, evidence.map(torch.Tensor.detach), state)
        keep = one if setting.mask == "none" else (~found.flipped[world, rows]).float()
        loss = (setting.loss(evidence, gamma) * keep).sum() / keep.sum()
        optimizer.param_groups[0]["lr"] = learning_rate(setting, how, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return policy


def centred(f):
    """Scores without their mean, which no pair decides: its gradient is rounding, which Adam blows up."""
    return f - f.mean(-1, keepdim=True)


def settings_of(name):
    margin = MARGINS[name]
    settings = [Setting(arm=name, loss=DPO(beta=0.5), margin=margin, flip_rate=rate) for rate in (0.0, 0.3)]
    settings.append(Setting(arm="ipo", loss=IPO(beta=0.5), margin=margin, learning_rate=0.02))
    settings.append(Setting(arm="simpo", loss=SimPO(beta=0.5), margin=margin))
    settings.append(Setting(arm="masked", loss=DPO(beta=0.5), margin=margin, flip_rate=0.3, mask="flipped"))
    return settings


@pytest.mark.parametrize("name", MARGINS)
def test_a_run_of_the_batched_program_is_a_plain_training_loop(name, worlds):
    settings = ordered([*settings_of(name), *settings_of("none")])
    trained = train(worlds, settings, HOW)
    held_out = with_constant(worlds.held_out.features.flatten(1, 2))
    found = scores(trained.network, held_out)
    for index, setting in enumerate(settings):
        if setting.margin == NoMargin() and name != "none":
            continue
        for world in (1, 4):
            policy = one_run(worlds, world, setting, HOW)
            expected = policy(worlds.held_out.features[world].flatten(0, 1))[:, 0]
            assert expected.std() > 0.01
            assert (centred(found[world, index]) - centred(expected)).abs().max() < SAME_SCORES


def one_kto_run(worlds, world, beta, gamma, setting, how):
    """KTO's formula on the probabilities of a softmax over all responses of the prompt."""
    pairs, (policy, order) = worlds.pairs, beginning(worlds, world, how)
    found = labels(pairs, setting.flip_rate).first_chosen[world]
    optimizer = torch.optim.Adam(policy.parameters(), lr=1.0)
    for step in range(how.steps):
        rows = order[step]
        log_policy = torch.log_softmax(pairs.reference[world, rows] + policy(pairs.responses[world, rows])[..., 0], 1)
        reward = beta * (log_policy - pairs.reference[world, rows])
        sides = []
        for side in (pairs.first, pairs.second):
            place = (pairs.responses[world, rows] == side[world, rows][:, None]).all(-1)
            assert bool((place.sum(1) == 1).all())
            sides.append(reward[place])
        chosen = torch.where(found[rows], sides[0], sides[1])
        rejected = torch.where(found[rows], sides[1], sides[0])
        k_chosen, k_rejected = (max(0.0, float(side.detach().mean())) for side in (chosen, rejected))
        up, down = chosen - gamma / 2 - k_rejected, rejected + gamma / 2 - k_chosen
        loss = (1 / (1 + up.exp()) + 1 / (1 + (-down).exp())).mean()
        optimizer.param_groups[0]["lr"] = learning_rate(setting, how, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return policy


def test_kto_is_trained_on_the_probabilities_of_a_softmax_over_all_responses(worlds):
    settings = [Setting(arm="a", loss=DPO(beta=0.5), flip_rate=0.3)]
    for gamma, flips in ((0.0, 0.0), (0.8, 0.0), (0.8, 0.3)):
        settings.append(Setting(arm=f"kto {gamma}", loss=KTOPair(beta=2.0), margin=Fixed(gamma=gamma), flip_rate=flips))
    settings = ordered([settings[1], settings[0], *settings[2:]])
    assert settings[0].arm == "a"  # what needs all responses comes last
    held_out = with_constant(worlds.held_out.features.flatten(1, 2))
    found = scores(train(worlds, settings, HOW).network, held_out)
    assert torch.allclose(found[:, :1], scores(train(worlds, settings[:1], HOW).network, held_out), atol=SAME_SCORES)
    for index, setting in enumerate(settings[1:], start=1):
        for world in (1, 4):
            policy = one_kto_run(worlds, world, 2.0, setting.margin.gamma, setting, HOW)
            expected = policy(worlds.held_out.features[world].flatten(0, 1))[:, 0]
            assert expected.std() > 0.01
            assert (centred(found[world, index]) - centred(expected)).abs().max() < SAME_SCORES


def test_kto_without_the_flipped_pairs_is_refused():
    with pytest.raises(ConfigError, match="none with kto_pair"):
        Setting(arm="x", loss=KTOPair(), mask="flipped")


def test_no_margin_and_a_margin_of_zero_train_the_same_weights_bit_for_bit(worlds):
    settings = ordered([Setting(arm="base"), Setting(arm="kl", margin=KL()), Setting(arm="0", margin=Fixed(gamma=0.0))])
    network = train(worlds, settings, HOW).network
    base, zero = ([s.arm for s in settings].index(arm) for arm in ("base", "0"))
    assert all(torch.equal(layer[:, base], layer[:, zero]) for layer in network)
    assert not torch.equal(network.out[:, base], network.out[:, [s.arm for s in settings].index("kl")])


def test_snapshots_hold_the_pulls_of_the_loss(worlds):
    snapshots = train(worlds, [Setting(arm="a", loss=DPO(beta=0.5), margin=Fixed(gamma=0.3))], HOW).snapshots
    assert snapshots.step == (4, 8, 12)
    assert snapshots.weight.shape == (3, HOW.batch, 1, len(worlds))
    expected = 1 / (1 + (snapshots.reward_margin - 0.3).exp())
    assert torch.allclose(snapshots.weight, expected, atol=1e-6)


def test_shuffled_maps_differ_between_seeds_and_keep_the_mean(worlds):
    setting = Setting(arm="s", margin=Shuffled(inner=Map(budget=0.5)))
    table = known_margins(setting, worlds, labels(worlds.pairs, 0.0))
    straight = known_margins(Setting(arm="m", margin=Map(budget=0.5)), worlds, labels(worlds.pairs, 0.0))
    assert torch.allclose(table.mean(1), torch.full((len(worlds),), 0.5), atol=1e-5)
    assert torch.equal(table.sort(1).values, straight.sort(1).values)
    ranks = [straight[w].argsort().argsort()[table[w].argsort()] for w in (0, 2)]
    assert not torch.equal(*ranks)


def test_pools_side_by_side_are_reversed_as_if_each_were_alone():
    score = torch.tensor([[3.0, 1.0], [1.0, 1.0], [2.0, 0.0], [2.0, 5.0]])
    gamma = torch.tensor([[0.4, 0.2], [0.1, 0.2], [0.2, 0.1], [0.3, 0.9]])
    # first pool: 0.1 to the largest score, 0.4 to the smallest, the tie shares 0.2 and 0.3;
    # second pool: 0.1 to the largest, 0.9 to the smallest, the tie has 0.2 twice
    expected = torch.tensor([[0.1, 0.2], [0.4, 0.2], [0.25, 0.9], [0.25, 0.1]])
    assert torch.allclose(reversed_ranks(score, gamma), expected)


def test_flips_are_nested_and_as_frequent_as_asked():
    pairs = Bandit(prompts=4096, held_out=1).draw((0,), (0.5,)).pairs
    low, high = labels(pairs, 0.1), labels(pairs, 0.4)
    assert bool((high.flipped | ~low.flipped).all())
    assert float(high.flipped.double().mean()) == pytest.approx(0.4, abs=0.025)  # 3 standard errors
    assert torch.equal(high.first_chosen ^ high.flipped, pairs.first_preferred)
    assert torch.equal(high.wrong, high.first_chosen ^ pairs.first_better)


def test_the_reference_orders_pairs_the_better_the_larger_rho_is():
    accuracy = reference_accuracy(Bandit(held_out=1).draw(range(9), (0.0, 0.5, 0.75)).pairs).view(9, 3).mean(0)
    assert accuracy.tolist() == pytest.approx([0.49, 0.63, 0.73], abs=0.06)  # 3 standard errors over worlds


def test_pairs_come_from_the_reference_without_replacement():
    worlds = Bandit(prompts=4000, held_out=1, responses=3).draw((3,), (1.0,))
    pairs = worlds.pairs
    assert not bool((pairs.first == pairs.second).all(-1).any())
    # with ρ = 1 and three responses, the likelier of two draws is the better one
    assert bool(((pairs.reference_first > pairs.reference_second) == pairs.first_better).all())
    assert float(pairs.first_better.double().mean()) == pytest.approx(0.5, abs=0.025)


def held_out_prompts():
    generator = torch.Generator().manual_seed(5)
    gold = torch.randn(3, 4, generator=generator)
    gold[1, 0] = gold[1, 3]
    reference = torch.randn(3, 4, generator=generator).masked_fill(torch.eye(3, 4, dtype=torch.bool), -torch.inf)
    return HeldOut(torch.zeros(3, 4, 1), reference.log_softmax(-1), gold), torch.randn(2, 3, 4, generator=generator)


def test_win_rate_kl_and_accuracy_are_explicit_sums_over_pairs_of_responses():
    held_out, f = held_out_prompts()
    judge = Judge(held_out)
    outcome, accuracy = judge.outcome(f, 0.7), judge.pair_accuracy(f)
    for run in range(2):
        wins, kl, right, weight = 0.0, 0.0, 0.0, 0.0
        for prompt in range(3):
            ref = [math.exp(x) for x in held_out.reference[prompt].tolist()]
            g, scored = held_out.gold[prompt].tolist(), f[run, prompt].tolist()
            raw = [p * math.exp(0.7 * s) for p, s in zip(ref, scored, strict=True)]
            policy = [p / sum(raw) for p in raw]
            kl += sum(p * math.log(p / q) for p, q in zip(policy, ref, strict=True) if p) / 3
            for a in range(4):
                for b in range(4):
                    wins += policy[a] * ref[b] * ((g[a] > g[b]) + 0.5 * (g[a] == g[b])) / 3
                    if g[a] > g[b]:
                        right += ref[a] * ref[b] * (scored[a] > scored[b])
                        weight += ref[a] * ref[b]
        assert float(outcome.win_rate[run]) == pytest.approx(wins, abs=1e-6)
        assert float(outcome.kl[run]) == pytest.approx(kl, abs=1e-6)
        assert float(accuracy[run]) == pytest.approx(right / weight, abs=1e-6)


def test_scores_are_rescaled_to_the_kl_asked_for_and_nan_where_it_is_out_of_reach():
    held_out, f = held_out_prompts()
    judge = Judge(held_out)
    for kl in (0.01, 0.3):
        assert judge.outcome(f, judge.scale_for(f, kl)).kl.tolist() == pytest.approx([kl, kl], rel=1e-3)
    assert judge.scale_for(f, 50.0).isnan().all()
    assert judge.scale_for(torch.zeros(2, 3, 4), 0.3).isnan().all()


@pytest.mark.parametrize("name", ["nca_pair", "cpo", "dpop", "bco_pair", "sft"])
def test_a_loss_that_needs_more_than_the_difference_is_refused(name):
    with pytest.raises(ConfigError, match=f"'{name}' is not allowed in a bandit study"):
        Setting(arm="x", loss=build_loss(name))


@pytest.mark.parametrize("name", ["alpha_dpo", "column", "kl_dual"])
def test_a_margin_that_the_batched_program_cannot_run_is_refused(name):
    with pytest.raises(ConfigError, match=f"the margin '{name}' is not known"):
        Setting(arm="x", margin=build_margin(name))


def test_a_run_alone_is_what_it_is_among_many(worlds):
    settings = [Setting(arm=str(k), loss=DPO(beta=0.1 * (k + 1)), margin=KL()) for k in range(5)]
    x = with_constant(worlds.held_out.features.flatten(1, 2))
    many, alone = (scores(train(worlds, chosen, HOW).network, x) for chosen in (settings, settings[2:3]))
    assert (centred(many[:, 2]) - centred(alone[:, 0])).abs().max() < SAME_SCORES


def test_the_frontier_names_every_arm_once_also_those_that_need_flips() -> None:
    measured = {"stage": "arms", "rho": 0.5, "win_rate_kl1": 0.6, "kl": 1.0, "win_rate": 0.6}
    rows = [measured | {"arm": arm, "flip_rate": rate} for arm, rate in (("dpo", 0.0), ("dpo", 0.4), ("oracle", 0.4))]
    figure = frontier_figure(rows)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["dpo", "oracle"]
