"""Pairs of ego and exo clips: which cameras become samples, and that both views show the same instants.

The generated world paints the number of each frame along the upper edge of every frame, so a test reads from the
pixels which instant a camera shows.
"""

from __future__ import annotations

import json
import shutil
from itertools import chain
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from datamodules.batch import IGNORE_INDEX
from datamodules.clips.dataset import ClipConfig
from datamodules.clips.loader import ResumableLoader
from datamodules.clips.sampler import BatchRequest, GlobalBatchSampler
from datamodules.ego_exo_clip.datamodule import EgoExoClipDataModule, NarrationConfig
from datamodules.video.errors import Damaged, FileMissing
from datamodules.video.probe import probe
from datamodules.video.reader import ClipReader
from datamodules.video.sampling import read_views, segment_midpoints

SIDE, FRAMES, FPS = 64, 4, 8
NARRATIONS = 7 * 6 + (6 + 3) + 1  # seven takes with one annotator, one with two, one with a single narration
FOLDER = "takes/{}/frame_aligned_videos/downscaled/448/{}.mp4"


def module(root, views=("ego", "exo"), **options):
    clips = ClipConfig(FRAMES, SIDE, "squash")
    shared = {"root": str(root), "tokenizer": str(root / "tokenizer"), "clips": clips, "global_batch_size": 4}
    given = {"index": str(root / "ego_exo_clip"), "views": list(views), **shared, **options}
    made = EgoExoClipDataModule(**given)
    made.setup("fit")
    return made


def dataset(root, **options):
    return module(root, **options).train_set


