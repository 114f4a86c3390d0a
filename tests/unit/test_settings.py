"""Where two trees of settings differ: leaf by leaf, or as one."""

from megatron_demix.settings import differences


def test_leaves_are_named_by_their_places():
    then = {"train": {"lr": 0.1, "beta": 0.9}, "rounds": [8, 4], "old": 1}
    now = {"train": {"lr": 0.2, "beta": 0.9}, "rounds": [8, 5], "new": {"x": 1}}
    assert list(differences(then, now)) == [
        ("train.lr", 0.1, 0.2),
        ("rounds.1", 4, 5),
        ("old", 1, None),
        ("new", None, {"x": 1}),
    ]
    assert list(differences(then, then)) == []


def test_what_has_no_leaves_in_common_differs_as_one():
    assert list(differences({"a": [1, 2]}, {"a": [1, 2, 3]})) == [("a", [1, 2], [1, 2, 3])]
    assert list(differences({"a": {"x": 1}}, {"a": "natural"})) == [("a", {"x": 1}, "natural")]
    assert list(differences({"a": {"x": 1}}, {"a": {"x": 2}}, as_one=lambda then, now: "x" in then)) == [
        ("a", {"x": 1}, {"x": 2})
    ]
