"""A request as integers: the adapters, rankings and constants it uses, and its row of the request table.

Why resources are keyed by content: two names of one adapter, or two equal rankings, share one row on the device.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from snpatch.errors import SnpatchError
from snpatch.executors.base import Request
from snpatch.models.model import Model
from snpatch.op.plan import RequestColumn, Source, float_bits, request_column, request_width
from snpatch.patching.patch import Constant, Noise, Overwrite, Scale
from snpatch.ranking.contrast_statistics import Statistics
from snpatch.ranking.ranking import Ranking

BASE_SLOT = 0  # slot of a model without an adapter


@dataclass(frozen=True, eq=False)
class RequestResources:
    """Adapters, rankings and constants that a request uses, by content hash.

    constants: values, or standard deviations of noise, [L, F] float32.
    """

    models: dict[str, Model] = field(default_factory=dict)
    rankings: dict[str, Ranking] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Return whether the request needs no slots: unpatched, without a capture, on models without adapters."""
        return not (self.models or self.rankings or self.constants)


@dataclass(frozen=True, eq=False)
class SlotIndex:
    """Slots of a request's resources, by content hash. group: the group of its statistics, -1 = none."""

    models: Mapping[str, int]
    rankings: Mapping[str, int]
    constants: Mapping[str, int]
    group: int = -1

    def model_slot(self, model: Model) -> int:
        """Return the slot of a model's adapter; BASE_SLOT for a model whose IA3 vectors are all ones."""
        return BASE_SLOT if model.is_unscaled else self.models[model.scales.fingerprint]


def collect_resources(request: Request) -> RequestResources:
    """Return the resources that a request uses; models without an adapter need none."""
    resources = RequestResources()
    for model in (request.recipient, request.donor):
        if model is not None and not model.is_unscaled:
            resources.models[model.scales.fingerprint] = model
    for overwrite in request.overwrites:
        resources.rankings[overwrite.ranking.fingerprint] = overwrite.ranking
        source = overwrite.source
        if isinstance(source, Constant):
            resources.constants[source.fingerprint] = source.values.float()
        elif isinstance(source, Noise):
            resources.constants[source.fingerprint] = source.deviation.float()
    if capture := request.capture:
        if request.overwrites and request.overwrites[0].ranking.fingerprint != capture.ranking.fingerprint:
            raise SnpatchError("request: expected one ranking for its capture and its patch, got two")
        resources.rankings[capture.ranking.fingerprint] = capture.ranking
    return resources


def stream_models(request: Request, recipient_stream: int = 0) -> tuple[Model, Model]:
    """Return the models of streams 0 and 1. Without a donor, both run the recipient."""
    donor = request.recipient if request.donor is None else request.donor
    return (donor, request.recipient) if recipient_stream else (request.recipient, donor)


def build_request_row(
    request: Request, slots: SlotIndex, num_interventions: int, recipient_stream: int = 0
) -> list[int]:
    """Build a request's row of the request table, without its rows of `receipt` and `capture`.

    num_interventions: how many the table has columns for.
    """
    row = [0] * request_width(num_interventions)
    models = stream_models(request, recipient_stream)
    row[RequestColumn.ADAPTER_0], row[RequestColumn.ADAPTER_1] = map(slots.model_slot, models)
    row[RequestColumn.RECIPIENT_STREAM] = recipient_stream
    row[RequestColumn.GROUP] = row[RequestColumn.CAPTURE] = row[RequestColumn.RECEIPT] = -1
    for i, overwrite in enumerate(request.overwrites):
        for column, value in _overwrite_columns(overwrite, slots).items():
            row[request_column(column, i)] = value
    if observe := request.observe:
        row[RequestColumn.GROUP] = slots.group
        row[RequestColumn.OBSERVE_START], row[RequestColumn.OBSERVE_STOP] = observe.start, observe.stop
    if capture := request.capture:
        row[RequestColumn.RANKING] = slots.rankings[capture.ranking.fingerprint]
        row[RequestColumn.CAPTURE_START], row[RequestColumn.CAPTURE_STOP] = capture.start, capture.stop
    return row


def _overwrite_columns(overwrite: Overwrite, slots: SlotIndex) -> dict[RequestColumn, int]:
    """Return an intervention's columns; those that are missing are 0."""
    source, (self_weight, source_weight) = overwrite.source, map(float_bits, overwrite.factors)
    columns = {
        RequestColumn.RANKING: slots.rankings[overwrite.ranking.fingerprint],
        RequestColumn.LO: overwrite.window.lo,
        RequestColumn.HI: overwrite.window.hi,
        RequestColumn.SELF_WEIGHT: self_weight,
        RequestColumn.SOURCE_WEIGHT: source_weight,
        RequestColumn.PATCH_START: overwrite.start,
        RequestColumn.PATCH_STOP: overwrite.stop,
    }
    if isinstance(source, Scale):
        columns[RequestColumn.SOURCE] = Source.CONSTANT  # its weight is 0
    elif isinstance(source, Constant):
        columns[RequestColumn.SOURCE] = Source.CONSTANT
        columns[RequestColumn.CONSTANT_ROW] = slots.constants[source.fingerprint]
    elif isinstance(source, Noise):
        columns[RequestColumn.SOURCE] = Source.NOISE
        columns[RequestColumn.CONSTANT_ROW] = slots.constants[source.fingerprint]
        columns[RequestColumn.SEED] = source.seed
    return columns


def implied_overwrites(request: Request, num_positions: int) -> int:
    """Return how many neurons a request's patch overwrites in its first positions.

    Each intervention is counted.
    """
    return sum(len(overwrite.window) * overwrite.num_positions(num_positions) for overwrite in request.overwrites)


def observed_statistics(requests: Sequence[Request]) -> list[Statistics]:
    """Return the distinct Statistics of the requests' observations, in the order of their first use."""
    return list({id(r.observe.statistics): r.observe.statistics for r in requests if r.observe}.values())
