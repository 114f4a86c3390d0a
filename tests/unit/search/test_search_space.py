import numpy as np
import pytest
from feasible_mixtures import feasible
from scipy.optimize import minimize

from megatron_demix.errors import MixtureError
from megatron_demix.mixture import Mixture, apportion, tokens_of_epochs
from megatron_demix.search.space import Group, SearchSpace, epoch_caps

NATURAL = Mixture({"general": 0.7, "code": 0.2, "math": 0.1})
UNIFORM = Mixture.uniform(NATURAL)


def test_epoch_caps_are_epochs_times_tokens_over_the_budget_and_never_above_1() -> None:
    caps = epoch_caps({"code": 30e9, "math": 10e9, "general": 900e9}, {"code": 2, "math": 4}, 100e9)
    assert caps == {"code": 0.6, "math": 0.4, "general": 1.0}


def test_a_share_at_its_cap_can_be_built() -> None:
    """Whatever the sizes: rounded to whole tokens it is no more than max_epochs allow."""
    draw = np.random.default_rng(0)
    for _ in range(300):
        tokens, budget = int(draw.integers(1, 90_000)), int(draw.integers(90_000, 10_000_000))
        epochs = float(draw.choice([1, 1.2, 2.5, 3, 7.1]))
        cap = epoch_caps({"a": tokens, "b": 1e9}, {"a": epochs}, budget)["a"]
        if cap < 1:
            assert apportion(budget, [cap, 1 - cap])[0] <= tokens_of_epochs(tokens, epochs)


def test_shares_are_the_anchor_and_the_weights_in_the_anchors_proportion() -> None:
    space = SearchSpace(NATURAL, UNIFORM, 0.4)
    weights_MD = np.array([[1.0, 0.0, 0.0], [0.2, 0.3, 0.5]])
    np.testing.assert_allclose(space.shares(weights_MD), 0.4 / 3 + 0.6 * weights_MD)


def test_feasible_reads_caps_on_actual_shares_not_on_weights() -> None:
    space = SearchSpace(NATURAL, Mixture({"general": 1.0}), 0.5, {"code": 0.3})
    # A weight of .6 stands for a share of .3.
    rows = np.array([[0.4, 0.6, 0.0], [0.39, 0.61, 0.0], [0.5, 0.6, 0.0], [1.1, -0.1, 0.0]])
    assert feasible(space, rows).tolist() == [True, False, False, False]


def test_nearest_keeps_feasible_rows_and_the_proportions_of_unbounded_entries() -> None:
    space = SearchSpace(NATURAL, UNIFORM, 0.0, {"code": 0.25})
    inside, outside = space.nearest(np.array([[0.5, 0.2, 0.3], [0.2, 0.6, 0.2]]))
    np.testing.assert_allclose(inside, [0.5, 0.2, 0.3], atol=1e-11)
    np.testing.assert_allclose(outside, [0.375, 0.25, 0.375], atol=1e-11)


def test_nearest_gives_zero_entries_something_only_when_the_others_are_full() -> None:
    space = SearchSpace(NATURAL, UNIFORM, 0.0, {"general": 0.6, "code": 0.3})
    np.testing.assert_allclose(space.nearest(np.array([[1.0, 1.0, 0.0]])), [[0.6, 0.3, 0.1]], atol=1e-11)


def test_groups_and_fixed_shares_hold() -> None:
    space = SearchSpace(
        NATURAL,
        UNIFORM,
        0.3,
        min_shares={"math": 0.2},
        max_shares={"math": 0.2},
        groups={"text": Group(("general", "code"), 0, 0.85)},
    )
    weights_MD = space.nearest(np.random.default_rng(0).dirichlet(np.ones(3), size=100))
    np.testing.assert_allclose(space.shares(weights_MD)[:, 2], 0.2, atol=1e-11)
    assert feasible(space, weights_MD).all()
    space = SearchSpace(NATURAL, UNIFORM, 0.0, groups={"skills": Group(("code", "math"), 0.4, 0.5)})
    sums = space.nearest(np.array([[1, 0, 0], [0, 1, 1], [5, 2, 2.5]]))[:, 1:].sum(axis=1)
    np.testing.assert_allclose(sums, [0.4, 0.5, 4.5 / 9.5], atol=1e-11)


def test_the_leash_pulls_rows_in_and_leaves_near_ones_alone() -> None:
    space = SearchSpace(NATURAL, UNIFORM, 0.0, max_kl=0.2)
    near, far = space.nearest(np.array([[0.6, 0.3, 0.1], [0.0, 0.0, 1.0]]))
    np.testing.assert_allclose(near, [0.6, 0.3, 0.1], atol=1e-11)
    assert space.kl(far[None])[0] == pytest.approx(0.2, abs=1e-6)
    assert space.kl(far[None])[0] <= 0.2 + 1e-9


def test_a_space_of_one_point_is_that_point() -> None:
    thirds = dict.fromkeys(NATURAL, 1 / 3)
    space = SearchSpace(NATURAL, UNIFORM, 0.0, thirds)
    weights_MD = space.nearest(np.eye(3))
    np.testing.assert_allclose(weights_MD, 1 / 3, atol=1e-11)
    assert feasible(space, weights_MD).all()
    assert (weights_MD.sum(axis=1) == 1).all()


def test_centre_is_the_natural_mixture_where_that_is_feasible() -> None:
    np.testing.assert_allclose(SearchSpace(NATURAL, NATURAL, 0.5).centre_D, list(NATURAL.values()), atol=1e-11)
    capped = SearchSpace(NATURAL, UNIFORM, 0.0, {"general": 0.4})
    np.testing.assert_allclose(capped.centre_D, [0.4, 0.4, 0.2], atol=1e-11)


