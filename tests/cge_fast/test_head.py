"""CGEHead in networks and loops of others: their casts, their thawing, their exports."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from support import KERNEL_DEVICE
from torch.utils.checkpoint import checkpoint

import cge_kernels
from cge_fast import CGEHead

CHANNELS, CLASSES = 8, 5
LABELS = torch.tensor([0, 0, 1, 1, 3, 3])


def head(**options) -> CGEHead:
    torch.manual_seed(0)
    return CGEHead(CHANNELS, CLASSES, **options)


def feature_map() -> torch.Tensor:
    return torch.rand(6, CHANNELS, 7, 3, generator=torch.Generator().manual_seed(0))


def step(made: CGEHead, maps: torch.Tensor, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    out = made(maps, LABELS)
    optimizer.zero_grad()
    out.loss.backward()
    optimizer.step()
    made.write_memory(out.stripes, LABELS, 0.5)
    return out.loss.detach()


@pytest.mark.parametrize("cast", [lambda made: made.half(), lambda made: made.to(torch.bfloat16)])
def test_it_stays_in_float32_when_the_network_around_it_is_cast(cast):
    made, plain = head(), head()
    cast(torch.nn.ModuleList([made]))
    assert {tensor.dtype for tensor in made.state_dict().values()} == {torch.float32, torch.int64}
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in made.state_dict().items())
    maps = feature_map().half()
    losses = [step(one, maps, torch.optim.SGD(one.parameters(), lr=0.1)) for one in (made, plain)]
    assert torch.equal(*losses)
    assert made.eval()(maps).dtype == torch.float32
    assert {tensor.dtype for tensor in head().double().state_dict().values()} == {torch.float64, torch.int64}


def test_bnnecks_bias_cannot_be_thawed():
    made = head()
    copies = copy.deepcopy(made), pickle.loads(pickle.dumps(made))
    for one in (made, *copies, torch.nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(made))):
        one.requires_grad_(True)
        for parameter in one.parameters():
            parameter.requires_grad = True
        assert [name for name, parameter in one.named_parameters() if not parameter.requires_grad] == ["neck.bias"]
    optimizer = torch.optim.Adam(made.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        step(made, feature_map(), optimizer)
    assert (made.neck.bias == 0).all()
    assert (made.neck.weight != 1).all()


def test_bnneck_is_a_batch_norm_and_saves_how_many_batches_it_has_seen():
    neck, ordinary = head().neck, torch.nn.BatchNorm1d(CHANNELS)
    for number in range(3):
        pooled = feature_map()[number:, :, 0, 0]
        assert torch.equal(neck(pooled), ordinary(pooled))
    for _ in range(2):
        assert neck.state_dict().keys() == ordinary.state_dict().keys()
        assert all(tensor.equal(neck.state_dict()[name]) for name, tensor in ordinary.state_dict().items())
    assert torch.equal(neck.eval()(pooled), ordinary.eval()(pooled))
    assert neck.state_dict()["num_batches_tracked"] == 3


def test_a_map_of_other_channels_is_an_error_in_its_own_words():
    wanted = r"feature_map must have shape \(B, 8, H, W\), got \(6, {}\)"
    for labels in (LABELS, None):
        with pytest.raises(ValueError, match=wanted.format("4, 7, 3")):
            head()(feature_map()[:, :4], labels)
        with pytest.raises(ValueError, match=wanted.format("8, 7")):
            head()(feature_map()[..., 0], labels)


def test_a_loop_of_logits_and_a_feature_pools_once_a_step_and_trains_as_the_heads_own():
    made, own = head(), head()
    pooled = []
    made.pool.register_forward_hook(lambda *_: pooled.append(1))
    optimizers = [torch.optim.Adam(one.parameters(), lr=0.1) for one in (made, own)]
    for number in range(1, 4):
        logits, embeddings = made.revised_logits(feature_map() + number)
        loss = torch.nn.functional.cross_entropy(logits, LABELS, label_smoothing=0.1)
        optimizers[0].zero_grad()
        loss.backward()
        optimizers[0].step()
        made.write_memory(embeddings.stripes, LABELS, 0.5)
        torch.testing.assert_close(loss.detach(), step(own, feature_map() + number, optimizers[1]))
        assert len(pooled) == number
        assert embeddings.pooled.shape == embeddings.embedding.shape == (6, CHANNELS)
    torch.testing.assert_close(made.loss.memory, own.loss.memory)
    assert made.loss.memory.norm() > 0
    with pytest.raises(ValueError, match="feature_map must have shape"):
        made.revised_logits(feature_map()[:, :4])


class Network(torch.nn.Module):
    """Somebody's own, with the head in it."""

    def __init__(self, gem: bool):
        super().__init__()
        self.backbone, self.head = torch.nn.Conv2d(3, CHANNELS, 3), head(gem=gem)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(images))


