"""The door: ``medtl VERB CONFIG [--set a.b=c]``.

Results go to stdout, everything else to stderr; ``--json`` makes the last line of stdout one object. Exit codes: 0
done, 1 failed, 2 usage or configuration, 3 refused by a gate. Nothing heavy is imported before it is
needed: help is instant.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, CycloptsError, Group, Parameter

from medtl import __version__
from medtl.config import Config
from medtl.errors import ConfigError, GateRefused, MedtlError
from pipelines import audit_verbs, registry_verbs, scan_verbs
from pipelines import lr_find as lr_find_verb
from pipelines import weights as weight_verbs
from pipelines.advise import advise
from pipelines.terminal import (
    ConfigFile,
    Json,
    Sets,
    load,
    load_diagnosis,
    log_to_file,
    number,
    progress,
    show_table,
    table,
)

log = logging.getLogger("medtl")

_HELP = """Transfer learning for medical imaging that people can trust with patients.

A run is one YAML file: scans in, a validated model and its report out.

  medtl demo                              a synthetic hospital, from nothing to a report
  medtl run configs/malaria.yaml --set scans.source=FOLDER --set model.weights=FILE
  medtl show excluded configs/malaria.yaml --set scans.source=FOLDER
  medtl predict configs/malaria.yaml --scans NEW_FOLDER

Exit codes: 0 done, 1 failed, 2 usage or configuration, 3 refused by a gate.
"""

_INTERRUPTED, _TERMINATED = 130, 143

app = App(name="medtl", help=_HELP, version=__version__, help_format="plaintext", suppress_keyboard_interrupt=False)
_RUNS = Group("Runs", sort_key=1)
_LOOK = Group("Looking at things", sort_key=2)
for verb in (scan_verbs.convert, scan_verbs.deidentify, scan_verbs.listen):
    app.command(verb, group=scan_verbs.SCANS)
app.command(scan_verbs.quarantine)
app.command(weight_verbs.weights)
app.command(registry_verbs.registry)
app.command(audit_verbs.audit)
app.command(advise, group=_RUNS)
app.command(lr_find_verb.lr_find, name="lr-find", group=_LOOK)


class _Ended(BaseException):
    """SIGTERM came outside of a flow; inside of one Prefect raises its own."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    signal.signal(signal.SIGTERM, _end)
    code = call(arguments)
    if code in (_INTERRUPTED, _TERMINATED):  # a step may still be computing in its thread: what it saved is whole
        from pipelines.environment import stop_servers

        stop_servers()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _end(number: int, frame: object) -> None:
    raise _Ended


