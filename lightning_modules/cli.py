"""Command line: ``python -m lightning_modules VERB ...``.

::

    python -m lightning_modules fit experiments/toy stage1 trainer.max_steps=100
    python -m lightning_modules fit runs/toy/stage1/config.yaml

Every verb imports what it needs when it is called, so that ``--help`` and wrong arguments cost no import of torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datamodules.io.hub import is_hub_name
from datamodules.io.processes import start_server
from lightning_modules.config import Composition, ConfigError, compose, read_layers, stage_names
from lightning_modules.early_check import check_early
from lightning_modules.layers import dump_yaml
from lightning_modules.lock import RunLock, is_rank_zero, release_all
from lightning_modules.signals import ExitOnSignal

if TYPE_CHECKING:
    from lightning_modules.serving.server import Limits

OVERRIDES = "stage, and keys to override: key=value, --key=value, or ~key to remove one; `keys` lists them all"
DATASET_MODULES = (
    "datamodules.clips.validation",
    "datamodules.ego_exo_clip.datamodule",
    "datamodules.egoit.datamodule",
)
"""Modules of the datasets of a run, which reading processes have to import."""


def fit(options: argparse.Namespace) -> None:
    """Train a stage or resume it, then answer the validation questions."""
    composition = _read_layers(options)
    config = composition.resolve()
    with _locked(config):
        check_early(config, "fit")
        _start_reading_server(config)
        _silence_warnings()
        from lightning_modules import training

        training.fit(config, options.force, composition)


def evaluate(options: argparse.Namespace) -> None:
    """Answer the validation questions, or benchmarks, with a finished stage; or benchmarks with any model."""
    if options.model is not None:
        _evaluate_model(options)
        return
    config = _read_layers(options).resolve()
    names = _benchmark_names(options)
    if not names and config["data"]["init_args"].get("held_out") is None:
        raise ConfigError("data.held_out: got null, so there are no questions: name benchmarks, `BENCHMARKS=all`")
    with _locked(config):
        _check_then_import(config, "evaluate")
        from lightning_modules import evaluation

        if names:
            evaluation.evaluate_benchmarks(config, None if names == ["all"] else names, options.force)
        else:
            evaluation.evaluate(config)


def _benchmark_names(options: argparse.Namespace) -> list[str]:
    return [name for name in options.benchmarks.split(",") if name]


def _evaluate_model(options: argparse.Namespace) -> None:
    """Answer benchmarks with a model that needs no experiment."""
    names = _benchmark_names(options)
    if not names:
        raise ConfigError("--benchmarks: a model without an experiment answers benchmarks only: name them, or all")
    if options.experiment.is_dir():
        raise ConfigError(f"{options.experiment}: is a folder: name a file with the key egobench, and no stage")
    _require_files(options)
    config = read_layers(options.experiment, None, options.rest).resolve()
    if not (config.get("egobench") or {}).get("benchmarks"):
        raise ConfigError(
            f"{options.experiment}: key egobench.benchmarks is missing: name a file that lists benchmarks"
        )
    # The two last folders of its path name a model, as owner and name do on the hub.
    parts = [part for part in Path(options.model).absolute().parts if part != "handoff"]
    out = options.out / "_".join(parts[-2:])
    with _locked({"run_dir": out}):
        _silence_warnings()
        from lightning_modules import evaluation

        evaluation.evaluate_model(options.model, config, out, None if names == ["all"] else names, options.force)


def show(options: argparse.Namespace) -> None:
    """Print the resolved configuration of a stage with all defaults, and check it."""
    config = _compose(options)
    from lightning_modules.run import build, complete

    print(dump_yaml(complete(config)), end="")
    build(config)


def check(options: argparse.Namespace) -> None:
    """Check what `fit` is given, as far as that is possible within a second; `show` checks everything."""
    check_early(_read_layers(options).resolve(), "check")


def keys(options: argparse.Namespace) -> None:
    """Print all keys of a stage with value, type, default and meaning, one a line."""
    config = _compose(options)
    from lightning_modules.run import print_keys

    print_keys(config)


def plan(options: argparse.Namespace) -> None:
    """Print parameters, memory, operations and hours of the stages, without allocating anything.

    Raises:
        ConfigError: a stage does not fit its devices; the message names the keys to change.
    """
    stage = _stage_argument(options)
    stages = [stage] if stage else stage_names(options.experiment)
    configs = [compose(options.experiment, name, options.rest) for name in stages]
    for config in configs:
        _check_then_import(config, "plan")
    from lightning_modules.demonstrations import build_demonstrator
    from lightning_modules.plan.benchmarks import cost_table
    from lightning_modules.plan.stages import PlanConfig, device_count, plan_demonstrations, plan_stage, plan_table
    from lightning_modules.run import build_stage

    plans = [plan_stage(config, build_stage(config)) for config in configs]
    assumptions = [PlanConfig(**(config.get("plan") or {})) for config in configs]
    print(plan_table(plans, assumptions))
    for config in configs:
        if config["model"]["init_args"].get("demonstrations"):
            print(f"\n{plan_demonstrations(config, build_demonstrator(config))}")
    for config, assumed in zip(configs, assumptions, strict=True):
        if config["stage"] == "stage3":
            num_frames, devices = int(config["clips"]["num_frames"]), device_count(config["trainer"])
            print(f"\n{cost_table(build_stage(config), num_frames, assumed, devices)}")
    problems = []
    for plan, assumed in zip(plans, assumptions, strict=True):
        try:
            plan.require_fit(assumed.gpu_memory_gib)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("; ".join(problems))


def demonstrate(options: argparse.Namespace) -> None:
    """Compute the demonstrator's answers about all pairs once, for stage 2 to read.

    An interrupted call resumes.
    """
    config = _compose(options)
    from lightning_modules import demonstrations

    demonstrations.demonstrate(config, options.force)


def probe(options: argparse.Namespace) -> None:
    """Print what y, x and F(x) of a finished stage 2 tell about clips, bars of its KL, and norms of its gradients."""
    config = _compose(options)
    from lightning_modules import probe as probes

    probes.probe(config, options.samples)


def consolidate(options: argparse.Namespace) -> None:
    """Export stage weights from the last checkpoint of an unfinished stage."""
    config = _read_layers(options).resolve()
    with _locked(config):
        _check_then_import(config, "consolidate")
        from lightning_modules import training

        training.consolidate(config)


def report(options: argparse.Namespace) -> None:
    """Print the tables of all stages of an experiment's runs."""
    from lightning_modules import evaluation

    evaluation.report(options.runs)


