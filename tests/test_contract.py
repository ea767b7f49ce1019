"""One contract: for a clip and a question, every way to the model has the same frames, tokens and numbers.

The ways: the training batch, ``make evaluate`` with validation questions and with benchmarks, ``Exo2Ego.answer``, the
server, an exported folder under plain transformers, its language model alone, and the plug-in for lmms-eval. Each is
entered as a user does it, and ``observe.py`` watches the model.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from observe import Observer, Seen

from datamodules.batch import IGNORE_INDEX, VIDEO_TOKEN_ID
from datamodules.clips.sampler import BatchRequest
from lightning_modules import Exo2Ego
from lightning_modules.cli import main
from lightning_modules.config import compose
from lightning_modules.evaluation import trained_run
from lightning_modules.inference.export import export_model

ROOT = Path(__file__).parents[1]
TOKENS = 32  # longest answer of validation questions
LMMS_EVAL = "EXO2EGO_LMMS_EVAL_PYTHON"


@dataclass
class Walk:
    """A trained stage 3, a clip of its training data, and a question.

    Attributes:
        config: file of the run's configuration.
        run: folder with its stage weights, which evaluation writes to.
        tmp: folder for everything else.
        answers: the first answer in words by each way.
        seen: observations by each way; the training batch's is the one to be equal to.
    """

    config: Path
    run: Path
    tmp: Path
    answers: dict[str, str] = field(default_factory=dict)
    seen: dict[str, Seen] = field(default_factory=dict)

    def __post_init__(self) -> None:
        run, _ = trained_run(self.compose())
        self.stage, self.data = run.stage, run.datamodule
        self.data.setup("fit")
        samples = self.data.train_set
        # A clip in the middle of a video, whose end is stated.
        self.index = next(n for n in range(len(samples)) if samples.span(n, 0).start_s > 1)
        span = samples.span(self.index, 0)
        (self.video,) = span.paths.values()
        self.start, self.end = span.start_s, None if math.isinf(span.end_s) else span.end_s
        self.question = samples.turns(self.index, 0)[0][0]
        self.vocab_size = self.stage.vocab_size
        self.prompt = self.data.encoder.prompt(self.question).input_ids

    def compose(self, *overrides):
        return compose(self.config, None, [f"run_dir={self.run}", *overrides])

    def observe(self, **how):
        return Observer(self.vocab_size, **how)

    # -------------------------------------------------------------------------------------------------------- the ways

    def training(self):
        """Take the step of training on this sample, without dropout."""
        self.stage.configure_model()
        self.stage.eval()
        batch = self.data.train_set.__getitems__(BatchRequest(0, [self.index], [self.index], 1))
        first_label = int((batch.text.labels[0] != IGNORE_INDEX).nonzero()[0])
        assert batch.text.input_ids[0, :first_label].tolist() == self.prompt
        with self.observe(first=True) as observer, torch.no_grad():
            self.stage.training_step(batch, 0)
        seen = observer.seen()
        self.seen["training"] = seen._replace(text=seen.text[:first_label])

    def validation(self):
        """``make evaluate``, with a file of validation questions that asks this one."""
        record = {"id": "a", "views": {"ego": os.path.relpath(self.video, self.data.root)}, "start": self.start}
        record["end"] = self.stated_end()
        record["questions"] = [{"task": "question", "question": self.question, "answer": "red"}]
        held_out = self.tmp / "held_out.jsonl"
        held_out.write_text(json.dumps(record) + "\n")
        keys = [f"run_dir={self.run}", f"data.init_args.held_out={held_out}", "trainer.logger=false"]
        with self.observe() as observer:
            assert main(["evaluate", str(self.config), *keys]) == 0
        self.seen["validation"] = observer.seen()
        (line,) = (self.run / "predictions.jsonl").read_text().splitlines()
        self.answers["validation"] = json.loads(line)["prediction"]

    def benchmark(self):
        """``make evaluate BENCHMARKS=...``, with a benchmark of open answers and prompts that add nothing."""
        videos = self.tmp / "videos"
        videos.mkdir()
        (videos / "clip.mp4").symlink_to(self.video)
        rows = [{"sample_id": "a", "video_id": "clip", "video_uid": "clip", "question": self.question, "answer": "red"}]
        rows[0] |= {"video_start_sec": self.start, "video_end_sec": self.stated_end()}
        (self.tmp / "annotations.QaEgo4D_test.json").write_text(json.dumps(rows))
        prompts = {"prefill": "(", "context": {"default": ""}}
        for kind in ("choice", "open"):
            prompts[kind] = dict.fromkeys(
                ("base", "task", "ego"), "{question}\n{options}" if kind == "choice" else "{question}"
            )
        (self.tmp / "prompts.yaml").write_text(yaml.safe_dump(prompts))
        entry = {"name": "qaego4d_open", "annotations": str(self.tmp), "videos": str(videos), "cut": True}
        keys = [f"run_dir={self.run}", f"egobench.benchmarks=[{json.dumps(entry)}]", "trainer.logger=false"]
        keys += [f"egobench.prompts={self.tmp}/prompts.yaml", "data.init_args.held_out=null"]
        with self.observe() as observer:
            assert main(["evaluate", str(self.config), *keys, "--benchmarks", "qaego4d_open"]) == 0
        self.seen["benchmark"] = observer.seen()
        file = self.run / "egobench" / "predictions" / "qaego4d_open.jsonl"
        self.answers["benchmark"] = json.loads(file.read_text())["prediction"]

    def api(self, name="api", source=None):
        """Ask ``Exo2Ego.answer``."""
        model = Exo2Ego.from_pretrained(source or self.run)
        with self.observe() as observer:
            self.answers[name] = model.answer(self.video, self.question, self.start, self.end, TOKENS)
        self.seen[name] = observer.seen()
        return model

    def server(self):
        """Send a request over HTTP."""
        pytest.importorskip("starlette", reason="needs pip install -e '.[serve]'")
        from test_serving import Limits, build_app, messages, running, send

        model = Exo2Ego.from_pretrained(self.run)
        span = {"start": self.start} | ({} if self.end is None else {"end": self.end})
        body = {"messages": messages(self.video.name, self.question, **span), "max_tokens": TOKENS}
        with running(build_app(model, self.video.parent, Limits(seconds=300))) as port, self.observe() as observer:
            status, answer = send(port, body)
        assert status == 200, answer
        self.seen["server"] = observer.seen()
        self.answers["server"] = answer["choices"][0]["message"]["content"]

    def transformers(self, exported, for_vllm):
        """Load exported folders in a process that cannot import this repository.

        Args:
            exported: the whole model.
            for_vllm: its language model, merged, and its vision parts, apart.

        Returns:
            Logits of the language model by itself, float [V], and its answer.
        """
        video = {"type": "video", "path": str(self.video), "start": self.start, "end": self.end}
        messages = [{"role": "user", "content": [video, {"type": "text", "text": self.question}]}]
        done = self.run_script(sys.executable, PLAIN_TRANSFORMERS, exported, for_vllm, json.dumps(messages))
        assert "MISSING" not in done.stderr and "UNEXPECTED" not in done.stderr
        (self.seen["transformers"], self.answers["transformers"]), others = self.read_seen()
        torch.testing.assert_close(others["forward"], self.seen["transformers"].logits, atol=1e-5, rtol=1e-5)
        assert others["piped"] == self.answers["transformers"]
        return others["stock_logits"], others["stock_text"]

    def lmms_eval(self, python, exported):
        """Run lmms-eval with a folder of two tasks: this question in words, and as a choice.

        Args:
            python: of an environment with lmms-eval.
            exported: the whole model.

        Returns:
            The losses of the options, and the share of right choices.
        """
        tasks = self.tmp / "tasks"
        tasks.mkdir()
        doc = {"path": str(self.video), "start": self.start, "end": self.stated_end(), "question": self.question}
        doc |= {"answer": "red", "options": OPTIONS, "right": 1}
        (tasks / "docs.jsonl").write_text(json.dumps(doc) + "\n")
        (tasks / "utils.py").write_text(TASK_FUNCTIONS)
        for name, content in TASKS.items():
            (tasks / f"{name}.yaml").write_text(content.format(name=name, docs=tasks / "docs.jsonl"))
        self.write_entry_point(self.tmp / "site")
        words = ["--model", "exo2ego", "--model_args", f"pretrained={exported}", "--tasks", ",".join(TASKS), "--device"]
        words += ["cpu", "--include_path", tasks, "--output_path", self.tmp / "out", "--log_samples"]
        self.run_script(python, RUN_LMMS_EVAL, *words, PYTHONPATH=os.pathsep.join([str(self.tmp / "site"), str(ROOT)]))
        (self.seen["lmms_eval"], _), _ = self.read_seen()
        samples = {name: self.read_samples(name) for name in TASKS}
        self.answers["lmms_eval"] = samples["exo2ego_open"]["filtered_resps"]
        (results,) = (self.tmp / "out").rglob("*results.json")
        accuracy = json.loads(results.read_text())["results"]["exo2ego_choice"]["acc,none"]
        return [float(loss) for loss, _ in samples["exo2ego_choice"]["filtered_resps"]], accuracy

    def read_samples(self, name):
        (file,) = (self.tmp / "out").rglob(f"*samples_{name}.jsonl")
        return json.loads(file.read_text())

    @staticmethod
    def write_entry_point(folder):
        """Write what `pip install --no-deps` of this repository would tell other packages."""
        entries = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lmms_eval.models"]
        info = folder / "exo2ego-0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: exo2ego\nVersion: 0\n")
        lines = ["[lmms_eval.models]", *(f"{name} = {value}" for name, value in entries.items())]
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")

    def run_script(self, python, script, *arguments, **environment):
        """Run a script of this file that writes ``seen.pt``, away from this repository."""
        shutil.copy(Path(__file__).with_name("observe.py"), self.tmp)
        kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTEST_ADDOPTS")}
        kept |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(self.tmp / "hub"), "HF_MODULES_CACHE": str(self.tmp / "modules")}
        done = subprocess.run(
            [python, "-c", script, str(self.vocab_size), *map(str, arguments)],
            cwd=self.tmp,
            env=kept | environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done

    def read_seen(self):
        seen, text, others = torch.load(self.tmp / "seen.pt", weights_only=True)
        return (Seen(*seen), text), others

    def stated_end(self):
        if self.end is not None:
            return self.end
        model = Exo2Ego.from_pretrained(self.run)
        return model._reader.usable_end_s(self.video, self.start, math.inf)

    # -------------------------------------------------------------------------------------------------------- contract

    def check(self, exact=("training", "validation", "benchmark", "api", "server")):
        """Compare every way with the training batch."""
        expected = self.seen["training"]
        place = self.prompt.index(VIDEO_TOKEN_ID)
        text = self.prompt[:place] + self.prompt[place + 1 :]
        for name, seen in self.seen.items():
            assert torch.equal(seen.frames, expected.frames), name
            ids = seen.text.tolist()
            if len(ids) == len(self.prompt):  # spliced: the placeholder of the clip was embedded as 0
                assert ids.pop(place) == 0, name
            assert ids == text, name
            if name in exact:
                assert torch.equal(seen.visual, expected.visual), name
            torch.testing.assert_close(
                seen.visual, expected.visual, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
            torch.testing.assert_close(
                seen.logits, expected.logits, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
        assert len(set(self.answers.values())) == 1 and all(self.answers.values()), self.answers


PLAIN_TRANSFORMERS = """
import json, sys
from pathlib import Path

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("lightning_modules", "datamodules"):
            raise ImportError(name)

