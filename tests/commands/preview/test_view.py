"""The preview shows the pack and nothing else: every number in the page is compared with the tensors that
training would use."""

import re

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from previews import HOUSE, TIP, packed, record, sample_page

from unigen.commands.preview.chips import CHIPS, characters
from unigen.commands.preview.pictures import COLOURS, HATCHED, mask_picture, noised
from unigen.commands.preview.view import PictureView, look, planner_with
from unigen.config import DataOptions
from unigen.model.flow import training_time
from unigen.model.weights import load_planner
from unigen.sequence.draw import RandomKey
from unigen.sequence.types import Image, Kind, Pack, Text

# ---- tokens and loss


@pytest.mark.parametrize("epoch", range(3))
@pytest.mark.parametrize("number", range(7))
def test_every_token_in_the_page_is_a_column_of_the_pack(number, epoch, tmp_path, planner, records):
    """Index, position, id and label of every text token and marker of the seven formats, with dropout as it
    falls."""
    pack = packed(records[number], number, planner, epoch)
    page = sample_page(tmp_path, records[number], planner, epoch, number)
    shown = {}
    for _, values in page.elements:
        for index, *numbers in TIP.findall(values.get("title") or ""):
            assert int(index) not in shown
            shown[int(index)] = [int(n) if n else -100 for n in numbers]
    texts = (pack.kind == Kind.TEXT) & ~pack.image
    columns = zip(
        pack.index[texts].tolist(), pack.position[texts], pack.ids[texts], pack.label[texts], strict=True
    )
    assert shown == {index: [int(position), int(id), int(label)] for index, position, id, label in columns}


@pytest.mark.parametrize("number", range(7))
def test_what_is_marked_as_learnt_is_what_carries_labels(number, tmp_path, planner, records):
    """Learnt tokens, next-modality tokens and labels behind a cut are together the pack's labels, in each of
    some passes."""
    for epoch in range(4):
        view = look(records[number], number, planner, RandomKey(42, epoch, number))
        pack = packed(records[number], number, planner, epoch)
        learnt = sum(token.learnt for shown in view.blocks for token in shown.tokens)
        opened = sum(shown.next_modality is not None for shown in view.blocks)
        assert learnt + opened == pack.n_text_labels == view.pack.n_text_labels
        page = sample_page(tmp_path, records[number], planner, epoch, number)
        legend = 1  # of each mark
        assert len(page.of("bdi", "t")) - legend == opened
        lit = [values for tag in ("span", "bdi") for values in page.of(tag, "y")]
        assert sum(len(TIP.findall(values.get("title") or "")) for values in lit) == learnt


def test_the_sums_in_the_page_are_the_packs(tmp_path, estimate, records):
    pack = packed(records[1], 1, estimate)
    text = sample_page(tmp_path, records[1], estimate, number=1).text
    share = pack.n_image_targets / (pack.n_image_targets + pack.n_text_labels)
    assert f"{len(pack):,}length{len(pack) / 32768:.1%} of the 32,768 tokens" in text
    of_tokens = f"{pack.n_text_labels / len(pack):.1%} of the sample's tokens"
    assert f"{pack.n_text_labels}text labels{of_tokens}" in text
    assert f"{pack.n_image_targets:,}image target tokens" in text and f"{share:.1%} of its targets" in text


def test_a_cut_text_shows_what_is_lost(tmp_path, golden):
    short = load_planner(golden / "model", DataOptions(max_sequence_length=40))
    entry = record(
        Text("Say it."), Text("What is cut off here is shown as lost, every word of it.", target=True)
    )
    view = look(entry, 0, short, RandomKey(42, 0, 0))
    pack = packed(entry, 0, short)
    (shown,) = [shown for shown in view.blocks if shown.block.cut]
    ids = short.tokenizer.encode(entry.sample[1].text)
    kept = [token.id for token in shown.tokens[1:-1]]
    assert len(pack) == 40 and kept + shown.lost == ids and shown.lost
    assert shown.tokens[-2].label == shown.lost[0] and not shown.tokens[-1].learnt
    page = sample_page(tmp_path, entry, short)
    assert short.tokenizer.decode(shown.lost) in page.text
    assert f"cut: {len(shown.lost)} text tokens are lost" in page.text
    learnt = sum(token.learnt for token in shown.tokens)
    # one stands behind the cut
    assert learnt + 1 + sum(s.next_modality is not None for s in view.blocks) == pack.n_text_labels


