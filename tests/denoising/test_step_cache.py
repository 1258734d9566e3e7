"""Step caching: of HunyuanVideo beside diffusers' own hooks, and of our transformer, whose blocks overwrite."""

from __future__ import annotations

import json
import math
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel
from diffusers.hooks import FirstBlockCacheConfig, MagCacheConfig, apply_first_block_cache, apply_mag_cache
from diffusers.hooks.mag_cache import nearest_interp

from skyreels_v3.denoising.cache_methods import METHODS, CacheSettings
from skyreels_v3.denoising.step_cache import CachedBlocks, StepCache, distance, fitted, nearest
from skyreels_v3.memory.stream import BlockStream
from skyreels_v3.wan.transformer import Segment, SkyReelsTransformer3DModel
from skyreels_v3.wan.transformer.rope import rotary_tables

STEPS = 12
HUNYUAN = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "patch_size": 1,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (4, 6, 6),
}
WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 64,
    "num_layers": 3,
}
BLOCKS = HUNYUAN["num_layers"] + HUNYUAN["num_single_layers"]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


# diffusers' HunyuanVideo


def hunyuan():
    torch.manual_seed(0)
    return HunyuanVideoTransformer3DModel(**HUNYUAN).eval()


def prompt(name):
    """What the model is conditioned on under a name."""
    generator = torch.Generator().manual_seed(len(name))
    return {
        "encoder_hidden_states": torch.randn(1, 5, 16, generator=generator),
        "encoder_attention_mask": torch.ones(1, 5),
        "pooled_projections": torch.randn(1, 8, generator=generator),
        "guidance": torch.tensor([6000.0]),
    }


def sample(model, under, names=("full",), steps=STEPS):
    """Euler steps from noise to data, of the sum of the predictions; `under` is as `StepCache.under`."""
    latents = torch.randn(1, 4, 2, 4, 6, generator=torch.Generator().manual_seed(1))
    sigmas = torch.linspace(1, 0, steps + 1)
    for sigma, following in pairwise(sigmas):

        def predict(name, latents=latents, sigma=sigma):
            return model(latents, 1000 * sigma.reshape(1), **prompt(name), return_dict=False)[0]

        latents = latents + (following - sigma) * sum(under(name, predict) for name in names)
    return latents


def sample_cached(model, cache, **more):
    with cache.attached(model):
        return sample(model, cache.under, **more)


def sample_hooked(model, **more):
    """The same with diffusers' hooks, which are on the model."""

    def under(name, predict):
        with model.cache_context(name):
            return predict(name)

    return sample(model, under, **more)


@contextmanager
def counted(model):
    """The number of blocks that really work: hooks may keep one from it, but not from being called."""
    count = []
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    handles = [block.attn.register_forward_hook(lambda *_: count.append(1)) for block in blocks]
    yield count
    for handle in handles:
        handle.remove()


def uncached(name, predict):
    return predict(name)


def made(method, threshold, figures=None, steps=STEPS, team=None):
    return StepCache(CacheSettings(method, threshold), steps, figures, team)


def ratios(steps=STEPS):
    return torch.linspace(1.03, 0.98, steps)


@pytest.mark.parametrize("names", [("full",), ("full", "no_text")])
@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.2, 0.3, 0.5, 10.0])
def test_fbcache_is_diffusers(threshold, names):
    theirs, ours = hunyuan(), hunyuan()
    apply_first_block_cache(theirs, FirstBlockCacheConfig(threshold))
    with counted(theirs) as expected_count:
        expected = sample_hooked(theirs, names=names)
    cache = made("fbcache", threshold)
    with counted(ours) as count:
        out = sample_cached(ours, cache, names=names)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)
    assert len(count) == len(expected_count) == cache.evaluated
    assert cache.evaluated + cache.skipped == BLOCKS * STEPS * len(names)


@pytest.mark.parametrize("names", [("full",), ("full", "no_text")])
@pytest.mark.parametrize("threshold", [0.0, 0.03, 0.06, 0.2, 10.0])
@pytest.mark.parametrize("measured_steps", [STEPS, 7, 30])
def test_magcache_is_diffusers(threshold, names, measured_steps):
    theirs, ours = hunyuan(), hunyuan()
    figures = {"ratios": ratios(measured_steps)}
    apply_mag_cache(theirs, MagCacheConfig(threshold, num_inference_steps=STEPS, mag_ratios=figures["ratios"]))
    with counted(theirs) as expected_count:
        expected = sample_hooked(theirs, names=names)
    cache = made("magcache", threshold, figures)
    with counted(ours) as count:
        out = sample_cached(ours, cache, names=names)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)
    assert len(count) == len(expected_count) == cache.evaluated


