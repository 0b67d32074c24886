"""The verbs of the weight vault: list, add, fetch, verify, remove. They need no Prefect."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Group, Parameter

from medtl.errors import ConfigError, WeightsError
from medtl.progress import listening
from pipelines.terminal import Json, progress, show_table

if TYPE_CHECKING:
    from medtl.model.vault import VaultEntry
    from medtl.model.weights import InputContract
    from medtl.records import LoadReport

log = logging.getLogger("medtl")
KEEP = Group("Keeping things", sort_key=3)
weights = App(name="weights", help="Keep weights in the vault: list, add, fetch, verify, remove.", group=KEEP)
VaultFolder = Annotated[Path, Parameter(help="folder of the vault; a run's is WORKSPACE/weights")]
_DEFAULT = Path("workspace/weights")


@weights.command(name="list")
def weights_list(*, vault: VaultFolder = _DEFAULT, json_: Json = False) -> None:
    """List the vault. An entry that cannot be read is listed as damaged."""
    from medtl.model.vault import Vault

    kept = Vault(vault)
    entries = kept.entries()
    damaged = sorted(set(kept.names()) - {entry.name for entry in entries})
    value = [asdict(entry) for entry in entries] + [{"name": name, "damaged": True} for name in damaged]
    rows: list[tuple[Any, ...]] = [
        (e.name, e.backbone or "-", e.source, e.licence or "-", e.sha256[:12]) for e in entries
    ]
    rows += [(name, "damaged: medtl weights verify", "-", "-", "-") for name in damaged]
    columns = ("name", "backbone", "source", "licence", "sha256")
    show_table(value, json_, f"Weights in {vault}", columns, rows)


@weights.command(name="add")
def weights_add(
    file: Annotated[Path, Parameter(help="safetensors, or a checkpoint of PyTorch (tensors only)")],
    *,
    backbone: Annotated[str | None, Parameter(help="whose weights these are: `medtl backbones`")] = None,
    name: Annotated[str | None, Parameter(help="of the entry; default: the file's")] = None,
    licence: str | None = None,
    citation: str | None = None,
    mean: Annotated[str | None, Parameter(help="per channel, in units of --value-range: 0.5,0.5,0.5")] = None,
    std: Annotated[str | None, Parameter(help="per channel")] = None,
    size: Annotated[str | None, Parameter(help="rows,columns of the images it was trained on: 224,224")] = None,
    value_range: Annotated[str, Parameter(help="of the images: 0,1 or 0,255 or -1,1")] = "0,1",
    colour_order: Literal["RGB", "BGR", "grey"] = "RGB",
    min_share: Annotated[float, Parameter(help="least share of the backbone that the file must fill")] = 0.9,
    vault: VaultFolder = _DEFAULT,
    json_: Json = False,
) -> None:
    """Put a file into the vault, as safetensors; use it with model.weights=vault:NAME.

    A pickle is read in a process of its own, as tensors only. With --backbone the names of torchvision, timm, MONAI,
    MedicalNet, RadImageNet, Lightning and MoCo are understood, and a file that belongs to something else is refused.
    """
    from medtl.model.backbones import backbone as look_up
    from medtl.model.vault import Vault

    if not 0 <= min_share <= 1:
        raise ConfigError("--min-share is from 0 to 1.")
    if backbone is not None:
        look_up(backbone)
    if not file.is_file():
        raise ConfigError(f"'{file}' is not a file.")
    contract = _contract(mean, std, size, value_range, colour_order)
    entry, report = Vault(vault).add_file(
        file, backbone, name, licence=licence, citation=citation, contract=contract, min_share=min_share
    )
    _show(entry, report, json_)


@weights.command(name="fetch")
def weights_fetch(
    backbone: Annotated[str, Parameter(help="whose ImageNet weights: `medtl backbones`")],
    *,
    host: Annotated[
        str | None,
        Parameter(help="https address of a mirror's folder; default: MEDTL_WEIGHTS_HOST, else torchvision's"),
    ] = None,
    other_hosts: Annotated[bool, Parameter(help="follow redirects to other hosts", negative="")] = False,
    vault: VaultFolder = _DEFAULT,
    json_: Json = False,
) -> None:
    """Download a backbone's ImageNet weights and check them; what is there and whole is not fetched again.

    A broken download goes on where it was. The file's sha256 is checked before anything opens it.
    """
    from medtl.model.vault import Vault

    with progress() as listener, listening(listener) if listener else nullcontext():
        entry = Vault(vault).fetch(backbone, host, other_hosts)
    _show(entry, None, json_)


@weights.command(name="verify")
def weights_verify(*, vault: VaultFolder = _DEFAULT, json_: Json = False) -> None:
    """Hash every entry again, hold it against the vault's trail; name what was altered, is missing or damaged.

    Exit code 1 if anything is. `medtl audit log --workspace VAULT` tells who put in or took out what, and when.
    """
    from medtl.model.vault import Vault

    kept = Vault(vault)
    with progress() as listener, listening(listener) if listener else nullcontext():
        faults = {fault.name: fault.what for fault in kept.verify()}
    names = kept.names()
    rows = [(name, faults.get(name, "whole")) for name in sorted({*names, *faults})]
    value = {"entries": len(names), "faults": faults, "trail": kept.told}
    if names and not kept.told:
        log.warning(
            "%s has no audit trail: nobody can say who put these weights in. The next addition begins one.", vault
        )
    show_table(value, json_, f"Weights in {vault}", ("name", "state"), rows)
    if faults:
        named = "; ".join(f"'{name}' {what}" for name, what in faults.items())
        raise WeightsError(
            f"{len(faults)} of what is in {vault} cannot be trusted: {named}. Remove it and add it again; if it is the "
            "trail, compare with a backup."
        )


@weights.command(name="remove")
def weights_remove(
    name: Annotated[str, Parameter(help="as `medtl weights list` shows it")],
    *,
    vault: VaultFolder = _DEFAULT,
    json_: Json = False,
) -> None:
    """Take an entry out of the vault. Nothing is asked."""
    from medtl.model.vault import Vault

    Vault(vault).remove(name)
    show_table({"removed": name}, json_, f"Weights in {vault}", ("removed",), [(name,)])


def _show(entry: VaultEntry, report: LoadReport | None, as_json: bool) -> None:
    rows: list[tuple[str, Any]] = [
        ("use it with", f"model.weights=vault:{entry.name}"),
        ("backbone", entry.backbone or "unknown"),
        ("tensors", entry.tensors),
        ("parameters", _millions(entry.parameters)),
        ("input", _input(entry.contract)),
        ("names read as", entry.layout or "not known: no backbone was named"),
        ("sha256", entry.sha256),
        ("of the file", entry.original_sha256 or "-"),
    ]
    value: dict[str, Any] = asdict(entry)
    if report is not None:
        rows.append(("fills the backbone to", f"{report.share:.1%} ({len(report.missing)} tensors missing)"))
        rows.append(("not used", f"{len(report.unexpected)} tensors"))
        value["load"] = asdict(report)
    show_table(value, as_json, entry.name, ("what", "value"), rows)


def _contract(
    mean: str | None, std: str | None, size: str | None, value_range: str, colour_order: str
) -> InputContract | None:
    from medtl.model.weights import InputContract

    if (mean, std, size, value_range, colour_order) == (None, None, None, "0,1", "RGB"):
        return None
    means, deviations = _numbers("--mean", mean), _numbers("--std", std)
    extent = _numbers("--value-range", value_range) or ()
    if len(extent) != 2:
        raise ConfigError("--value-range is two numbers: 0,255")
    sizes = _numbers("--size", size)
    return InputContract(
        channels=len(means) if means else 1 if colour_order == "grey" else None,
        mean=means,
        std=deviations,
        size=tuple(int(one) for one in sizes) if sizes else None,
        value_range=(extent[0], extent[1]),
        colour_order=colour_order,
    )


def _numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"{option} is numbers with commas between them, not '{text}'.") from error


def _millions(parameters: int | None) -> str:
    return "-" if parameters is None else f"{parameters / 1e6:.1f} M"


def _input(contract: InputContract | None) -> str:
    if contract is None or contract.mean is None or contract.std is None:
        return "-"
    size = " x ".join(map(str, contract.size)) + ", " if contract.size else ""
    values = [" ".join(f"{one:.3g}" for one in part) for part in (contract.mean, contract.std)]
    return f"{size}mean {values[0]}, std {values[1]}"