def call(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; give the exit code."""
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    _log_to_stderr()
    try:
        app(tokens, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        print(f"medtl: {' '.join(str(error).split())} Try: medtl --help", file=sys.stderr)
        return 2
    except MedtlError as error:
        print(f"medtl: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("medtl: stopped; the same command goes on from here.", file=sys.stderr)
        return _INTERRUPTED
    except BaseException as error:
        if not isinstance(error, _Ended) and type(error).__name__ != "TerminationSignal":  # Prefect's own, in a flow
            raise
        print("medtl: stopped by a signal; the same command goes on from here.", file=sys.stderr)
        return _TERMINATED
    return 0


@app.command(group=_RUNS)
def run(config: ConfigFile, *, set_: Sets = None, json_: Json = False) -> None:
    """Do the whole way: ingest, train in phases, evaluate, release, report.

    What is done already is not done again; after a crash the same command goes on where it was. Exit code 3 if the gate
    refuses the model (the report says why). --set report.learning_curve=4 trains on fewer patients too, four times, and
    draws what they give.
    """
    settings = load(config, set_)
    summary = _finished(settings)
    if summary is None:
        summary = _flow(settings, "run")
    _show_run(summary, json_)


@app.command(group=_RUNS)
def ingest(config: ConfigFile, *, set_: Sets = None, json_: Json = False) -> None:
    """Read every scan once; count what was taken and what was left out, and why."""
    started = time.perf_counter()
    from pipelines import results

    settings = load(config, set_)
    summary = results.finished_ingest(settings) or _flow(settings, "ingest")
    summary["seconds"] = round(time.perf_counter() - started, 2)
    lines = [("files", summary["files"]), ("scans", summary["scans"])]
    lines += [(f"excluded: {code}", count) for code, count in summary["excluded"].items()]
    show_table(summary, json_, "Ingest", ("what", "count"), lines)


@app.command(group=_RUNS)
def train(config: ConfigFile, *, set_: Sets = None, json_: Json = False) -> None:
    """Train the model in phases; the test part stays sealed."""
    summary = _flow(load(config, set_), "train")
    rows = [
        (p["name"], p["best_epoch"], f"{p['monitor']} {number(p['watched'])}", number(p["val_loss"]), p["kept"])
        for p in summary["phases"]
    ]
    show_table(summary, json_, "Training (validation)", ("phase", "best epoch", "watched", "loss", "kept"), rows)


@app.command(group=_RUNS)
def pretrain(
    config: ConfigFile,
    *,
    into: Annotated[str, Parameter(help="name that the weights get in the vault")],
    licence: Annotated[str | None, Parameter(help="under which the scans allow their use; repeated in reports")] = None,
    citation: Annotated[str | None, Parameter(help="whose scans they are; repeated in reports")] = None,
    set_: Sets = None,
    json_: Json = False,
) -> None:
    """Learn from scans without labels: hide blocks of them, learn to fill them in, keep the weights in the vault.

    For a segmentation that has no weights to start from. The scans are a folder's (studies.labels.table: null), those
    that a table names (studies.labels.label: []), or the training part of a labelled study, by its own config. How long
    and how: model.reconstruct. Then, with the same dataset.grid:

      medtl run CONFIG --set model.weights=vault:NAME --set model.segmenter.network=dynunet

    (encoder_unet, where that was pre-trained; model.vault names a vault that several workspaces share). The images are
    listed beside the weights: a run that starts from them keeps them out of its test part.
    """
    from medtl.model.vault import check_name

    settings = load(config, set_)
    check_name(into)
    summary = _flow(settings, "reconstruct", into, licence, citation)
    use = f"model.weights=vault:{into} model.segmenter.network={summary['network']}"
    rows = [
        ("use them with", use),
        ("vault", summary["folder"]),
        ("scans", f"{summary['scans']} of {summary['patients']} patients"),
        ("network", f"{summary['network']}, {summary['parameters'] / 1e6:.1f} M parameters"),
        ("patch", " x ".join(map(str, summary["patch"]))),
        ("explained of what was hidden, held out", number(summary["explained"])),
    ]
    show_table(summary, json_, f"Pre-training: {into}", ("what", "value"), rows)


@app.command(group=_RUNS)
def study(
    config: ConfigFile,
    *,
    strategies: Annotated[list[str], Parameter(consume_multiple=True)] | None = None,
    curve: Annotated[list[str], Parameter(consume_multiple=True)] | None = None,
    patients: Annotated[list[int], Parameter(consume_multiple=True)] | None = None,
    set_: Sets = None,
    json_: Json = False,
) -> None:
    """Train several strategies on one split and measure them side by side; draw learning curves.

    Parameters
    ----------
    strategies
        features, probe, staged, lp-ft, full, scratch, or config (the phases that the config lists); default: all six.
    curve
        Strategies to train on fewer patients too, for instance: --curve staged scratch.
    patients
        Sizes of the learning curve; default: all training patients, and half as many four times.
    """
    from medtl.config import STRATEGIES

    chosen = [*strategies] if strategies else [*STRATEGIES]
    summary = _flow(load_diagnosis(config, set_, "study"), "study", chosen, curve or [], patients or [])
    rows = [_trial_row(one) for one in (*summary["strategies"], *summary["curve"])]
    columns = ("strategy", "patients", "AUROC", "low", "high", "minus scratch", "low", "high", "seconds")
    show_table(summary, json_, "Test part, 95 % intervals over patients", columns, rows)
    if not json_:
        _warn_of(
            f"{one['strategy']}, {one['patients']} patients: {caution}"
            for one in (*summary["strategies"], *summary["curve"])
            for caution in one["cautions"]
        )
        print(f"report  {summary['report']}")


def _trial_row(one: dict[str, Any]) -> tuple[Any, ...]:
    auroc, difference = one["scores"]["auroc"], one["difference"] or {}
    return (
        one["strategy"],
        one["patients"],
        *(number(auroc[key]) for key in ("value", "low", "high")),
        *(number(difference.get(key)) for key in ("value", "low", "high")),
        "-" if one["seconds"] is None else round(one["seconds"]),
    )


@app.command(group=_RUNS)
def evaluate(config: ConfigFile, *, set_: Sets = None, json_: Json = False) -> None:
    """Measure the model on the test part (trains it first if that is not done); the opening is logged."""
    summary = _flow(load(config, set_), "evaluate")
    show_table(summary, json_, "Test part, 95 % intervals over patients", _METRIC_COLUMNS, _metric_rows(summary))


@app.command(group=_RUNS)
def crossval(config: ConfigFile, *, set_: Sets = None, json_: Json = False) -> None:
    """Cross-validate by patient, or leave out one site at a time (dataset.folds); pool the folds with intervals.

    A split that came with the data is not used. Folds share one pass through the frozen layers. What comes out says how
    well this way of training does; it makes no release.
    """
    summary = _flow(load(config, set_), "crossval")
    show_table(summary, json_, "Folds, 95 % intervals over patients", _METRIC_COLUMNS, _fold_rows(summary))
    if not json_:
        _warn_of(summary.get("cautions", ()))
        print(f"report  {summary['report']}")


@app.command(group=_RUNS)
def report(config: ConfigFile, *, set_: Sets = None, json_: Json = False) -> None:
    """Write the report (running whatever it still lacks) and name it."""
    settings = load(config, set_)
    summary = _finished(settings) or _flow(settings, "run")
    if json_:
        print(json.dumps({"report": summary["report"], "release": summary["release"], "status": summary["status"]}))
    else:
        print(summary["report"])


@app.command(group=_RUNS)
def predict(
    config: ConfigFile,
    *,
    scans: Annotated[Path, Parameter(help="folder (or file) of new scans")],
    out: Annotated[
        Path | None, Parameter(help="CSV to write, of a segmentation a folder; default: predictions-RELEASE(.csv) here")
    ] = None,
    release: Annotated[str | None, Parameter(help="release to use; default: the newest validated one")] = None,
    allow_candidate: Annotated[
        bool, Parameter(help="also use a release that no gate has validated", negative="")
    ] = False,
    pseudonymous: Annotated[bool, Parameter(help="leave the file names out of the table", negative="")] = False,
    set_: Sets = None,
    json_: Json = False,
) -> None:
    """Apply a release to new scans, with its own plan and operating point; write a table.

    The table names files, because somebody has to act on it: it is written where you say, readable by you alone, and
    nothing of it is kept in the workspace. --pseudonymous leaves the names out. A segmentation writes a folder: the
    table, and a mask for each scan on its own voxels (NIfTI, PNG; of DICOM also SEG).
    """
    from pipelines.apply import Request

    settings = load(config, set_)
    request = Request(scans, out, release, allow_candidate, not pseudonymous)
    summary = _flow(settings, "predict", request)
    rows = [("scans", summary["scans"]), ("excluded", sum(summary["excluded"].values()))]
    rows += [(f"decision: {name}", count) for name, count in summary["decisions"].items()]
    rows += [(f"a person should look: {why}", count) for why, count in summary["doubts"].items()]
    show_table(summary, json_, f"Predictions of {summary['release']}", ("what", "count"), rows)
    if not json_:
        print(summary["table"])


@app.command(group=_RUNS)
def elsewhere(
    config: ConfigFile,
    *,
    scans: Annotated[Path, Parameter(help="folder of labelled scans from elsewhere, with its label table")],
    release: Annotated[str | None, Parameter(help="release to ask; default: the live one, else the newest")] = None,
    allow_candidate: Annotated[
        bool, Parameter(help="also ask a release that no gate has validated", negative="")
    ] = False,
    set_: Sets = None,
    json_: Json = False,
) -> None:
    """Measure a release on labelled scans of another hospital, scanner or year; compare with what it was released with.

    The label table has the columns that the config names (--set studies.labels.label=... for others). Nothing is
    fitted; patients and images that taught the release are refused.
    """
    from pipelines.validation import Elsewhere

    summary = _flow(load(config, set_), "elsewhere", Elsewhere(scans, release, allow_candidate))
    rows = [
        (name, *(number(found[key]) for key in ("value", "low", "high"))) for name, found in summary["metrics"].items()
    ]
    for name, found in summary["change"].items():
        rows.append((f"{name}, minus as released", *(number(found[key]) for key in ("value", "low", "high"))))
    title = f"{summary['release']} on {summary['studies']} studies of {summary['patients']} patients, 95 % intervals"
    show_table(summary, json_, title, _METRIC_COLUMNS, rows)
    if not json_:
        print(f"report  {summary['report']}")


@app.command(group=_RUNS)
def serve(
    config: ConfigFile,
    *,
    every: Annotated[str | None, Parameter(help="20s, 30m, 24h, 7d")] = None,
    cron: Annotated[str | None, Parameter(help='cron expression, for instance "0 3 * * *"')] = None,
    set_: Sets = None,
) -> None:
    """Keep the run on a schedule until stopped (Ctrl-C); one run at a time.

    Starts Prefect's server on a free loopback port, unless PREFECT_API_URL names one.
    """
    from pipelines.environment import prepare_prefect, server
    from pipelines.serve import interval_of
    from pipelines.serve import serve as serve_flow

    if (every is None) == (cron is None):
        raise ConfigError("Give either --every 24h or --cron '0 3 * * *'.")
    interval = interval_of(every) if every else None
    settings = load(config, set_)
    settings = settings.model_copy(update={"workspace": settings.workspace.absolute()})
    prepare_prefect(settings.workspace)
    with server(settings.workspace) as url:
        log.info("serving '%s' %s; Prefect's server: %s", settings.name, f"every {every}" if every else cron, url)
        serve_flow(settings, interval, cron)


@app.command(group=_RUNS)
def demo(
    folder: Annotated[Path, Parameter(help="where the hospital, the workspace and the report go")] = Path("demo"),
    *,
    set_: Sets = None,
    json_: Json = False,
) -> None:
    """Write a small synthetic hospital, pre-train, transfer, compare with from scratch, report.

    Needs no network, no weights, no data and no server.
    """
    from pipelines.demo import prepare_demo

    settings, pretraining = prepare_demo(folder, set_ or [])
    if pretraining is not None:
        _flow(pretraining, "pretrain", settings)
    summary = _finished(settings) or _flow(settings, "run")
    _show_run(summary, json_)


Topic = Literal["codes", "config", "strategies", "excluded", "split", "plan", "phases", "metrics", "releases"]


@app.command(group=_LOOK)
def show(
    what: Annotated[Topic, Parameter(help="what to look at")],
    config: ConfigFile,
    *,
    set_: Sets = None,
    json_: Json = False,
) -> None:
    """Look at a run: its config, what was excluded (with file names, on your terminal only), split, plan,
    phases, metrics.

    Computes nothing but what ingest and split need; torch stays asleep.
    """
    from pipelines import look

    title, columns, rows = look.at(what, load(config, set_))
    show_table([dict(zip(columns, row, strict=True)) for row in rows], json_, title, columns, rows)


@app.command(group=_LOOK)
def backbones(*, json_: Json = False) -> None:
    """List the backbones: stages, input, licence, citation, where their weights come from."""
    from medtl.model.backbones import BACKBONES

    rows = [
        (
            name,
            f"{row.library} {row.dimensions}-D",
            " ".join(stage for stage, _ in row.stages),
            f"{row.min_size}" + (f", multiples of {row.multiple}" if row.multiple > 1 else ""),
            (f"of {row.inflates}, inflated: " if row.inflates else "") + (row.weights.file if row.weights else "-"),
            row.citation,
        )
        for name, row in BACKBONES.items()
    ]
    columns = ("backbone", "library", "stages (then head)", "least size", "ImageNet weights", "citation")
    show_table([dict(zip(columns, row, strict=True)) for row in rows], json_, "Backbones", columns, rows)


def _finished(settings: Config) -> dict[str, Any] | None:
    from medtl.artifacts import Store
    from pipelines import results
    from pipelines.trail import unchanged

    started = time.perf_counter()
    if results.fetches(settings):  # what the archive has is seen in the flow
        return None
    Store(settings.workspace)  # says at once if the workspace cannot be written
    log_to_file(settings.workspace)
    done = results.finished_run(settings)
    if done is None:
        return None
    unchanged(settings, done)
    log.info("nothing to do: every input is unchanged and every result verified")
    seconds = round(time.perf_counter() - started, 2)
    return {**done, "reused": True, "seconds": seconds, "peak_memory_mb": results.peak_memory_mb()}


def _flow(settings: Config, name: str, *more: Any) -> dict[str, Any]:
    """Run a flow on Prefect, with progress on a terminal."""
    import asyncio
    import importlib

    from medtl.artifacts import Store
    from medtl.progress import listening
    from pipelines.environment import ended_by_signals, prepare_prefect, small_server, unwrapped

    Store(settings.workspace)
    log_to_file(settings.workspace)
    prepare_prefect(settings.workspace)
    ready = small_server(settings.workspace)
    flow: Callable[..., Any] = getattr(importlib.import_module(f"pipelines.{name}"), name)
    ready()
    with progress() as listener, listening(listener) if listener else nullcontext(), unwrapped(), ended_by_signals():
        result: dict[str, Any] = asyncio.run(flow(settings, *more))
    return result


_METRIC_COLUMNS = ("metric", "value", "low", "high")


def _metric_rows(summary: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [(n, number(m["value"]), number(m["low"]), number(m["high"])) for n, m in summary["metrics"].items()]


def _fold_rows(summary: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Give the pooled figures, the headline of each fold, and what weights made of it where that was asked."""
    rows = [(f"mean over folds: {name}", *values) for name, *values in _metric_rows(summary)]
    for one in summary["folds"]:
        again = f", repeat {one['repeat'] + 1}" if one["repeat"] else ""
        headline = next(name for name in ("dice", "auroc", *one["values"]) if name in one["values"])
        name = f"{'without ' if summary['by'] == 'site' else 'fold '}{one['fold']}{again}: {headline}"
        rows.append((name, number(one["values"][headline]), "", ""))
    for metric, found in summary.get("difference", {}).items():
        rows.append((f"{metric}, with weights - without", *(number(found[key]) for key in ("value", "low", "high"))))
    return rows


def _warn_of(cautions: Iterable[str]) -> None:
    """Say what to know before believing the difference to the network from scratch."""
    for caution in cautions:
        print(f"caution {caution}")


def _show_run(summary: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(summary))
    else:
        split = ", ".join(f"{part} {count}" for part, count in summary["split"].items())
        rows = _metric_rows(summary)
        if "difference" in summary:
            ((metric, scratch),) = summary["scratch"].items()
            difference = summary["difference"][metric]
            rows.append((f"{metric} from scratch", *(number(v) for v in scratch.values())))
            rows.append((f"{metric}, transfer - scratch", *(number(v) for v in difference.values())))
        table(f"{summary['name']}: test part, 95 % intervals over patients ({split})", _METRIC_COLUMNS, rows)
        _warn_of(summary.get("cautions", ()))
        how = "nothing recomputed" if summary["reused"] else "computed"
        print(f"release {summary['release']}: {summary['status']} ({how}, {summary['seconds']:.1f} s)")
        print(f"report  {summary['report']}")
    if summary["status"] == "refused":
        failed = "; ".join(
            f"{one['condition']}, observed {number(one['observed'])}" for one in summary["gate"] if not one["passed"]
        )
        raise GateRefused(f"The gate refused release {summary['release']}: {failed}. The report shows why.")


def _log_to_stderr() -> None:
    logger = logging.getLogger("medtl")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("medtl: %(message)s"))
    logger.addHandler(handler)


if __name__ == "__main__":
    main()
