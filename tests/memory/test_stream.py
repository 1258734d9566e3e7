"""Block streaming on the CPU, which copies as on any device: the same results, and unchanged host memory."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn

from skyreels_v3.attention.backends import sdpa
from skyreels_v3.memory.quantize import quantize
from skyreels_v3.memory.stream import STREAM_SLOTS, BlockStream, buffer_bytes, tensors_of
from skyreels_v3.wan.rope import Segment
from skyreels_v3.wan.transformer import SkyReelsTransformer3DModel

CPU = torch.device("cpu")
SMALL = {
    **{"num_attention_heads": 2, "attention_head_dim": 24, "text_dim": 16, "freq_dim": 32, "ffn_dim": 64},
    **{"image_dim": 8, "audio_dim": 12, "audio_hidden_dim": 4, "audio_tokens": 3},
}
Forward = Callable[[], torch.Tensor]
PINS = pytest.mark.parametrize("pin", [None, lambda buffer: True], ids=["mapped", "pinned"])


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def transformer(layers: int = 5) -> tuple[SkyReelsTransformer3DModel, Forward]:
    """A model with all conditions, and a function that runs two steps of it."""
    torch.manual_seed(0)
    model = SkyReelsTransformer3DModel(**SMALL, num_layers=layers).eval()
    segments = [Segment(noise(1, 16, 1, 4, 6), clean=True), Segment(noise(1, 16, 1, 4, 6), 1)]
    conditions = noise(1, 512, 16), noise(1, 257, 8), noise(1, 1, 5, 5, 12, 768)

    @torch.inference_mode()
    def forward() -> torch.Tensor:
        steps = (torch.tensor([[0, time]]) for time in (900, 40))
        return torch.cat([part for timestep in steps for part in model(segments, timestep, *conditions)], dim=2)

    return model, forward


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def addresses(module: nn.Module) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors_of(module)]


class Watch:
    """What streaming must not change, recorded once the blocks have been packed."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
        self.values = {name: bits(tensor).clone() for name, tensor in self.tensors.items()}

    def check(self) -> None:
        now = dict(self.model.named_parameters(remove_duplicate=False)) | dict(self.model.named_buffers())
        assert now.keys() == self.tensors.keys()
        for name, tensor in now.items():
            assert tensor is self.tensors[name], name
            assert torch.equal(bits(tensor), self.values[name]), name


def no_hooks(blocks) -> bool:
    return not any(block._forward_pre_hooks or block._forward_hooks for block in blocks)


def check_stream(model: nn.Module, forward: Forward, pin: Callable | None = None, resident: int = 0) -> BlockStream:
    """Check that the model gives the same results when streamed, repeatedly, and is unchanged afterwards."""
    expected = forward()
    stream = BlockStream(model, model.blocks, CPU, resident, pin)
    stream.prepare()
    watch = Watch(model)
    for _ in range(2):
        with stream.active():
            assert torch.equal(forward(), expected)
            assert torch.equal(forward(), expected)
        watch.check()
    assert no_hooks(model.blocks)
    return stream


@PINS
@pytest.mark.parametrize(("layers", "resident"), [(5, 0), (5, 2), (5, 4), (4, 9), (2, 0), (1, 0), (1, 1)])
def test_the_same_results(layers, resident, pin):
    assert len(check_stream(*transformer(layers), pin, resident).streamed) == max(0, layers - resident)


@PINS
def test_fp8_blocks(pin):
    model, forward = transformer(4)
    quantize(model.blocks, CPU)
    check_stream(model, forward, pin)


@PINS
def test_live_adapters_on_some_blocks(pin):
    model, forward = transformer()
    torch.manual_seed(0)
    plain = forward()
    model.add_adapter(LoraConfig(r=2, target_modules=r"blocks\.[13]\..*to_[qv]", init_lora_weights=False))
    assert not torch.equal(plain, forward())
    stream = check_stream(model, forward, pin, resident=1)
    with stream.active():
        model.disable_adapters()
        assert torch.equal(forward(), plain)


