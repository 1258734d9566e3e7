"""Block streaming on the CPU, where it copies as on any device: the same results, and host memory as it was."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from skyreels_v3.attention.backends import sdpa
from skyreels_v3.memory.quantize import quantize
from skyreels_v3.memory.stream import STREAM_SLOTS, BlockStream, buffer_bytes, tensors_of, views
from skyreels_v3.wan.transformer import Segment, SkyReelsTransformer3DModel

CPU = torch.device("cpu")
SMALL = {"num_attention_heads": 2, "attention_head_dim": 24, "text_dim": 16, "freq_dim": 32, "ffn_dim": 64}
WITH_SOUND = {"image_dim": 8, "audio_dim": 12, "audio_hidden_dim": 4, "audio_tokens": 3}
TASKS = ("reference", "extension", "avatar")
Forward = Callable[[], torch.Tensor]


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def transformer(task: str = "reference", layers: int = 5) -> tuple[SkyReelsTransformer3DModel, Forward]:
    """A model, and two steps of it."""
    torch.manual_seed(0)
    sound = WITH_SOUND if task == "avatar" else {}
    model = SkyReelsTransformer3DModel(**SMALL, num_layers=layers, **sound).eval()
    segments = [Segment(noise(1, 16, 2, 4, 6))]
    if task != "avatar":
        segments.append(Segment(noise(1, 16, 1, 4, 6), 1024, clean=task == "extension"))

    @torch.inference_mode()
    def forward() -> torch.Tensor:
        more = (noise(1, 257, 8), noise(1, 1, 5, 5, 12, 768)) if task == "avatar" else ()
        conditions = (noise(1, 512, 16), *more)
        steps = (torch.tensor([time]) if task != "extension" else torch.tensor([[time, time, 0]]) for time in (900, 40))
        return torch.cat([part for timestep in steps for part in model(segments, timestep, *conditions)], dim=2)

    return model, forward


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def addresses(module: nn.Module) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors_of(module)]


class Watch:
    """What a stream must leave as it was; taken when its blocks have been brought into form."""

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


@pytest.mark.parametrize("pin", [None, lambda room: True], ids=["mapped", "pinned"])
@pytest.mark.parametrize(("layers", "keep"), [(5, 0), (5, 1), (5, 2), (5, 4), (5, 5), (4, 9), (2, 0), (1, 0), (1, 1)])
@pytest.mark.parametrize("task", TASKS)
def test_the_same_results(task, layers, keep, pin):
    model, forward = transformer(task, layers)
    expected = forward()
    stream = BlockStream(model, model.blocks, CPU, keep, pin)
    assert len(stream.streamed) == max(0, layers - keep)
    stream.prepare()
    watch = Watch(model)
    for _ in range(2):
        with stream.active():
            assert torch.equal(forward(), expected)
        watch.check()
    assert no_hooks(model.blocks)
    assert torch.equal(forward(), expected)


@pytest.mark.parametrize("pin", [None, lambda room: True], ids=["mapped", "pinned"])
@pytest.mark.parametrize("keep", [0, 1, 3])
def test_no_more_than_two_blocks_are_away(keep, pin):
    """Looked at from the attention kernel, while each block works."""
    model, forward = transformer(layers=6)
    stream = BlockStream(model, model.blocks, CPU, keep, pin)
    stream.prepare()
    host = [addresses(block) for block in model.blocks]
    moved = []

    def watching(query, key, value):
        now = [addresses(block) for block in model.blocks]
        for here, there in zip(now, host, strict=True):
            assert here == there or not set(here) & set(there)  # whole blocks
        moved.append([index for index, here in enumerate(now) if here != host[index]])
        return sdpa(query, key, value)

    model.set_attention(watching, cross_attention=sdpa)
    with stream.active():
        forward()
    kept = {index * 6 // keep for index in range(keep)}
    assert len(moved) == 2 * 6
    for call, away in enumerate(moved):
        assert not kept & {*away}  # where nothing is copied that stays
        assert len(away) <= STREAM_SLOTS
        assert call % 6 in {*away} | kept  # the one that works
    assert [addresses(block) for block in model.blocks] == host


def test_the_next_block_is_on_its_way():
    """A block is sent for when the one before it has been started, and a kept one never."""
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


def test_an_error_while_the_blocks_are_brought_into_form():
    """A second attempt goes on where the first one stopped."""
    model, forward = transformer(layers=4)
    expected = forward()
    rooms = []

    def pin(room: torch.Tensor) -> bool:
        if len(rooms) == 2:
            rooms.append(None)
            raise MemoryError
        rooms.append(room)
        return True

    stream = BlockStream(model, model.blocks, CPU, pin=pin)
    with pytest.raises(MemoryError), stream.active():
        pass
    assert torch.equal(forward(), expected)
    with stream.active():
        assert torch.equal(forward(), expected)
    assert len(rooms) == 5


def test_a_stay_within_a_stay():
    model, forward = transformer()
    expected = forward()
    stream = BlockStream(model, model.blocks, CPU)
    watch = Watch(model)
    with stream.active():
        with pytest.raises(RuntimeError, match="stop"), stream.active():
            assert torch.equal(forward(), expected)
            raise RuntimeError("stop")
        assert not no_hooks(model.blocks)
        assert torch.equal(forward(), expected)
    watch.check()
    assert no_hooks(model.blocks)


@pytest.mark.parametrize("pinned", [0, 2])
def test_host_memory_that_cannot_be_pinned(caplog, pinned):
    model, forward = transformer()
    expected = forward()
    rooms: list[torch.Tensor] = []

    def pin(room: torch.Tensor) -> bool:
        if len(rooms) == pinned:
            return False
        rooms.append(room)
        return True

    stream = BlockStream(model, model.blocks, CPU, pin=pin)
    with caplog.at_level(logging.WARNING), stream.active():
        assert torch.equal(forward(), expected)
    (said,) = caplog.messages
    assert f"{5 - pinned} blocks stream unpinned" in said
    for index, block in enumerate(model.blocks):
        storages = {tensor.untyped_storage().data_ptr() for tensor in tensors_of(block)}
        assert (storages == {rooms[index].data_ptr()}) if index < pinned else (len(storages) > 1)


def test_blocks_are_brought_into_form_once():
    model, forward = transformer(layers=3)
    rooms = []
    stream = BlockStream(model, model.blocks, CPU, pin=lambda room: rooms.append(room) or True)
    for _ in range(3):
        with stream.active():
            forward()
    assert [room.nbytes for room in rooms] == [buffer_bytes(tensors_of(block)) for block in model.blocks]


class Chain(nn.Module):
    """Blocks in an order that is set from outside."""

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


@pytest.mark.parametrize("order", [[4, 3, 2, 1, 0], [0, 0, 0], [2], [0, 3, 3, 1, 4, 0, 2], [1, 0, 1, 0], []])
@pytest.mark.parametrize("keep", [0, 2, 4])
def test_out_of_order(order, keep):
    torch.manual_seed(0)
    chain = Chain([nn.Linear(8, 8) for _ in range(5)])
    chain.order = order
    x = torch.randn(3, 8)
    expected = chain(x)
    watch = Watch(chain)
    stream = BlockStream(chain, chain.blocks, CPU, keep)
    with stream.active():
        assert torch.equal(chain(x), expected)
        assert torch.equal(chain(x), expected)
    watch.check()


@pytest.mark.parametrize("pin", [None, lambda room: True], ids=["mapped", "pinned"])
def test_blocks_that_are_not_alike(pin):
    """In sizes, number of tensors, dtypes, with buffers, scalars, empty tensors and views; one has nothing at all."""
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
            torch.testing.assert_close(chain(x), expected, rtol=1e-6, atol=1e-6)  # one weight lies another way
            assert all(map(torch.equal, odd.buffers(), (torch.tensor(3.0), torch.empty(0, 4), torch.arange(7).byte())))
    watch.check()


@pytest.mark.parametrize("pin", [None, lambda room: True], ids=["mapped", "pinned"])
def test_live_adapters_on_some_blocks(pin):
    model, forward = transformer()
    torch.manual_seed(0)
    plain = forward()
    model.add_adapter(LoraConfig(r=2, target_modules=r"blocks\.[13]\..*to_[qv]", init_lora_weights=False))
    expected = forward()
    assert not torch.equal(plain, expected)
    stream = BlockStream(model, model.blocks, CPU, resident=1, pin=pin)
    stream.prepare()
    watch = Watch(model)
    with stream.active():
        assert torch.equal(forward(), expected)
        model.disable_adapters()
        assert torch.equal(forward(), plain)
    watch.check()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("pin", [None, lambda room: True], ids=["mapped", "pinned"])
def test_fp8_blocks(pin, dynamic):
    model, forward = transformer("avatar", 4)
    quantize(model.blocks, CPU, dynamic=dynamic)
    expected = forward()
    stream = BlockStream(model, model.blocks, CPU, pin=pin)
    stream.prepare()
    watch = Watch(model)
    with stream.active():
        assert torch.equal(forward(), expected)
    watch.check()


@pytest.mark.parametrize("pin", [None, lambda room: True], ids=["mapped", "pinned"])
def test_tied_tensors(pin):
    """Within a block, between blocks, and between a block and what is not streamed."""
    torch.manual_seed(0)
    pair = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    pair[1].weight = pair[0].weight
    chain = Chain([pair, nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)])
    chain.blocks[2].weight = chain.blocks[1].weight
    chain.first.weight = chain.blocks[3].weight
    x = torch.randn(3, 8)
    expected = chain(x)
    stream = BlockStream(chain, chain.blocks, CPU, pin=pin)
    stream.prepare()
    watch = Watch(chain)
    with stream.active():
        assert torch.equal(chain(x), expected)
        assert pair[0].weight is pair[1].weight
    watch.check()


def test_a_tensor_tied_to_a_streamed_one_is_on_the_device():
    """Of what is outside the blocks all goes there; a device that every machine has, and that nothing is copied on."""
    chain = Chain([nn.Linear(8, 8) for _ in range(3)])
    chain.first.weight = chain.blocks[1].weight
    stream = BlockStream(chain, chain.blocks, CPU)
    assert {id(tensor) for tensor in tensors_of(chain.first)} == stream._tensors_outside()


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
            assert torch.equal(forward(), expected)
        watch.check()
    assert file.read_bytes() == content


@torch.inference_mode()
def test_the_text_encoder():
    config = UMT5Config(
        vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4, feed_forward_proj="gated-gelu",
        is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = UMT5EncoderModel(config).eval()
    ids, mask = torch.arange(20)[None], (torch.arange(20) < 15)[None].long()
    for _ in range(2):  # plain, and in FP8
        expected = model(ids, attention_mask=mask).last_hidden_state
        watch = Watch(model)
        with BlockStream(model, model.encoder.block, CPU).active():
            assert torch.equal(model(ids, attention_mask=mask).last_hidden_state, expected)
        watch.check()
        quantize(model.encoder.block, CPU)


def test_one_piece_holds_all_tensors():
    """Each at an address that any dtype and any copy engine takes, none over another."""
    tensors = [torch.randn(3, 5), torch.arange(7, dtype=torch.uint8), torch.tensor(2.0), torch.randn(70).bfloat16()]
    tensors += [torch.empty(0), nn.Parameter(torch.randn(300))]
    room = torch.empty(buffer_bytes(tensors), dtype=torch.uint8)
    places = views(room, tensors)
    for place, tensor in zip(places, tensors, strict=True):
        place.data.copy_(tensor)
    for place, tensor in zip(places, tensors, strict=True):
        assert torch.equal(place, tensor) and place.dtype == tensor.dtype and type(place) is type(tensor)
        assert (place.data_ptr() - room.data_ptr()) % 256 == 0 or not place.numel()
    assert buffer_bytes(tensors) == (1 + 1 + 1 + 1 + 0 + 5) * 256