def test_a_long_text_folds_and_loses_nothing(tmp_path, planner):
    text = " ".join(f"word{i}" for i in range(600))
    entry = record(Text("Count."), Text(text, target=True))
    page = sample_page(tmp_path, entry, planner)
    assert len(page.of("details", "fold")) == 1
    assert text in re.sub(r"… [\d,]+ more tokens|\n", "", page.text)
    assert 0 < sum(len(TIP.findall(values.get("title") or "")) for _, values in page.elements) <= CHIPS + 4


def test_parts_of_characters_are_joined(planner, estimate):
    """Byte-level tokens of a character form one part; the parts are the text, and no token is lost."""
    text = "你好 😀 \u00e9 مرحبا שלום 👩‍👩‍👧‍👦\n"
    for tokenizer in (planner.tokenizer, estimate.tokenizer):
        ids = tokenizer.encode(text)
        parts = characters(tokenizer, ids)
        assert "".join(part for part, _ in parts) == text and sum(n for _, n in parts) == len(ids)
        assert not any("\ufffd" in part for part, _ in parts)
    assert max(n for _, n in characters(planner.tokenizer, planner.tokenizer.encode(text))) > 1
    broken = planner.tokenizer.encode("你")[:1]  # as a cut leaves it
    assert [n for _, n in characters(planner.tokenizer, broken)] == [1]


def test_a_special_token_inside_a_text_is_pointed_out(tmp_path, planner):
    planner = planner_with(planner, allow_control_tokens=True)
    assert (
        "special token inside the text"
        in sample_page(tmp_path, record(Text("a <|im_end|> b"), Text("c", target=True)), planner).text
    )
    assert (
        "special token inside the text"
        not in sample_page(tmp_path, record(Text("a"), Text("c", target=True)), planner).text
    )


def test_the_caption_variant_of_the_pass_is_shown(tmp_path, planner):
    entry = record(Text("one", others=("two", "three")), Text("c", target=True))
    seen = set()
    for epoch in range(12):
        view = look(entry, 0, planner, RandomKey(42, epoch, 0))
        (shown, _) = view.blocks
        text = planner.tokenizer.decode([token.id for token in shown.tokens[1:-1]])
        assert shown.variants == ("one", "two", "three") and text == shown.variants[shown.variant]
        seen.add(text)
    assert (
        len(seen) > 1
        and f"caption variant {shown.variant + 1} of 3"
        in sample_page(tmp_path, entry, planner, epoch=11).text
    )


# ---- pictures, positions


def test_tiles_show_the_tensors_of_the_pack(planner, records):
    pack = packed(records[4], 4, planner, epoch=2)
    view = look(records[4], 4, planner, RandomKey(42, 2, 4), shift=3.0)
    shown = [s for s in view.blocks if s.picture]
    assert {s.kind for s in shown} == {Kind.VIT, Kind.CLEAN, Kind.NOISED}
    vae = [s for s in shown if s.kind != Kind.VIT]
    for entry, number in zip(vae, pack.vae_block, strict=True):
        assert torch.equal(entry.picture.pixels, pack.vae_pixels[number])
    times = [float(t[0]) for t in training_time(pack.u, 3.0).split([r * c for r, c in pack.vae_grid])]
    assert [s.picture.time or 0.0 for s in vae] == times and max(times) > 0
    rows = [s.picture.pixels for s in shown if s.kind == Kind.VIT]
    patch = planner.geometry.vit_patch
    cells = [
        p.unfold(1, patch, patch)
        .unfold(2, patch, patch)
        .permute(1, 2, 3, 4, 0)
        .reshape(-1, patch * patch * 3)
        for p in rows
    ]
    assert torch.equal(torch.cat(cells), pack.vit_patches)


