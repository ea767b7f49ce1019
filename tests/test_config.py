"""Experiments as YAML: layers, interpolation, and that every one of them binds to the code."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict

import pytest
import tiny
import yaml

from datamodules.video.convert import PAD_RGB
from lightning_modules import AnswerGuidance
from lightning_modules.config import (
    INTERPOLATED_KEYS,
    RENAMED_KEYS,
    ConfigError,
    Renamed,
    compose,
    config_hash,
    read_layers,
)
from lightning_modules.config_check import check_config
from lightning_modules.layers import dump_yaml
from lightning_modules.run import SHARED_KEYS, build

EXPERIMENTS = sorted(
    path.parent.relative_to(tiny.EXPERIMENTS)
    for path in tiny.EXPERIMENTS.rglob("experiment.yaml")
    if path.parent.name != "base"
)
TOY = tiny.EXPERIMENTS / "toy"


def write(folder, **files):
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return folder


# ------------------------------------------------------------------------------------------------------------- layers


def test_later_layers_win(tmp_path):
    write(tmp_path / "base", experiment={"a": 1, "b": 1, "c": 1, "d": 1, "e": 1, "f": 1}, stage1={"b": 2, "f": 2})
    write(tmp_path / "parts", first={"c": 3, "d": 3}, second={"d": 4})
    extends = ["../base", "../parts/first.yaml", "../parts/second.yaml"]
    write(tmp_path / "own", experiment={"extends": extends, "e": 5, "f": 5}, stage1={"f": 6})
    found = compose(tmp_path / "own", "stage1", ["g=7"])
    assert found == {"stage": "stage1", "a": 1, "b": 2, "c": 3, "d": 4, "e": 5, "f": 6, "g": 7}
    found = compose(tmp_path / "own", "stage0", ["f=8"])
    assert found == {"stage": "stage0", "a": 1, "b": 1, "c": 3, "d": 4, "e": 5, "f": 8}


def test_extends_is_transitive_and_merges_nested_keys(tmp_path):
    write(tmp_path / "one", experiment={"x": {"a": 1, "b": 1}, "list": [1, 2, 3]})
    write(tmp_path / "two", experiment={"extends": ["../one"], "x": {"b": 2}})
    write(tmp_path / "three", experiment={"extends": ["../two"], "x": {"c": "${x.b}"}, "list": [4]})
    assert compose(tmp_path / "three", "stage2") == {"stage": "stage2", "x": {"a": 1, "b": 2, "c": 2}, "list": [4]}


def test_interpolation_sees_overrides(tmp_path):
    write(tmp_path / "one", experiment={"a": 1, "b": "${a}", "c": "path/${a}"})
    assert compose(tmp_path / "one", "stage0", ["a=5"]) == {"stage": "stage0", "a": 5, "b": 5, "c": "path/5"}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12:00:00:00", "12:00:00:00"),
        ("010", 8),
        ("08", "08"),
        (".5", 0.5),
        ("-1E5", -1e5),
        ("1_0", 10),
        ("2026-01-01", "2026-01-01"),
        ("1e-3", 1e-3),
        ("null", None),
        ("[1, a]", [1, "a"]),
        ("{b: 2}", {"b": 2}),
        ("x=y", "x=y"),
    ],
)
def test_overrides_are_yaml(tmp_path, text, value):
    write(tmp_path / "one", experiment={"a": 0})
    assert compose(tmp_path / "one", "stage0", [f"a={text}"]) == {"stage": "stage0", "a": value}


def test_a_layer_may_replace_and_remove(tmp_path):
    write(tmp_path / "one", experiment={"a": {"x": 1, "y": {"z": 2}}, "b": {"c": 3}, "e": "${b}"})
    own = {"extends": "../one", "a": {"_delete_": True, "v": 4}, "b": {"c": "_delete_", "d": 5}}
    write(tmp_path / "two", experiment=own)
    merged = {"stage": "stage0", "a": {"v": 4}, "b": {"d": 5}, "e": {"d": 5}}
    assert compose(tmp_path / "two", "stage0") == merged
    for overrides, changed in [
        (["a={}"], {"a": {}}),
        (["a={}", "a.x=6"], {"a": {"x": 6}}),
        (["a={_delete_: true, x: {y: 6}}"], {"a": {"x": {"y": 6}}}),
        (["a={x: 6}"], {"a": {"v": 4, "x": 6}}),
        (["~a.v", "a.v.w=6"], {"a": {"v": {"w": 6}}}),
        (["a=null"], {"a": None}),
        (["e.f=6"], {"e": {"d": 5, "f": 6}}),
        (["e._delete_=true"], {"e": {}}),
    ]:
        assert compose(tmp_path / "two", "stage0", overrides) == merged | changed, overrides
    for overrides, message in [
        (["~a.x"], "command line: a: x is to be removed but is not set there; set: v$"),
        (["a._delete_=1"], "a: _delete_: got 1, allowed: true"),
        (["e.f=6", "b=null", "b.d.x=1", "c=${nothing}"], "Interpolation key 'nothing' not found"),
    ]:
        with pytest.raises(ConfigError, match=message):
            compose(tmp_path / "two", "stage0", overrides)


def test_short_forms_of_arguments(tmp_path):
    layer = {"model": {"class_path": "a.B", "x": 1}, "data": {"init_args": {"y": 2}, "z": {"w": 3}}}
    write(tmp_path / "one", experiment=layer)
    found = compose(tmp_path / "one", "stage0", ["model.x=4", "data.z.w=5", "~data.y"])
    assert found["model"] == {"class_path": "a.B", "init_args": {"x": 4}}
    assert found["data"] == {"init_args": {"z": {"w": 5}}}
    write(tmp_path / "two", experiment={"model": {"x": 1, "init_args": {"x": 1}}})
    with pytest.raises(ConfigError, match=r"model.x is short for model.init_args.x: remove one of them"):
        compose(tmp_path / "two", "stage0")
    assert compose(TOY, "stage2", ["model.kl.answer_tokens=9"])["model"]["init_args"]["answer_tokens"] == 9


def test_a_pretrained_language_model_replaces_the_shape_of_the_experiment():
    for experiment in EXPERIMENTS:
        chosen = ["network.language_model.pretrained=weights/other"]
        model = compose(tiny.EXPERIMENTS / experiment, "stage1", chosen)["network"]["language_model"]
        assert model == {"pretrained": "weights/other"}
        chosen += ["network.language_model.architecture=llama", "network.language_model.overrides={hidden_size: 8}"]
        model = compose(tiny.EXPERIMENTS / experiment, "stage1", chosen)["network"]["language_model"]
        assert len(model) == 3  # a contradiction in one place is for the model to refuse


# ------------------------------------------------------------------------------------------------------------- errors


def test_unknown_experiment_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"no experiment .*/toi: .*there are: .*toy, .*toy_coarse") as caught:
        compose(tiny.EXPERIMENTS / "toi", "stage1")
    known = str(caught.value).rpartition("there are: ")[2].split(", ")
    assert known == sorted(path.name for path in tiny.EXPERIMENTS.iterdir() if (path / "experiment.yaml").is_file())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.max_steps", "override 'trainer.max_steps': expected key=value"),
        ("=3", "override '=3': expected key=value"),
        ("trainer.max_steps=[1", r"override 'trainer.max_steps=\[1': the value is no YAML"),
        ("run_dir=${nowhere}", "'nowhere' not found .*run_dir"),
        ("run_dir=${runs", "run_dir"),
        ("~trainer.max_steps=3", "override '~trainer.max_steps=3': expected key=value"),
        ("trainer..max_steps=3", "expected key=value"),
        ("data.views[0]=ego", r"override .*: a list is given as a whole: data.views=\[\.\.\.\]$"),
    ],
)
def test_wrong_overrides(override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        compose(TOY, "stage1", [override])
    assert "\n" not in str(caught.value)


def test_wrong_files(tmp_path):
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "twice.yaml").write_text("a: 1\na: 2\n")
    write(tmp_path / "one", experiment={"extends": ["missing.yaml"]})
    write(tmp_path / "two", experiment={"extends": "../nothing"})
    write(tmp_path / "three", experiment={"extends": {"a": 1}})
    write(tmp_path / "four", experiment={}, stage0={"extends": "../one"})
    write(tmp_path / "itself", experiment={"extends": "."})
    write(tmp_path / "ring", experiment={"extends": "../link"})
    write(tmp_path / "link", experiment={"extends": ["../ring/experiment.yaml"]})
    for path, stage, message in (
        ("broken.yaml", None, "broken.yaml: .*line 2"),
        ("list.yaml", None, "list.yaml: expected keys and values"),
        ("nowhere.yaml", None, "nowhere.yaml: no such file"),
        ("twice.yaml", None, "twice.yaml: duplicate key a .*line"),
        ("one", "stage0", "missing.yaml: no such file"),
        ("two", "stage0", "no experiment .*/nothing, which .*/two/experiment.yaml extends: no such file"),
        ("three", "stage0", "three/experiment.yaml: extends: got .*, allowed: a list of files and of folders"),
        ("four", "stage0", "stage0.yaml: extends: only an experiment.yaml extends others: move it there"),
        ("itself", "stage0", "itself/experiment.yaml: extends: the experiment extends itself .*itself -> .*itself"),
        ("ring", "stage0", "extends itself .*/ring -> .*/link -> .*/ring.: remove one of these lines"),
    ):
        with pytest.raises(ConfigError, match=message):
            compose(tmp_path / path, stage)


# ------------------------------------------------------------------------------------------------------- renamed keys


@pytest.fixture
def renamed(monkeypatch):
    """Three keys of an imagined earlier version."""
    keys = {
        "network.reads": Renamed("network.inputs", lambda value: ["ego", "mapped"] if value == "both" else [value]),
        "model.init_args.network.reads": Renamed("model.init_args.network.inputs", lambda value: [value]),
        "rate": Renamed("optim.rate", stages=("stage2",)),
        "kind": Renamed("kind", lambda value: {"old": "new"}.get(value, value)),
    }
    monkeypatch.setattr("lightning_modules.config.RENAMED_KEYS", keys)


@pytest.mark.usefixtures("renamed")
def test_old_keys_are_renamed_in_every_layer(tmp_path, capsys):
    write(tmp_path / "base", experiment={"network": {"inputs": ["exo"]}, "copy": "${network.inputs}"})
    write(tmp_path / "own", experiment={"extends": ["../base"], "network": {"reads": "both"}}, stage1={"kind": "old"})
    both = {"network": {"inputs": ["ego", "mapped"]}, "copy": ["ego", "mapped"]}
    assert compose(tmp_path / "own", "stage0") == both | {"stage": "stage0"}
    file = tmp_path / "own" / "experiment.yaml"
    assert capsys.readouterr().err == f"{file}: network.reads is now called network.inputs\n"
    assert compose(tmp_path / "own", "stage1") == both | {"stage": "stage1", "kind": "new"}
    assert capsys.readouterr().err.endswith(f"{tmp_path}/own/stage1.yaml: the value 'old' of kind is now 'new'\n")


@pytest.mark.usefixtures("renamed")
def test_old_keys_are_renamed_in_overrides_and_references(tmp_path, capsys):
    write(tmp_path / "own", experiment={"network": {"inputs": ["exo"]}, "copy": "${network.reads}", "kind": "new"})
    capsys.readouterr()
    found = compose(tmp_path / "own", "stage0", ["network.reads=ego", "rate=3"])
    assert found.pop("stage") == "stage0"
    assert found == {"network": {"inputs": ["ego"]}, "copy": ["ego"], "kind": "new", "rate": 3}
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "override network.reads=ego: network.reads is now called network.inputs"
    assert [line.partition(":")[0] for line in lines] == [
        f"{tmp_path}/own/experiment.yaml",
        "override network.reads=ego",
    ]
    assert compose(tmp_path / "own", "stage2", ["rate=3"])["optim"] == {"rate": 3}


@pytest.mark.usefixtures("renamed")
def test_old_keys_are_renamed_in_the_configuration_of_a_run(tmp_path):
    saved = {"stage": "stage2", "rate": 1, "network": {"reads": "ego"}}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(saved | {"model": {"init_args": {"network": {"reads": "ego"}}}}))
    expected = {"stage": "stage2", "optim": {"rate": 1}, "network": {"inputs": ["ego"]}}
    expected["model"] = {"init_args": {"network": {"inputs": ["ego"]}}}
    assert compose(file, None) == expected
    assert compose(file, None, ["rate=2"])["optim"] == {"rate": 2}


@pytest.mark.usefixtures("renamed")
def test_an_old_key_next_to_its_new_name_is_refused(tmp_path):
    write(tmp_path / "own", experiment={"network": {"inputs": ["exo"], "reads": "ego"}})
    with pytest.raises(ConfigError, match=r"network.reads is the old name of network.inputs: remove one of them"):
        compose(tmp_path / "own", "stage0")


@pytest.mark.parametrize(("reads", "inputs"), [("both", ["ego", "mapped"]), ("ego", ["ego"]), ("mapped", ["mapped"])])
def test_learner_reads_is_the_old_name_of_visual_inputs(reads, inputs):
    override = f"network.learner_reads={reads}"
    config = compose(tiny.EXPERIMENTS / "toy", "stage2", [override])
    assert config["network"]["visual_inputs"] == config["model"]["init_args"]["network"]["visual_inputs"] == inputs


@pytest.mark.parametrize(("level", "style"), [("base", "base"), ("as_written", "raw")])
def test_prompt_level_is_the_old_name_of_instruction_style(level, style):
    config = compose(tiny.EXPERIMENTS / "toy", "stage3", [f"data.init_args.prompt_level={level}"])
    assert config["data"]["init_args"]["instruction_style"] == style


def test_answers_as_a_place_of_the_kl_are_a_class_now(tmp_path, capsys):
    kl = "{ kl: { where: answers, answer_tokens: 9, weight: 2.0 } }"
    (tmp_path / "stage2.yaml").write_text(f"model: {{ init_args: {kl} }}\n")
    base = "model: { class_path: lightning_modules.DemonstratorLearnerGuidance, init_args: { vtg_weight: 0.5 } }\n"
    (tmp_path / "experiment.yaml").write_text(base)
    config = compose(tmp_path, "stage2")
    assert config["model"]["class_path"] == "lightning_modules.AnswerGuidance"
    assert config["model"]["init_args"] == {"vtg_weight": 0.5, "answer_tokens": 9, "kl": {"weight": 2.0}}
    shown = capsys.readouterr().err
    assert "model.init_args.kl.where: answers is now model.class_path: lightning_modules.AnswerGuidance" in shown
    assert "model.init_args.kl.answer_tokens is now called model.init_args.answer_tokens" in shown


@pytest.mark.parametrize("entry", RENAMED_KEYS.values(), ids=list(RENAMED_KEYS))
def test_new_keys_are_not_old_ones(entry):
    """One pass must be enough."""
    assert entry.new_key not in RENAMED_KEYS or RENAMED_KEYS[entry.new_key] is entry


# -------------------------------------------------------------------------------------------------------- key checks


@dataclass
class Shape:
    """A configuration with a rule of its own."""

    width: int
    ratio: float = 1.0
    kind: Literal["a", "b"] = "a"

    def __post_init__(self):
        if self.width < 1:
            raise ValueError(f"shape.width: got {self.width}, allowed: 1 or more")


class Extra(TypedDict, total=False):
    file: str


class Part:
    def __init__(self, shape: Shape, sources: dict[str, str | list[str] | None] | None = None):
        pass


class Larger(Part):
    """Passes most arguments on."""

    def __init__(self, depth: int = 1, extra: Extra | None = None, pair: tuple[float, float] = (0, 1), **kwargs):
        super().__init__(**kwargs)


LARGER = f"{__name__}.Larger"


def problems(**given):
    part = {"class_path": LARGER, "init_args": {"shape": {"width": 1}} | given}
    with pytest.raises(ConfigError) as caught:
        check_config({"part": part}, {"part": Part})
    return str(caught.value).replace("part.init_args.", "")


def test_arguments_that_are_passed_on_are_known():
    for given in ({}, {"depth": 2, "extra": {"file": "a"}, "pair": [0, 1.5], "sources": {"a": None, "b": ["c"]}}):
        check_config(
            {"part": {"class_path": LARGER, "init_args": {"shape": {"width": 1, "ratio": 2}} | given}}, {"part": Part}
        )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dept": 1}, "dept: no such key in part.init_args, allowed: shape, sources, depth, extra, pair"),
        ({"shape": {"width": "x"}}, "shape.width: got x, allowed: int"),
        ({"shape": {"width": 0}}, "shape.width: got 0, allowed: 1 or more"),
        ({"shape": {"width": None}}, "shape.width: got null, allowed: int"),
        ({"shape": {"ratio": 2}}, "shape.width: missing, allowed: int"),
        ({"shape": {"width": 1, "kind": "c"}}, "shape.kind: got c, allowed: a, b"),
        ({"shape": 3}, "shape: got 3, allowed: the keys width, ratio, kind"),
        ({"extra": {"fil": "a"}}, "extra.fil: no such key in extra, allowed: file"),
        ({"pair": [1]}, "pair: got 1 values, allowed: 2"),
        ({"pair": [1, "x"]}, "pair[1]: got x, allowed: float"),
        ({"sources": {"a": 3}}, "sources.a: got 3, allowed: str or a list of str or null"),
        ({"depth": 1.5, "widht": 1}, "depth: got 1.5, allowed: int; widht: no such key"),
    ],
)
def test_problems_name_the_key_and_what_is_allowed(given, message):
    found = problems(**given).replace(" in part.init_args.", " in ")
    assert found.startswith(message)


def test_a_class_that_does_not_fit():
    for path, message in (
        ("nowhere.Larger", "which does not exist"),
        ("pathlib.Path", f"subclasses of {__name__}.Part"),
    ):
        with pytest.raises(ConfigError, match=rf"^part.class_path: got {path}, .*{message}"):
            check_config({"part": {"class_path": path}}, {"part": Part})
    with pytest.raises(ConfigError, match=r"^part.init_arg: no such key in part, allowed: class_path, init_args"):
        check_config(
            {"part": {"class_path": LARGER, "init_arg": {}, "init_args": {"shape": {"width": 1}}}}, {"part": Part}
        )


def test_all_problems_are_in_one_line():
    kinds = {"shape": Shape, "part": Part, "name": str}
    config = {"shape": {"width": "x", "heigth": 1}, "part": {"class_path": LARGER}, "nam": "a"}
    with pytest.raises(ConfigError) as caught:
        check_config(config, kinds)
    assert str(caught.value) == (
        "shape.width: got x, allowed: int; shape.heigth: no such key in shape, allowed: width, ratio, kind; "
        "part.init_args.shape: missing, allowed: the keys width, ratio, kind; "
        "nam: no such key, allowed: name, part, shape"
    )


# -------------------------------------------------------------------------------------------------------- experiments


def overrides(world, data=True):
    """Point an experiment at the generated world and at a CPU, and let every part start fresh."""
    given = [
        f"data_root={world}",
        f"tokenizer={world}/tokenizer",
        "model.init_args.init=null",
        "trainer.accelerator=cpu",
    ]
    given += ["trainer.devices=1", "trainer.num_nodes=1", "trainer.strategy=auto", "trainer.precision=32-true"]
    given += ["trainer.enable_progress_bar=false", "threads=1", "model.init_args.frozen_dtype=float32"]
    given += [f"data.init_args.root={world}"]
    return given + ([f"data.init_args.held_out={world}/instructions/held_out.jsonl"] if data else [])


@pytest.mark.parametrize("stage", tiny.STAGES)
@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=str)
def test_every_experiment_binds_to_its_classes(toy_world, tmp_path, experiment, stage):
    given = [*overrides(toy_world), f"runs={tmp_path}"]
    config = compose(tiny.EXPERIMENTS / experiment, stage, given)
    if "sources" in config["data"]["init_args"]:
        given.append(f"data.init_args.sources=[{toy_world}/instructions/initialisation.jsonl]")
        config = compose(tiny.EXPERIMENTS / experiment, stage, given)
    if "demonstrations" in config["model"]["init_args"]:
        given.append("model.init_args.demonstrations=null")  # stored ones need the projector of stage 1
        config = compose(tiny.EXPERIMENTS / experiment, stage, given)
    assert config["experiment"] == str(experiment)  # runs of different experiments never share a folder
    run = build(config)
    answers = stage == "stage2" and str(experiment) in ("exo2ego_7b_answer_kl", "toy_fair", "toy_faint")
    assert type(run.stage) is (AnswerGuidance if answers else tiny.STAGES[stage])
    assert run.folder == tmp_path / experiment / stage
    assert not list(tmp_path.rglob("*.safetensors"))
    for part, sources in (
        compose(tiny.EXPERIMENTS / experiment, stage)["model"]["init_args"].get("init") or {}
    ).items():
        assert part in (*run.stage.uses, *run.stage.optional)
        for source in [sources] if isinstance(sources, str) else sources or []:
            handoff = source.partition(":")[0].endswith("/handoff")
            assert handoff or re.fullmatch(r"weights/[\w.-]+/[\w.-]+|open_clip:[\w-]+/\w+", source)


def test_the_full_size_experiment_trains_what_the_paper_writes():
    two, three = (compose(tiny.EXPERIMENTS / "exo2ego_7b", stage) for stage in ("stage2", "stage3"))
    of_two, of_three = two["model"]["init_args"], three["model"]["init_args"]
    assert two["network"]["mapper"] | {"residual": False, "num_blocks": 9} == two["network"]["mapper"]
    assert not {"ego_to_exo", "exo_to_ego"} & of_two["init"].keys()  # F and G from random weights
    assert of_two["init"]["ego_encoder"] == two["start"]["encoder"]
    assert set(of_two["train"]) == {"ego_encoder", "ego_to_exo", "exo_to_ego"}
    assert set(of_three["train"]) == {"ego_encoder", "ego_to_exo", "lora"}
    assert of_three["init"]["projector"] == three["handoffs"]["stage1"]  # weights of frozen parts are not written again
    assert not {"kl", "cycle"} & of_two.keys()  # the KL of features and both cycles are the defaults of the class


def test_a_shared_key_reaches_everything_that_depends_on_it(toy_world, tmp_path):
    before = compose(TOY, "stage2", overrides(toy_world))
    changes = ["clips.image_size=64", "clips.num_frames=6", f"runs={tmp_path}", "seed_everything=11"]
    run = build(compose(TOY, "stage2", [*overrides(toy_world), *changes]))
    assert before["clips"]["image_size"] != 64
    assert run.stage.network.encoder.image_size == run.datamodule.clips.image_size == 64
    assert run.datamodule.clips.num_frames == 6
    assert run.stage.seed == run.datamodule.seed == run.config["seed_everything"] == 11
    assert run.folder == tmp_path / "toy" / "stage2"
    assert Path(run.trainer.logger.log_dir) == run.folder
    (handoff,) = [c for c in run.trainer.callbacks if type(c).__name__ == "StageHandoff"]
    assert handoff.folder == run.folder / "handoff"
    (checkpoints,) = [c for c in run.trainer.callbacks if type(c).__name__ == "Checkpoints"]
    assert checkpoints.folder == run.folder / "checkpoints"


def test_padding_has_the_mean_colour_of_the_encoder(toy_world):
    siglip = ["network.encoder.image_mean=[0.5, 0.5, 0.5]"]
    for changes, colour in ((siglip, (127, 127, 127)), ([], PAD_RGB), (["clips.pad_rgb=[1, 2, 3]"], (1, 2, 3))):
        assert build(compose(TOY, "stage1", [*overrides(toy_world), *changes])).datamodule.clips.pad_rgb == colour


def test_pairs_that_are_not_synchronised_are_refused_before_weights_are_read(toy_world, tmp_path):
    shutil.copytree(toy_world / "ego_exo_clip", tmp_path / "index")
    header = tmp_path / "index" / "index.json"
    header.write_text(json.dumps(json.loads(header.read_text()) | {"synchronised": False}))
    given = [*overrides(toy_world), f"data.init_args.index={tmp_path}/index", "model.kl.pool=none"]
    config = compose(TOY, "stage2", given)
    with pytest.raises(ValueError, match=r"views of data\.index are not synchronised: set"):
        build(config)


def test_runs_reaches_the_handoffs_of_earlier_stages(tmp_path):
    init = compose(TOY, "stage2", [f"runs={tmp_path}"])["model"]["init_args"]["init"]
    assert init == {
        "exo_encoder": f"{tmp_path}/toy/stage1/handoff",
        "ego_encoder": f"{tmp_path}/toy/stage1/handoff:exo_encoder",
        "projector": f"{tmp_path}/toy/stage1/handoff",
        "language_model": f"{tmp_path}/toy/stage0/handoff",
    }
    moved = compose(TOY, "stage2", ["handoffs.stage1=elsewhere"])["model"]["init_args"]["init"]
    assert moved["ego_encoder"] == "elsewhere:exo_encoder"


def test_data_root_reaches_tokenizers_and_files(toy_world):
    config = compose(TOY, "stage3", [f"data_root={toy_world}"])
    assert (
        config["model"]["init_args"]["tokenizer"]
        == config["data"]["init_args"]["tokenizer"]
        == f"{toy_world}/tokenizer"
    )
    given = config["data"]["init_args"]
    files = [*(source["file"] for source in given["sources"]), given["held_out"], given["templates"]]
    assert len(files) == 5
    for file in files:
        assert file.startswith(f"{toy_world}/")


def test_the_resolved_configuration_is_itself_runnable(toy_world, tmp_path):
    config = compose(TOY, "stage3", [*overrides(toy_world), f"runs={tmp_path}", "clips.num_frames=2"])
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    again = compose(file, None)
    assert again == config
    assert config_hash(again) == config_hash(config)
    assert build(again).datamodule.clips.num_frames == 2
    assert compose(file, None, ["trainer.max_steps=3"]) == config | {"trainer": config["trainer"] | {"max_steps": 3}}


# ----------------------------------------------------------------------------------------------- the layers of a run


def save(folder, *arguments):
    """Save a configuration as a run does."""
    layers = read_layers(*arguments)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(dump_yaml(layers.resolve()))
    layers.save(folder)
    return folder / "config.yaml"


SHARED = [
    "seed_everything=5",
    "experiment=other",
    "stage=stage9",
    "runs=elsewhere",
    "run_dir=elsewhere/here",
    "handoffs.stage0=elsewhere/stage0",
    "weights=released",
    "start.encoder=elsewhere/encoder",
    "data_root=elsewhere/data",
    "tokenizer=elsewhere/tokenizer",
    "threads=7",
    "checkpoint_every_n_steps=7",
    "stall_timeout_s=7",
    "network.mapper.kind=resnet",
    "network.encoder.type=encoder.ConvEncoder",
    "network.language_model.pretrained=elsewhere/model",
    "clips.image_size=64",
    "monitor.every_n_steps=7",
    "panel.clips=7",
    "plan.mfu=0.7",
    "egobench.caption=Describe.",
    "judge.kind=hf",
]


def test_an_override_of_a_saved_run_is_one_of_its_experiment(tmp_path):
    assert {override.partition("=")[0].partition(".")[0] for override in SHARED} == {*SHARED_KEYS, "seed_everything"}
    before = ["trainer.max_steps=9", "network.mapper.width=8", "network.encoder.type=encoder.OtherEncoder"]
    file, unchanged = save(tmp_path / "run", TOY, "stage2", before), compose(TOY, "stage2", before)
    assert compose(file, None) == unchanged
    more = ["network.encoder.type=null", "network.lora={}", "~network.mapper.width", "model.kl.weight=0"]
    for override in [*SHARED, *more, "data={_delete_: true, root: x}"]:
        wanted = compose(TOY, "stage2", [*before, override])
        assert wanted != unchanged, override
        assert compose(file, None, [override]) == wanted, override
    again = save(tmp_path / "again", file, None, more)  # a run of a run
    assert compose(again, None, SHARED) == compose(TOY, "stage2", [*before, *more, *SHARED])


def test_the_curves_of_a_saved_run_with_another_folder_go_there(tmp_path):
    file = save(tmp_path / "run", TOY, "stage2")
    logger = compose(file, None, [f"run_dir={tmp_path}/other"])["trainer"]["logger"]
    assert logger["init_args"]["save_dir"] == f"{tmp_path}/other"


@pytest.mark.parametrize("change", ["no layers", "edited"])
def test_an_override_that_would_not_reach_every_key_is_refused(tmp_path, change):
    """Runs of earlier versions have no layers, and those of an edited file are not its own."""
    file = save(tmp_path, TOY, "stage2")
    if change == "edited":
        file.write_text(file.read_text().replace("max_steps: 180", "max_steps: 181"))
        assert compose(file, None)["trainer"]["max_steps"] == 181
    else:
        (tmp_path / "layers.yaml").unlink()
    refused = set()
    for override in SHARED:
        try:
            compose(file, None, [override])
        except ConfigError as error:
            assert str(error).startswith(f"override {override!r}: {file} repeats ")
            refused.add(override.partition("=")[0].partition(".")[0])
    free = {"threads", "checkpoint_every_n_steps", "stall_timeout_s", "monitor", "panel", "plan", "egobench", "judge"}
    assert refused == {*SHARED_KEYS, "seed_everything"} - free
    kl = compose(TOY, "stage2")["model"]["init_args"]["kl"]
    assert compose(file, None, ["model.kl.weight=0"])["model"]["init_args"]["kl"] == kl | {"weight": 0}


def test_no_key_that_an_experiment_interpolates_is_free():
    for file in tiny.EXPERIMENTS.rglob("*.yaml"):
        if file.parent.name != "ablations":
            assert set(re.findall(r"\$\{(\w+)", file.read_text())) <= set(INTERPOLATED_KEYS), file


def test_a_complete_file_with_interpolations_of_its_own_takes_overrides(tmp_path):
    (tmp_path / "own.yaml").write_text("data_root: data\ndata: {root: '${data_root}/videos'}\nruns: runs\n")
    assert compose(tmp_path / "own.yaml", None, ["data_root=x"])["data"]["init_args"]["root"] == "x/videos"
    with pytest.raises(ConfigError, match=r"repeats runs in other keys"):
        compose(tmp_path / "own.yaml", None, ["runs=x"])


def test_moments_in_8_bits_are_refused_where_they_would_be_sharded(toy_world, tmp_path):
    given = [*overrides(toy_world), f"runs={tmp_path}", "model.init_args.optim.algorithm=adamw8bit"]
    with pytest.raises(ConfigError, match=r"optim.algorithm: got adamw8bit, allowed with fsdp2: adamw"):
        build(compose(TOY, "stage0", [*given, "trainer.strategy=fsdp2"]))