def number_on(frame):
    """Frame number painted on a squashed frame: eight blocks, each an eighth of the width, lowest bit left."""
    bits = frame[2, SIDE // 16 :: SIDE // 8].float().mean(dim=-1)
    assert bool(((bits < 70) | (bits > 185)).all()), bits
    return sum(1 << i for i, bit in enumerate(bits.tolist()) if bit > 128)


def numbers_on(frames):
    return [number_on(frame) for frame in frames]


def lines(root, name):
    return [json.loads(line) for line in (root / "ego_exo_clip" / f"{name}.jsonl").read_text().splitlines()]


def clip_of(pairs, index):
    """The index's line of a sample."""
    (found,) = (clip for clip in lines(pairs.root, "clips") if clip["clip_id"] == pairs.name(index))
    return found


def take_name(pairs, index):
    return next(iter(pairs.span(index, 0).paths.values())).relative_to(pairs.root).parts[1]


@pytest.fixture(scope="module")
def pairs(toy_world):
    return dataset(toy_world)


@pytest.fixture
def copy(toy_world, tmp_path):
    """The world with one take, in a folder that a test may break."""
    for part in ("ego_exo_clip", "tokenizer", "takes/toy_train_0001"):
        shutil.copytree(toy_world / part, tmp_path / part)
    uid = lines(tmp_path, "groups")[1]["group_id"]
    counts = {}
    for name in ("groups", "clips"):
        kept = [line for line in lines(tmp_path, name) if line["group_id"] == uid]
        (tmp_path / "ego_exo_clip" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
        counts[name] = len(kept)
    (tmp_path / "ego_exo_clip" / "index.json").write_text(json.dumps({"schema_version": 1, **counts}))
    return tmp_path


# --------------------------------------------------------------------------------------------------------------------
# samples


def test_all_is_a_sample_for_every_camera_of_a_narration(toy_world, pairs):
    listed = lines(toy_world, "clips")
    folders = {
        group["group_id"]: (toy_world / group["views"]["ego"]["path"]).parent for group in lines(toy_world, "groups")
    }
    assert len(listed) == NARRATIONS
    expected = []
    for clip in listed:
        expected += [(clip["clip_id"], file) for file in sorted(folders[clip["group_id"]].glob("cam*.mp4"))]
    spans = [pairs.span(index, 0) for index in range(len(pairs))]
    assert [(pairs.name(i), span.paths["exo"]) for i, span in enumerate(spans)] == expected
    assert len(set(expected)) == len(pairs) > 2 * NARRATIONS


@pytest.mark.parametrize("policy", ["all", "best"])
def test_groups_are_the_takes_of_the_samples(toy_world, policy):
    chosen = dataset(toy_world, exo_policy=policy)
    groups = chosen.groups()
    assert (groups.dtype, groups.shape) == (np.int32, (len(chosen),))
    names = [take_name(chosen, index) for index in range(len(chosen))]
    assert [f"toy_train_{group:04d}" for group in groups] == names


def test_a_sample_that_does_not_exist_is_refused(pairs):
    for index in (-1, len(pairs)):
        with pytest.raises(IndexError):
            pairs.span(index, 0)


def test_best_is_a_sample_for_every_narration(toy_world):
    best = dataset(toy_world, exo_policy="best")
    groups = {group["group_id"]: group for group in lines(toy_world, "groups")}
    assert len(best) == NARRATIONS
    for index, clip in enumerate(lines(toy_world, "clips")):
        name = clip["best_exo"] or groups[clip["group_id"]]["best_exo"]
        assert best.name(index) == clip["clip_id"]
        assert best.span(index, 0).paths["exo"] == toy_world / FOLDER.format(take_name(best, index), name)


def test_best_falls_back_to_the_take_where_the_narration_names_none(toy_world):
    best = dataset(toy_world, exo_policy="best")
    groups = {Path(group["views"]["ego"]["path"]).parts[1]: group for group in lines(toy_world, "groups")}
    for name, of_take, of_clip in (("toy_train_0003", None, "cam01"), ("toy_train_0008", "cam01", None)):
        index = next(i for i in range(len(best)) if take_name(best, i) == name)
        assert (groups[name]["best_exo"], clip_of(best, index)["best_exo"]) == (of_take, of_clip)
        assert best.span(index, 0).paths["exo"] == toy_world / FOLDER.format(name, "cam01")


def test_another_policy_is_refused(toy_world):
    with pytest.raises(ValueError, match=r"^data\.exo_policy: got 'first', allowed: all, best, random, best_first, "):
        dataset(toy_world, exo_policy="first")
    with pytest.raises(ValueError, match=r"^data\.exo_policy: got mean, but data\.views is \[exo\]: "):
        dataset(toy_world, exo_policy="mean", views=("exo",))
    with pytest.raises(ValueError, match=r"^data\.curriculum_epochs: got 0, allowed: 1 or more$"):
        dataset(toy_world, exo_policy="best_first", curriculum_epochs=0)


@pytest.mark.parametrize(("policy", "shares"), [("best_first", (1, 0.5, 0)), ("best_last", (0, 0.5, 1))])
def test_a_curriculum_leads_from_the_best_view_to_random_ones_or_back(toy_world, policy, shares):
    chosen = dataset(toy_world, exo_policy=policy, curriculum_epochs=2)
    best, drawn = (dataset(toy_world, exo_policy=name) for name in ("best", "random"))
    assert len(chosen) == NARRATIONS
    for epoch, share in ((0, shares[0]), (1, shares[1]), (2, shares[2]), (9, shares[2])):
        cameras = [chosen.span(index, epoch).paths["exo"] for index in range(NARRATIONS)]
        of_best = [best.span(index, epoch).paths["exo"] for index in range(NARRATIONS)]
        at_random = [drawn.span(index, epoch).paths["exo"] for index in range(NARRATIONS)]
        assert all(camera in pair for camera, pair in zip(cameras, zip(of_best, at_random, strict=True), strict=True))
        apart = [place for place in range(NARRATIONS) if of_best[place] != at_random[place]]
        found = sum(cameras[place] == of_best[place] for place in apart) / len(apart)
        assert found == share if share in (0, 1) else 0.25 < found < 0.75
        assert set(chosen.pair(index, epoch) for index in range(NARRATIONS)) <= set(chosen.used_pairs().tolist())


def test_mean_reads_the_best_view_and_every_other_camera(toy_world):
    chosen, best = (dataset(toy_world, exo_policy=name) for name in ("mean", "best"))
    groups = {group["group_id"]: group for group in lines(toy_world, "groups")}
    cameras = [len(groups[clip_of(best, index)["group_id"]]["views"]["exo"]) for index in range(NARRATIONS)]
    few, many = (cameras.index(count) for count in (min(cameras), max(cameras)))
    batch = chosen.__getitems__(BatchRequest(0, [few, many], [few, many], 1))
    assert cameras[few] < cameras[many] and batch.other_exo_video.shape[:2] == (2, cameras[many] - 1)
    assert batch.other_exo.sum(1).tolist() == [cameras[few] - 1, cameras[many] - 1]
    for row, index in enumerate((few, many)):
        own = best.videos(best.span(index, 0))["exo"]
        torch.testing.assert_close(batch.exo_video[row], own, rtol=0, atol=0)
        for place, there in enumerate(batch.other_exo[row].tolist()):
            video = batch.other_exo_video[row, place]
            assert numbers_on(video) == numbers_on(own) if there else not video.any()
            assert not torch.equal(video, own)
    assert batch.num_frames == FRAMES * (2 + 2 + 2 * (cameras[many] - 1))
    assert chosen.used_pairs().tolist() == best.used_pairs().tolist()


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
        listed = {path for path in drawn.span(index, 0).paths["ego"].parent.glob("cam*.mp4")}
        assert {drawn.span(index, epoch).paths["exo"] for epoch in range(40)} == listed


def test_text_is_the_caption_alone_or_the_answer_to_an_instruction(toy_world, pairs):
    asked = dataset(toy_world, instruction="Describe the video.")
    caption = clip_of(pairs, 5)["text"]
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
        seen.setdefault(take_name(pairs, index), set()).update(ego)
    assert len(seen) == 9  # so also the portrait camera, the short stream and the far key frames
    assert all(len(numbers) > 15 for name, numbers in seen.items() if name != "toy_train_0006")


def test_a_stream_a_frame_short_bounds_both_views(toy_world, pairs):
    names = {"ego": "aria01_214-1", "exo": "cam01"}
    paths = {view: toy_world / FOLDER.format("toy_train_0003", name) for view, name in names.items()}
    frames = {view: probe(path).num_frames for view, path in paths.items()}
    assert frames["ego"] == frames["exo"] + 1
    take = lines(toy_world, "groups")[3]
    assert (take["num_frames"], take["duration"]) == (frames["exo"], frames["exo"] / FPS)
    ends_s = [clip["end"] for clip in lines(toy_world, "clips") if clip["group_id"] == take["group_id"]]
    assert max(ends_s) <= take["duration"]
    end_s = frames["ego"] / FPS  # by the egocentric stream, a frame past the end of the other
    views = read_views(ClipReader(), paths, end_s - 1.0, end_s, 7, SIDE, "squash")
    last = frames["exo"] - 1
    assert numbers_on(views["ego"].frames) == numbers_on(views["exo"].frames) == list(range(last - 6, last + 1))


def test_the_portrait_camera_is_read_upright_at_its_own_size(toy_world):
    path = toy_world / FOLDER.format("toy_train_0001", "cam02")
    info = probe(path)
    assert (info.width, info.height) == (64, 84)
    clip = ClipReader().read(path, [20 / FPS], 84, "pad")
    frame = clip.frames[0, :, 10:74]  # 64 wide in a square of 84
    bits = frame[4, 4::8].float().mean(dim=-1) > 128
    assert sum(1 << i for i, bit in enumerate(bits.tolist()) if bit) == 20


def test_a_take_with_one_key_frame_is_read_anywhere(toy_world):
    names = ("aria01_214-1", "cam01", "cam02", "cam03", "cam04")
    paths = {name: toy_world / FOLDER.format("toy_train_0007", name) for name in names}
    wanted = [61, 3, 40, 40, 17]
    for path in paths.values():
        clip = ClipReader().read(path, [(number + 0.5) / FPS for number in wanted], SIDE, "squash")
        assert numbers_on(clip.frames) == clip.frame_numbers.tolist() == wanted


def test_a_frame_offset_moves_one_view_only(copy):
    """The camera's file is 3 frames behind, as the index is told: each of its frames is 3 numbers later."""
    before = dataset(copy)
    expected = [numbers_on(before.videos(before.span(index, 0))["exo"]) for index in range(len(before))]
    (group,) = lines(copy, "groups")
    group["frame_offset"] = {"cam02": 3}
    (copy / "ego_exo_clip" / "groups.jsonl").write_text(json.dumps(group))
    after = dataset(copy)
    assert len(after) == len(before) == 12
    last_s = (group["num_frames"] - 3) / FPS
    for index in range(len(after)):
        span = after.span(index, 0)
        videos = after.videos(span)
        shift = 3 if span.paths["exo"].name == "cam02.mp4" else 0
        assert numbers_on(videos["exo"]) == [number + shift for number in numbers_on(videos["ego"])], index
        assert span.end_s <= last_s
        if span.end_s < last_s:
            assert numbers_on(videos["exo"]) == [number + shift for number in expected[index]]


def test_batches_of_the_loader_pair_the_views_row_by_row(pairs, toy_world):
    made = module(toy_world, exo_policy="random")
    made.trainer = type("Trainer", (), {"accumulate_grad_batches": 2, "world_size": 1, "global_rank": 0})()
    made.num_workers = 0
    source = made.train_dataloader()
    assert isinstance(source, ResumableLoader)
    source.load_state_dict({"epoch": 1, "global_batch": 3})
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


# --------------------------------------------------------------------------------------------------------------------
# the index


def test_no_index_is_one_error_before_anything_is_read(copy):
    (copy / "ego_exo_clip" / "index.json").unlink()
    with pytest.raises(ValueError, match=rf"^data\.index: no index in {copy}/ego_exo_clip .*`make ego-exoclip"):
        EgoExoClipDataModule(
            index=str(copy / "ego_exo_clip"),
            views=["ego"],
            root=str(copy),
            tokenizer=str(copy / "tokenizer"),
            clips=ClipConfig(FRAMES, SIDE, "squash"),
            global_batch_size=4,
        )


def test_the_index_may_lie_elsewhere(copy, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "index"
    (copy / "ego_exo_clip").rename(elsewhere)
    moved = dataset(copy, index=str(elsewhere))
    assert moved.videos(moved.span(0, 0)).keys() == {"ego", "exo"}


def test_reading_opens_no_video(copy):
    shutil.rmtree(copy / "takes")
    assert len(dataset(copy)) == 12


def test_the_fingerprint_is_of_takes_and_narrated_clips(copy):
    made = module(copy)
    before = made.fingerprint()
    header = copy / "ego_exo_clip" / "index.json"
    header.write_text(json.dumps(json.loads(header.read_text()) | {"built": "elsewhere"}))
    assert made.fingerprint() == before
    for name in ("groups", "clips"):
        file = copy / "ego_exo_clip" / f"{name}.jsonl"
        text = file.read_text()
        file.write_text(text + "\n")
        assert made.fingerprint() != before
        file.write_text(text)


# ----------------------------------------------------------------------------------- narrations that are not used


def takes(pairs):
    return pairs.groups()


def partly(root, seed=0, **narration):
    return dataset(root, seed=seed, narration=NarrationConfig(**narration))


def test_the_default_uses_every_narration_once(pairs):
    assert pairs.epoch_length == len(pairs)
    assert pairs.epoch_samples(3).tolist() == list(range(len(pairs)))
    assert all(pairs.text(index, 0).label_tokens > 0 for index in range(len(pairs)))


def test_a_fraction_of_the_takes_keeps_its_text_and_the_others_their_frames(toy_world, pairs):
    some = partly(toy_world, ego_text_fraction=0.34)
    narrated = {int(takes(some)[index]) for index in range(len(some)) if some.text(index, 0).label_tokens}
    everything = set(takes(some).tolist())
    assert len(narrated) == round(0.34 * len(everything)) == 3
    for index in range(len(some)):
        assert some.span(index, 0) == pairs.span(index, 0)
        if int(takes(some)[index]) in narrated:
            assert some.text(index, 0) == pairs.text(index, 0)
    assert some.epoch_samples(0).tolist() == list(range(len(pairs)))


def test_a_batch_counts_the_tokens_of_narrated_clips_only(toy_world, pairs):
    some = partly(toy_world, ego_text_fraction=0.34)
    indices = [int(some.with_text[0]), *some.without_text[:3].tolist()]
    batch = some.__getitems__(BatchRequest(0, indices, indices, 1))
    assert batch.valid.all() and not batch.corrupt
    supervised = (batch.text.labels != IGNORE_INDEX).sum(1).tolist()
    assert supervised == [pairs.text(indices[0], 0).label_tokens, 0, 0, 0]
    assert batch.label_tokens == supervised[0]
    full = pairs.__getitems__(BatchRequest(0, indices, indices, 1))
    assert torch.equal(batch.ego_video, full.ego_video) and torch.equal(batch.exo_video, full.exo_video)


def test_the_narrated_takes_depend_on_the_seed_and_are_nested(toy_world):
    def narrated(fraction, seed):
        some = partly(toy_world, seed, ego_text_fraction=fraction)
        return set(takes(some)[some.with_text].tolist())

    assert narrated(0.3, 0) < narrated(0.7, 0) < narrated(1.0, 0)
    assert narrated(0.3, 0) == narrated(0.3, 0)
    assert len({frozenset(narrated(0.3, seed)) for seed in range(8)}) > 1
    assert len(narrated(0.001, 0)) == 1


@pytest.mark.parametrize(("ratio", "others"), [(0, 0), (1, 2), (2, 4), (100, 7), (None, 7)])
def test_the_ratio_says_how_many_other_takes_are_used(toy_world, ratio, others):
    some = partly(toy_world, ego_text_fraction=0.22, unnarrated_ratio=ratio)
    used = some.epoch_samples(0)
    count = len(set(takes(some).tolist()))
    assert len(set(takes(some)[some.with_text].tolist())) == 2
    assert len(set(takes(some)[used].tolist())) == 2 + min(others, count - 2)
    assert len(used) == some.epoch_length


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_the_share_of_narrated_samples_is_reached_by_repeating_or_leaving_out(toy_world, share):
    some = partly(toy_world, ego_text_fraction=0.22, share=share)
    epochs = [some.epoch_samples(epoch) for epoch in range(2)]
    for samples in epochs:
        assert len(samples) == some.epoch_length
        narrated = np.isin(samples, some.with_text)
        assert narrated.mean() == pytest.approx(share, abs=0.5 / len(samples) + 1e-9)
        assert samples[~narrated].tolist() == some.without_text.tolist()
        times = np.unique(samples[narrated], return_counts=True)[1]
        assert times.max() - times.min() <= 1
    assert np.array_equal(epochs[0], some.epoch_samples(0))
    assert share == 0.5 or not np.array_equal(*epochs)


@pytest.mark.parametrize("world", [1, 2])
def test_the_loader_goes_on_with_the_same_mix_of_narrated_pairs(toy_world, world):
    def requests(start=0, rank=0):
        some = partly(toy_world, ego_text_fraction=0.22, share=0.5)
        sampler = GlobalBatchSampler(some.epoch_length, 4, 1, rank, world, 0, epoch_samples=some.epoch_samples)
        sampler.epoch, sampler.start = 1, start
        return [request.indices for request in sampler]

    ranks = [requests(rank=rank) for rank in range(world)]
    assert len({len(of_rank) for of_rank in ranks}) == 1
    together = [list(chain(*parts)) for parts in zip(*ranks, strict=True)]
    assert {len(batch) for batch in together} == {4}
    assert requests(start=3) == ranks[0][3:]


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("ego_text_fraction", 0.0, "above 0 to 1"),
        ("ego_text_fraction", 1.1, "above 0 to 1"),
        ("unnarrated_ratio", -1.0, "0 or more"),
        ("share", 1.0, "between 0 and 1"),
    ],
)
def test_impossible_narrations_are_refused(key, value, allowed):
    with pytest.raises(ValueError, match=rf"data.narration.{key}: got {value}, allowed: {allowed}"):
        NarrationConfig(**{key: value})


@pytest.mark.parametrize("instruction", [None, "Describe the video."])
def test_the_prompt_is_what_stands_before_every_caption(toy_world, instruction):
    chosen = dataset(toy_world, instruction=instruction)
    batch = chosen.__getitems__(BatchRequest(0, [0, 1], [0, 1], 1))
    for ids, labels in zip(batch.text.input_ids, batch.text.labels, strict=True):
        first = int((labels != IGNORE_INDEX).int().argmax())
        assert ids[:first].tolist() == batch.prompt.tolist()