def score(options: argparse.Namespace) -> None:
    """Compute the benchmark scores of all stages again, from their predictions alone."""
    from lightning_modules import evaluation
    from lightning_modules.egobench.judge import JudgeConfig
    from lightning_modules.egobench.results import score_stages

    score_stages(options.runs, JudgeConfig(options.judge, options.judge_model))
    evaluation.report(options.runs)


def chat(options: argparse.Namespace) -> None:
    """Ask a trained model about a video, interactively without --question."""
    _silence_warnings()
    from lightning_modules.inference.api import Exo2Ego
    from lightning_modules.inference.terminal import ask

    model = Exo2Ego.from_pretrained(options.model)
    ask(model, options.video, options.question, options.start, options.end)


def describe(options: argparse.Namespace) -> None:
    """Narrate a video of any length with time stamps, optionally as subtitles."""
    _silence_warnings()
    from lightning_modules.inference.api import CAPTION, Exo2Ego
    from lightning_modules.inference.terminal import check_subtitles, narrate

    if options.out is not None:
        check_subtitles(options.out)
    model = Exo2Ego.from_pretrained(options.model)
    question = options.question or CAPTION
    narrate(model, options.video, options.every, options.start, options.end, question, options.out)


def watch(options: argparse.Namespace) -> None:
    """Answer about the last seconds of a camera, a stream, or a file as if live, until it ends."""
    _silence_warnings()
    from lightning_modules.inference.api import CAPTION, Exo2Ego
    from lightning_modules.inference.terminal import watch as print_observations

    model = Exo2Ego.from_pretrained(options.model)
    print_observations(model, options.source, options.every, options.window, options.question or CAPTION)


