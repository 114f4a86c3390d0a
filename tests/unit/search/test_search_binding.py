from megatron_demix.mixture import Mixture
from megatron_demix.search.binding import Binding, binding
from megatron_demix.search.space import Group, SearchSpace

NATURAL = Mixture({"general": 0.7, "code": 0.2, "math": 0.1})


def test_every_bound_that_a_mixture_lies_at_is_named_with_its_setting() -> None:
    space = SearchSpace(
        NATURAL,
        Mixture({"general": 1.0}),
        0.4,
        max_shares={"code": 0.35},
        min_shares={"math": 0.05},
        groups={"skills": Group(("code", "math"), 0.2, 0.4)},
    )
    found = binding(space, Mixture({"general": 1 / 3, "code": 0.35 / 0.6, "math": 0.05 / 0.6}))
    assert [(b.constraint, b.of, b.side, b.limit) for b in found] == [
        ("max_share", "code", "at most", 0.35),
        ("min_share", "math", "at least", 0.05),
        ("group", "skills", "at most", 0.4),
    ]
    assert binding(space, Mixture({"general": 0.5, "code": 0.3, "math": 0.2})) == []


def test_epochs_bind_before_a_looser_wish_and_the_anchor_binds_on_both_sides() -> None:
    space = SearchSpace(NATURAL, Mixture({"general": 1.0}), 0.4, {"code": 0.5}, epoch_caps={"code": 0.3, "general": 1.0})
    found = binding(space, Mixture({"general": 0.0, "code": 0.5, "math": 0.5}))
    assert found == [Binding("anchor", "general", "at least", 0.4, 0.4), Binding("max_epochs", "code", "at most", 0.3, 0.3)]
    assert binding(space, Mixture({"general": 0.0, "code": 0.0, "math": 1.0}))[1:] == [
        Binding("anchor", "math", "at most", 0.6, 0.6)
    ]


def test_the_leash_binds_where_the_divergence_is_used_up() -> None:
    space = SearchSpace(NATURAL, NATURAL, 0.0, max_kl=0.1)
    far = space.mixture(space.nearest([[0.0, 0.0, 1.0]])[0])
    assert [b.constraint for b in binding(space, far)] == ["max_kl"]
    assert binding(space, NATURAL) == []


def test_a_share_between_close_bounds_lies_at_neither() -> None:
    natural = Mixture({"general": 0.7, "code": 0.2975, "tiny": 0.0025})
    capped = SearchSpace(natural, natural, 0.0, epoch_caps={"tiny": 0.004})
    assert binding(capped, Mixture({"general": 0.7, "code": 0.3, "tiny": 0.0})) == []
    assert [b.of for b in binding(capped, Mixture({"general": 0.7, "code": 0.29601, "tiny": 0.00399}))] == ["tiny"]
    between = SearchSpace(natural, natural, 0.0, min_shares={"tiny": 0.001}, max_shares={"tiny": 0.004})
    assert binding(between, natural) == []
    fixed = SearchSpace(natural, natural, 0.0, min_shares={"tiny": 0.0025}, max_shares={"tiny": 0.0025})
    assert [b.side for b in binding(fixed, natural)] == ["at most", "at least"]