sys.meta_path.insert(0, Refuse())
sys.path.insert(0, str(Path.cwd()))

import torch
from observe import Observer
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers import pipeline

vocab_size, folder, for_vllm, messages = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), json.loads(sys.argv[4])
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor.apply_chat_template(messages)
with torch.no_grad():
    forward = model(**inputs).logits[0, -1]
with Observer(vocab_size) as observer:
    tokens = model.generate(**inputs, max_new_tokens=32)
(text,) = processor.post_process_image_text_to_text(tokens)
answer = pipeline("image-text-to-text", model=model, processor=processor)
piped = answer(text=messages, max_new_tokens=32, return_full_text=False)[0]["generated_text"]

vision = AutoModel.from_pretrained(for_vllm / "vision", trust_remote_code=True)
processor = AutoProcessor.from_pretrained(for_vllm / "vision", trust_remote_code=True)
embeds = vision(**processor.apply_chat_template(messages))[None]
stock = AutoModelForCausalLM.from_pretrained(for_vllm / "language_model")
with torch.no_grad():
    logits = stock(inputs_embeds=embeds).logits[0, -1]
    tokens = stock.generate(inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2]), max_new_tokens=32)
tokenizer = AutoTokenizer.from_pretrained(for_vllm / "language_model")
stock_text = tokenizer.decode(tokens[0], skip_special_tokens=True).strip()
others = {"forward": forward, "piped": piped, "stock_logits": logits, "stock_text": stock_text}
torch.save([list(observer.seen()), text, others], "seen.pt")
"""

OPTIONS = ["the red ball", "the blue cup", "the ball"]
TASK_FUNCTIONS = """
def video(doc):
    return [{key: doc[key] for key in ("path", "start", "end")}]