def export(options: argparse.Namespace) -> None:
    """Write a trained model as a folder for transformers, PEFT, VideoLLaMA2 or vLLM."""
    from lightning_modules.inference.export import export_model

    _silence_warnings()
    export_model(options.model, options.out, options.to, merge=not options.unmerged)


def serve(options: argparse.Namespace) -> None:
    """Serve a trained model over HTTP, in the form of OpenAI's chat completions."""
    _require_packages("serve", "starlette", "uvicorn")
    _silence_warnings()
    from lightning_modules.serving import server

    server.serve(options.model, options.root, options.host, options.port, _limits(options))


def demo(options: argparse.Namespace) -> None:
    """Serve a web page to ask a trained model about uploaded videos."""
    _require_packages("demo", "gradio", "starlette", "uvicorn")
    _silence_warnings()
    from lightning_modules.serving.demo import serve

    serve(options.model, options.host, options.port, _limits(options))


_KEY_OPTION = re.compile(
    r"^--(?!(?:benchmarks|model|out|samples|force|judge|traceback)=)([A-Za-z_][\w.]*=.*)", re.DOTALL
)
"""An override in the form ``--key=value``. Names of options have no dots, and no key has the name of one."""

_VERBS = (
    fit,
    evaluate,
    demonstrate,
    show,
    check,
    keys,
    plan,
    probe,
    consolidate,
    report,
    score,
    chat,
    describe,
    watch,
    export,
    serve,
    demo,
)
VERBS = {verb.__name__: verb for verb in _VERBS}
_OF_A_MODEL = ("chat", "describe", "watch", "export", "serve", "demo")
"""Verbs that take a trained model and no experiment, and so no overrides."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb.

    Returns:
        Exit status: 0 success, 1 training failed, 2 invalid input, 75 stopped before the end and resumable.
    """
    options = _parse(arguments)
    with ExitOnSignal(_stopped) if options.verb == "fit" else nullcontext():
        return _run(options)


def _run(options: argparse.Namespace) -> int:
    try:
        if options.verb in _OF_A_MODEL:
            _require_files(options)
        VERBS[options.verb](options)
    except Exception as error:
        if options.traceback and isinstance(error, ValueError | OSError):
            raise
        if isinstance(error, ValueError) and "torch" not in sys.modules:
            print(f"error: {error}", file=sys.stderr)
            return 2
        from lightning_modules.exits import exit_status

        return exit_status(error)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m lightning_modules", description="Train and evaluate Exo2Ego.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name, verb in VERBS.items():
        text = str(verb.__doc__).partition("\n")[0]
        command = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
        if name in ("report", "score"):
            command.add_argument("runs", type=Path, help="folder of an experiment's runs, e.g. runs/toy")
        elif name == "export":
            command.add_argument("model", help="run, such as runs/toy/stage3, or its stage weights")
            command.add_argument("out", type=Path, help="folder to write; it must not exist")
        elif name in ("chat", "describe"):
            command.add_argument("video", help="video file, or folder of images")
        elif name == "watch":
            command.add_argument("source", help="number of a camera, device, address, or video file")
        elif name in ("serve", "demo"):
            command.add_argument("model", help="run, exported folder, or name on the hub")
        else:
            command.add_argument("experiment", type=Path, help="folder of the experiment, or config.yaml of a run")
            command.add_argument("rest", nargs="*", metavar="[STAGE] key=value", help=OVERRIDES)
        command.add_argument("--traceback", action="store_true", help="show the traceback of an error")
        _add_options(name, command)
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] not in _OF_A_MODEL:
        given = [_KEY_OPTION.sub(r"\1", word) for word in given]
    options, after = parser.parse_known_args(given)
    # argparse accepts no more positional arguments after an option, but key=value may follow in any order.
    wrong = [word for word in after if word.startswith("-") or not ("=" in word or word.startswith("~"))]
    if wrong or (after and "rest" not in options):
        name = wrong[0].removeprefix("--") if wrong else ""
        hint = f": write {name}=value to override a key" if re.fullmatch(r"[a-z]\w*(\.\w+)+", name) else ""
        parser.error(f"unrecognized arguments: {' '.join(wrong or after)}{hint}")
    if after:
        options.rest += after
    return options


