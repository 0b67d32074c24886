"""Did the weights arrive? Names are matched, shapes compared, and what loaded is counted in parameters. Pure.

Never ``strict=False`` without looking: a set of weights of which less than ``model.min_share`` of the trunk's
parameters arrive is refused, because a network that starts from noise looks just like one that does not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn

from medtl.errors import WeightsError
from medtl.model.surgery import HEAD, StagedNetwork, interpolate_positions, trunk_keys
from medtl.records import LoadReport

_WRAPPERS = ("module.", "model.", "backbone.", "encoder_q.")
_OLD_DENSENET = re.compile(
    r"^(.*denselayer\d+\.(?:norm|relu|conv))\.((?:[12])\.(?:weight|bias|running_mean|running_var))$"
)
OURS = "stages."


def plain_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take known wrappers off the names: ``module.``, ``model.``, ``backbone.``, and old DenseNet dots."""
    plain = dict(state)
    for wrapper in _WRAPPERS:
        if plain and all(key.startswith(wrapper) for key in plain):
            plain = {key.removeprefix(wrapper): value for key, value in plain.items()}
    return {_OLD_DENSENET.sub(r"\1\2", key): value for key, value in plain.items()}


def load_source(
    source: nn.Module, name: str, state: Mapping[str, Tensor], size: int, report: LoadReport, min_share: float
) -> LoadReport:
    """Load weights in the source library's own names into the source network's trunk.

    Args:
        source: network in its library's form, before it is cut.
        name: backbone.
        state: names to tensors.
        size: rows of the input (positions of a vision transformer are resized to it).
        report: says where the weights come from; its counts are filled in.
        min_share: least share of the trunk's parameters.

    Raises:
        WeightsError: less than ``min_share`` arrived.
    """
    given = interpolate_positions(plain_keys(state), size)
    return _load(source, given, trunk_keys(source, name), report, min_share, name)


def load_staged(
    network: StagedNetwork, name: str, state: Mapping[str, Tensor], report: LoadReport, min_share: float
) -> LoadReport:
    """Load weights that medtl wrote (names begin with ``stages.``) into every stage but the head.

    Raises:
        WeightsError: less than ``min_share`` arrived.
    """
    wanted = tuple(
        key
        for key in network.state_dict()
        if not key.startswith(f"{OURS}{HEAD}.") and not key.endswith("num_batches_tracked")
    )
    given = {key: value for key, value in state.items() if not key.startswith(f"{OURS}{HEAD}.")}
    own = network.state_dict()
    for key, value in given.items():
        if key in own and value.ndim == 4 and value.shape[1] != own[key].shape[1] and value.shape[1] in (1, 3):
            channels = own[key].shape[1]
            given[key] = value.sum(1, keepdim=True).repeat(1, channels, 1, 1) / channels
    return _load(network, given, wanted, report, min_share, name)


def _load(
    module: nn.Module,
    given: Mapping[str, Tensor],
    wanted: tuple[str, ...],
    report: LoadReport,
    min_share: float,
    name: str,
) -> LoadReport:
    own = module.state_dict()
    fitting = {key: given[key] for key in wanted if key in given and given[key].shape == own[key].shape}
    missing = tuple(key for key in wanted if key not in fitting)
    unexpected = tuple(sorted(key for key in given if key not in own))
    total = sum(own[key].numel() for key in wanted)
    share = sum(value.numel() for value in fitting.values()) / max(total, 1)
    if share < min_share:
        example = missing[0] if missing else "-"
        raise WeightsError(
            f"Only {share:.1%} of the parameters of '{name}' are in the weights '{report.source}' ({len(missing)} of "
            f"{len(wanted)} tensors missing or of another shape, first '{example}'): they belong to another "
            "architecture. "
            "Give weights of this backbone, or another model.backbone; model.min_share sets the limit."
        )
    module.load_state_dict({**own, **fitting})
    return LoadReport(
        source=report.source,
        sha256=report.sha256,
        loaded=len(fitting),
        missing=missing,
        unexpected=unexpected,
        share=round(share, 6),
        licence=report.licence,
        citation=report.citation,
    )
