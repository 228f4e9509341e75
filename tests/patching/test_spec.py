"""Patches as text and JSON."""

import jsonschema
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jobs import ALL, RANKINGS

from snpatch import Constant, Intervention, Noise, Patch, Ranking, Scale, SnpatchError, Window
from snpatch.patching import spec
from snpatch.utils import schema

NAMED = spec.PatchNamespace(
    {"safety": RANKINGS[0], "other": RANKINGS[1]}, {"mine": Constant(torch.ones(RANKINGS[0].shape))}
)
windows = st.tuples(st.integers(0, ALL), st.integers(0, ALL)).map(sorted)
places = st.sampled_from(["all", "prompt", "completion"]) | st.integers(-9, 9)


@given(
    st.sampled_from(["base", "sft"]),
    st.sampled_from([*NAMED.rankings]),
    windows,
    places,
    st.sampled_from([1.0, 0.5, -2.0]),
)
def test_patch_json_round_trip(recipient, name, window, where, strength):
    data = {"recipient": recipient, "donor": "dpo", "ranking": name, "window": window, "positions": where}
    data["strength"] = strength
    patch = spec.from_json(data, NAMED)
    assert spec.to_json(patch) == data | {"ranking": NAMED.rankings[name].fingerprint}
    by_digest = spec.PatchNamespace({ranking.fingerprint: ranking for ranking in NAMED.rankings.values()}, {})
    assert spec.to_json(spec.from_json(spec.to_json(patch), by_digest)) == spec.to_json(patch)


def test_interventions_json_round_trip():
    first = {"donor": "dpo", "ranking": "safety", "window": [0, 9], "positions": "all", "strength": 1.0}
    second = {"donor": "dpo", "ranking": "other", "window": [3, 9], "positions": -1, "strength": 0.5}
    patch = spec.from_json({"recipient": "sft", "interventions": [first, second]}, NAMED)
    assert [intervention.window for intervention in patch.interventions] == [Window(0, 9), Window(3, 9)]
    rankings = [NAMED.rankings[name].fingerprint for name in ("safety", "other")]
    assert spec.to_json(patch)["interventions"] == [
        {**table, "ranking": ranking} for table, ranking in zip((first, second), rankings, strict=True)
    ]
    flat_patch = spec.from_json({"recipient": "sft", "interventions": [first]}, NAMED)
    assert spec.to_json(flat_patch) == {"recipient": "sft", **first, "ranking": rankings[0]}, "one is written flat"
    for change, message, field in (
        ({"interventions": 7}, "interventions: expected InterventionSchema, got 7", "interventions"),
        ({"interventions": [{"donor": "dpo"}]}, "interventions: ranking, window is missing", "interventions.ranking"),
        ({"interventions": [first, {**first, "window": [9, 3]}]}, "expected 0 <= lo <= hi", "interventions.1.window"),
        ({"interventions": [first], **second}, "donor: expected in each of the interventions", "donor"),
        ({"interventions": [first], "strength": 0.5}, "strength: expected in each of the interventions", "strength"),
    ):
        with pytest.raises(SnpatchError, match=message) as caught:
            spec.from_json({"recipient": "sft", **change}, NAMED)
        assert caught.value.field == field


def test_patch_fields_and_interventions_are_refused():
    intervention = Intervention("dpo", RANKINGS[0], 5)
    with pytest.raises(SnpatchError, match="got both"):
        Patch("sft", "dpo", RANKINGS[0], 5, interventions=[intervention])
    with pytest.raises(SnpatchError, match="got both"):
        Patch("sft", strength=0.5, interventions=[intervention])
    with pytest.raises(SnpatchError, match="interventions: expected Intervention"):
        Patch("sft", interventions=["dpo"])


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ("all", range(9)),
        ("prompt", range(4)),
        ("last_prompt_token", [3]),
        ("completion", range(4, 9)),
        ("completion_shifted", range(3, 9)),
        (2, range(2, 9)),
        (-1, range(3, 9)),
        (-9, range(9)),
    ],
)
def test_positions_select_range_of_tokens(positions, expected):
    start, stop = Intervention("dpo", RANKINGS[0], 5, positions).position_range(4)
    assert [position for position in range(9) if start <= position < stop] == list(expected)


