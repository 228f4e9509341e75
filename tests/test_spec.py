"""Patches as text and JSON."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jobs import ALL, RANKINGS

from snpatch import Clause, Constant, Noise, Patch, Ranking, Scale, SnpatchError, Window
from snpatch.patching import spec

NAMED = {"safety": RANKINGS[0], "other": RANKINGS[1]}
windows = st.tuples(st.integers(0, ALL), st.integers(0, ALL)).map(sorted)
places = st.sampled_from(["all", "prompt", "generated"]) | st.integers(-9, 9)


@given(st.sampled_from(["base", "sft"]), st.sampled_from([*NAMED]), windows, places, st.sampled_from([1.0, 0.5, -2.0]))
def test_json_and_patch_are_each_others_inverse(recipient, name, window, where, strength):
    data = {"recipient": recipient, "donor": "dpo", "ranking": name, "window": window, "where": where}
    data["strength"] = strength
    patch = spec.from_json(data, NAMED)
    assert spec.to_json(patch) == data | {"ranking": NAMED[name].digest}
    by_digest = {ranking.digest: ranking for ranking in NAMED.values()}
    assert spec.to_json(spec.from_json(spec.to_json(patch), by_digest)) == spec.to_json(patch)


def test_further_clauses_are_read_and_told():
    then = [{"donor": "dpo", "ranking": "other", "window": [3, 9], "where": -1, "strength": 0.5}]
    data = {"recipient": "sft", "donor": "dpo", "ranking": "safety", "window": [0, 9], "where": "all", "strength": 1.0}
    patch = spec.from_json({**data, "then": then}, NAMED)
    assert [clause.window for clause in patch.clauses] == [Window(0, 9), Window(3, 9)]
    told = spec.to_json(patch)
    assert told["then"] == [{**then[0], "ranking": NAMED["other"].digest}]
    for bad, message in ((7, "wanted a list of clauses"), ([{"donor": "dpo"}], "wanted clauses of donor, ranking")):
        with pytest.raises(SnpatchError, match=message):
            spec.from_json({**data, "then": bad}, NAMED)


def test_k_alone_is_the_top_k_and_where_is_all():
    patch = spec.from_json({"recipient": "sft", "donor": "dpo", "ranking": "safety", "window": 9}, NAMED)
    assert (patch.window, patch.where) == (Window(0, 9), "all")


GOOD = {"recipient": "sft", "donor": "dpo", "ranking": "safety", "window": 9}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 1}, "there is no k; a patch has recipient, donor, ranking, window, where"),
        ({"donor": None}, "donor: wanted a text, got None"),
        ({"recipient": 3}, "recipient: wanted a text, got 3"),
        ({"ranking": "none"}, "no ranking named 'none': there are safety, other"),
        ({"window": "9"}, "window: wanted k or \\[lo, hi\\], got '9'"),
        ({"window": [1, 2, 3]}, "window: wanted k"),
        ({"window": True}, "window: wanted k"),
        ({"window": [9, 1]}, "wanted 0 <= lo <= hi"),
        ({"window": ALL + 1}, "reaches past the ranking's"),
        ({"where": 1.5}, "where: wanted a text or a position, got 1.5"),
        ({"where": "here"}, "where must be one of"),
        ({"seed": "1"}, "seed: wanted a number"),
        ({"donor": "noise:x"}, "donor noise:N: 'x' is not a number"),
        ({"donor": "mean:donor"}, "the ranking holds no donor_mean"),
        ({"strength": "1"}, "strength must be a finite number of float32, got '1'"),
        ({"strength": True}, "strength must be a finite number"),
        ({"strength": float("nan")}, "strength must be a finite number"),
        ({"strength": 1e39}, "strength must be a finite number of float32"),
        ({"strength": 10**400}, "strength must be a finite number of float32"),
        ({"donor": "scale:1e39"}, "scale: factor must be a finite number of float32"),
        ({"donor": "scale:1e30", "strength": -1e30}, "strength \\* \\(scale - 1\\) must be a finite number"),
    ],
)
def test_bad_json_names_the_field(change, message):
    with pytest.raises(SnpatchError, match=message):
        spec.from_json(GOOD | change, NAMED)


@pytest.mark.parametrize("data", [None, [], "sft", 3])
def test_what_is_no_object_is_refused(data):
    with pytest.raises(SnpatchError, match="wanted an object"):
        spec.from_json(data, NAMED)


def test_a_missing_field_is_named():
    with pytest.raises(SnpatchError, match="ranking, window is missing"):
        spec.from_json({"recipient": "sft", "donor": "dpo"}, NAMED)


def test_words_for_donors():
    ranking = Ranking(RANKINGS[0].rank, moments={"recipient_std": torch.ones(RANKINGS[0].shape)})
    assert spec.donor_of("dpo", ranking) == "dpo"
    assert isinstance(spec.donor_of("zero", ranking), Constant)
    noise = spec.donor_of("noise:2", ranking)
    assert isinstance(noise, Noise)
    assert (noise.seed, noise.deviation.unique().tolist()) == (0, [2.0])
    assert spec.donor_of("noise:2", ranking, seed=5).seed == 5


def test_a_patchs_content_changes_with_every_field():
    """What names it (keys, salts, JSON) is made of all its fields, so that none can be left out."""
    ranking, other = RANKINGS
    patches = [
        Patch("sft", "dpo", ranking, 5),
        Patch("base", "dpo", ranking, 5),
        Patch("sft", "base", ranking, 5),
        Patch("sft", "dpo", other, 5),
        Patch("sft", "dpo", ranking, (1, 5)),
        Patch("sft", "dpo", ranking, 5, "prompt"),
        Patch("sft", Constant.zero(ranking), ranking, 5),
        Patch("sft", Noise(torch.zeros(ranking.shape), seed=1), ranking, 5),
        Patch("sft", Noise(torch.zeros(ranking.shape), seed=2), ranking, 5),
        Patch("sft", Constant(torch.zeros(ranking.shape), mode="add"), ranking, 5),
        Patch("sft", Scale(2.0), ranking, 5),
        Patch("sft", "dpo", ranking, 5, strength=0.5),
        Patch("sft", "dpo", ranking, 5, then=(Clause("dpo", other, 5),)),
        Patch("sft", "dpo", ranking, 5, then=(Clause("dpo", other, 5, "prompt"),)),
    ]
    contents = [repr(patch.content(str)) for patch in patches]
    assert len({*contents}) == len(patches)
    assert repr(Patch("sft", "dpo", ranking, 5, strength=1).content(str)) == contents[0], "1 is 1.0"
    fields = set(Patch.__dataclass_fields__)
    assert all(fields - {"then"} <= set(patch.content(str)) <= fields for patch in patches)
    assert set(patches[-1].content(str)) == fields