"""
_TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {docs}}}}}
test_split: test
doc_to_visual: !function utils.video
doc_to_text: question
"""
TASKS = {
    "exo2ego_open": _TASK
    + """
output_type: generate_until
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 32, temperature: 0, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
""",
    "exo2ego_choice": _TASK
    + """
output_type: multiple_choice
doc_to_target: right
doc_to_choice: options
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
""",
}
RUN_LMMS_EVAL = """
import sys
from pathlib import Path

sys.path.insert(0, str(Path.cwd()))
vocab_size = int(sys.argv.pop(1))

import torch
from lmms_eval.__main__ import cli_evaluate
from observe import Observer

with Observer(vocab_size) as observer:
    cli_evaluate()
torch.save([list(observer.seen()), "", {}], "seen.pt")
"""


def walk_all(walk):
    """Go every way that needs no other environment."""
    walk.training()
    walk.validation()
    walk.benchmark()
    walk.api()
    walk.server()
    exported, merged, for_vllm = (walk.tmp / name for name in ("exported", "merged", "for_vllm"))
    export_model(walk.run, exported, merge=False)
    export_model(walk.run, merged)
    export_model(walk.run, for_vllm, "vllm")
    stock_logits, stock_text = walk.transformers(exported, for_vllm)
    assert set(walk.seen) == {"training", "validation", "benchmark", "api", "server", "transformers"}
    walk.check()

    # Merging the adapters rounds once more; the language model by itself has them merged.
    model = walk.api("merged", merged)
    assert "lora" not in model.model.parts
    seen, answer = walk.seen.pop("merged"), walk.answers.pop("merged")
    expected = walk.seen["training"]
    assert torch.equal(seen.frames, expected.frames) and torch.equal(seen.visual, expected.visual)
    torch.testing.assert_close(seen.logits, expected.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(stock_logits, seen.logits, atol=1e-5, rtol=1e-5)
    assert answer == stock_text == walk.answers["api"]


def walk_lmms_eval(walk):
    """Go the way through lmms-eval, in an environment that has it."""
    python = os.environ.get(LMMS_EVAL)
    if python is None:
        pytest.skip(f"{LMMS_EVAL} does not name the python of an environment with lmms-eval")
    if "training" not in walk.seen:
        walk.training()
    exported = walk.tmp / "exported"
    if not exported.exists():
        export_model(walk.run, exported, merge=False)
    losses, accuracy = walk.lmms_eval(python, exported)
    model = walk.api()
    walk.check(exact=("training", "api"))
    chances = model.choose(walk.video, walk.question, OPTIONS, walk.start, walk.end)
    torch.testing.assert_close(
        (-torch.tensor(losses)).softmax(0), torch.tensor(list(chances.values())), atol=1e-4, rtol=0
    )
    assert accuracy == (losses.index(min(losses)) == 1)


@pytest.fixture(scope="module")
def walk(noisy_runs, toy_runs, tmp_path_factory):
    """Return a walk over the tiny network."""
    tmp = tmp_path_factory.mktemp("contract")
    run = shutil.copytree(noisy_runs / "toy" / "stage3", tmp / "run" / "stage3")
    return Walk(toy_runs / "toy" / "stage3" / "config.yaml", run, tmp)


def test_every_way_to_the_tiny_model_is_the_same(walk):
    walk_all(walk)


@pytest.mark.slow
def test_lmms_eval_has_the_same_tiny_model(walk):
    walk_lmms_eval(walk)


EXPERIMENT = """
extends:
  - {experiments}/base
  - {experiments}/data/toy.yaml
  - {experiments}/model/dinov2_s_smollm2_135m.yaml
  - {experiments}/hardware/cpu.yaml
experiment: real
tokenizer: {language_model}
start: {{language_model: "{language_model}"}}
model:
  init_args:
    init: {{ego_encoder: "{tower}", ego_to_exo: null, projector: null}}
    optim: {{learning_rate: 1.0e-3}}
data:
  init_args:
    sources: ["${{data_root}}/instructions/egtea.jsonl"]
    held_out: null
    num_workers: 0
    global_batch_size: 2
    max_text_tokens: 512
trainer: {{max_steps: 1, enable_progress_bar: false}}
"""


@pytest.fixture(scope="module")
def real_walk(toy_world, tmp_path_factory):
    """Return a walk over pretrained parts after one step of training: DINOv2 ViT-S/14 and SmolLM2-135M-Instruct."""
    weights = tiny.real_weights()
    if weights is None:
        pytest.skip(f"no DINOv2-S and SmolLM2-135M in {tiny.REAL_WEIGHTS}: make test-real WEIGHTS=folder")
    tower, language_model = weights
    tmp = tmp_path_factory.mktemp("real")
    folder = tmp / "real"
    folder.mkdir()
    (folder / "experiment.yaml").write_text(
        EXPERIMENT.format(experiments=tiny.EXPERIMENTS, tower=tower, language_model=language_model)
    )
    assert main(["fit", str(folder), "stage3", f"data_root={toy_world}", f"runs={tmp}/runs"]) == 0
    run = tmp / "runs" / "real" / "stage3"
    return Walk(run / "config.yaml", run, tmp)


@pytest.mark.slow
def test_every_way_to_a_model_of_pretrained_parts_is_the_same(real_walk):
    walk_all(real_walk)


@pytest.mark.slow
def test_lmms_eval_has_the_same_model_of_pretrained_parts(real_walk):
    walk_lmms_eval(real_walk)
