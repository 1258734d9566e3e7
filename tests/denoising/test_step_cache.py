"""First-Block Cache: HunyuanVideo's against diffusers' own hook, and our transformer's, whose blocks work in place."""

from __future__ import annotations

from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel
from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

from skyreels_v3.denoising.step_cache import StepCache
from skyreels_v3.memory.stream import BlockStream
from skyreels_v3.wan.rope import Segment
from skyreels_v3.wan.transformer import SkyReelsTransformer3DModel

STEPS = 12
HUNYUAN = {
    **{"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "patch_size": 1},
    **{"num_layers": 2, "num_single_layers": 2, "num_refiner_layers": 1, "text_embed_dim": 16},
    **{"pooled_projection_dim": 8, "rope_axes_dim": (4, 6, 6)},
}
WAN = {
    **{"num_attention_heads": 2, "attention_head_dim": 24, "text_dim": 16, "freq_dim": 32, "ffn_dim": 64},
    "num_layers": 3,
}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def hunyuan():
    torch.manual_seed(0)
    return HunyuanVideoTransformer3DModel(**HUNYUAN).eval()


def prompt(name):
    """The conditioning inputs for a name."""
    generator = torch.Generator().manual_seed(len(name))
    return {
        "encoder_hidden_states": torch.randn(1, 5, 16, generator=generator),
        "encoder_attention_mask": torch.ones(1, 5),
        "pooled_projections": torch.randn(1, 8, generator=generator),
        "guidance": torch.tensor([6000.0]),
    }


def sample(model, under, names):
    """Euler steps from noise to data with the sum of the predictions; `under` is called like `StepCache.under`."""
    latents = torch.randn(1, 4, 2, 4, 6, generator=torch.Generator().manual_seed(1))
    for sigma, following in pairwise(torch.linspace(1, 0, STEPS + 1)):

        def predict(name, latents=latents, sigma=sigma):
            return model(latents, 1000 * sigma.reshape(1), **prompt(name), return_dict=False)[0]

        latents = latents + (following - sigma) * sum(under(name, predict) for name in names)
    return latents


@contextmanager
def counted(model):
    """Count the blocks that are actually computed: diffusers' hooks also call skipped ones."""
    count = []
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    handles = [block.attn.register_forward_hook(lambda *_: count.append(1)) for block in blocks]
    yield count
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("names", [("full",), ("full", "no_text")])
@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.3, 10.0])
def test_the_same_as_diffusers(threshold, names):
    theirs, ours = hunyuan(), hunyuan()
    apply_first_block_cache(theirs, FirstBlockCacheConfig(threshold))

    def under(name, predict):
        with theirs.cache_context(name):
            return predict(name)

    with counted(theirs) as expected_count:
        expected = sample(theirs, under, names)
    cache = StepCache(threshold)
    with counted(ours) as count, cache.attached(ours):
        out = sample(ours, cache.under, names)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)
    assert len(count) == len(expected_count) == cache.computed
    assert cache.computed + cache.skipped == 4 * STEPS * len(names)
    assert (0 < cache.skipped < 3 * (STEPS - 1) * len(names)) == (threshold in (0.2, 0.3))


def wan():
    torch.manual_seed(0)
    return SkyReelsTransformer3DModel(**WAN).eval()


def uncached(name, predict):
    return predict(name)


def walk(model, under, names=("full",)):
    """Euler steps as above, with a clean frame in front and a different text for each name."""
    generator = torch.Generator().manual_seed(1)
    latents, before = torch.randn(1, 16, 2, 4, 6, generator=generator), torch.randn(1, 16, 1, 4, 6, generator=generator)
    contexts = {name: torch.randn(1, 512, 16, generator=generator) for name in names}
    for sigma, following in pairwise(torch.linspace(1, 0, STEPS + 1)):

        def predict(name, latents=latents, sigma=sigma):
            segments = [Segment(before, clean=True), Segment(latents, 1)]
            return model(segments, 1000 * sigma * torch.tensor([[0, 1, 1]]), contexts[name])[-1]

        latents = latents + (following - sigma) * sum(under(name, predict) for name in names)
    return latents


