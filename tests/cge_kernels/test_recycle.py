"""A large gradient takes the memory of the last one only when nobody can see it any more."""

import torch

from cge_kernels.common.recycle import LARGE, recycled_empty_like


def large(**options):
    """A tensor just large enough; its memory is never touched."""
    return torch.empty(2, LARGE // 16, 2, **options)


def test_memory_that_nobody_holds_is_taken_again():
    like = large()
    first = recycled_empty_like(like)
    address = first.data_ptr()
    del first
    assert recycled_empty_like(like).data_ptr() == address


def test_memory_that_a_tensor_or_a_view_or_an_array_of_it_holds_is_left_alone():
    like = large()
    held = [recycled_empty_like(like)]
    held.append(recycled_empty_like(like)[1:, :3])
    held.append(recycled_empty_like(like).numpy()[0])
    addresses = {held[0].data_ptr(), held[1].untyped_storage().data_ptr(), held[2].ctypes.data}
    addresses.add(recycled_empty_like(like).data_ptr())
    assert len(addresses) == 4


def test_layout_and_dtype_are_those_of_empty_like():
    for like in (large(), large().permute(2, 0, 1), large(dtype=torch.float64), large()[:, ::2].repeat(1, 2, 2)):
        made, expected = recycled_empty_like(like), torch.empty_like(like)
        assert (made.dtype, made.shape, made.stride()) == (expected.dtype, expected.shape, expected.stride())


def test_small_results_are_fresh():
    like = torch.empty(3)
    first = recycled_empty_like(like)
    second = recycled_empty_like(like)
    assert first.data_ptr() != second.data_ptr()


def test_gradients_of_successive_steps_do_not_overwrite_each_other():
    import cge_kernels

    feature_map = torch.rand(2, 2048, 64, 32).requires_grad_()  # 32 MiB
    kept = []
    for factor in (1.0, 2.0, 3.0):
        global_feature, _ = cge_kernels.stripe_pool(feature_map, 2)
        (grad,) = torch.autograd.grad((global_feature * factor).sum(), feature_map)
        kept.append(grad)
    assert [round(grad[0, 0, 0, 0].item() * 2048) for grad in kept] == [1, 2, 3]