@PINS
@pytest.mark.parametrize("resident", [0, 1, 3])
def test_at_most_two_blocks_are_streamed_at_a_time(resident, pin):
    """Checked from the attention kernel while each block runs."""
    model, forward = transformer(layers=6)
    stream = BlockStream(model, model.blocks, CPU, resident, pin)
    stream.prepare()
    host = [addresses(block) for block in model.blocks]
    moved = []

    def watching(query, key, value):
        now = [addresses(block) for block in model.blocks]
        assert all(new == old or not set(new) & set(old) for new, old in zip(now, host, strict=True))  # whole blocks
        moved.append({index for index, new in enumerate(now) if new != host[index]})
        return sdpa(query, key, value)

    model.set_attention(watching, cross_attention=sdpa)
    with stream.active():
        forward()
    stay = {index * 6 // resident for index in range(resident)}
    assert len(moved) == 2 * 6
    for call, streamed in enumerate(moved):
        assert not stay & streamed and len(streamed) <= STREAM_SLOTS
        assert call % 6 in streamed | stay  # the block that runs
    assert [addresses(block) for block in model.blocks] == host


def test_the_next_block_is_prefetched():
    """When the previous block has been launched; never for a resident one."""
    model, forward = transformer(layers=6)
    stream = BlockStream(model, model.blocks, CPU, resident=1)
    fetch, log = stream._fetch, []
    stream._fetch = lambda index, slot: log.append(f"fetch {index + 1}") or fetch(index, slot)
    for index, block in enumerate(model.blocks):
        block.attn2.register_forward_hook(lambda *_, index=index: log.append(f"work {index}"))
    with stream.active():
        forward()
    first = ["fetch 1", "fetch 2", "work 0", "work 1", "work 2"]
    step = [f"{what} {index}" for index in (3, 4, 5) for what in ("fetch", "work")]
    second = ["fetch 1", "work 0", "work 1", "fetch 2", "work 2"]
    assert log == [*first, *step, *second, *step, "fetch 1"]


def test_an_error_in_the_middle():
    model, forward = transformer()
    expected = forward()
    stream = BlockStream(model, model.blocks, CPU)
    watch = Watch(model)
    stop = model.blocks[3].ffn.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="stop"), stream.active():
            forward()
        watch.check()
    stop.remove()
    assert no_hooks(model.blocks)
    with stream.active():
        assert torch.equal(forward(), expected)
    watch.check()


def test_preparing_continues_where_it_failed():
    """Each block is packed only once, into one buffer."""
    model, forward = transformer(layers=4)
    expected = forward()
    buffers, attempts = [], []

    def pin(buffer: torch.Tensor) -> bool:
        attempts.append(buffer)
        if len(attempts) == 3:
            raise MemoryError
        buffers.append(buffer)
        return True

    stream = BlockStream(model, model.blocks, CPU, pin=pin)
    with pytest.raises(MemoryError), stream.active():
        pass
    assert torch.equal(forward(), expected)
    for _ in range(2):
        with stream.active():
            assert torch.equal(forward(), expected)
    assert [buffer.nbytes for buffer in buffers] == [buffer_bytes(tensors_of(block)) for block in model.blocks]


def test_one_inside_another_changes_nothing():
    model, forward = transformer()
    expected = forward()
    stream = BlockStream(model, model.blocks, CPU)
    watch = Watch(model)
    with stream.active():
        with pytest.raises(RuntimeError, match="stop"), stream.active():
            raise RuntimeError("stop")
        assert not no_hooks(model.blocks)
        assert torch.equal(forward(), expected)
    watch.check()