def test_a_leash_is_measured_from_the_closest_mixture_where_groups_bind() -> None:
    natural = Mixture({"a": 0.5, "b": 0.3, "c": 0.15, "d": 0.05})
    groups = {"g": Group(("a", "c"), 0.0, 0.4), "h": Group(("b",), 0.0, 0.45)}
    free = SearchSpace(natural, Mixture.uniform(natural), 0.0, {"d": 0.2}, {}, groups)

    def kl(shares_D: np.ndarray) -> float:
        return float((shares_D * np.log(shares_D / np.array([0.5, 0.3, 0.15, 0.05]))).sum())

    bounds = [(1e-9, 1), (1e-9, 0.45), (1e-9, 1), (1e-9, 0.2)]
    limits = [
        {"type": "eq", "fun": lambda shares_D: shares_D.sum() - 1},
        {"type": "ineq", "fun": lambda shares_D: 0.4 - shares_D[0] - shares_D[2]},
    ]
    closest = minimize(kl, np.array([0.2, 0.4, 0.2, 0.2]), bounds=bounds, constraints=limits, options={"ftol": 1e-14})
    np.testing.assert_allclose(free.centre_D, closest.x, atol=1e-5)
    leash = {"groups": groups, "max_kl": kl(free.centre_D) + 1e-6}
    space = SearchSpace(natural, Mixture.uniform(natural), 0.0, {"d": 0.2}, {}, **leash)
    assert feasible(space, space.nearest(np.eye(4))).all()
    with pytest.raises(MixtureError, match="no feasible mixture lies within"):
        SearchSpace(natural, Mixture.uniform(natural), 0.0, {"d": 0.2}, {}, groups, kl(free.centre_D) - 1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"epoch_caps": {"math": 0.1}},
            r"'math': max_epochs x its tokens / the final budget allow a share of 0\.1, but the anchor alone gives it 0\.1667 "
            r".* 0\.06667 too much\. Allow it more epochs, .* or lower its part in the anchor",
        ),
        (
            {"max_shares": {"general": 0.4, "code": 0.3, "math": 0.2}},
            r"sum to 0\.9, expected at least 1: 0\.1 short .*'general'",
        ),
        ({"max_shares": {"logic": 0.4}}, "max_shares: unknown domain 'logic'; the domains are general, code, math"),
        ({"max_shares": {"math": 1.4}}, "max_shares of domain 'math' is 1.4, expected a share"),
        (
            {"max_shares": {"general": 0.9}, "epoch_caps": {"general": 0.4, "code": 0.3, "math": 0.2}},
            r"sum to 0\.9, expected at least 1: 0\.1 short .*'general'\. Allow it more epochs",
        ),
        (
            {"max_shares": {"math": 0.1}},
            r"'math': max_share allows 0\.1, but the anchor alone gives it 0\.1667 .* 0\.06667 too much\. Raise max_share, or",
        ),
        ({"min_shares": {"math": 0.9}}, r"'math': min_share asks for 0\.9, but the components reach 0\.6667: 0\.2333 short"),
        (
            {"min_shares": {"math": 0.5}, "max_shares": {"math": 0.4}},
            r"min_share asks for 0\.5, but max_share allows 0\.4: 0\.1 short\. Lower min_share, or raise max_share",
        ),
        (
            {"min_shares": {"math": 0.5}, "epoch_caps": {"math": 0.4}},
            r"min_share asks for 0\.5, but max_epochs x its tokens / the final budget allow a share of 0\.4: 0\.1 short",
        ),
        (
            {"min_shares": {"math": 0.6, "code": 0.6}},
            r"smallest allowed shares sum to 1\.367, expected at most 1: 0\.3667 too much",
        ),
        ({"groups": {"g": Group(("code", "math"), 0.0, 0.2)}}, r"group 'g' may have at most 0\.2, but .* already give 0\.3333"),
        (
            {"groups": {"g": Group(("code",), 0.5, 1.0)}, "max_shares": {"code": 0.4}},
            r"group 'g' must have at least 0\.5, but its domains' maximums sum to 0\.4: 0\.1 short",
        ),
        (
            {"groups": {"g": Group(("code", "math"), 0.9, 1.0)}},
            r"group 'g' must have at least 0\.9, but the components reach 0\.8333 \(anchor share 0\.5\): 0\.06667 short",
        ),
        ({"groups": {"g": Group(("code",), 0.5, 0.4)}}, "group 'g' has bounds 0.5 to 0.4"),
        ({"groups": {"g": Group(("logic",))}}, "group 'g': unknown domain 'logic'"),
        ({"groups": {"g": Group(("code",)), "h": Group(("code", "math"))}}, "'code' is in the groups 'g' and 'h'"),
        ({"max_kl": 1e-3}, r"max_kl: no feasible mixture lies within 0\.001 nats .* closest is at 0\.0"),
    ],
)
def test_infeasible_spaces_name_the_constraint_and_the_gap(arguments: dict, message: str) -> None:
    with pytest.raises(MixtureError, match=message):
        SearchSpace(NATURAL, UNIFORM, 0.5, **arguments)


def test_other_bad_arguments() -> None:
    with pytest.raises(MixtureError, match="anchor share is 1, expected 0 <= share < 1"):
        SearchSpace(NATURAL, UNIFORM, 1)
    with pytest.raises(MixtureError, match="mixture: unknown domain 'prose'; the domains are general, code, math"):
        SearchSpace(NATURAL, Mixture({"prose": 1.0}), 0.5)
    with pytest.raises(MixtureError, match="target tokens are 0, expected > 0"):
        epoch_caps({"code": 1.0}, {}, 0)
    with pytest.raises(MixtureError, match="domain 'code' has 0 tokens, expected > 0"):
        epoch_caps({"code": 0}, {}, 10)
