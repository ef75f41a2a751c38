"""The revision's weights."""

import pytest
import torch
from torch.nn.functional import logsigmoid

from cge_fast.analyze.weights import histogram, weights
from cge_fast.errors import UserError
from cge_reference.revise_logits import local_scores


def expected_weights(trained, train_set):
    """Of the true and of the false classes."""
    images, labels = train_set(trained)
    weight = logsigmoid(local_scores(trained.model(images).stripes, trained.loss.memory)).mean(dim=1).exp()
    true = torch.arange(weight.shape[1]) == labels[:, None]
    return weight[true].double(), weight[~true].double()


def test_mean_and_deviation_of_true_and_false_classes(opened, train_set, with_memory):
    trained = opened("mine", change=with_memory)
    counts, mean, deviation = histogram(trained)
    for kind, values in enumerate(expected_weights(trained, train_set)):
        assert counts[kind].sum() == len(values)
        assert mean[kind] == pytest.approx(values.mean().item(), rel=1e-6)
        assert deviation[kind] == pytest.approx(values.std(correction=0).item(), rel=1e-5)
    assert mean[0] != pytest.approx(mean[1], rel=1e-3)


def test_bins_hold_the_weights_between_their_edges(opened, train_set, with_memory, rows_of, tmp_path):
    trained = opened("mine", change=with_memory)
    written = weights([trained], tmp_path)
    rows = rows_of(written.table)
    for classes, values in zip(("true", "false"), expected_weights(trained, train_set), strict=True):
        mine = [row for row in rows if row["classes"] == classes]
        for row in mine:
            near = 1e-6  # a weight at an edge may round to either side
            low, high = float(row["from"]), float(row["to"])
            inside = ((values > low + near) & (values < high - near)).sum()
            around = ((values > low - near) & (values < high + near)).sum()
            assert inside <= int(row["count"]) <= around
            assert float(row["share"]) == int(row["count"]) / len(values)
    assert written.picture.exists()


def test_a_memory_without_content_gives_one_half(opened, rows_of, tmp_path):
    written = weights([opened("empty")], tmp_path)
    assert "empty: true 0.5000 ± 0.0000, false 0.5000 ± 0.0000" in written.summary
    filled = [row for row in rows_of(written.table) if row["count"] != "0"]
    assert [(row["classes"], row["count"], row["share"]) for row in filled] == [
        ("true", "24", "1.0"),
        ("false", "72", "1.0"),
    ]
    assert all(float(row["from"]) <= 0.5 <= float(row["to"]) for row in filled)


def test_every_possible_weight_has_a_bin(opened, train_set):
    trained = opened("mine")
    images, labels = train_set(trained)
    stripes = trained.model(images[:1]).stripes[0]
    direction = stripes / stripes.norm(dim=1, keepdim=True)
    trained.loss.memory[:, 0], trained.loss.memory[:, 1] = direction, -direction
    true, false = expected_weights(trained, lambda _: (images[:1], labels[:1]))
    assert true.item() == pytest.approx(0.73106, abs=1e-5)
    assert false.min().item() == pytest.approx(0.26894, abs=1e-5)
    counts, _, _ = histogram(trained)
    assert counts.sum() == 96
    assert counts[0, 463] > 0
    assert counts[1, 0] > 0


def test_without_cge_there_are_none(opened, tmp_path):
    with pytest.raises(UserError, match="weights needs CGE"):
        weights([opened("bot", "--model.cge", "false")], tmp_path)