def test_the_page_says_what_the_resize_did(tmp_path, estimate):
    PILImage.new("RGB", (640, 480), "teal").save(tmp_path / "wide.png")
    entry = record(Image(tmp_path / "wide.png"), Text("Small?"), Image(HOUSE, target=True))
    view = look(entry, 0, estimate, RandomKey(42, 0, 0))
    page = sample_page(tmp_path, entry, estimate)
    for shown in view.blocks:
        if shown.picture:
            (w0, h0), (w, h), grid = shown.picture.original, shown.picture.size, shown.block.grid
            assert f"{w0:,} × {h0:,} → {w:,} × {h:,} px" in page.text
            assert f"{grid[0]} × {grid[1]} = {grid[0] * grid[1]}" in page.text
            assert shown.picture.enlarged == (min(w / w0, h / h0) > 1.1)
    enlarged = [shown for shown in view.blocks if shown.picture and shown.picture.enlarged]
    assert page.text.count("this adds no detail") == len(enlarged)
    assert (
        "resize×0." in page.text
        and "resizeunchanged" in page.text
        and view.blocks[0].picture.original == (640, 480)
    )


def test_a_noised_image_shares_its_position_with_its_copy(tmp_path, planner, records):
    view = look(records[0], 0, planner, RandomKey(42, 0, 0))
    pack = packed(records[0], 0, planner)
    for shown in view.kept:
        inside = pack.position[(pack.index >= shown.start) & (pack.index < shown.stop)]
        assert shown.positions == (int(inside.min()), int(inside.max()))
    (noised,) = [s for s in view.kept if s.kind == Kind.NOISED]
    (copied,) = [s for s in view.kept if s.kind == Kind.CLEAN]
    assert noised.same_position == [copied.number] and copied.same_position == [noised.number]
    assert sum(bool(s.same_position) for s in view.kept) == 2
    assert f"same position as {copied.number}" in sample_page(tmp_path, records[0], planner).text


def test_noise_hides_as_much_as_its_time_says(estimate):
    """At t = 0 the tile is the picture, at t = 1 it has nothing of it."""
    image = PILImage.new("RGB", (64, 64), (200, 40, 90))
    clean = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
    assert torch.allclose(noised(image, PictureView("", (1, 1), clean, 0.0), (4, 4)), clean)
    other = PILImage.new("RGB", (64, 64), "white")
    assert torch.equal(
        noised(image, PictureView("", (1, 1), clean, 1.0), (4, 4)),
        noised(other, PictureView("", (1, 1), clean, 1.0), (4, 4)),
    )


# ---- the mask


def rule(pack: Pack) -> np.ndarray:
    """The mask as docs/model.md states it, token by token in the order of the sequence."""
    order = pack.index.argsort().tolist()
    sample, span, image, noised = (
        getattr(pack, name).tolist() for name in ("sample", "span", "image", "noised")
    )
    seen = np.zeros((len(order), len(order)), bool)
    for i, q in enumerate(order):
        for j, k in enumerate(order):
            same = span[q] == span[k]
            seen[i, j] = (
                sample[q] == sample[k] and (i >= j or (same and image[q])) and (not noised[k] or same)
            )
    return seen


def drawn(picture) -> tuple[np.ndarray, np.ndarray]:
    """[n, n] bool each: what is seen, and what is hatched."""
    opacity = np.asarray(picture.image)[..., 3]
    assert set(np.unique(opacity)) <= {0, HATCHED, 255}
    return opacity == 255, opacity == HATCHED


@pytest.mark.parametrize("number", [0, 1, 4])
def test_the_drawn_mask_is_the_rule(number, planner, records):
    view = look(records[number], number, planner, RandomKey(42, 1, number))
    picture = mask_picture(view)
    seen, hatched = drawn(picture)
    wanted = rule(view.pack)
    assert picture.by_token and np.array_equal(seen, wanted)
    noised_before = np.tril(~wanted)
    assert hatched.any() == noised_before.any() and not (hatched & ~noised_before).any()
    colours = np.asarray(picture.image)[..., :3]
    for shown in view.kept:
        inside = colours[:, shown.start : shown.stop][seen[:, shown.start : shown.stop]]
        assert (inside == COLOURS[shown.kind]).all()