def test_the_thresholds_above_skip_some_steps():
    """Else the comparisons with diffusers would say little."""
    for method, threshold, figures in (("fbcache", 0.3, None), ("magcache", 0.03, {"ratios": ratios()})):
        cache = made(method, threshold, figures)
        sample_cached(hunyuan(), cache)
        assert 16 < cache.evaluated < 40


@pytest.mark.parametrize("steps", [STEPS, 7])
def test_measured_ratios_are_diffusers(steps, capsys):
    theirs = hunyuan()
    apply_mag_cache(theirs, MagCacheConfig(num_inference_steps=steps, calibrate=True))
    expected = sample_hooked(theirs, steps=steps)
    printed = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("[1.0"))
    cache = made("magcache", 0.06, steps=steps)
    assert cache.measured is None
    torch.testing.assert_close(sample_cached(hunyuan(), cache, steps=steps), expected, atol=1e-6, rtol=0)
    assert cache.skipped == 0
    assert cache.measured.keys() == {"ratios"}
    np.testing.assert_allclose(cache.measured["ratios"], json.loads(printed), atol=1e-5)


@pytest.mark.parametrize("counts", [(30, 20), (30, 50), (28, 8), (12, 12), (6, 100)])
def test_figures_of_other_numbers_of_steps(counts):
    measured, steps = counts
    numbers = torch.rand(measured, generator=torch.Generator().manual_seed(0))
    assert torch.equal(nearest(numbers, steps), nearest_interp(numbers, steps))


# TeaCache, of which diffusers has none


class PlainTea:
    """TeaCache's rule around a forward of HunyuanVideo that is written out, with numpy's older polynomials."""

    def __init__(self, model, threshold, figures):
        self.model, self.threshold = model, threshold
        self.low, self.high = figures["signal"].min().item(), figures["signal"].max().item()
        self.polynomial = np.polyfit(figures["signal"].double(), figures["residual"].double(), 4)
        self.step, self.sum, self.computed = 0, 0.0, []
        self.signal = self.residual = None

    def __call__(self, latents, timestep, *, encoder_hidden_states, encoder_attention_mask, pooled_projections, **rest):
        model = self.model
        temb, _ = model.time_text_embed(timestep, pooled_projections, rest["guidance"])
        start = model.x_embedder(latents)
        text = model.context_embedder(encoder_hidden_states, timestep, encoder_attention_mask)
        if self.due(model.transformer_blocks[0].norm1(start, emb=temb)[0]):
            hidden, rotary = start, model.rope(latents)
            for block in (*model.transformer_blocks, *model.single_transformer_blocks):
                hidden, text = block(hidden, text, temb, None, rotary)  # no token of the text is padding
            self.residual = hidden - start
        out = model.proj_out(model.norm_out(start + self.residual, temb))
        return (out.reshape(1, *latents.shape[2:], 4).movedim(-1, 1),)

    def due(self, signal):
        if self.step not in (0, STEPS - 1):
            change = ((signal - self.signal).abs().mean() / self.signal.abs().mean()).item()
            nearest_known = min(max(change, self.low), self.high)
            self.sum += np.polyval(self.polynomial, nearest_known) * change / nearest_known
        due = self.step in (0, STEPS - 1) or self.sum >= self.threshold
        if due:
            self.sum = 0.0
            self.computed.append(self.step)
        self.step += 1
        self.signal = signal
        return due


@pytest.mark.parametrize(
    ("threshold", "least", "most"), [(0.0, STEPS, STEPS), (0.4, 3, 11), (0.7, 3, 11), (1.0, 3, 11), (100.0, 2, 2)]
)
def test_teacache_is_its_rule(threshold, least, most):
    model = hunyuan()
    measuring = made("teacache", 0.0)
    sample_cached(model, measuring)
    figures = measuring.measured
    figures["signal"][3] *= 0.9  # so that some changes lie outside of what is known
    plain = PlainTea(model, threshold, figures)
    expected = sample(plain, uncached)
    cache = made("teacache", threshold, figures)
    torch.testing.assert_close(sample_cached(model, cache), expected, atol=1e-6, rtol=0)
    assert cache.evaluated == BLOCKS * len(plain.computed)
    assert least <= len(plain.computed) <= most