def test_patch_swapped_arguments_are_named():
    order = r"Arguments are \(recipient, donor, ranking, window\)"
    with pytest.raises(SnpatchError, match=f"recipient: expected a model's name, got Ranking.*{order}"):
        Patch(RANKINGS[0], "base", "dpo", 5)
    with pytest.raises(SnpatchError, match=f"ranking: expected a Ranking, got 5.*{order}"):
        Patch("base", "dpo", 5, RANKINGS[0])
    with pytest.raises(SnpatchError, match=f"donor: expected a model's name.*got Ranking.*{order}"):
        Patch("base", RANKINGS[0], RANKINGS[0], 5)


def test_patch_json_defaults_are_top_k_at_all_positions():
    patch = spec.from_json({"recipient": "sft", "donor": "dpo", "ranking": "safety", "window": 9}, NAMED)
    assert (patch.window, patch.positions) == (Window(0, 9), "all")


GOOD = {"recipient": "sft", "donor": "dpo", "ranking": "safety", "window": 9}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 1}, "patch: unknown key k; expected one of donor, ranking, window, positions"),
        ({"donor": None}, "patch: donor is missing"),
        ({"recipient": 3}, "recipient: expected str, got 3"),
        ({"ranking": "none"}, "ranking: expected one of safety, other, got 'none'"),
        ({"window": "9"}, "window: expected int or \\[int, int\\], got '9'"),
        ({"window": [1, 2, 3]}, "window: expected int"),
        ({"window": True}, "window: expected int"),
        ({"window": [9, 1]}, "expected 0 <= lo <= hi"),
        ({"window": ALL + 1}, "reaches past the ranking's"),
        ({"positions": 1.5}, "positions: expected str or int, got 1.5"),
        ({"positions": "here"}, "positions: expected one of"),
        ({"seed": "1"}, "seed: expected int, got"),
        ({"donor": "noise:x"}, "donor noise:N: expected a number, got 'x'"),
        ({"donor": "mean:donor"}, "the ranking holds no donor_mean"),
        ({"donor": "constant:none"}, "constant: expected one of mine, got 'none'"),
        ({"donor": "add:dpo"}, "expected mean:recipient, mean:donor or a constant after add:"),
        ({"strength": "1"}, "strength: expected float, got '1'"),
        ({"strength": True}, "strength: expected float, got True"),
        ({"strength": float("nan")}, "strength: expected a finite number"),
        ({"strength": 1e39}, "strength: expected a finite number of float32"),
        ({"strength": 10**400}, "strength: expected a number that float64 can hold"),
        ({"donor": "scale:1e39"}, "scale: factor: expected a finite number of float32"),
        ({"donor": "scale:1e30", "strength": -1e30}, "strength \\* \\(scale - 1\\): expected a finite number"),
    ],
)
def test_patch_json_invalid_value_names_field(change, message):
    with pytest.raises(SnpatchError, match=message) as caught:
        spec.from_json(GOOD | change, NAMED)
    assert caught.value.field in change


@pytest.mark.parametrize("data", [None, [], "sft", 3])
def test_patch_json_without_object_is_refused(data):
    with pytest.raises(SnpatchError, match="patch: expected a table"):
        spec.from_json(data, NAMED)


def test_patch_json_missing_field_is_named():
    with pytest.raises(SnpatchError, match="ranking, window is missing"):
        spec.from_json({"recipient": "sft", "donor": "dpo"}, NAMED)


def test_patch_json_of_recipient_is_unpatched():
    assert spec.from_json({"recipient": "sft"}, NAMED) == "sft"
    with pytest.raises(SnpatchError, match="strength: expected a donor") as caught:
        spec.from_json({"recipient": "sft", "strength": 2}, NAMED)
    assert caught.value.field == "strength"


