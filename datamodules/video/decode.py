"""Demux and decode exactly the wanted frames of an open video.

Times are presentation time stamps (pts) in ticks of the stream. Three tricks save most of the decoding, all of them
exact: packets are demuxed first and only the needed ones decoded, frames that nothing refers to are skipped unless they
are wanted, and groups of frames between two wanted ones are passed over.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import chain
from typing import cast

import av
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from datamodules.video.errors import Damaged, FrameMissing, NoTimes, SpanOutsideFile
from datamodules.video.media import prefetch
from datamodules.video.probe import OpenVideo, packet_end_s

_SKIPS_UNREFERENCED = frozenset({"h264", "hevc"})  # decoders that honour skip_frame packet by packet
_RESEEK_GAP_S = 1.0  # below this, demuxing further is about as cheap as another seek


class NeedsFullDecode(Exception):
    """Seeking cannot produce the wanted frames; only decoding from the start of the file can."""


def is_torn(packet: Packet[VideoStream], codec_name: str, length_bytes: int | None) -> bool:
    """Return True if a packet has zeros where its coding forbids them, such as in a block that was never written.

    A decoder would show them as a frame that hardly changes.

    Args:
        packet: packet of a frame, or the empty one at the end of a file.
        codec_name: ``h264``, ``hevc`` or another.
        length_bytes: ``nal_length_bytes``; without it the answer is always False.
    """
    if length_bytes is None:
        return False
    # A packet is a sequence of units, each a length and so many bytes, of which the first tells the unit's type. Coded
    # frames never hold three zero bytes in a row, except at their end.
    data, end = bytes(packet), 0
    while end < len(data):
        begin = end + length_bytes
        end = begin + int.from_bytes(data[end:begin], "big")
        if end == begin or end > len(data):
            return True
        holds_frame = (data[begin] >> 1 & 63) < 32 if codec_name == "hevc" else (data[begin] & 31) < 6
        if holds_frame and data.find(b"\0\0\0", begin, end - 8) >= 0:
            return True
    return False


def split_at_key_frames(video: OpenVideo, ascending: list[int]) -> list[list[int]]:
    """Group ascending ticks so that a long gap with a key frame in it is skipped by seeking, not by demuxing."""
    groups = [[ascending[0]]]
    for tick in ascending[1:]:
        previous = groups[-1][-1]
        if (tick - previous) * video.tick_s > _RESEEK_GAP_S:
            entry = video.stream.index_entries.search_timestamp(tick)
            if entry >= 0 and video.stream.index_entries[entry].timestamp > previous:
                groups.append([tick])
                continue
        groups[-1].append(tick)
    return groups


def demux_span(video: OpenVideo, first_tick: int, last_tick: int) -> tuple[list[Packet[VideoStream]], bool]:
    """Return the packets from the key frame that ``first_tick`` needs to the last one shown by ``last_tick``.

    Returns:
        Packets in decode order, and True if the file ended first.

    Raises:
        NeedsFullDecode: seeking does not reach the key frame.
        Damaged: see ``take_until``.
    """
    # Seeking uses decode times, so the key frame reached may be displayed after the target: then step back.
    prefetch(video.container, video.stream, first_tick, last_tick)
    seek_tick, previous_dts = first_tick, None
    while True:
        try:
            video.container.seek(seek_tick, stream=video.stream)
        except av.error.FFmpegError as error:
            raise NeedsFullDecode from error
        packets = video.container.demux(video.stream)
        head = next(packets, None)
        if head is None or head.pts is None:
            raise NeedsFullDecode
        if head.is_keyframe and head.pts <= first_tick:
            return take_until(video, chain((head,), packets), last_tick)
        if head.dts is None or (previous_dts is not None and head.dts >= previous_dts):
            raise NeedsFullDecode
        previous_dts = head.dts
        seek_tick = head.dts - 1


def take_until(
    video: OpenVideo, packets: Iterable[Packet[VideoStream]], last_tick: int
) -> tuple[list[Packet[VideoStream]], bool]:
    """Return the packets up to the decode time ``last_tick``, and True if the file ended first.

    Raises:
        NoTimes: a packet has no display time.
    """
    taken: list[Packet[VideoStream]] = []
    for packet in packets:
        if packet.pts is None:
            if packet.size:
                raise NoTimes("a packet has no display time", video.path)
            break
        if packet.dts is not None and packet.dts > last_tick:
            return taken, False
        taken.append(packet)
    return taken, True


def choose_frames(
    video: OpenVideo, packets: list[Packet[VideoStream]], at_end: bool, ascending: list[int]
) -> dict[int, int]:
    """Return for every wanted tick the pts of the last frame displayed at or before it.

    Raises:
        FrameMissing: no frame is displayed by the first tick.
        Damaged: the file ends earlier than its header claims.
        SpanOutsideFile: the last tick is more than one frame past the end.
    """
    shown = sorted(cast(int, packet.pts) for packet in packets if not packet.is_discard)
    if not shown or shown[0] > ascending[0]:
        raise FrameMissing(f"no frame is displayed by {video.time_s(ascending[0]):.3f} s", video.path)
    # The last frame is shown until its end; a later time is an error of the annotation, or of a file that was cut.
    if at_end:
        file_end_s = max(packet_end_s(video, packet) for packet in packets if not packet.is_discard)
        if video.is_whole:  # packets list durations in the order of decoding, so the last frame may last longer
            file_end_s = max(file_end_s, video.header_end_s)
        wanted_s = video.time_s(ascending[-1])
        if file_end_s <= wanted_s < video.header_end_s - video.frame_s:
            raise Damaged(
                f"frames end at {file_end_s:.3f} s, the header promises {video.header_end_s:.3f} s", video.path
            )
        if wanted_s >= file_end_s + video.frame_s:
            raise SpanOutsideFile(f"the video ends at {file_end_s:.3f} s", video.path)
    return {tick: shown[bisect_right(shown, tick) - 1] for tick in ascending}


def decode_segments(video: OpenVideo, packets: list[Packet[VideoStream]], wanted: list[int]) -> Iterator[VideoFrame]:
    """Decode the wanted pts (ascending), each from its own key frame, passing over groups of unwanted frames.

    Raises:
        Damaged, NeedsFullDecode: see ``decode_packets``.
    """
    # Segments: first packet (a key frame), last packet, wanted pts. Wanted frames of one key frame share a segment.
    position = {packet.pts: i for i, packet in enumerate(packets) if not packet.is_discard}
    keys = [i for i, packet in enumerate(packets) if packet.is_keyframe]
    segments: list[tuple[int, int, set[int]]] = []
    for pts in wanted:
        at = position[pts]
        key = next((k for k in reversed(keys) if k <= at and cast(int, packets[k].pts) <= pts), None)
        if key is None:
            raise NeedsFullDecode
        if segments and key <= segments[-1][1]:
            first, last, members = segments[-1]
            segments[-1] = (first, max(last, at), members | {pts})
        else:
            segments.append((key, at, {pts}))
    for first, last, members in segments:
        yield from decode_packets(video, packets[first : last + 1], members, exact_start=True)


def decode_packets(
    video: OpenVideo, packets: list[Packet[VideoStream]], wanted: set[int], exact_start: bool
) -> Iterator[VideoFrame]:
    """Feed packets and yield the frames whose pts is wanted.

    Args:
        video: an open file whose decoder is empty.
        packets: in decode order, from a key frame to the last wanted one.
        wanted: pts of the frames to yield.
        exact_start: the first packet is a key frame and later packets refer to nothing before it; frames displayed
            before it are left out and unreferenced ones are skipped. Otherwise every packet is decoded.

    Raises:
        Damaged: a packet or frame on the way is corrupt.
        NeedsFullDecode: a wanted frame did not come out.
    """
    codec = video.codec
    may_skip = exact_start and video.codec_name in _SKIPS_UNREFERENCED
    codec.skip_frame = "DEFAULT"
    skipping = False
    first_pts = cast(int, packets[0].pts)
    missing = set(wanted)
    for packet in chain(packets, (None,)):
        if packet is not None:
            pts = cast(int, packet.pts)
            if packet.is_corrupt or is_torn(packet, video.codec_name, video.nal_length_bytes):
                raise Damaged(f"corrupt packet at {video.time_s(pts):.3f} s", video.path)
            if exact_start and pts < first_pts:
                continue
            if may_skip and skipping == (pts in wanted):
                skipping = not skipping
                codec.skip_frame = "NONREF" if skipping else "DEFAULT"
        # Down to the empty packet: a wanted frame may refer to one that is displayed later.
        for frame in codec.decode(packet):
            if frame.is_corrupt:
                raise Damaged(f"corrupt frame at {video.time_s(cast(int, frame.pts)):.3f} s", video.path)
            if frame.pts in missing:
                missing.remove(frame.pts)
                yield frame
    codec.flush_buffers()
    if missing:
        raise NeedsFullDecode


def decode_in_order(video: OpenVideo) -> Iterator[VideoFrame]:
    """Decode a file whose packets have no display times from its start, and set the time of every frame.

    The frames come out in the order in which they are displayed, one at each decode time of a packet.

    Raises:
        Damaged: a packet or frame is corrupt.
        FrameMissing: the decoder returned fewer or more frames than there are packets.
    """
    slots: list[int] = []
    count = 0
    for packet in video.container.demux(video.stream):
        if packet.is_corrupt:
            raise Damaged(f"corrupt packet after {count} frames", video.path)
        if packet.size and packet.dts is not None:
            slots.append(packet.dts)
        for frame in video.codec.decode(packet if packet.size or packet.dts is not None else None):
            if frame.is_corrupt:
                raise Damaged(f"corrupt frame at number {count}", video.path)
            if count >= len(slots):
                raise FrameMissing(f"{count + 1} frames in {len(slots)} packets", video.path)
            frame.pts, frame.time_base = slots[count], cast(Fraction, video.stream.time_base)
            count += 1
            yield frame
    if count != len(slots):
        raise FrameMissing(f"{len(slots) - count} of {len(slots)} frames are never decoded", video.path)