def test_what_teacache_measures():
    model, starts, ends, signals = hunyuan(), [], [], []
    first, last = model.transformer_blocks[0], model.single_transformer_blocks[-1]
    handles = [
        first.norm1.register_forward_hook(lambda _, __, out: signals.append(out[0])),
        first.register_forward_pre_hook(lambda _, arguments: starts.append(arguments[0])),
        last.register_forward_hook(lambda _, __, out: ends.append(out[0])),
    ]
    sample(model, uncached)
    for handle in handles:
        handle.remove()
    residuals = [end - start for start, end in zip(starts, ends, strict=True)]
    cache = made("teacache", 0.1)
    sample_cached(model, cache)
    assert cache.skipped == 0
    for name, values in (("signal", signals), ("residual", residuals)):
        changes = [(y - x).abs().mean() / x.abs().mean() for x, y in pairwise(values)]
        torch.testing.assert_close(cache.measured[name], torch.stack(changes), atol=1e-5, rtol=0)


def test_outside_of_what_was_measured_the_last_ratio_holds():
    signal = torch.linspace(0.1, 0.5, 9)
    expected = fitted(signal, 3 * signal**4 - signal + 1)
    assert expected(0.2) == pytest.approx(3 * 0.2**4 - 0.2 + 1)
    assert expected(1.0) == pytest.approx(2 * expected(0.5))
    assert expected(0.05) == pytest.approx(expected(0.1) / 2)
    assert expected(0.0) == 0
    assert fitted(signal, -signal)(0.3) == 0


# Our transformer, whose blocks overwrite their input


def wan():
    torch.manual_seed(0)
    return SkyReelsTransformer3DModel(**WAN).eval()


def walk(model, under, steps=STEPS, names=("full",), clean=False):
    """Euler steps as above, with a clean frame in front, or none; under each name there is another text."""
    generator = torch.Generator().manual_seed(1)
    latents, before = torch.randn(1, 16, 2, 4, 6, generator=generator), torch.randn(1, 16, 1, 4, 6, generator=generator)
    contexts = {name: model.embed_context(torch.randn(1, 512, 16, generator=generator)) for name in names}
    sigmas = torch.linspace(1, 0, steps + 1)
    for sigma, following in pairwise(sigmas):

        def predict(name, latents=latents, sigma=sigma):
            segments = ([Segment(before, clean=True)] if clean else []) + [Segment(latents, 1)]
            times = 1000 * sigma * torch.tensor([[0, 1, 1]] if clean else [1])
            return model(segments, times, contexts[name])[-1]

        latents = latents + (following - sigma) * sum(under(name, predict) for name in names)
    return latents


def walk_cached(model, cache, **more):
    with cache.attached(model):
        return walk(model, cache.under, **more)


def figures_of(method, model):
    if method == "fbcache":
        return None
    cache = made(method, 0.0)
    walk_cached(model, cache)
    return cache.measured


