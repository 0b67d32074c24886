"""What each strategy gives on real data: the studies behind docs/results.md, by one command.

Every set is split by patient; six strategies and two learning curves are trained with one checkpoint and measured on
the same test part. Finished parts are not computed again.

    python benchmarks/results.py --data FOLDER --weights FILE [--sets malaria ...] [--write docs/results.md]

FOLDER holds ``malaria/``, ``ham10000/`` and ``pneumoniamnist/`` with the public files that the configs name.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SETS = {  # config -> folder of the set
    "malaria": "malaria", "ham10000": "ham10000", "melanoma": "ham10000", "pneumoniamnist": "pneumoniamnist",
}  # fmt: skip
PUBLISHED = {
    "pneumoniamnist": """Published on the official test part (Yang et al., Sci Data 10:41): ResNet-18 at 28 pixels AUROC
.944, at 224 pixels .956, ResNet-50 at 224 pixels .962, the best AutoML .991. Our test part is cut from the file's
training part, at another size: these figures show the order of magnitude, not a ranking.""",
}

HEAD = """# Strategies on real data

Written by `python benchmarks/results.py --data FOLDER --weights FILE --write docs/results.md`. Test parts are split off
by patient (by lesion or image where patients are not published) and were never trained or chosen on; 95 % intervals
over patients. Backbone: torchvision's SqueezeNet 1.0 with its ImageNet checkpoint (Iandola 2016, Han 2016). One split,
one seed: an interval holds the luck of the test patients, not that of the split. Seconds are of training alone, on two
cores that did other work beside it: orders of magnitude.
"""


def source_of(folder: Path) -> Path:
    """Give what a config's ``scans.source`` should be: the folder, or the one .npz file in it."""
    files = sorted(folder.glob("*.npz"))
    return files[0] if files else folder


def study(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one study in its own workspace and read its last line."""
    command = [
        sys.executable, "-m", "pipelines.cli", "study", str(ROOT / "configs" / f"{name}.yaml"),
        "--curve", "staged", "scratch",
        "--set", f"scans.source={source_of(arguments.data / SETS[name])}",
        "--set", f"model.weights={arguments.weights}",
        "--set", f"workspace={arguments.workspace / name}", "--json",
    ]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"the study of {name} failed; its messages are above")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def markdown(studies: dict[str, dict[str, Any]]) -> str:
    """Write the studies as a page."""
    lines = [HEAD]
    for name, found in studies.items():
        test = found["parts"]["test"]
        lines += [
            f"## {name}",
            "",
            f"{found['size'][0]} pixels; " + "; ".join(
                f"{part} {n['studies']:,} images of {n['patients']:,} patients" for part, n in found["parts"].items()
            ) + (". Patients are not known: each image counts as one." if not found["patients_known"] else "."),
            "",
        ]  # fmt: skip
        lines += [PUBLISHED[name], ""] if PUBLISHED.get(name) else []
        lines += _table(found["strategies"], curve=False)
        if found["curve"]:
            lines += ["", f"Fewer training patients, the same {test['studies']:,} test images:", ""]
            lines += _table(found["curve"], curve=True)
        lines.append("")
    return "\n".join(lines)


def _table(trials: list[dict[str, Any]], curve: bool) -> list[str]:
    lines = [
        "| strategy | patients | AUROC | balanced accuracy | minus scratch | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for one in trials:
        scores = one["scores"]
        lines.append(
            f"| `{one['strategy']}` | {one['patients']:,}" + (f" ({one['share']:.0%})" if curve else "")
            + f" | {_interval(scores['auroc'])} | {_interval(scores['balanced_accuracy'])}"
            + f" | {_interval(one['difference'])} | "
            + ("" if one["seconds"] is None else f"{one['seconds']:.0f}") + " |"
        )  # fmt: skip
    return lines


def _interval(score: dict[str, Any] | None) -> str:
    if score is None or score["value"] is None:
        return ""
    if score["low"] is None:
        return f"{score['value']:.3f}"
    return f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"


def main() -> None:
    """Run the studies, print the page, write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the sets")
    parser.add_argument("--weights", type=Path, required=True, help="checkpoint of torchvision's squeezenet1_0")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--workspace", type=Path, help="where results are kept; default: a temporary folder")
    parser.add_argument("--write", type=Path, help="Markdown file to write")
    parser.add_argument("--json", action="store_true", help="last line of stdout: one JSON object")
    arguments = parser.parse_args()
    arguments.data, arguments.weights = arguments.data.absolute(), arguments.weights.absolute()
    with tempfile.TemporaryDirectory() as temporary:
        arguments.workspace = (arguments.workspace or Path(temporary)).absolute()
        studies = {name: study(name, arguments) for name in arguments.sets}
    page = markdown(studies)
    print(page)
    if arguments.write:
        arguments.write.write_text(page)
    if arguments.json:
        print(json.dumps({"benchmark": "results", "rows": _rows(studies)}, default=str))


def _rows(studies: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"name": one["strategy"], "case": f"{name}, {one['patients']} patients",
         "median": one["scores"]["auroc"]["value"],
         "unit": "AUROC", "ratio": None}
        for name, found in studies.items()
        for one in (*found["strategies"], *found["curve"])
    ]  # fmt: skip


if __name__ == "__main__":
    main()
