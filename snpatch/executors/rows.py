"""A request as integers: what it names, and its row of the request table once all of that has a place.

Why content names places: two names of one adapter, or two equal rankings, are one row on the device.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from snpatch.errors import SnpatchError
from snpatch.executors.base import Request
from snpatch.models.model import Model
from snpatch.op.plan import Entry, Source, bits_of, entries_of, entry_of
from snpatch.patching.patch import Constant, Noise, Overwrite, Scale
from snpatch.ranking.ranking import Ranking

PLAIN = 0  # the place of a model that nothing scales


@dataclass(frozen=True, eq=False)
class Named:
    """What a request names, by content: digest -> model, ranking, and values of constants and noise [L, F] float32."""

    models: dict[str, Model] = field(default_factory=dict)
    rankings: dict[str, Ranking] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        return not (self.models or self.rankings or self.constants)


@dataclass(frozen=True, eq=False)
class Places:
    """Digest -> place of everything that a request names. group: of its statistics."""

    models: Mapping[str, int]
    rankings: Mapping[str, int]
    constants: Mapping[str, int]
    group: int = -1

    def of_model(self, model: Model) -> int:
        return PLAIN if model.is_unscaled else self.models[model.scales.fingerprint]


def named_by(request: Request) -> Named:
    """What a request names; models that nothing scales are not among it."""
    named = Named()
    for model in (request.recipient, request.donor):
        if model is not None and not model.is_unscaled:
            named.models[model.scales.fingerprint] = model
    for overwrite in request.overwrites:
        named.rankings[overwrite.ranking.fingerprint] = overwrite.ranking
        source = overwrite.source
        if isinstance(source, Constant):
            named.constants[source.fingerprint] = source.values.float()
        elif isinstance(source, Noise):
            named.constants[source.fingerprint] = source.deviation.float()
    if capture := request.capture:
        if request.overwrites and request.overwrites[0].ranking.fingerprint != capture.ranking.fingerprint:
            raise SnpatchError("a request cannot capture by one ranking while it is patched by another")
        named.rankings[capture.ranking.fingerprint] = capture.ranking
    return named


def streams(request: Request, speaker: int = 0) -> tuple[Model, Model]:
    """The models that the two streams run; the donor's stream runs the recipient where there is no donor."""
    donor = request.recipient if request.donor is None else request.donor
    return (donor, request.recipient) if speaker else (request.recipient, donor)


def request_row(request: Request, places: Places, clauses: int, speaker: int = 0) -> list[int]:
    """The request table's row, without a receipt and a row for captures.

    clauses: as many as the table has room for. speaker: the recipient's stream.
    """
    row = [0] * entries_of(clauses)
    row[Entry.FIRST], row[Entry.SECOND] = map(places.of_model, streams(request, speaker))
    row[Entry.SPEAKER] = speaker
    row[Entry.GROUP] = row[Entry.CAPTURE] = row[Entry.RECEIPT] = -1
    for clause, overwrite in enumerate(request.overwrites):
        for entry, value in _clause(overwrite, places).items():
            row[entry_of(entry, clause)] = value
    if observe := request.observe:
        row[Entry.GROUP] = places.group
        row[Entry.OBSERVE_START], row[Entry.OBSERVE_STOP] = observe.start, observe.stop
    if capture := request.capture:
        row[Entry.RANKING] = places.rankings[capture.ranking.fingerprint]
        row[Entry.CAPTURE_START], row[Entry.CAPTURE_STOP] = capture.start, capture.stop
    return row


def _clause(overwrite: Overwrite, places: Places) -> dict[Entry, int]:
    """A clause's entries; where nothing is said they are 0."""
    source, (keep, take) = overwrite.source, map(bits_of, overwrite.factors)
    entries = {
        Entry.RANKING: places.rankings[overwrite.ranking.fingerprint],
        Entry.LO: overwrite.window.lo,
        Entry.HI: overwrite.window.hi,
        Entry.KEEP: keep,
        Entry.TAKE: take,
        Entry.PATCH_START: overwrite.start,
        Entry.PATCH_STOP: overwrite.stop,
    }
    if isinstance(source, Scale):
        entries[Entry.SOURCE] = Source.CONSTANT  # of which nothing is taken
    elif isinstance(source, Constant):
        entries |= {Entry.SOURCE: Source.CONSTANT, Entry.ROW: places.constants[source.fingerprint]}
    elif isinstance(source, Noise):
        entries |= {
            Entry.SOURCE: Source.NOISE,
            Entry.ROW: places.constants[source.fingerprint],
            Entry.SEED: source.seed,
        }
    return entries


def implied_overwrites(request: Request, fed: int) -> int:
    """How many neurons a request's patch overwrites in the first `fed` positions, each clause counted."""
    return sum(len(overwrite.window) * overwrite.positions(fed) for overwrite in request.overwrites)


def observed_statistics(requests: Sequence[Request]) -> list:
    """The different Statistics that requests are observed into, in the order of their first use."""
    return list({id(r.observe.into): r.observe.into for r in requests if r.observe}.values())