@pytest.mark.parametrize("clean", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_nothing_skipped_changes_nothing(method, clean):
    model = wan()
    cache = made(method, 0.0, figures_of(method, model))
    names = ("full", "no_text")
    assert torch.equal(
        walk_cached(model, cache, names=names, clean=clean), walk(model, uncached, names=names, clean=clean)
    )
    assert (cache.evaluated, cache.skipped) == (3 * STEPS * 2, 0)


@pytest.mark.parametrize(
    ("method", "computed"),
    [
        ("fbcache", 3 + (STEPS - 1)),  # the first step, and the first block of the others
        ("teacache", 2 * 3),  # the first and the last step
        ("magcache", 3 * (2 + 2)),  # a fifth of the steps; then every fourth
    ],
)
def test_a_threshold_beyond_all_bounds(method, computed):
    model = wan()
    cache = made(method, 1e9, figures_of(method, model))
    walk_cached(model, cache)
    assert (cache.evaluated, cache.skipped) == (computed, 3 * STEPS - computed)


@pytest.mark.parametrize("method", ["fbcache", "teacache", "magcache"])
def test_a_skipped_step_is_its_input_and_what_was_added_before(method):
    """Of four steps MagCache may skip from the second on, TeaCache but the last."""
    model, first_block, steps, ends = wan(), method == "fbcache", 4, []
    figures = {"ratios": torch.ones(steps), "signal": torch.rand(9), "residual": torch.zeros(9)}
    segments = [[Segment(torch.randn(1, 16, 2, 4, 6))] for _ in range(3)]
    times = [torch.tensor([time]) for time in (900, 880, 860)]
    context = model.embed_context(torch.randn(1, 512, 16))
    start = model.blocks[1 if first_block else 0]
    handles = [
        start.register_forward_pre_hook(lambda _, arguments: ends.append(arguments[0].clone())),
        model.blocks[-1].register_forward_hook(lambda _, __, out: ends.append(out.clone())),
    ]
    model(segments[0], times[0], context)
    for handle in handles:
        handle.remove()
    residual = ends[1] - ends[0]
    cache = made(method, 1e9, figures, steps)
    with cache.attached(model):
        outs = [cache.under("full", lambda _, i=i: model(segments[i], times[i], context)[0]) for i in range(3)]
    assert cache.skipped == 2 * (2 if first_block else 3)
    for segment, time, out in zip(segments[1:], times[1:], outs[1:], strict=True):
        tokens = model.patch_embedding(segment[0].latents).flatten(2).transpose(1, 2)
        embedding, modulation = model.condition_embedder.time(time[:, None])
        if first_block:
            rotary = rotary_tables(segment, (1, 2, 2), WAN["attention_head_dim"])
            tokens = model.blocks[0](tokens.clone(), context, modulation, rotary)
        expected = model.unpatchify(model.head(tokens + residual, embedding), segment[0])
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_conditions_go_their_own_ways(method):
    """Beside another condition, whose steps come in between, one does what it does alone."""
    model = wan()
    figures, threshold = figures_of(method, model), {"fbcache": 0.1, "teacache": 0.3, "magcache": 0.1}[method]
    alone = made(method, threshold, figures)
    expected = walk_cached(model, alone)
    assert 0 < alone.skipped < alone.evaluated + alone.skipped - 6

    cache = made(method, threshold, figures)
    others = iter(torch.randn(STEPS, 1, 16, 2, 4, 6))
    context = model.embed_context(torch.randn(1, 512, 16))

    def under(name, predict):
        other = [Segment(next(others))]
        cache.under("other", lambda _: model(other, torch.tensor([3.0]), context)[0])
        return cache.under(name, predict)

    with cache.attached(model):
        out = walk(model, under)
    assert torch.equal(out, expected)


def test_another_loop_begins_anew():
    model = wan()
    cache = made("fbcache", 0.1)
    assert torch.equal(walk_cached(model, cache), walk_cached(model, cache))


def test_the_signal_is_what_self_attention_gets():
    """Seen in its projection, with one modulation and with one for each frame."""
    model, seen = wan(), []
    measured = made("teacache", 0.0)
    model.blocks[0].attn1.to_q.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].clone()))
    walk_cached(model, measured, clean=True)
    changes = [(y - x).abs().mean() / x.abs().mean() for x, y in pairwise(seen)]
    torch.testing.assert_close(measured.measured["signal"], torch.stack(changes), atol=1e-5, rtol=0)


def test_the_signal_is_asked_of_a_called_block():
    """Hooks may bring a block's weights when it is called. It does not work for that, and no hook is left on it."""
    model, calls = wan(), []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append("before"))
    model.blocks[0].register_forward_hook(lambda *_: calls.append("after"))
    figures = {"signal": torch.rand(9), "residual": torch.zeros(9)}
    walk_cached(model, made("teacache", 1.0, figures))
    computed = calls.count("after")
    assert calls.count("before") == STEPS + computed and computed == 2  # the first step and the last
    assert len(model.blocks[0]._forward_pre_hooks) == 1


@pytest.mark.parametrize("method", METHODS)
def test_streamed_blocks(method):
    """The weights are where they work only while a block is called; those of skipped blocks do not come."""
    model, fetched = wan(), []
    threshold = {"fbcache": 0.1, "teacache": 0.3, "magcache": 0.1}[method]
    figures = figures_of(method, model)
    expected = walk_cached(model, made(method, threshold, figures))
    stream = BlockStream(model, model.blocks, torch.device("cpu"))
    stream.prepare()
    fetch = stream._fetch
    stream._fetch = lambda index, slot: (fetched.append(index), fetch(index, slot))
    cache = made(method, threshold, figures)
    with stream.active():
        assert torch.equal(walk_cached(model, cache), expected)
    assert 0 < cache.skipped
    assert len(fetched) <= cache.evaluated + 1  # the first block, for a step that does not come


# Attaching


