"""Precision of the memories, and the levels, which count the same hits."""

import pytest
import torch
from torch.nn.functional import normalize

from cge_fast.analyze.levels import level_name, levels
from cge_fast.analyze.precision import precision, stripe_hits
from cge_fast.errors import UserError
from cge_reference.revise_logits import local_scores

IMAGES = 24


def mixed_memory(network):
    """Of 4 identities: the first stripe tells colours apart as well as it can, the second somehow, the third never."""
    random = torch.Generator().manual_seed(3)
    network.head.memory[1] = normalize(torch.rand(network.head.memory.shape[1:], generator=random), dim=1)
    network.head.memory[0] = normalize(torch.randn(network.head.memory.shape[1:], generator=random), dim=1)


def expected_hits(trained, train_set):
    images, labels = train_set(trained)
    _, local_features = trained.network.head.pool(trained.network.feature_map(images))
    return local_scores(local_features, trained.network.head.memory).argmax(dim=2) == labels[:, None]


def test_a_hit_is_the_largest_cosine_at_the_label(opened, train_set):
    trained = opened("mine", change=mixed_memory)
    hits = stripe_hits(trained)
    assert torch.equal(hits, expected_hits(trained, train_set))
    assert hits[:, 2].sum() == 6, "a memory without any content says the first identity always"


def test_precision_is_the_share_of_hits_of_each_stripe(opened, train_set, rows_of, tmp_path):
    trained, empty = opened("mine", change=mixed_memory), opened("empty", "--model.stripes", "2")
    right = expected_hits(trained, train_set).sum(dim=0).tolist()
    written = precision([trained, empty], tmp_path / "out")
    rows = rows_of(written.table)
    assert [(row["checkpoint"], row["stripe"], int(row["right"])) for row in rows] == [
        *(("mine", str(stripe), count) for stripe, count in enumerate(right, start=1)),
        ("empty", "1", 6),
        ("empty", "2", 6),
    ]
    assert [float(row["precision"]) for row in rows] == [count / IMAGES for count in (*right, 6, 6)]
    assert "empty: 25.0%, 25.0%" in written.summary
    assert written.picture.exists()


def test_levels_count_images_by_their_hits_the_easiest_first(opened, train_set, rows_of, tmp_path):
    trained, empty = opened("mine", change=mixed_memory), opened("empty", "--model.stripes", "2")
    number = expected_hits(trained, train_set).sum(dim=1)
    counts = [(number == right).sum().item() for right in (3, 2, 1, 0)]
    written = levels([trained, empty], tmp_path / "out")
    rows = rows_of(written.table)
    assert [(row["level"], row["stripes_right"], int(row["images"])) for row in rows] == [
        ("easiest", "3", counts[0]),
        ("mid-easy", "2", counts[1]),
        ("mid-hard", "1", counts[2]),
        ("hardest", "0", counts[3]),
        ("2 of 2 right", "2", 6),
        ("1 of 2 right", "1", 0),
        ("0 of 2 right", "0", 18),
    ]
    assert [float(row["share"]) for row in rows] == [int(row["images"]) / IMAGES for row in rows]
    assert "empty: 2 of 2 right 25.0%, 1 of 2 right 0.0%, 0 of 2 right 75.0%" in written.summary
    assert written.picture.exists()


def test_only_three_stripes_have_the_papers_names():
    assert [level_name(right, 3) for right in (3, 0)] == ["easiest", "hardest"]
    assert level_name(3, 4) == "3 of 4 right"


@pytest.mark.parametrize("analysis", [levels, precision])
def test_without_cge_there_is_nothing_to_count(opened, tmp_path, analysis):
    with pytest.raises(UserError, match=f"{analysis.__name__} needs CGE"):
        analysis([opened("bot", "--model.cge", "false")], tmp_path / "out")
    assert not (tmp_path / "out").exists()