def _add_options(verb: str, command: argparse.ArgumentParser) -> None:
    """Declare the options of a single verb."""
    if verb in ("fit", "check"):
        command.add_argument("--force", action="store_true", help="train from scratch, discarding an earlier run")
    if verb == "demonstrate":
        command.add_argument("--force", action="store_true", help="discard demonstrations that exist")
    if verb == "probe":
        command.add_argument("--samples", type=int, default=400, metavar="N", help="clips to encode, 400 by default")
    if verb == "evaluate":
        benchmarks = "answer benchmarks of the experiment instead: names separated by commas, or all"
        command.add_argument("--benchmarks", metavar="NAMES", default="", help=benchmarks)
        model = "run, exported folder, folder of VideoLLaMA2, or name on the hub, in place of a stage: benchmarks of "
        model += "the named YAML file, such as experiments/data/egobench.yaml"
        command.add_argument("--model", metavar="FOLDER", help=model)
        out = "folder of the results of such models, by default runs/evaluated"
        command.add_argument("--out", type=Path, default=Path("runs/evaluated"), metavar="FOLDER", help=out)
        command.add_argument("--force", action="store_true", help="discard predictions that exist")
    if verb in ("chat", "describe", "watch"):
        command.add_argument("--model", default="runs/toy/stage3", help="run, exported folder, or name on the hub")
        command.add_argument("--question", metavar="TEXT", help="asked about the clip, or about every part")
    if verb in ("chat", "describe"):
        command.add_argument("--start", type=float, default=0.0, metavar="SECONDS", help="start of the span")
        command.add_argument("--end", type=float, metavar="SECONDS", help="its end, by default that of the video")
    if verb == "export":
        command.add_argument(
            "--to", choices=("hf", "peft", "videollama2", "vllm"), default="hf", help="form of the folder"
        )
        command.add_argument("--unmerged", action="store_true", help="keep the adapters of LoRA apart from the layers")
    if verb == "serve":
        command.add_argument("--root", type=Path, metavar="FOLDER", help="requests may name the videos below it")
    if verb in ("serve", "demo"):
        port = {"serve": 8000, "demo": 7860}[verb]
        command.add_argument("--host", default="127.0.0.1", help="address to listen on, by default this machine's own")
        command.add_argument("--port", type=int, default=port, help="port to listen on")
        command.add_argument("--running", type=int, metavar="N", help="requests that are answered at the same time")
        command.add_argument("--waiting", type=int, metavar="N", help="further requests that are accepted")
        command.add_argument("--body-mib", type=float, metavar="MIB", help="largest request or upload")
        command.add_argument("--seconds", type=float, metavar="S", help="longest time of a request")
        command.add_argument("--new-tokens", type=int, metavar="N", help="longest answer")
    if verb == "watch":
        command.add_argument("--every", type=float, default=2.0, metavar="SECONDS", help="time between two answers")
        command.add_argument("--window", type=float, metavar="SECONDS", help="time that an answer looks back")
    if verb == "describe":
        command.add_argument("--every", type=float, default=2.0, metavar="SECONDS", help="length of a narrated part")
        command.add_argument("--out", type=Path, metavar="FILE", help="subtitles to write, .srt or .vtt")
    if verb == "score":
        command.add_argument("--judge", choices=("none", "file", "hf"), default="none", help="judge of open answers")
        judge_model = "folder or hub name of the judge, or who wrote the file of verdicts"
        command.add_argument("--judge-model", metavar="NAME", help=judge_model)


