"""Precision of the memories, and the levels, which count the same stripes."""

import pytest
import torch
from torch.nn.functional import normalize

from cge_fast.analyze.stripes import levels, precision, train_stripe_correct
from cge_fast.errors import UserError
from cge_reference.revise_logits import local_scores

IMAGES = 24


def mixed_memory(run):
    """Of 4 identities: the first stripe tells colours apart as well as it can, the second somehow, the third never."""
    random, memory = torch.Generator().manual_seed(3), run.criterion.classification.memory
    memory[1] = normalize(torch.rand(memory.shape[1:], generator=random), dim=1)
    memory[0] = normalize(torch.randn(memory.shape[1:], generator=random), dim=1)


def expected_correct(trained, train_set):
    images, labels = train_set(trained)
    return local_scores(trained.model(images).stripes, trained.loss.memory).argmax(dim=2) == labels[:, None]


def test_a_stripe_is_correct_where_the_largest_cosine_is_at_the_label(opened, train_set):
    trained = opened("mine", change=mixed_memory)
    correct = train_stripe_correct(trained)
    assert torch.equal(correct, expected_correct(trained, train_set))
    assert correct[:, 2].sum() == 6, "a memory without any content says the first identity always"


def test_precision_is_the_share_of_images_that_a_stripe_gets_right(opened, train_set, rows_of, tmp_path):
    trained, empty = opened("mine", change=mixed_memory), opened("empty", "--model.stripes", "2")
    correct = expected_correct(trained, train_set).sum(dim=0).tolist()
    written = precision([trained, empty], tmp_path / "out")
    rows = rows_of(written.table)
    assert [(row["checkpoint"], row["stripe"], int(row["correct"])) for row in rows] == [
        *(("mine", str(stripe), count) for stripe, count in enumerate(correct, start=1)),
        ("empty", "1", 6),
        ("empty", "2", 6),
    ]
    assert [float(row["precision"]) for row in rows] == [count / IMAGES for count in (*correct, 6, 6)]
    assert "empty: 25.0%, 25.0%" in written.summary
    assert written.picture.exists()


def test_levels_count_images_by_their_correct_stripes_the_easiest_first(opened, train_set, rows_of, tmp_path):
    trained, empty = opened("mine", change=mixed_memory), opened("empty", "--model.stripes", "2")
    number = expected_correct(trained, train_set).sum(dim=1)
    counts = [(number == correct).sum().item() for correct in (3, 2, 1, 0)]
    written = levels([trained, empty], tmp_path / "out")
    rows = rows_of(written.table)
    assert [(row["level"], row["num_stripes_correct"], int(row["images"])) for row in rows] == [
        ("easiest", "3", counts[0]),
        ("mid-easy", "2", counts[1]),
        ("mid-hard", "1", counts[2]),
        ("hardest", "0", counts[3]),
        ("2 of 2 correct", "2", 6),
        ("1 of 2 correct", "1", 0),
        ("0 of 2 correct", "0", 18),
    ]
    assert [float(row["share"]) for row in rows] == [int(row["images"]) / IMAGES for row in rows]
    assert "empty: 2 of 2 correct 25.0%, 1 of 2 correct 0.0%, 0 of 2 correct 75.0%" in written.summary
    assert written.picture.exists()


@pytest.mark.parametrize("analysis", [levels, precision])
def test_without_cge_there_is_nothing_to_count(opened, tmp_path, analysis):
    with pytest.raises(UserError, match=f"{analysis.__name__} needs CGE"):
        analysis([opened("bot", "--model.cge", "false")], tmp_path / "out")
    assert not (tmp_path / "out").exists()
