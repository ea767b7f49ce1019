"""Words that the tokenizer does not know are reported: at the start of a stage, and by the check of a dataset."""

import json

from transformers import AutoTokenizer

from datamodules import ClipConfig, InstructionDataModule
from datamodules.text import unknown_words
from datamodules.tools.data_check import main


def test_share_and_examples(toy_tokenizer):
    tokenizer = AutoTokenizer.from_pretrained(toy_tokenizer)
    assert unknown_words(tokenizer, ["Describe the video.", "picks up the red ball"]) == ""
    assert unknown_words(tokenizer, []) == ""
    found = unknown_words(tokenizer, ["picks up the screwdriver", "the screwdriver and the spanner"])
    assert found.startswith("33.33% of the words (2 different ones) are unknown to the tokenizer ")
    assert "reads <unk> for them, e.g. 'screwdriver' (2x), 'spanner' (1x)" in found


def module(toy_world, file):
    held_out = toy_world / "instructions" / "held_out.jsonl"
    return InstructionDataModule(
        [str(file)],
        root=str(toy_world),
        tokenizer=str(toy_world / "tokenizer"),
        clips=ClipConfig(2, 16),
        global_batch_size=2,
        held_out=str(held_out),
        templates=str(toy_world / "templates"),
        instruction_style="base",
    )


def test_a_stage_warns_at_its_start(toy_world, tmp_path, capsys):
    for name in ("initialisation", "egtea"):
        module(toy_world, toy_world / "instructions" / f"{name}.jsonl").setup("fit")
        assert "unknown" not in capsys.readouterr().err
    lines = (toy_world / "instructions" / "initialisation.jsonl").read_text().splitlines()
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(lines).replace("ball", "screwdriver") + "\n")
    module(toy_world, file).setup("fit")
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: training texts: ") and "'screwdriver" in warning


def test_the_check_of_a_dataset_counts_them(toy_world, tmp_path, capsys):
    line = json.loads((toy_world / "instructions" / "initialisation.jsonl").read_text().splitlines()[0])
    line["conversations"] = [
        {"from": "human", "value": "<video>\nDescribe the video."},
        {"from": "gpt", "value": "picks up the screwdriver"},
    ]
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps(line) + "\n")
    arguments = [str(file), "--root", str(toy_world), "--workers", "1"]
    assert main([*arguments, "--tokenizer", str(toy_world / "tokenizer")]) == 0
    assert "warning: 14.29% of the words (1 different ones)" in capsys.readouterr().out
    assert main([*arguments, "--tokenizer", str(tmp_path)]) == 2
    assert "tokenizer_config.json" in capsys.readouterr().err
    index = [str(toy_world / "ego_exo_clip"), "--root", str(toy_world)]
    assert main([*index, "--tokenizer", str(toy_world / "tokenizer")]) == 0
    assert "unknown" not in capsys.readouterr().out