def _limits(options: argparse.Namespace) -> Limits:
    """Return the bounds of a server; those that were not given keep their defaults."""
    from lightning_modules.serving.server import Limits

    names = [field.name for field in dataclasses.fields(Limits)]
    return Limits(**{name: getattr(options, name) for name in names if getattr(options, name) is not None})


def _locked(config: dict[str, Any]) -> AbstractContextManager[object]:
    """Lock the run's folder in the first process; the others of a distributed run belong to it."""
    run_dir = config.get("run_dir")
    return RunLock(Path(str(run_dir))) if run_dir and is_rank_zero() else nullcontext()


def _start_reading_server(config: dict[str, Any]) -> None:
    """Let the server of reading processes import what they need while this process does the same."""
    data = config.get("data") or {}
    if data.get("class_path") and (data.get("init_args") or {}).get("num_workers", 1):
        start_server([str(data["class_path"]).rpartition(".")[0], *DATASET_MODULES])


def _stopped(by: str) -> None:
    release_all()
    if os.environ.get("LOCAL_RANK", "0") == "0":
        os.write(2, f"stopped by {by}: nothing is lost; run it again to resume\n".encode())  # without a lock


def _stage_argument(options: argparse.Namespace) -> str | None:
    """Remove the stage from the positional arguments and return it, if there is one.

    Raises:
        ConfigError: the experiment has no such stage.
    """
    if not options.rest or "=" in options.rest[0] or options.rest[0].startswith("~"):
        return None
    stage = str(options.rest.pop(0))
    known = stage_names(options.experiment)
    if stage not in known:
        raise ConfigError(f"stage: got {stage!r}, allowed: {', '.join(known)}")
    return stage


def _compose(options: argparse.Namespace) -> dict[str, Any]:
    """Compose, resolve and check the configuration that the arguments name."""
    config = _read_layers(options).resolve()
    _check_then_import(config, options.verb)
    return config


def _read_layers(options: argparse.Namespace) -> Composition:
    """Read the layers of the configuration that the arguments name.

    Raises:
        ConfigError: the experiment or the stage does not exist, or its configuration is invalid.
    """
    stage = _stage_argument(options)
    if stage is None and options.experiment.is_dir():
        known = ", ".join(stage_names(options.experiment))
        raise ConfigError(f"{options.experiment} is a folder: name a stage after it, {known}")
    return read_layers(options.experiment, stage, options.rest)


def _check_then_import(config: dict[str, Any], verb: str) -> None:
    """Refuse common mistakes at once; only then import torch and Lightning, which takes seconds.

    Raises:
        ValueError: a key is unknown, a plain value has the wrong type, or a folder is missing.
    """
    check_early(config, verb)
    _silence_warnings()


def _require_files(options: argparse.Namespace) -> None:
    """Refuse a model or a video that is not there before torch is imported and the model read.

    Raises:
        ValueError: it names the argument.
    """
    if not Path(options.model).is_dir() and not is_hub_name(options.model):
        raise ValueError(f"{options.model}: no such folder: name a run, an exported folder, or owner/name on the hub")
    if "video" in options and not Path(options.video).exists():
        raise ValueError(f"{options.video}: no such file: name a video, or a folder of images")


def _require_packages(extra: str, *names: str) -> None:
    """Refuse a command whose packages are missing.

    Raises:
        ValueError: it names the first one and the command that installs them.
    """
    for name in names:
        if find_spec(name) is None:
            raise ValueError(f"{name} is not installed: pip install -e '.[{extra}]'")


def _silence_warnings() -> None:
    from lightning_modules.compat import silence_expected_warnings

    silence_expected_warnings()