def test_patch_json_names_constants():
    patch = spec.from_json(GOOD | {"donor": "constant:mine"}, NAMED)
    assert patch.donor is NAMED.constants["mine"]
    add_patch = spec.from_json(GOOD | {"donor": "add:constant:mine"}, NAMED)
    assert (add_patch.donor.mode, add_patch.donor.fingerprint) == ("add", patch.donor.fingerprint)


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("recipient=sft", {"recipient": "sft"}),
        ("recipient=sft,donor=dpo,ranking=safety,k=9", GOOD),
        ("recipient=sft, donor=dpo, ranking=safety, window=3:9", GOOD | {"window": [3, 9]}),
        (
            "recipient=sft,donor=noise:2,ranking=safety,k=9,positions=-1,strength=0.5,seed=4",
            GOOD | {"donor": "noise:2", "positions": -1, "strength": 0.5, "seed": 4},
        ),
        ('{"recipient": "sft", "interventions": [7]}', {"recipient": "sft", "interventions": [7]}),
    ],
)
def test_patch_text_equals_its_json(text, data):
    assert spec.parse_patch_table(text) == data


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("recipient", "expected name=value"),
        ("k=1,window=2", "each name once"),
        ("k=x", "expected a number, got 'x'"),
        ("{", "expected JSON"),
    ],
)
def test_patch_text_invalid_names_form(text, message):
    with pytest.raises(SnpatchError, match=message):
        spec.parse_patch_table(text)


values = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats().filter(lambda x: not x.is_integer())
    | st.text(max_size=9)
    | st.lists(st.integers(), max_size=3)
)
near = st.fixed_dictionaries({}, optional={name: st.sampled_from([value]) | values for name, value in GOOD.items()})
extra = st.dictionaries(
    st.sampled_from(["positions", "strength", "seed", "interventions", "k"]), values | st.lists(near, max_size=2)
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # its first input makes the strategy
@given(near, extra)
def test_patch_schema_accepts_what_reader_accepts(data, changes):
    """Compare types and names. Limits of values depend on rankings, which the schema does not know."""
    table = {**data, **changes}
    try:
        jsonschema.validate(table, schema.json_schema(spec.PatchSchema))
        is_valid = True
    except jsonschema.ValidationError:
        is_valid = False
    try:
        schema.from_dict(spec.PatchSchema, "patch", table)
        is_read = True
    except SnpatchError:
        is_read = False
    assert is_read == is_valid


def test_donor_words_build_constants_and_noise():
    ranking = Ranking(RANKINGS[0].rank, moments={"recipient_std": torch.ones(RANKINGS[0].shape)})
    assert spec.parse_donor("dpo", ranking) == "dpo"
    assert isinstance(spec.parse_donor("zero", ranking), Constant)
    noise = spec.parse_donor("noise:2", ranking)
    assert isinstance(noise, Noise)
    assert (noise.seed, noise.deviation.unique().tolist()) == (0, [2.0])
    assert spec.parse_donor("noise:2", ranking, seed=5).seed == 5


def test_patch_content_changes_with_every_field():
    """Keys, cache salts and JSON are made from all fields, so that none can be forgotten."""
    ranking, other_ranking = RANKINGS
    patches = [
        Patch("sft", "dpo", ranking, 5),
        Patch("base", "dpo", ranking, 5),
        Patch("sft", "base", ranking, 5),
        Patch("sft", "dpo", other_ranking, 5),
        Patch("sft", "dpo", ranking, (1, 5)),
        Patch("sft", "dpo", ranking, 5, "prompt"),
        Patch("sft", Constant.zero(ranking), ranking, 5),
        Patch("sft", Noise(torch.zeros(ranking.shape), seed=1), ranking, 5),
        Patch("sft", Noise(torch.zeros(ranking.shape), seed=2), ranking, 5),
        Patch("sft", Constant(torch.zeros(ranking.shape), mode="add"), ranking, 5),
        Patch("sft", Scale(2.0), ranking, 5),
        Patch("sft", "dpo", ranking, 5, strength=0.5),
        Patch("sft", interventions=[Intervention("dpo", ranking, 5), Intervention("dpo", other_ranking, 5)]),
        Patch("sft", interventions=[Intervention("dpo", ranking, 5), Intervention("dpo", other_ranking, 5, "prompt")]),
    ]
    contents = [repr(patch.content(str)) for patch in patches]
    assert len({*contents}) == len(patches)
    assert repr(Patch("sft", "dpo", ranking, 5, strength=1).content(str)) == contents[0], "1 is 1.0"
    fields = set(Intervention.__dataclass_fields__)
    assert all(set(patch.content(str)) == {"recipient"} | fields for patch in patches[:-2])
    assert set(patches[-1].content(str)) == {"recipient", "interventions"}
    assert all(set(content) == fields for content in patches[-1].content(str)["interventions"])