def exported(network, images, file) -> torch.nn.Module:
    program = torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, file)
    return program.module()


def traced(network, images, file) -> torch.nn.Module:
    made = torch.jit.trace(network, (images,))
    made.save(file)
    return made


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore:Converting a tensor")  # shapes are checked, not traced
@pytest.mark.parametrize("gem", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("export", "load"), [(exported, "torch.export.load"), (traced, "torch.jit.load")])
def test_an_exported_network_runs_without_this_package(export, load, gem, tmp_path):
    network, images = Network(gem).eval(), torch.rand(3, 3, 9, 5)
    found = export(network, images[:2], tmp_path / "file")
    torch.testing.assert_close(found(images), network(images))
    code = f"import sys, torch; {load}({str(tmp_path / 'file')!r}); assert 'cge_kernels' not in sys.modules"
    if gem:  # once: a process takes seconds
        subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
    else:
        operators = str(found.graph if export is exported else found.inlined_graph)
        assert "cge_kernels::" not in operators
        assert "cge_kernels." not in operators


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("gem", [False, True])
def test_a_network_goes_to_onnx_by_either_exporter(dynamo, gem, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    network, images, file = Network(gem).eval(), torch.rand(3, 3, 9, 5), tmp_path / "network.onnx"
    batch = {"dynamic_shapes": ({0: "batch"},)} if dynamo else {"dynamic_axes": {"images": {0: "batch"}}}
    torch.onnx.export(network, (images[:2],), file, input_names=["images"], dynamo=dynamo, **batch)
    (found,) = onnxruntime.InferenceSession(file).run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), network(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["triton", "cpu", "reference"])
def test_activation_checkpointing_gives_the_gradients_of_a_plain_step(name):
    torch.manual_seed(0)
    head = CGEHead(6, 5, stripes=2).to(KERNEL_DEVICE)
    labels = torch.arange(4, device=KERNEL_DEVICE)
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(1)
        feature_map = torch.rand(4, 6, 5, 2, device=KERNEL_DEVICE, requires_grad=True)
        arguments = feature_map, labels
        with cge_kernels.backend(name):
            out = checkpoint(head, *arguments, use_reentrant=False) if checkpointed else head(*arguments)
            gradients.append(torch.autograd.grad(out.loss, [feature_map, head.loss.weight, head.pool.p]))
    assert all(a.equal(b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", ["triton", "cpu", "reference"])
def test_what_is_saved_is_unpacked_once(name):
    head, unpacked = CGEHead(6, 5, stripes=2).to(KERNEL_DEVICE), []

    def unpack(packed):
        tensor = packed.pop()  # a second time there is none
        unpacked.append(tensor)
        return tensor

    with cge_kernels.backend(name):
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: [tensor], unpack):
            out = head(torch.rand(4, 6, 5, 2, device=KERNEL_DEVICE), torch.arange(4, device=KERNEL_DEVICE))
        out.loss.backward()
    assert unpacked


def test_one_sample_alone_is_refused_in_training_and_none_leaves_the_statistics_alone():
    head, labels = CGEHead(4, 3, stripes=2), torch.zeros(1, dtype=torch.long)
    with pytest.raises(ValueError, match=r"BNNeck: needs 2 samples or more in training, got 1; drop_last=True"):
        head(torch.rand(1, 4, 4, 2), labels)
    assert len(head.eval()(torch.rand(1, 4, 4, 2), labels).embedding) == 1
    head.train()(torch.rand(0, 4, 4, 2), labels[:0]).loss.backward()
    assert head.neck.running_mean.isfinite().all()
    assert head.neck.running_var.isfinite().all()
    assert head.loss.weight.grad.equal(torch.zeros(3, 4))