@pytest.mark.parametrize("make", [wan, hunyuan])
def test_the_blocks_come_back(make):
    model = make()
    names = ("blocks",) if make is wan else ("transformer_blocks", "single_transformer_blocks")
    lists, everything = [getattr(model, name) for name in names], {*model.parameters()}
    modules = [name for name, _ in model.named_modules()]
    with pytest.raises(KeyboardInterrupt), made("fbcache", 0.1).attached(model):
        (cached,) = getattr(model, names[0])
        assert isinstance(cached, CachedBlocks)
        assert [*cached.blocks] == [block for blocks in lists for block in blocks]
        assert all(len(getattr(model, name)) == 0 for name in names[1:])
        assert {*model.parameters()} == everything
        raise KeyboardInterrupt
    assert all(getattr(model, name) is blocks for name, blocks in zip(names, lists, strict=True))
    assert [name for name, _ in model.named_modules()] == modules


def test_a_model_without_blocks():
    with pytest.raises(AssertionError, match="Linear"), made("fbcache", 0.1).attached(torch.nn.Linear(1, 1)):
        pass


def test_without_a_condition_all_is_computed():
    model = wan()
    cache = made("fbcache", 1e9)
    with cache.attached(model):
        out = walk(model, uncached)
    assert torch.equal(out, walk(model, uncached))
    assert cache.skipped == 0


def test_after_an_error_a_step_can_be_made_again():
    """What was kept is gone by then, and must not be missed."""
    model, times = wan(), []

    def broken(*_):
        times.append(1)
        if len(times) == 2:
            raise MemoryError

    cache = made("fbcache", 0.0)
    model.blocks[-1].register_forward_pre_hook(broken)

    def under(name, predict):
        try:
            return cache.under(name, predict)
        except MemoryError:
            return cache.under(name, predict)

    with cache.attached(model):
        out = walk(model, under)
    assert torch.equal(out, walk(model, uncached))


@pytest.mark.parametrize("steps", [1, 5])
def test_too_few_steps_to_measure(steps):
    cache = made("magcache", 0.06, steps=steps)
    walk_cached(wan(), cache, steps=steps)
    assert cache.measured is None


def test_only_the_full_condition_is_measured():
    model, alone, both = wan(), made("magcache", 0.06), made("magcache", 0.06)
    walk_cached(model, both, names=("no_text",))
    assert both.measured is None
    walk_cached(model, alone)
    walk_cached(model, both)
    assert torch.equal(alone.measured["ratios"], both.measured["ratios"])


# Several processes


class Others:
    """A team whose other process has the sums that are given."""

    def __init__(self, *sums):
        self.sums = torch.tensor(sums)

    def all_gather(self, x):
        return torch.stack((x, self.sums))


@pytest.mark.parametrize("method", ["fbcache", "teacache"])
def test_what_others_see_decides(method):
    """Theirs outweighs our own: nothing has changed, or everything."""
    model, threshold = wan(), {"fbcache": 0.1, "teacache": 0.3}[method]
    figures = figures_of(method, model)
    few = STEPS + 2 if method == "fbcache" else 6
    if figures is not None:
        figures = {"signal": torch.linspace(0, 1, 9), "residual": torch.linspace(0, 1, 9)}
    for sums, evaluated in (((0.0, 1e9), few), ((1e9, 1e9), 3 * STEPS)):
        cache = made(method, threshold, figures, team=Others(*sums))
        walk_cached(model, cache)
        assert cache.evaluated == evaluated


def test_means_are_of_sums():
    """(own ratio * 12 tokens + 4 * 6 tokens) / 18 tokens."""
    model, alone, together = wan(), made("magcache", 0.06), made("magcache", 0.06, team=Others(24.0, 6.0))
    for cache in (alone, together):
        walk_cached(model, cache)
    own = alone.measured["ratios"]
    expected = torch.cat((own[:1], (12 * own[1:] + 24) / 18))
    torch.testing.assert_close(together.measured["ratios"], expected)


def test_two_halves_decide_as_the_whole():
    """Two processes with half of the tokens each: their sums, added, are those of all tokens."""
    x, y = torch.randn(2, 1, 24, 8).unbind(0)
    halves = [list(pair) for pair in zip(x.split(12, 1), y.split(12, 1), strict=True)]
    sums = [torch.stack((distance(a, b), distance(b))) for a, b in halves]
    rule = made("fbcache", 0.1, team=Others(*sums[1].tolist()))._fresh()
    assert rule.change(*halves[0]) == pytest.approx(((x - y).abs().mean() / y.abs().mean()).item())
    assert math.isfinite(rule.change(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1)))