@pytest.mark.parametrize("pinned", [0, 2])
def test_host_memory_that_cannot_be_pinned(caplog, pinned):
    model, forward = transformer()
    expected = forward()
    buffers: list[torch.Tensor] = []

    def pin(buffer: torch.Tensor) -> bool:
        if len(buffers) == pinned:
            return False
        buffers.append(buffer)
        return True

    stream = BlockStream(model, model.blocks, CPU, pin=pin)
    with caplog.at_level(logging.WARNING), stream.active():
        assert torch.equal(forward(), expected)
    (said,) = caplog.messages
    assert f"{5 - pinned} blocks stream unpinned" in said
    for index, block in enumerate(model.blocks):
        storages = {tensor.untyped_storage().data_ptr() for tensor in tensors_of(block)}
        assert (storages == {buffers[index].data_ptr()}) if index < pinned else (len(storages) > 1)
        if index < pinned:
            assert not any((tensor.data_ptr() - buffers[index].data_ptr()) % 256 for tensor in tensors_of(block))


class Chain(nn.Module):
    """Blocks that run in an order set from outside."""

    def __init__(self, blocks) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(blocks)
        self.order = [*range(len(blocks))]

    @torch.inference_mode()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for index in self.order:
            x = torch.tanh(self.blocks[index](x))
        return x


@pytest.mark.parametrize("order", [[4, 3, 2, 1, 0], [0, 0, 0], [0, 3, 3, 1, 4, 0, 2], []])
@pytest.mark.parametrize("resident", [0, 2])
def test_out_of_order(order, resident):
    torch.manual_seed(0)
    chain, x = Chain([nn.Linear(8, 8) for _ in range(5)]), torch.randn(3, 8)
    chain.order = order
    check_stream(chain, lambda: chain(x), resident=resident)


@PINS
def test_blocks_that_are_not_alike(pin):
    """In sizes, number of tensors and dtypes; with buffers, scalars, empty tensors and views. One has no tensors."""
    torch.manual_seed(0)
    odd = nn.Linear(8, 8)
    odd.register_buffer("scalar", torch.tensor(3.0))
    odd.register_buffer("empty", torch.empty(0, 4))
    odd.register_buffer("bytes", torch.arange(7, dtype=torch.uint8))
    odd.weight = nn.Parameter(torch.randn(8, 8).t())  # not contiguous
    wide = nn.Sequential(nn.Linear(8, 300), nn.BatchNorm1d(300), nn.Linear(300, 8)).eval()
    chain = Chain([nn.Linear(8, 8), wide, nn.Identity(), odd, nn.Linear(8, 8, bias=False)])
    x = torch.randn(3, 8)
    expected = chain(x)
    stream = BlockStream(chain, chain.blocks, CPU, pin=pin)
    stream.prepare()
    watch = Watch(chain)
    with stream.active():
        for _ in range(3):
            torch.testing.assert_close(chain(x), expected, rtol=1e-6, atol=1e-6)  # one weight has another memory layout
            assert all(map(torch.equal, odd.buffers(), (torch.tensor(3.0), torch.empty(0, 4), torch.arange(7).byte())))
    watch.check()


@PINS
def test_tied_tensors(pin):
    """Within a block, between blocks, and between a block and a part that is not streamed."""
    torch.manual_seed(0)
    pair = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    pair[1].weight = pair[0].weight
    chain = Chain([pair, nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)])
    chain.blocks[2].weight = chain.blocks[1].weight
    chain.first.weight = chain.blocks[3].weight
    x = torch.randn(3, 8)
    with check_stream(chain, lambda: chain(x), pin).active():
        assert pair[0].weight is pair[1].weight


def test_weights_mapped_from_a_file(tmp_path):
    model, forward = transformer()
    file = tmp_path / "a.safetensors"
    save_file(dict(model.named_parameters()), file)
    content = file.read_bytes()
    expected = forward()
    model.load_state_dict(load_file(file), strict=True, assign=True)
    watch = Watch(model)
    for _ in range(2):
        with BlockStream(model, model.blocks, CPU).active():
            torch.testing.assert_close(forward(), expected)  # aligned differently
        watch.check()
    assert file.read_bytes() == content
