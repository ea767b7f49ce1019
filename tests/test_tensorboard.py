"""The arrangement of runs in TensorBoard: cards of validation clips, settings, and tables of scores."""

import io

import tiny
import torch
from PIL import Image, ImageChops

from lightning_modules.callbacks.sample_panel import clip_card
from lightning_modules.callbacks.tensorboard import GROUPS, numbered, settings
from lightning_modules.validation.report import score_table
from lightning_modules.validation.scores import Prediction


def answer(task, question, prediction, right, view="ego"):
    return Prediction("take_1", view, True, task, question, "the red ball", prediction, {task: float(right)})


def test_a_card_moves_and_grows_with_its_questions():
    views = {"ego": tiny.video(1, seed=0)[0], "exo": torch.zeros_like(tiny.video(1, seed=1)[0])}
    few = [answer("caption", "Describe the video.", "the blue cup", False)]
    more = [*few, answer("choice", "Which of these? " * 20, "the red ball", True)]
    card, (width, height) = clip_card("take_1", views, few)
    with Image.open(io.BytesIO(card)) as moving:
        assert (moving.format, moving.n_frames, moving.size) == ("GIF", tiny.FRAMES, (width, height))
        first = moving.convert("RGB")
        moving.seek(1)
        second = moving.convert("RGB")
    # The egocentric frames on the left change, the black exocentric ones and the text do not.
    left, right, text = (30, 40, 220, 230), (250, 40, 450, 230), (0, 255, width, height)
    assert first.crop(left).tobytes() != second.crop(left).tobytes()
    assert first.crop(right).tobytes() == second.crop(right).tobytes()
    assert max(channel[1] for channel in first.crop(right).getextrema()) < 10
    first_text, second_text = (image.crop(text).convert("1", dither=Image.Dither.NONE) for image in (first, second))
    changed = ImageChops.logical_xor(first_text, second_text).histogram()[255]
    assert changed < 0.002 * first_text.width * first_text.height  # colours of a GIF are rounded
    assert min(channel[0] for channel in first.crop(text).getextrema()) < 100  # there is text
    _, (same_width, larger) = clip_card("take_1", views, more)
    assert same_width == width and larger > height + 3 * 18  # the long question is wrapped


def test_wrong_answers_are_red_and_right_ones_green():
    views = {"ego": torch.zeros_like(tiny.video(1, seed=0)[0])}

    def excess_of_red(right):
        card, (_, height) = clip_card("c", views, [answer("caption", "?", "the red ball", right)])
        with Image.open(io.BytesIO(card)) as image:
            pixels = image.convert("RGB").crop((0, 255, 200, height)).tobytes()
        return sum(pixels[0::3]) - sum(pixels[1::3])

    assert excess_of_red(False) > 1000 and excess_of_red(True) < -1000


def test_curves_are_sorted_as_they_are_read():
    tags = [numbered(f"{group}/x") for group in GROUPS]
    assert tags == sorted(tags) and tags[0] == "1_train/x"
    assert numbered("mine/x") == "mine/x"


def test_settings_are_flat_and_say_nothing_twice():
    config = {
        "seed_everything": 1,
        "run_dir": "runs/toy/stage1",
        "clips": {"num_frames": 8},
        "model": {"init_args": {"train": None, "optim": {"betas": [0.9, 0.98]}}},
        "data": {"init_args": {"clips": {"num_frames": 8}, "seed": 1}},
        "trainer": {"logger": {"class_path": "x"}, "max_steps": 9, "inference_mode": False},
    }
    assert settings(config) == {
        "seed_everything": 1,
        "clips.num_frames": 8,
        "model.init_args.train": "null",
        "model.init_args.optim.betas": "[0.9, 0.98]",
        "data.init_args.seed": 1,
        "trainer.max_steps": 9,
        "trainer.inference_mode": False,
    }
    config["data"]["init_args"]["clips"]["num_frames"] = 4  # overridden for the data alone
    assert settings(config)["data.init_args.clips.num_frames"] == 4


def test_a_table_of_scores_with_their_numbers():
    table = score_table({"ego_choice": (0.5, 100), "ego_loss": (1.2, 100)}, {"choice": 0.25})
    row = [cell.strip() for cell in table.splitlines()[-1].strip("|").split("|")]
    assert row == ["egocentric", "four-way choice", "100", "25.0", "50.0", "5.0"]
