"""Pairs of ego and exo clips: which cameras become samples, and that both views show the same instants.

The generated world paints the number of each frame along the upper edge of every picture, so a test reads from the
pixels which instant a camera shows.
"""

from __future__ import annotations

import shutil

import av
import numpy as np
import pytest
import torch

from datamodules.clip_stream import ClipReader, Damaged, FileMissing, NotAVideo, probe, read_views, segment_midpoints
from datamodules.clips import ClipConfig, ResumableLoader
from datamodules.ego_exo_clip import EgoExoClipDataModule

SIDE, FRAMES, FPS = 64, 4, 8
NARRATIONS = 7 * 6 + (6 + 3) + 1  # seven takes with one annotator, one with two, one with a single narration
FOLDER = "takes/{}/frame_aligned_videos/downscaled/448/{}.mp4"


def module(root, views=("ego", "exo"), **options):
    clips = ClipConfig(FRAMES, SIDE, "squash")
    shared = {"root": str(root), "tokenizer": str(root / "tokenizer"), "clips": clips, "global_batch_size": 4}
    made = EgoExoClipDataModule(list(views), **{**shared, **options})
    made.setup("fit")
    return made


def dataset(root, **options):
    return module(root, **options).train_set


def number_on(picture):
    """Frame number painted on a squashed picture: eight blocks, each an eighth of the width, lowest bit left."""
    bits = picture[2, SIDE // 16 :: SIDE // 8].float().mean(dim=-1)
    assert bool(((bits < 70) | (bits > 185)).all()), bits
    return sum(1 << i for i, bit in enumerate(bits.tolist()) if bit > 128)


def numbers_on(frames):
    return [number_on(picture) for picture in frames]


def take_of(pairs, index):
    return pairs.release.takes[pairs.release.clips[pairs.clip_of[index]].take_index]


@pytest.fixture(scope="module")
def pairs(toy_world):
    return dataset(toy_world)


@pytest.fixture
def copy(toy_world, tmp_path):
    """The world with one take, in a folder that a test may break."""
    for part in ("annotations", "tokenizer", "takes/toy_train_0001"):
        shutil.copytree(toy_world / part, tmp_path / part)
    shutil.copy(toy_world / "takes.json", tmp_path)
    return tmp_path


# --------------------------------------------------------------------------------------------------------------------
# samples


def test_all_is_a_sample_for_every_camera_that_filmed_a_narration(toy_world, pairs):
    assert len(pairs.release.clips) == NARRATIONS
    expected = []
    for clip in pairs.release.clips:
        name = pairs.release.takes[clip.take_index].take_name
        files = sorted((toy_world / "takes" / name).rglob("cam*.mp4"))
        expected += [(clip.clip_id, str(file.relative_to(toy_world))) for file in files]
    spans = [pairs.span(index, 0) for index in range(len(pairs))]
    found = [(pairs.name(i), str(span.paths["exo"].relative_to(toy_world))) for i, span in enumerate(spans)]
    assert found == expected
    assert len(set(found)) == len(pairs) > 2 * NARRATIONS


def test_best_is_a_sample_for_every_narration(toy_world):
    best = dataset(toy_world, exo_policy="best")
    assert len(best) == NARRATIONS
    for index, clip in enumerate(best.release.clips):
        take = best.release.takes[clip.take_index]
        name = clip.best_exo or take.best_exo
        assert best.span(index, 0).paths["exo"] == toy_world / FOLDER.format(take.take_name, name)


def test_best_falls_back_to_the_take_where_the_narration_names_none(toy_world):
    best = dataset(toy_world, exo_policy="best")
    for name, of_take, of_clip in (("toy_train_0003", None, "cam01"), ("toy_train_0008", "cam01", None)):
        index = next(i for i in range(len(best)) if take_of(best, i).take_name == name)
        assert (take_of(best, index).best_exo, best.release.clips[index].best_exo) == (of_take, of_clip)
        assert best.span(index, 0).paths["exo"] == toy_world / FOLDER.format(name, "cam01")


def test_random_depends_on_seed_epoch_and_sample_only(toy_world):
    def draws(drawn, epoch, indices):
        return {index: drawn.span(index, epoch).paths["exo"] for index in indices}

    drawn = dataset(toy_world, exo_policy="random", seed=1)
    forwards, backwards = range(len(drawn)), range(len(drawn) - 1, -1, -1)
    assert len(drawn) == NARRATIONS
    first = draws(drawn, 0, forwards)
    assert draws(drawn, 1, forwards) != first
    assert draws(dataset(toy_world, exo_policy="random", seed=2), 0, forwards) != first
    assert draws(dataset(toy_world, exo_policy="random", seed=1), 0, backwards) == first
    for index in forwards:
        listed = {toy_world / view.path for view in take_of(drawn, index).exos}
        assert {drawn.span(index, epoch).paths["exo"] for epoch in range(40)} == listed


def test_text_is_the_caption_alone_or_the_answer_to_an_instruction(toy_world, pairs):
    asked = dataset(toy_world, instruction="Describe the video.")
    caption = pairs.release.clips[pairs.clip_of[5]].text
    assert caption.startswith("Camera-wearer ")
    assert pairs.text(5, 0) == pairs.encoder.plain(caption)
    assert asked.text(5, 0) == pairs.encoder.conversation([("Describe the video.", caption)])


# --------------------------------------------------------------------------------------------------------------------
# synchrony


def test_both_views_of_every_pair_show_the_instants_asked_for(pairs):
    seen = {}
    for index in range(len(pairs)):
        span = pairs.span(index, 0)
        videos = pairs.videos(span)
        ego, exo = numbers_on(videos["ego"]), numbers_on(videos["exo"])
        assert ego == exo, (index, span)
        times_s = segment_midpoints(span.start_s, span.end_s, FRAMES)
        assert ego == [int((time_s + 1e-3) * FPS) for time_s in times_s], (index, span)
        seen.setdefault(take_of(pairs, index).take_name, set()).update(ego)
    assert len(seen) == 9  # so also the portrait camera, the short stream and the far key frames
    assert all(len(numbers) > 15 for name, numbers in seen.items() if name != "toy_train_0006")


def test_a_stream_a_frame_short_bounds_both_views(toy_world, pairs):
    names = {"ego": "aria01_214-1", "exo": "cam01"}
    paths = {view: toy_world / FOLDER.format("toy_train_0003", name) for view, name in names.items()}
    frames = {view: probe(path).num_frames for view, path in paths.items()}
    assert frames["ego"] == frames["exo"] + 1
    (take,) = (take for take in pairs.release.takes if take.take_name == "toy_train_0003")
    assert take.duration_s == frames["exo"] / FPS
    assert max(clip.end_s for clip in pairs.release.clips if clip.take_uid == take.take_uid) <= take.duration_s
    end_s = frames["ego"] / FPS  # by the egocentric stream, a frame past the end of the other
    views = read_views(ClipReader(), paths, end_s - 1.0, end_s, 7, SIDE, "squash")
    last = frames["exo"] - 1
    assert numbers_on(views["ego"].frames) == numbers_on(views["exo"].frames) == list(range(last - 6, last + 1))


def test_the_portrait_camera_is_read_upright_at_its_own_size(toy_world):
    path = toy_world / FOLDER.format("toy_train_0001", "cam02")
    info = probe(path)
    assert (info.width, info.height) == (64, 84)
    clip = ClipReader().read(path, [20 / FPS], 84, "pad")
    picture = clip.frames[0, :, 10:74]  # 64 wide in a square of 84
    bits = picture[4, 4::8].float().mean(dim=-1) > 128
    assert sum(1 << i for i, bit in enumerate(bits.tolist()) if bit) == 20


def test_a_take_with_one_key_frame_is_read_anywhere(toy_world):
    names = ("aria01_214-1", "cam01", "cam02", "cam03", "cam04")
    paths = {name: toy_world / FOLDER.format("toy_train_0007", name) for name in names}
    wanted = [61, 3, 40, 40, 17]
    for path in paths.values():
        clip = ClipReader().read(path, [(number + 0.5) / FPS for number in wanted], SIDE, "squash")
        assert numbers_on(clip.frames) == clip.frame_numbers.tolist() == wanted


def test_batches_of_the_loader_pair_the_views_row_by_row(pairs, toy_world):
    made = module(toy_world, exo_policy="random")
    made.trainer = type("Trainer", (), {"accumulate_grad_batches": 2, "world_size": 1, "global_rank": 0})()
    made.num_workers = 0
    source = made.train_dataloader()
    assert isinstance(source, ResumableLoader)
    source.load_state_dict({"epoch": 1, "position": 3})
    batch = next(iter(source))
    assert batch.ego_video.shape == batch.exo_video.shape == (2, FRAMES, SIDE, SIDE, 3)
    for row, name in enumerate(batch.ids):
        assert numbers_on(batch.ego_video[row]) == numbers_on(batch.exo_video[row])
        (index,) = (i for i in range(len(made.train_set)) if made.train_set.name(i) == name)
        expected = made.train_set.videos(made.train_set.span(index, 1))["exo"]  # of the loader's epoch
        torch.testing.assert_close(batch.exo_video[row], expected, rtol=0, atol=0)


@pytest.mark.parametrize("view", ["ego", "exo"])
def test_a_view_that_is_not_asked_for_is_not_read(copy, view):
    one = dataset(copy, views=[view])
    other = {"ego": "cam*.mp4", "exo": "aria*.mp4"}[view]
    for file in copy.rglob(other):
        file.unlink()
    span = one.span(0, 0)
    assert set(span.paths) == set(one.videos(span)) == {view}
    request = type("Request", (), {"epoch": 0, "indices": [0], "global_indices": [0], "micro_batches": 1})()
    batch = one.__getitems__(request)
    assert (batch.ego_video is None, batch.exo_video is None) == (view == "exo", view == "ego")
    assert batch.num_frames == FRAMES


def test_no_view_is_refused(toy_world):
    with pytest.raises(ValueError, match=r"^data\.views: got none, allowed: ego, exo"):
        module(toy_world, views=[])


# --------------------------------------------------------------------------------------------------------------------
# damage: named, never patched up


def test_a_video_that_vanished_is_named(copy):
    damaged = dataset(copy)
    span = damaged.span(0, 0)
    span.paths["exo"].unlink()
    with pytest.raises(FileMissing) as error:
        damaged.videos(span)
    assert str(span.paths["exo"]) in str(error.value)
    assert set(damaged.videos(damaged.span(1, 0))) == {"ego", "exo"}  # the other camera


def test_a_truncated_video_is_named(copy):
    damaged = dataset(copy)
    span = damaged.span(0, 0)
    path = span.paths["ego"]
    with av.open(str(path)) as source, av.open(str(copy / "moved.mp4"), "w", options={"movflags": "faststart"}) as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.size:
                packet.stream = stream
                out.mux(packet)
    whole = (copy / "moved.mp4").read_bytes()
    path.write_bytes(whole)
    assert numbers_on(damaged.videos(span)["ego"]) == numbers_on(damaged.videos(span)["exo"])
    path.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(Damaged, match="truncated") as error:
        damaged.videos(span)
    assert str(path) in str(error.value)


def test_a_video_cut_before_its_index_is_named_before_training(copy):
    path = copy / FOLDER.format("toy_train_0001", "cam01")
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(NotAVideo) as error:
        dataset(copy)
    assert str(path) in str(error.value)


def test_options_of_the_release_reader_are_passed_on(toy_world, pairs):
    longer = dataset(toy_world, clip_scale=2.0)
    shorter = dataset(toy_world, max_clip_s=0.5)
    releases = [made.release for made in (pairs, longer, shorter)]
    length = [np.median([clip.end_s - clip.start_s for clip in read.clips]) for read in releases]
    assert length[1] == pytest.approx(2 * length[0], rel=0.05)
    assert length[2] == pytest.approx(0.5)
    visible = dataset(toy_world, require_ego_visible=True).release.clips
    assert [clip.clip_id for clip in visible] == [clip.clip_id for clip in pairs.release.clips if clip.ego_visible]
    assert len(visible) < NARRATIONS


def test_the_fingerprint_is_of_takes_and_training_narrations(copy):
    made = module(copy)
    before = made.fingerprint()
    (copy / "annotations" / "atomic_descriptions_val.json").unlink()
    assert made.fingerprint() == before
    takes = copy / "takes.json"
    takes.write_text(takes.read_text() + "\n")
    assert made.fingerprint() != before
