"""A request as integers: what it names, and its row of the request table once all of that has a place.

Why content names places: two names of one adapter, or two equal rankings, are one row on the device.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from snpatch.errors import SnpatchError
from snpatch.executors.base import Request
from snpatch.models.model import Model
from snpatch.op.plan import Entry, Source, bits_of
from snpatch.patching.patch import Constant, Noise, Scale
from snpatch.ranking.ranking import Ranking

PLAIN = 0  # the place of a model that nothing scales


@dataclass(frozen=True, eq=False)
class Named:
    """What a request names, by content: digest -> model, ranking, and values of constants and noise [L, F] float32."""

    models: dict[str, Model] = field(default_factory=dict)
    rankings: dict[str, Ranking] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Places:
    """Digest -> place of everything that a request names. group: of its statistics."""

    models: Mapping[str, int]
    rankings: Mapping[str, int]
    constants: Mapping[str, int]
    group: int = -1

    def of_model(self, model: Model) -> int:
        return PLAIN if model.is_plain else self.models[model.scales.digest]


def named_by(request: Request) -> Named:
    """What a request names; models that nothing scales are not among it."""
    named = Named()
    for model in (request.recipient, request.donor):
        if model is not None and not model.is_plain:
            named.models[model.scales.digest] = model
    if request.overwrite:
        named.rankings[request.overwrite.ranking.digest] = request.overwrite.ranking
        source = request.overwrite.source
        if isinstance(source, Constant):
            named.constants[source.digest] = source.values.float()
        elif isinstance(source, Noise):
            named.constants[source.digest] = source.deviation.float()
    if request.capture:
        named.rankings[request.capture.ranking.digest] = request.capture.ranking
    if len(named.rankings) > 1:
        raise SnpatchError("a request cannot capture by one ranking while it is patched by another")
    return named


def streams(request: Request, speaker: int = 0) -> tuple[Model, Model]:
    """The models that the two streams run; the donor's stream runs the recipient where there is no donor."""
    donor = request.recipient if request.donor is None else request.donor
    return (donor, request.recipient) if speaker else (request.recipient, donor)


def request_row(request: Request, places: Places, speaker: int = 0) -> list[int]:
    """The request table's row [len(Entry)], without a receipt and a row for captures. speaker: recipient's stream."""
    row = [0] * len(Entry)
    row[Entry.FIRST], row[Entry.SECOND] = map(places.of_model, streams(request, speaker))
    row[Entry.SPEAKER] = speaker
    row[Entry.GROUP] = row[Entry.CAPTURE] = row[Entry.RECEIPT] = -1
    if overwrite := request.overwrite:
        row[Entry.RANKING] = places.rankings[overwrite.ranking.digest]
        row[Entry.LO], row[Entry.HI] = overwrite.window.lo, overwrite.window.hi
        row[Entry.PATCH_START], row[Entry.PATCH_STOP] = overwrite.start, overwrite.stop
        row[Entry.KEEP], row[Entry.TAKE] = map(bits_of, overwrite.factors)
        if isinstance(overwrite.source, Scale):
            row[Entry.SOURCE] = Source.CONSTANT  # of which nothing is taken
        elif isinstance(overwrite.source, Constant | Noise):
            is_noise = isinstance(overwrite.source, Noise)
            row[Entry.SOURCE] = Source.NOISE if is_noise else Source.CONSTANT
            row[Entry.SEED] = overwrite.source.seed if is_noise else 0
            row[Entry.ROW] = places.constants[overwrite.source.digest]
    if observe := request.observe:
        row[Entry.GROUP] = places.group
        row[Entry.OBSERVE_START], row[Entry.OBSERVE_STOP] = observe.start, observe.stop
    if capture := request.capture:
        row[Entry.RANKING] = places.rankings[capture.ranking.digest]
        row[Entry.CAPTURE_START], row[Entry.CAPTURE_STOP] = capture.start, capture.stop
    return row


def window_width(request: Request) -> int:
    """Neurons that are overwritten at each patched position."""
    return len(request.overwrite.window) if request.overwrite else 0


def patched_positions(request: Request, fed: int) -> int:
    """How many of the first `fed` positions the request's patch covers."""
    return request.overwrite.positions(fed) if request.overwrite else 0


def observed_statistics(requests: Sequence[Request]) -> list:
    """The different Statistics that requests are observed into, in the order of their first use."""
    return list({id(r.observe.into): r.observe.into for r in requests if r.observe}.values())