def test_the_mask_of_a_long_sample_is_the_rule(estimate, records):
    """Each pair of blocks shows what holds between all of their tokens: everything, nothing, or a
    triangle."""
    view = look(records[5], 5, estimate, RandomKey(42, 0, 5))
    wanted, picture = rule(view.pack), mask_picture(view)
    seen, hatched = drawn(picture)
    assert not picture.by_token and len(seen) == sum(picture.sizes) < len(wanted)
    ends, hidden = np.cumsum([0, *picture.sizes]), 0
    for i, a in enumerate(view.kept):
        for j, b in enumerate(view.kept):
            cell = wanted[a.start : a.stop, b.start : b.stop]
            place = slice(ends[i], ends[i + 1]), slice(ends[j], ends[j + 1])
            if cell.all() or not cell.any():
                assert (seen[place] == cell.all()).all(), (a.number, b.number)
            else:
                assert i == j and np.array_equal(cell, np.tril(np.ones_like(cell)))
                assert (
                    np.triu(~seen[place], 1).any()
                    and (np.tril(seen[place]) == np.tril(np.ones_like(seen[place]))).all()
                )
            assert hatched[place].any() == (j < i and not cell.any())
            hidden += bool(hatched[place].any())
    assert hidden


# ---- dropout


@pytest.mark.parametrize("number", range(7))
def test_what_may_be_left_out_is_what_is_left_out_at_some_time(number, planner, records):
    """Over many passes the planner drops exactly the blocks that the preview calls droppable, about as often
    as it says."""
    entry = records[number]
    view = look(entry, number, planner, RandomKey(42, 0, number))
    sizes = planner.token_lengths(entry)
    passes = [planner.outline(entry.sample, sizes, RandomKey(7, epoch, number)) for epoch in range(300)]
    passes = [blocks for blocks in passes if len(blocks) == len(view.blocks)]
    for i, shown in enumerate(view.blocks):
        share = sum(blocks[i].dropped for blocks in passes) / len(passes)
        assert (share > 0) == bool(shown.option) and abs(share - shown.chance) < 0.12
        if shown.option:
            assert shown.chance == getattr(planner.options, shown.option)
    now = planner.outline(entry.sample, sizes, RandomKey(42, 0, number))
    assert [shown.block.dropped for shown in view.blocks] == [block.dropped for block in now]


def test_what_the_pass_left_out_is_told(tmp_path, golden, records):
    planner = load_planner(
        golden / "model",
        DataOptions(max_image_tokens=16, text_cond_dropout_prob=1.0, vit_cond_dropout_prob=0.0),
    )
    view = look(records[4], 4, planner, RandomKey(42, 0, 4))
    page = sample_page(tmp_path, records[4], planner, number=4)
    gone = [shown for shown in view.blocks if shown.block.dropped]
    assert {shown.kind for shown in gone} >= {Kind.TEXT} and len(page.of("div", "card")) == len(view.blocks)
    assert len([v for v in page.of("div", "dropped") if "card" in v["class"]]) == len(gone)
    assert "Paint the walls blue." in page.text and "A dropped text leaves nothing" in page.text
    assert "100%left out in this passtext_cond_dropout_prob" in page.text


def test_clean_copies_after_a_single_image_are_told(planner, records):
    """In the share of the passes that the option says, and this pass's state is the planner's."""
    entry = records[2]
    views = [look(entry, 2, planner, RandomKey(42, epoch, 2)) for epoch in range(40)]
    assert {view.clean_copies for view in views} == {planner.options.single_image_stop_prob}
    assert [view.copied for view in views] == [
        any(s.kind == Kind.CLEAN for s in view.blocks) for view in views
    ]
    assert 0 < sum(view.copied for view in views) < 20
    assert look(records[3], 3, planner, RandomKey(42, 0, 3)).clean_copies is None