def walk_cached(model, cache, **more):
    with cache.attached(model):
        return walk(model, cache.under, **more)


def test_nothing_skipped_changes_nothing():
    model, cache, names = wan(), StepCache(0.0), ("full", "no_text")
    assert torch.equal(walk_cached(model, cache, names=names), walk(model, uncached, names=names))
    assert (cache.computed, cache.skipped) == (3 * STEPS * 2, 0)


def test_a_skipped_step_adds_what_was_added_before():
    """The cached residual is added to the first block's output for the new input."""
    model, ends = wan(), []
    segments = [[Segment(torch.randn(1, 16, 2, 4, 6))] for _ in range(3)]
    times, context = torch.tensor([[900], [880], [860]]), torch.randn(1, 512, 16)
    handles = [
        model.blocks[1].register_forward_pre_hook(lambda _, arguments: ends.append(arguments[0].clone())),
        model.blocks[-1].register_forward_hook(lambda _, __, out: ends.append(out.clone())),
    ]
    for each, time in zip(segments, times, strict=True):
        model(each, time, context)
    for handle in handles:
        handle.remove()
    cache = StepCache(1e9)
    with cache.attached(model):
        outs = [cache.under("full", lambda _, i=i: model(segments[i], times[i], context)[0]) for i in range(3)]
    assert (cache.computed, cache.skipped) == (3 + 2, 2 * 2)
    for number in (1, 2):
        embedding = model.condition_embedder(times[number][:, None], context, None)[0]
        tokens = ends[2 * number] + ends[1] - ends[0]
        expected = model.unpatchify(model.head(tokens, embedding), segments[number][0])
        torch.testing.assert_close(outs[number], expected, atol=1e-5, rtol=0)


def test_conditions_and_loops_are_independent():
    model, cache = wan(), StepCache(0.1)
    expected = walk_cached(model, cache)
    assert 0 < cache.skipped < 2 * (STEPS - 1)
    context = torch.randn(1, 512, 16)

    def under(name, predict):
        other = [Segment(torch.randn(1, 16, 2, 4, 6))]
        cache.under("other", lambda _: model(other, torch.tensor([3.0]), context)[0])
        return cache.under(name, predict)

    with cache.attached(model):
        assert torch.equal(walk(model, under), expected)
    assert torch.equal(walk_cached(model, cache), expected)


def test_streamed_blocks():
    """A block's weights are on the device only while it runs; those of skipped blocks are not fetched."""
    model, fetched = wan(), []
    expected = walk_cached(model, StepCache(0.1))
    stream = BlockStream(model, model.blocks, torch.device("cpu"))
    stream.prepare()
    fetch = stream._fetch
    stream._fetch = lambda index, slot: (fetched.append(index), fetch(index, slot))
    cache = StepCache(0.1)
    with stream.active():
        assert torch.equal(walk_cached(model, cache), expected)
    assert 0 < cache.skipped
    assert len(fetched) <= cache.computed + 1  # the first block is prefetched for a step that never comes


@pytest.mark.parametrize("make", [wan, hunyuan])
def test_the_blocks_come_back(make):
    model = make()
    modules, parameters = dict(model.named_modules()), {*model.parameters()}
    with pytest.raises(KeyboardInterrupt), StepCache(0.1).attached(model):
        assert {*model.parameters()} == parameters
        raise KeyboardInterrupt
    assert dict(model.named_modules()) == modules


class Others:
    """A group with one other process, which reports fixed sums: of changes, and of magnitudes."""

    def __init__(self, *sums):
        self.sums = torch.tensor(sums)

    def all_gather(self, x):
        return torch.stack((x, self.sums))


@pytest.mark.parametrize(("sums", "computed"), [((0.0, 1e9), STEPS + 2), ((1e9, 1e9), 3 * STEPS)])
def test_all_processes_decide(sums, computed):
    """The other process outweighs this one: nothing has changed, or everything has."""
    cache = StepCache(0.1, Others(*sums))
    walk_cached(wan(), cache)
    assert cache.computed == computed
