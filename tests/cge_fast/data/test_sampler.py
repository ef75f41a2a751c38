"""Batches of P identities x K instances."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cge_fast.data.sampler import PKSampler
from cge_fast.errors import UserError


def labels_of(sampler, labels):
    return [[labels[index] for index, _ in batch] for batch in sampler]


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=2, max_size=9),
    identities=st.integers(1, 4),
    instances=st.integers(1, 4),
    seed=st.integers(0, 5),
)
def test_every_batch_has_p_identities_with_k_instances_each(sizes, identities, instances, seed):
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    if identities > len(sizes) or identities * instances > len(labels):
        with pytest.raises(UserError):
            PKSampler(labels, identities, instances, seed)
        return
    sampler = PKSampler(labels, identities, instances, seed)
    batches = list(sampler)
    assert len(batches) == len(sampler) == len(labels) // (identities * instances)
    for batch in batches:
        counts = Counter(labels[index] for index, _ in batch)
        assert len(counts) == identities
        assert set(counts.values()) == {instances}
        for label in counts:
            chosen = [index for index, _ in batch if labels[index] == label]
            if sizes[label] >= instances:
                assert len(set(chosen)) == instances, "without replacement where there are enough images"


@settings(max_examples=30, deadline=None)
@given(count=st.integers(2, 12), identities=st.integers(1, 5), seed=st.integers(0, 5))
def test_each_identity_comes_once_before_any_comes_twice(count, identities, seed):
    if identities > count:
        return
    labels = [label for label in range(count) for _ in range(7)]
    drawn = [label for batch in labels_of(PKSampler(labels, identities, 1, seed), labels) for label in batch]
    for start in range(0, len(drawn) - count, count):
        assert sorted(drawn[: start + count]) == sorted(list(range(count)) * (start // count + 1))


def test_an_epoch_of_the_embedded_set_has_31_batches():
    assert len(PKSampler([label for label in range(200) for _ in range(10)], 16, 4)) == 31


def test_the_same_seed_and_epoch_draw_the_same_and_others_do_not():
    labels = [label for label in range(8) for _ in range(5)]
    first, second, other = PKSampler(labels, 4, 2, 1), PKSampler(labels, 4, 2, 1), PKSampler(labels, 4, 2, 2)
    assert list(first) == list(second)
    assert list(first) != list(other)
    second.epoch = 2
    assert list(first) != list(second)


def test_ranks_share_each_batch_by_identities():
    labels = [label for label in range(8) for _ in range(5)]
    whole = list(PKSampler(labels, 4, 2, 3))
    parts = [list(PKSampler(labels, 4, 2, 3, rank, 2)) for rank in (0, 1)]
    assert [left + right for left, right in zip(*parts, strict=True)] == whole


def test_an_identity_with_fewer_than_k_images_is_drawn_again():
    labels = [0, 1, 1, 1, 1, 2, 2, 2]
    (batch,) = PKSampler(labels, 2, 4)
    counts = Counter(labels[index] for index, _ in batch)
    assert set(counts.values()) == {4}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0, 0, 1, 1], 3, 1), "data.identities: a batch needs 3, the training split has 2"),
        (([0, 1], 2, 4), "data.instances: a batch needs 2 x 4 images, the training split has 2"),
        (([0, 0, 1, 1], 1, 1, 0, 0, 2), "data.identities: 1 cannot be shared evenly by 2 processes"),
    ],
)
def test_impossible_batches_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        PKSampler(*arguments)
