"""Where networks look."""

import pytest
import torch

from cge_fast.analyze.saliency import described, saliency, saliency_maps
from cge_fast.data import read
from cge_fast.data.batches import plain_batches


def test_the_maximum_lies_at_its_cells_middle():
    saliency_map = torch.zeros(4, 2)
    saliency_map[3, 0] = 2.0
    columns = described(saliency_map, 2)
    assert (columns["maximum_x"], columns["maximum_y"]) == (0.25, 0.875)
    assert (columns["stripe_1"], columns["stripe_2"]) == (0, 1)


def test_stripes_that_overlap_share_one_saliency():
    columns = described(torch.ones(4, 2), 3)
    assert [columns[f"stripe_{number}"] for number in (1, 2, 3)] == pytest.approx([1 / 3] * 3)


def test_a_map_without_saliency_has_no_shares():
    columns = described(torch.zeros(3, 2), 3)
    assert [columns[f"stripe_{number}"] for number in (1, 2, 3)] == [0, 0, 0]


def test_a_map_is_the_maximum_over_the_channels(opened):
    trained = opened("mine", "--evaluation.batch", "3")
    images = read(trained.config.data).query
    batch = next(plain_batches(images, len(images), trained.config.data, trained.device, "all"))
    expected = trained.model.feature_map(batch).max(dim=1).values
    torch.testing.assert_close(saliency_maps(trained, images), expected, rtol=1e-5, atol=1e-6)


def test_evenly_spaced_queries_by_every_checkpoint(opened, rows_of, tmp_path, market):
    checkpoints = [opened("bot", "--model.cge", "false"), opened("cge", "--data.height", "48")]
    written = saliency(checkpoints, tmp_path, images=2)
    queries = sorted(str(path) for path in (market / "query").iterdir())
    rows = rows_of(written.table)
    assert [(row["image"], row["checkpoint"]) for row in rows] == [
        (queries[0], "bot"),
        (queries[0], "cge"),
        (queries[2], "bot"),
        (queries[2], "cge"),
    ]
    for row in rows:
        assert sum(float(row[f"stripe_{number}"]) for number in (1, 2, 3)) == pytest.approx(1)
    assert written.picture.exists()


def test_no_more_images_than_there_are(opened, rows_of, tmp_path):
    assert len(rows_of(saliency([opened("mine")], tmp_path, images=100).table)) == 4
